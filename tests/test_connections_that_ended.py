"""A connection whose end the driver notices, in use or idle, is used no more, and what was written on it is told."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import psycopg2
import pytest
import sqlalchemy.ext.asyncio
from sqlalchemy import event, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from fastapi_chatdify_db import Database, DatabaseSettings
from tests.either_driver import backend_of, names, run
from tests.models import Item
from tests.observing import Observer

MINUTE = 60.0


@pytest.mark.parametrize("end", ["by the server", "by the driver", "by the application"])
async def test_connection_whose_end_is_noticed_before_the_commit(observer: Observer, end: str) -> None:
    """What was written is lost, which the unit's owner is told, and the place in the pool is free again."""
    database = Database(settings=DatabaseSettings(db_pool_size=1, db_max_overflow=0))

    async def write_and_lose_connection() -> None:
        async with database.transaction() as session:
            session.add(Item("lost"))
            await session.flush()
            connection = await session.connection()
            raw = (await connection.get_raw_connection()).driver_connection
            assert raw is not None
            closed = asyncio.Event()
            raw.add_termination_listener(lambda _: closed.set())
            if end == "by the server":
                await observer.terminate_others()
            elif end == "by the driver":
                raw.terminate()
            else:
                await connection.invalidate()
            await closed.wait()

    with pytest.raises(SQLAlchemyError):
        await write_and_lose_connection()
    assert database.async_engine.pool.status().endswith("Current Checked out connections: 0")
    assert await observer.names() == []
    await database.dispose()


async def test_connection_that_is_aborted_after_a_read(observer: Observer) -> None:
    """Nothing was written, so the unit ends like any other, and the next one has another connection."""
    database = Database(settings=DatabaseSettings(db_ping_after=MINUTE))
    async with database.transaction() as session:
        await session.scalars(select(Item))
        raw = (await (await session.connection()).get_raw_connection()).driver_connection
        assert raw is not None
        raw.terminate()
    async with database.transaction() as session:
        assert (await session.scalars(select(Item))).all() == []
    await database.dispose()


async def test_idle_connection_whose_end_is_noticed(observer: Observer) -> None:
    """It is replaced at its checkout without being asked, so that any first statement succeeds."""
    database = Database(settings=DatabaseSettings(db_ping_after=MINUTE))

    def add_two(session: Session) -> None:
        session.add_all([Item("a"), Item("b")])

    async with database.transaction() as session:
        raw = (await (await session.connection()).get_raw_connection()).driver_connection
    with database.sync_transaction() as sync_session:
        sync_session.scalars(select(Item)).all()
    await observer.terminate_others()
    assert raw is not None
    async with asyncio.timeout(10):
        while not raw.is_closed():
            await asyncio.sleep(0)
    async with database.transaction() as session:
        await session.run_sync(add_two)
    await observer.connection.execute("DELETE FROM item")
    with database.sync_transaction() as sync_session:
        add_two(sync_session)
    assert await observer.names() == ["a", "b"]
    await database.dispose()


async def test_dead_connection_tells_of_those_as_old(observer: Observer) -> None:
    """Where one did not survive, the others are replaced at their checkout without being asked."""
    database = Database(settings=DatabaseSettings(db_ping_after=MINUTE))

    def both() -> list[int]:
        with database.sync_transaction() as one, database.sync_transaction() as other:
            return [backend_of(session) for session in (one, other)]

    before = both()
    # The one that was given back first is taken first.
    await observer.connection.fetch("SELECT pg_terminate_backend($1, 5000)", before[1])
    assert not set(both()) & set(before)
    await database.dispose()


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg2"])
async def test_connections_in_use_can_be_counted(
    observer: Observer, monkeypatch: pytest.MonkeyPatch, driver: str
) -> None:
    """Tracing tools (OpenTelemetry) listen to an engine before we do, and none that was replaced is left in use."""
    in_use: list[int] = []

    def traced(make: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        engine = make(*arguments, **options)
        event.listen(getattr(engine, "sync_engine", engine), "checkout", lambda *_: in_use.append(1))
        event.listen(getattr(engine, "sync_engine", engine), "checkin", lambda *_: in_use.append(-1))
        return engine

    def lose_between_reads(session: Session) -> None:
        backend = backend_of(session)
        names(session)
        with psycopg2.connect(os.environ["DATABASE_URL"]) as connection, connection.cursor() as cursor:
            cursor.execute("SELECT pg_terminate_backend(%s, 5000)", [backend])
        connection.close()
        names(session)
        assert backend_of(session) != backend

    for module, name in ((sqlalchemy, "create_engine"), (sqlalchemy.ext.asyncio, "create_async_engine")):
        monkeypatch.setattr(module, name, partial(traced, getattr(module, name)))
    database = Database(settings=DatabaseSettings(db_ping_after=MINUTE))
    await run(database, driver, lose_between_reads)  # found dead by a statement
    await observer.terminate_others()
    await run(database, driver, lose_between_reads)  # found dead at the checkout, too
    await database.dispose()
    assert sum(in_use) == 0
    assert len(in_use) >= 8  # of four connections
