"""Tables are created and dropped by one process at a time, and only where the application wants it."""

from __future__ import annotations

import asyncio
import os
import sys

import asyncpg
import pytest

from fastapi_chatdify_db import Database, DatabaseSettings, db
from tests.conftest import with_parameter
from tests.observing import Observer, Other

CREATE_IN_A_PROCESS = """
import asyncio, os
from fastapi_chatdify_db import db
import tests.models

async def main():
    async with db.lifespan(None):
        async with db.transaction() as session:
            session.add(tests.models.Item(str(os.getpid())))

asyncio.run(main())
"""


@pytest.mark.parametrize("turn", range(3))
async def test_eight_processes_create_the_tables_at_once(own_database: str, turn: int) -> None:
    """On an empty database all of them come up."""
    environment = {**os.environ, "DATABASE_URL": own_database, "DB_STATEMENT_TIMEOUT": "5"}
    processes = [
        await asyncio.create_subprocess_exec(sys.executable, "-c", CREATE_IN_A_PROCESS, env=environment)
        for _ in range(8)
    ]
    assert [await process.wait() for process in processes] == [0] * 8
    connection = await asyncpg.connect(own_database)
    assert await connection.fetchval("SELECT count(*) FROM item") == 8
    await connection.close()


async def test_tables_that_another_process_is_creating(tables: None, observer: Observer, database_url: str) -> None:
    """They are waited for, whatever the time limits of statements and locks."""
    await db.drop_tables()
    url = with_parameter(database_url, "options", "-clock_timeout=200")
    hurried = Database(settings=DatabaseSettings(database_url=url, db_statement_timeout=0.2))
    async with observer.connection.transaction():
        await observer.connection.execute("CREATE TABLE item ()")
        creating = asyncio.create_task(hurried.create_tables())
        await observer.until_somebody_waits_for_a_lock()
        await observer.connection.execute("SELECT pg_sleep(0.4)")
        await observer.connection.execute("DROP TABLE item")
    await creating
    await hurried.dispose()


async def test_server_that_goes_down_while_tables_are_created(tables: None, observer: Observer, other: Other) -> None:
    """It is waited for, as before."""
    await db.drop_tables()

    async def start() -> None:
        async with db.lifespan(None):
            pass

    async with observer.connection.transaction():
        await observer.connection.execute("CREATE TABLE item ()")
        starting = asyncio.create_task(start())
        await observer.until_somebody_waits_for_a_lock()
        waiting = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        first = other.ask(waiting)
        assert other.ask(f"SELECT pg_terminate_backend({first}, 10000)")
        await observer.until_somebody_waits_for_a_lock()
        assert other.ask(waiting) != first
        await observer.connection.execute("DROP TABLE item")
    await starting


async def test_tables_are_dropped_by_one_at_a_time(own_database: str) -> None:
    """Whoever comes second finds nothing left, rather than to fail."""
    own = Database("own", settings=DatabaseSettings(database_url=own_database))
    for _ in range(3):
        await own.create_tables()
        await asyncio.gather(*(own.drop_tables() for _ in range(8)))
    await own.dispose()


async def test_tables_are_created_only_when_wanted(tables: None, observer: Observer) -> None:
    """``create_tables=False`` leaves them to a migration."""
    await db.drop_tables()
    migrated = Database(create_tables=False)
    async with migrated.lifespan(None):
        assert await observer.connection.fetchval("SELECT to_regclass('item')") is None
