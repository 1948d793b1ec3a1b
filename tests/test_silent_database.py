"""A database that falls silent, behind something that goes on accepting bytes, holds up nobody without end."""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import Any, Final

import asyncpg
import pytest
from sqlalchemy import event, insert, make_url, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from fastapi_chatdify_db import Database, DatabaseSettings, DatabaseUnavailable, async_unit_of_work, liveness
from tests.forwarding import Forwarder
from tests.models import Item
from tests.observing import PATIENCE

CONNECTIONS: Final = 20  # more than may be waited for one after the other


async def test_idle_connection_is_tested_no_longer_than_its_user_waits(
    tables: None, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then it is dropped, without waiting for the server to confirm that."""
    monkeypatch.setattr(liveness, "_PING_LIMIT", 10 * PATIENCE)
    forwarder = Forwarder(database_url)
    settings = DatabaseSettings(database_url=forwarder.url, db_ping_after=0, db_pool_timeout=0.1)
    database = Database(settings=settings)
    was_closed: list[bool] = []

    @event.listens_for(database.async_engine.sync_engine, "invalidate")
    def note(connection: Any, *_: object) -> None:
        was_closed.append(connection.driver_connection.is_closed())

    async with asyncio.timeout(PATIENCE), forwarder.opened():
        async with database.transaction() as session:
            await session.execute(text("SELECT 1"))
        forwarder.fall_silent()
        with pytest.raises(DatabaseUnavailable):
            async with database.transaction() as session:
                await session.execute(text("SELECT 1"))
    assert was_closed == [True]


async def test_rollback_is_not_waited_for_without_end(
    tables: None, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing depends on its answer; the connection's place in the pool is free again."""
    monkeypatch.setattr(async_unit_of_work, "_ROLLBACK_LIMIT", 0.2)
    forwarder = Forwarder(database_url)
    database = Database(settings=DatabaseSettings(database_url=forwarder.url))

    async def fail() -> None:
        async with database.transaction() as session:
            await session.execute(insert(Item).values(name="lost"))
            forwarder.fall_silent()
            raise ZeroDivisionError

    async with asyncio.timeout(PATIENCE), forwarder.opened():
        with pytest.raises(ZeroDivisionError):
            await fail()
        assert database.async_engine.pool.status().endswith("Current Checked out connections: 0")


async def test_commit_that_a_time_limit_ends_is_a_lost_connection(tables: None, database_url: str) -> None:
    """Nobody knows its outcome, as handlers of such errors, and durable tasks, expect."""
    forwarder = Forwarder(database_url)
    url = make_url(forwarder.url).update_query_dict({"command_timeout": "0.5"})
    database = Database(settings=DatabaseSettings(database_url=url.render_as_string(hide_password=False)))

    async def write() -> None:
        async with database.transaction() as session:
            await session.execute(insert(Item).values(name="unknown"))
            forwarder.fall_silent()

    async with asyncio.timeout(PATIENCE), forwarder.opened():
        with pytest.raises(DBAPIError) as caught:
            await write()
    assert caught.value.connection_invalidated


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="the system has not all of the limits")
@pytest.mark.parametrize("driver", ["asyncpg", "psycopg2"])
async def test_system_ends_what_is_not_acknowledged(database_url: str, driver: str) -> None:
    """Either driver's connections are probed when idle, and end when nothing that is sent arrives."""
    forwarder = Forwarder(database_url)
    database = Database(settings=DatabaseSettings(database_url=forwarder.url))
    options: list[int] = []

    def read(session: Session) -> None:
        connection: Any = session.connection().connection.driver_connection
        connected = connection if driver == "psycopg2" else connection._transport.get_extra_info("socket")
        names = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT, socket.TCP_USER_TIMEOUT)
        with socket.fromfd(connected.fileno(), socket.AF_INET, socket.SOCK_STREAM) as own:
            options.append(own.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE))
            options.extend(own.getsockopt(socket.IPPROTO_TCP, name) for name in names)

    def in_thread() -> None:
        with database.sync_transaction() as session:
            read(session)

    async with forwarder.opened():
        if driver == "asyncpg":
            async with database.transaction() as session:
                await session.run_sync(read)
        else:
            await asyncio.to_thread(in_thread)
        await database.dispose()
    assert options == [1, 30, 10, 3, 30_000]


async def test_application_stops(tables: None, database_url: str, caplog: pytest.LogCaptureFixture) -> None:
    """Its idle connections, of either driver, are dropped together when the server does not confirm their end."""
    forwarder, together = Forwarder(database_url), asyncio.Barrier(CONNECTIONS)
    database = Database(settings=DatabaseSettings(database_url=forwarder.url, db_pool_size=CONNECTIONS))

    async def connect() -> asyncpg.Connection:
        async with database.transaction() as session:
            connection = await (await session.connection()).get_raw_connection()
            await together.wait()
            return connection.driver_connection

    def connect_in_thread() -> None:
        with database.sync_transaction() as session:
            session.execute(text("SELECT 1"))

    async with forwarder.opened():
        async with asyncio.timeout(PATIENCE), database.lifespan(None):
            idle = await asyncio.gather(*(connect() for _ in range(CONNECTIONS)))
            await asyncio.to_thread(connect_in_thread)
            forwarder.fall_silent()
        assert all(connection.is_closed() for connection in idle)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
