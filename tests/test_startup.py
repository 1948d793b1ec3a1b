"""The application comes up when its database does, or says why it cannot."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest
from sqlalchemy import event, make_url, text

from fastapi_chatdify_db import Database, DatabaseSettings, DatabaseUnavailable
from tests.forwarding import Forwarder
from tests.observing import Observer, Other
from tests.serving import free_socket


class OpensAtTheThirdTry(logging.Handler):
    """Notes what is logged, and opens the database's door when the third try has failed."""

    def __init__(self, door: asyncio.Event) -> None:
        super().__init__()
        self.lines: list[str] = []
        self._door = door

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())
        if len(self.lines) == 3:
            self._door.set()


async def test_database_may_come_up_after_the_app(observer: Observer, database_url: str) -> None:
    """The lifespan waits, with one log line a try, and then serves."""
    forwarder, door = Forwarder(database_url), asyncio.Event()
    late = Database("late", settings=DatabaseSettings(database_url=forwarder.url))
    handler = OpensAtTheThirdTry(door)
    logger = logging.getLogger("fastapi_chatdify_db.startup")
    logger.addHandler(handler)

    async def use() -> object:
        async with late.lifespan(None), late.transaction() as session:
            return await session.scalar(text("SELECT 1"))

    try:
        used = asyncio.create_task(use())
        opening = asyncio.create_task(door.wait())
        await asyncio.wait([used, opening], return_when=asyncio.FIRST_COMPLETED)
        opening.cancel()
        async with forwarder.opened():
            assert await used == 1
    finally:
        logger.removeHandler(handler)
    for number, line in enumerate(handler.lines, start=1):
        assert f"(try {number})" in line
        assert "\n" not in line


async def test_waiting_ends_with_a_clear_error() -> None:
    """After DB_STARTUP_TIMEOUT the error says which database, and which variables to look at, without the password."""
    with free_socket() as listener:
        port = listener.getsockname()[1]
    url = f"postgresql://user:secret@127.0.0.1:{port}/gone"
    gone = Database(settings=DatabaseSettings(database_url=url, db_startup_timeout=0.3))
    with pytest.raises(DatabaseUnavailable, match=rf"127\.0\.0\.1:{port}/gone .*0\.3 s.*DB_STARTUP_TIMEOUT") as caught:
        async with gone.lifespan(None):
            pass
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


async def test_refusal_for_good_is_not_waited_for(database_url: str, caplog: pytest.LogCaptureFixture) -> None:
    """A role that is not there will not come; the first try tells, and asyncpg's error for it says which."""
    url = make_url(database_url).set(username="no_such_role", password="secret")
    refused = Database(settings=DatabaseSettings(database_url=url.render_as_string(hide_password=False)))
    with pytest.raises(DatabaseUnavailable, match=r"\(Invalid\w+Error: .*no_such_role") as caught:
        async with refused.lifespan(None):
            pass
    assert "secret" not in str(caught.value)
    assert caplog.records == []


async def test_no_waiting_is_one_try(database_url: str) -> None:
    """With DB_STARTUP_TIMEOUT=0 a database that is there is served from, and one that is not fails at once."""
    there = Database(settings=DatabaseSettings(db_startup_timeout=0), create_tables=False)
    async with there.lifespan(None):
        pass
    with free_socket() as listener:
        url = f"postgresql://user@127.0.0.1:{listener.getsockname()[1]}/gone"
    gone = Database(settings=DatabaseSettings(database_url=url, db_startup_timeout=0))
    with pytest.raises(DatabaseUnavailable, match="within 0 s"):
        async with gone.lifespan(None):
            pass


async def test_mute_server_is_not_waited_for_longer() -> None:
    """A port that accepts the connection and then says nothing counts against DB_STARTUP_TIMEOUT too."""
    with free_socket() as listener:
        port = listener.getsockname()[1]
        url = f"postgresql://user:secret@127.0.0.1:{port}/mute"
        mute = Database(settings=DatabaseSettings(database_url=url, db_startup_timeout=0.5))
        async with asyncio.timeout(10):  # the driver's own limit is a minute
            with pytest.raises(DatabaseUnavailable, match=rf"127\.0\.0\.1:{port}/mute .*TimeoutError"):
                async with mute.lifespan(None):
                    pass


async def test_database_that_is_still_to_be_created(database_url: str, caplog: pytest.LogCaptureFixture) -> None:
    """It is waited for like a server; what the driver says about it stays one line, in the log and in the error."""
    url = make_url(database_url).set(database="no_such_database")
    settings = DatabaseSettings(database_url=url.render_as_string(hide_password=False), db_startup_timeout=0.3)
    with pytest.raises(DatabaseUnavailable, match='"no_such_database" does not exist') as caught:
        async with Database(settings=settings).lifespan(None):
            pass
    lines = [record.getMessage() for record in caplog.records if record.name == "fastapi_chatdify_db.startup"]
    assert [f"(try {number})" in line for number, line in enumerate(lines, start=1)] == [True] * len(lines)
    assert len(lines) >= 1
    assert all("\n" not in line for line in (*lines, str(caught.value)))


@pytest.mark.parametrize("code", ["53300", "57P03", "08P01"])
async def test_server_that_takes_no_connections_yet(code: str) -> None:
    """One that starts, has too many connections, or is a PgBouncer whose own server is away, is waited for."""

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(8)  # whether it speaks TLS
        writer.write(b"N")
        await reader.read(1024)
        reason = f"SFATAL\0VFATAL\0C{code}\0Mnot now\0\0".encode()
        writer.write(b"E" + (len(reason) + 4).to_bytes(4) + reason)
        writer.close()

    async with await asyncio.start_server(refuse, "127.0.0.1") as server:
        port = server.sockets[0].getsockname()[1]
        url = f"postgresql://user@127.0.0.1:{port}/name"
        busy = Database(settings=DatabaseSettings(database_url=url, db_startup_timeout=0.3))
        with pytest.raises(DatabaseUnavailable, match=r"within 0.3 s \(.*not now"):
            async with busy.lifespan(None):
                pass


@pytest.mark.parametrize("end", ["closed", "ended by the server"])
async def test_connection_that_is_lost_at_once(other: Other, end: str) -> None:
    """A server that goes down again, before it has answered anything, is waited for as well, however it goes."""
    database = Database(settings=DatabaseSettings(db_pool_pre_ping=False), create_tables=False)
    lent: list[Any] = []

    @event.listens_for(database.async_engine.sync_engine, "checkout")
    def lose_the_first(connection: Any, *_: object) -> None:
        lent.append(connection)
        driver = connection.driver_connection
        if len(lent) == 1 and end == "closed":
            driver.terminate()  # for which asyncpg's error has no code of PostgreSQL's
        elif len(lent) == 1:
            assert other.ask(f"SELECT pg_terminate_backend({driver.get_server_pid()}, 10000)")

    async with database.lifespan(None):
        assert len(lent) == 2
