"""A read that a time limit has ended is run and waited for once."""

from __future__ import annotations

import pytest
from sqlalchemy import make_url, select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from fastapi_chatdify_db import Database, DatabaseSettings
from tests.models import Counter, Item
from tests.observing import Observer


def limited(database_url: str, **limit: str) -> Database:
    url = make_url(database_url).update_query_dict(limit)
    return Database(settings=DatabaseSettings(database_url=url.render_as_string(hide_password=False)))


@pytest.mark.parametrize("limit", ["statement_timeout", "lock_timeout"])
async def test_read_that_takes_too_long_is_not_waited_for_again(
    observer: Observer, database_url: str, limit: str
) -> None:
    """So a unit that handles its error, and has only read, goes on."""
    database = limited(database_url, options=f"-c {limit}=200")

    def work(session: Session) -> None:
        session.get(Counter, 1)
        with pytest.raises(DBAPIError):
            session.scalars(select(Item))
        session.get(Counter, 2)

    async with observer.connection.transaction():
        await observer.connection.execute("LOCK TABLE item IN ACCESS EXCLUSIVE MODE")
        async with database.transaction() as session:
            await session.run_sync(work)
        with database.sync_transaction() as sync_session:
            work(sync_session)
    await database.dispose()


async def test_drivers_own_limit_is_not_waited_for_twice(observer: Observer, database_url: str) -> None:
    """asyncpg's ``command_timeout`` ends a read once."""
    database = limited(database_url, command_timeout="1")

    queries: list[str] = []

    async def read() -> None:
        async with database.transaction() as session:
            raw = (await (await session.connection()).get_raw_connection()).driver_connection
            assert raw is not None
            raw.add_query_logger(lambda record: queries.append(record.query))
            await session.scalars(select(Item))

    async with observer.connection.transaction():
        await observer.connection.execute("LOCK TABLE item IN ACCESS EXCLUSIVE MODE")
        with pytest.raises(TimeoutError):
            await read()
    assert queries == []  # it tells of those that came to an end: a BEGIN would have
    await database.dispose()
