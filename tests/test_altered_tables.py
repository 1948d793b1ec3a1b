"""A migration alters a table under connections that have prepared their statements for it."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from sqlalchemy import func, insert, select, text

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
