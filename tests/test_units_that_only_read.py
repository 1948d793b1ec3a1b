"""A unit that only reads is in no transaction and ends without the server, unless somebody relies on either."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import Connection, delete, event, insert, make_url, select
from sqlalchemy.orm import Session

from fastapi_chatdify_db import Database, DatabaseSettings, db
from tests.either_driver import in_transaction, names, run
from tests.models import Counter, Item
from tests.observing import Observer, Other


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg2"])
@pytest.mark.parametrize("lazy", [True, False])
async def test_unit_that_only_reads_is_idle_in_no_transaction(other: Other, driver: str, lazy: bool) -> None:
    """With DB_LAZY_BEGIN a handler may read, and wait for something slow, without a transaction open meanwhile."""
    database = Database(settings=DatabaseSettings(db_lazy_begin=lazy))

    def read(session: Session) -> None:
        names(session)
        session.get(Counter, 1)
        assert in_transaction(session.connection()) is not lazy

    await run(database, driver, read)
    await database.dispose()


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg2"])
@pytest.mark.parametrize("level", ["repeatable read", "serializable"])
async def test_isolation_level_of_the_server_counts(other: Other, database_url: str, driver: str, level: str) -> None:
    """Where the server's default is a stricter level, two reads of a transaction see the same."""
    url = make_url(database_url)
    options = f"-c default_transaction_isolation={level.replace(' ', chr(92) + ' ')}"
    strict = Database(
        settings=DatabaseSettings(database_url=url.update_query_dict({"options": options}).render_as_string(False))
    )

    def read_twice(session: Session) -> None:
        assert names(session) == []
        other.ask("INSERT INTO item (name) VALUES ('a')")
        assert names(session) == []

    await run(strict, driver, read_twice)
    await strict.dispose()


def write_on_the_driver(session: Session) -> None:
    session.connection().connection.cursor().execute("INSERT INTO item (name) VALUES ('a')")


def write_on_a_detached_connection(session: Session) -> None:
    session.connection().detach()
    session.execute(insert(Item).values(name="a"))


@pytest.mark.parametrize("write", [write_on_the_driver, write_on_a_detached_connection])
async def test_what_is_not_known_of_a_connection_may_be_a_write(
    observer: Observer, write: Callable[[Session], None]
) -> None:
    """It is committed too, although no statement that SQLAlchemy ran, or on no connection of the pool's, began it."""
    async with db.transaction() as session:
        await session.scalars(select(Item))
        await session.run_sync(write)
    assert await observer.names() == ["a"]
    with db.sync_transaction() as sync_session:
        sync_session.execute(delete(Item))
        write(sync_session)
    assert await observer.names() == ["a"]


async def test_reads_on_more_connections_than_the_pool_keeps(
    observer: Observer, caplog: pytest.LogCaptureFixture
) -> None:
    """The end of a unit that only read closes the connections beyond the pool's size, which takes a while."""
    settings = DatabaseSettings(db_application_name="overflowing", db_pool_size=1, db_max_overflow=4)
    database = Database(settings=settings)
    everybody_reads = asyncio.Barrier(5)

    async def read() -> None:
        async with database.transaction() as session:
            await session.scalars(select(Item))
            await everybody_reads.wait()

    await asyncio.gather(*(read() for _ in range(5)))
    async with asyncio.timeout(10):
        await observer.until_connections("overflowing", 1)
    assert database.async_engine.pool.status().startswith("Pool size: 1  Connections in pool: 1")
    assert caplog.records == []
    await database.dispose()


@pytest.mark.parametrize(
    ("target", "of_one_connection"),
    [("commit", False), ("rollback", False), ("reset", False), ("commit", True), ("rollback", True)],
)
async def test_hooks_that_ask_the_server_when_a_read_ends(
    tables: None, target: str, of_one_connection: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever an application does in SQLAlchemy's events at the end of a transaction, it does after reads too."""
    database = Database()
    answers: list[Any] = []

    def ask(connection: Any, *_: object) -> None:
        cursor = (connection.connection if isinstance(connection, Connection) else connection).cursor()
        cursor.execute("SELECT 42")
        answers.append(cursor.fetchone())

    async with database.transaction() as session:
        await session.scalars(select(Item))
        connection = (await session.connection()).sync_connection
        event.listen(connection if of_one_connection else database.async_engine.sync_engine, target, ask)
        if target == "rollback":
            database.rollback_only()
    assert (42,) in answers
    assert caplog.records == []
    await database.dispose()


async def test_a_session_that_only_read_tells_its_hooks_of_the_commit(tables: None) -> None:
    """Ending without the server is a commit all the same, for who listens to the session."""
    told: list[str] = []
    async with db.transaction() as session:
        await session.scalars(select(Item))
        event.listen(session.sync_session, "after_commit", lambda sync_session: told.append("after_commit"))
    assert told == ["after_commit"]


async def test_hook_that_writes_at_the_commit(observer: Observer) -> None:
    """What a handler of the session's ``before_commit`` writes is committed, although the unit itself only read."""
    async with db.transaction() as session:
        await session.scalars(select(Item))
        event.listen(session.sync_session, "before_commit", lambda sync_session: sync_session.add(Item("audited")))
    assert await observer.names() == ["audited"]


async def test_a_session_goes_on_after_it_only_read(tables: None) -> None:
    """What was read stays as it is, and a savepoint that nobody used is forgotten."""
    async with db.transaction() as session:
        session.add(Item("kept"))
    async with db.transaction() as session:
        item = (await session.scalars(select(Item))).one()
        await db.release()
        assert item in session
        assert item.name == "kept"
        await session.begin_nested()
        await db.release()
        assert not session.in_nested_transaction()
        item.name = "changed"
    async with db.transaction() as session:
        assert (await session.scalars(select(Item.name))).all() == ["changed"]
