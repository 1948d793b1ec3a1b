"""What both drivers tell a server: TLS first where the URL asks for it, then the exact password, and nobody else."""

from __future__ import annotations

import asyncio
import logging
import struct
import traceback
from collections.abc import AsyncIterator
from contextlib import suppress
from urllib.parse import quote

import pytest

from fastapi_chatdify_db import Database, DatabaseSettings, DatabaseUnavailable

PASSWORD = "s3cr:t/ü %?@#&="

# https://www.postgresql.org/docs/current/protocol-message-formats.html
SSL_REQUEST, GSS_REQUEST = 80877103, 80877104
ASK_FOR_PASSWORD = b"R" + struct.pack("!ii", 8, 3)
REFUSE = b"SFATAL\0C28P01\0Mthat is not it\0\0"


class GateKeeper:
    """A server without TLS that asks for the password in clear text, notes what it is told and refuses."""

    def __init__(self) -> None:
        self.asked_for_tls = 0
        self.greeted = 0
        self.passwords: list[str] = []

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            await self._converse(reader, writer)
        writer.close()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while (code := struct.unpack_from("!i", await self._message(reader))[0]) in (SSL_REQUEST, GSS_REQUEST):
            self.asked_for_tls += code == SSL_REQUEST
            writer.write(b"N")
        self.greeted += 1
        writer.write(ASK_FOR_PASSWORD)
        assert await reader.readexactly(1) == b"p"
        self.passwords.append((await self._message(reader)).rstrip(b"\0").decode())
        writer.write(b"E" + struct.pack("!i", 4 + len(REFUSE)) + REFUSE)
        await writer.drain()

    async def _message(self, reader: asyncio.StreamReader) -> bytes:
        (length,) = struct.unpack("!i", await reader.readexactly(4))
        return await reader.readexactly(length - 4)


@pytest.fixture(autouse=True)
def empty_environment(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DATABASE_URL")


@pytest.fixture
async def gate() -> AsyncIterator[tuple[GateKeeper, int]]:
    """A listening gatekeeper and its port."""
    keeper = GateKeeper()
    async with await asyncio.start_server(keeper.answer, "127.0.0.1") as server:
        yield keeper, server.sockets[0].getsockname()[1]


async def refusals(database: Database) -> list[BaseException]:
    """How each driver's attempt to connect ends."""

    def connect() -> None:
        database.sync_engine.connect().close()

    with pytest.raises(DatabaseUnavailable) as by_asyncpg:
        await database.async_engine.connect()
    with pytest.raises(DatabaseUnavailable) as by_psycopg2:
        await asyncio.to_thread(connect)
    return [by_asyncpg.value, by_psycopg2.value]


@pytest.mark.parametrize(
    "url",
    [
        f"postgres://ann:{quote(PASSWORD, safe='')}@127.0.0.1:PORT/name",
        f"postgresql://ann@127.0.0.1:PORT/name?password={quote(PASSWORD, safe='')}",
        None,
    ],
    ids=["percent-encoded", "in the query", "POSTGRES_PASSWORD"],
)
async def test_password_is_told_to_the_server_only(
    gate: tuple[GateKeeper, int], url: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Both drivers send it as it was meant; no repr, log line or traceback has it, in any spelling."""
    keeper, port = gate
    if url is None:
        parts = {"HOST": "127.0.0.1", "PORT": str(port), "USER": "ann", "PASSWORD": PASSWORD, "DB": "name"}
        for name, value in parts.items():
            monkeypatch.setenv(f"POSTGRES_{name}", value)
    else:
        monkeypatch.setenv("DATABASE_URL", url.replace("PORT", str(port)))
    monkeypatch.setenv("DB_ECHO", "true")
    database = Database()
    with caplog.at_level(logging.DEBUG):
        errors = await refusals(database)
        with pytest.raises(DatabaseUnavailable) as at_start:
            async with database.lifespan(None):
                pass
    assert keeper.passwords == [PASSWORD] * 3
    settings, engines = database.settings, (database.async_engine, database.sync_engine)
    shown = [settings, settings.url(), database, *engines, *(engine.url for engine in engines)]
    texts = [f"{each!r} {each}" for each in shown]
    texts += ["".join(traceback.format_exception(error)) for error in (*errors, at_start.value)]
    for spelling in (PASSWORD, quote(PASSWORD, safe=""), "s3cr"):
        assert spelling not in "".join([*texts, caplog.text])


@pytest.mark.parametrize("mode", ["require", "verify-ca", "verify-full"])
async def test_tls_that_is_required_is_insisted_on(gate: tuple[GateKeeper, int], mode: str) -> None:
    """A server that has none is told neither who connects nor the password, by either driver."""
    keeper, port = gate
    url = f"postgresql://ann:{quote(PASSWORD)}@127.0.0.1:{port}/name?sslmode={mode}"
    await refusals(Database(settings=DatabaseSettings(database_url=url)))
    assert (keeper.greeted, keeper.passwords) == (0, [])
    if mode == "require":  # the others want a root certificate before they ask
        assert keeper.asked_for_tls == 2


@pytest.mark.parametrize(("mode", "asked"), [("prefer", 2), ("disable", 0)])
async def test_tls_that_is_optional(gate: tuple[GateKeeper, int], mode: str, asked: int) -> None:
    """``prefer`` asks and goes on without, ``disable`` does not ask."""
    keeper, port = gate
    url = f"postgresql://ann:{quote(PASSWORD)}@127.0.0.1:{port}/name?sslmode={mode}"
    await refusals(Database(settings=DatabaseSettings(database_url=url)))
    assert (keeper.asked_for_tls, len(keeper.passwords)) == (asked, 2)
