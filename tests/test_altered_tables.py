"""A migration alters a table under connections that have prepared their statements for it."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from sqlalchemy import Column, Enum, MetaData, Table, func, insert, select, text

from fastapi_chatdify_db import Database, DatabaseSettings
from tests.models import Item
from tests.observing import Observer

READ = select(Item.name)
WRITE = insert(Item).values(name="y").returning(Item.name)


@pytest.fixture
async def altered(observer: Observer) -> AsyncIterator[Database]:
    """A pool of two connections that have prepared the statements, and then the column gets another type."""
    database = Database(settings=DatabaseSettings(db_pool_size=2, db_max_overflow=0))
    async with database.transaction() as one, database.transaction() as other:
        for session in (one, other):
            await session.scalars(READ)
        await one.scalars(WRITE)
        await one.rollback()
        await other.scalars(WRITE)
        await other.rollback()
    await observer.connection.execute("INSERT INTO item (name) VALUES ('x')")
    await observer.connection.execute("ALTER TABLE item ALTER name TYPE varchar(60)")
    yield database
    await database.dispose()
    await observer.connection.execute("ALTER TABLE item ALTER name TYPE varchar")


async def test_read(altered: Database) -> None:
    """It goes on, on whichever connection."""
    async with altered.transaction() as one, altered.transaction() as other:
        assert (await one.scalars(READ)).all() == ["x"]
        assert (await other.scalars(READ)).all() == ["x"]


async def test_first_write(altered: Database, observer: Observer) -> None:
    """It is done once."""
    async with altered.transaction() as session:
        assert (await session.scalars(WRITE)).all() == ["y"]
    assert await observer.names() == ["x", "y"]


async def test_later_statement(altered: Database) -> None:
    """Once one connection has met the change, the others take it into account, also in the middle of a transaction."""
    async with altered.transaction() as one, altered.transaction() as other:
        await one.execute(text("SELECT 1"))
        assert (await other.scalars(READ)).all() == ["x"]
        assert (await one.scalars(READ)).all() == ["x"]
        assert await one.scalar(select(func.count()).select_from(Item)) == 1


async def test_type_that_was_replaced(observer: Observer) -> None:
    """As a migration does that takes something from an enumeration: the first write is done once."""
    await observer.connection.execute("CREATE TYPE mood AS ENUM ('glad'); CREATE TABLE person (mood mood)")
    moods = Enum("glad", name="mood")
    person = Table("person", MetaData(), Column("mood", moods))
    database = Database(settings=DatabaseSettings(db_pool_size=1, db_max_overflow=0))
    try:
        for _ in range(2):
            async with database.transaction() as session:
                await session.execute(insert(person).values(mood="glad"))
            await observer.connection.execute(
                """
                ALTER TYPE mood RENAME TO former; CREATE TYPE mood AS ENUM ('glad', 'sad');
                ALTER TABLE person ALTER mood TYPE mood USING mood::text::mood; DROP TYPE former
                """
            )
        assert await observer.connection.fetchval("SELECT count(*) FROM person") == 2
    finally:
        await database.dispose()
        await observer.connection.execute("DROP TABLE person; DROP TYPE mood")
