"""What the application does on the driver's own connection, unseen by SQLAlchemy, is kept or refused like the rest."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

import asyncpg
import pytest
from sqlalchemy import select, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from fastapi_chatdify_db import Database, TransactionAborted, db
from tests.models import Counter, Item
from tests.observing import Observer

INSERT = "INSERT INTO item (name) VALUES ('x')"


@pytest.fixture
async def database(observer: Observer) -> AsyncIterator[Database]:
    database = Database()
    yield database
    await database.dispose()


def at_level(session: Session, level: str) -> None:
    session.connection(execution_options={"isolation_level": level})


async def raw(session: AsyncSession) -> Any:
    return (await (await session.connection()).get_raw_connection()).driver_connection


def write_and_fail(session: Session, level: str | None = None) -> None:
    if level is not None:
        at_level(session, level)
    session.get(Counter, 1)
    cursor = session.connection().connection.cursor()
    cursor.execute(INSERT)
    with suppress(Exception):
        cursor.execute("SELECT 1 / 0")


async def test_write_that_is_lost_at_a_level_of_its_own(database: Database, observer: Observer) -> None:
    """There a read begins the transaction, so that a write which follows on the driver's connection is not noticed."""

    async def in_async() -> None:
        async with database.transaction() as session:
            await session.run_sync(at_level, "SERIALIZABLE")
            await session.get(Counter, 1)
            await (connection := await raw(session)).execute(INSERT)
            with suppress(asyncpg.DivisionByZeroError):
                await connection.execute("SELECT 1 / 0")

    with pytest.raises(TransactionAborted, match="by the driver's own connection"):
        await in_async()
    with pytest.raises(TransactionAborted), database.sync_transaction() as session:
        write_and_fail(session, "SERIALIZABLE")
    assert await observer.names() == []


@pytest.mark.parametrize("level", ["AUTOCOMMIT", "SERIALIZABLE"])
async def test_connection_that_had_a_level_of_its_own(database: Database, observer: Observer, level: str) -> None:
    """Back in the pool, it is like any other: plain reads run without a transaction, which a later write is told by."""
    with database.sync_transaction() as session:
        at_level(session, level)
        session.scalars(select(Item)).all()
    with pytest.raises(TransactionAborted), database.sync_transaction() as session:
        write_and_fail(session)
    with database.sync_transaction() as session:
        session.scalars(select(Item)).all()
        assert session.connection().connection.driver_connection.info.transaction_status == 0  # type: ignore[union-attr]
    assert await observer.names() == []


async def begin(connection: Any) -> None:
    await connection.execute("BEGIN")
    await connection.execute(INSERT)


async def begin_after_a_failure(connection: Any) -> None:
    await begin(connection)
    with suppress(asyncpg.DivisionByZeroError):
        await connection.execute("SELECT 1 / 0")


@pytest.mark.parametrize("work", [begin, begin_after_a_failure])
async def test_transaction_that_the_driver_did_not_end(
    database: Database, observer: Observer, work: Callable[[Any], Any]
) -> None:
    """SQLAlchemy would not send the COMMIT, since it knows of none; whoever began the transaction is told."""

    async def in_block() -> None:
        async with database.transaction() as session:
            await session.get(Counter, 1)
            await work(await raw(session))

    with pytest.raises(TransactionAborted, match="did not end it"):
        await in_block()
    async with database.transaction() as session:
        connection = await raw(session)
        async with connection.transaction():
            await connection.execute(INSERT)
        async with connection.transaction():
            with suppress(asyncpg.DivisionByZeroError):
                await connection.execute("SELECT 1 / 0")
    assert await observer.in_transaction() == 0
    assert await observer.names() == ["x"]


async def test_what_sqlalchemy_began_the_driver_joins(database: Database, observer: Observer) -> None:
    """After a statement of the session's, what the driver's connection writes is committed with it."""
    async with database.transaction() as session:
        await session.execute(text("SELECT 1"))
        await (await raw(session)).execute(INSERT)
    assert await observer.names() == ["x"]


async def test_transaction_of_the_drivers_own_ends_with_the_connection(observer: Observer) -> None:
    """Nobody who gets a connection from the pool goes on in a transaction that SQLAlchemy does not know of."""
    async with db.async_engine.connect() as connection:
        driver = (await connection.get_raw_connection()).driver_connection
        assert driver is not None
        await driver.execute("BEGIN; INSERT INTO item (name) VALUES ('half')")
    async with db.transaction() as session:
        session.add(Item("whole"))
    assert await observer.in_transaction() == 0
    assert await observer.names() == ["whole"]
