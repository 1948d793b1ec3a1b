"""A database that falls silent, behind something that goes on accepting bytes, keeps no process from ending."""

from __future__ import annotations

import asyncio
import logging
from typing import Final

import asyncpg
import pytest
from sqlalchemy import text

from fastapi_chatdify_db import Database, DatabaseSettings
from tests.forwarding import Forwarder
from tests.observing import PATIENCE

CONNECTIONS: Final = 20  # more than may be waited for one after the other


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
