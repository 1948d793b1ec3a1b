"""A statement that failed, and whose error was handled, takes no success with it.

PostgreSQL has then given up the transaction, and answers COMMIT with a ROLLBACK that drivers take for a success.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import suppress

import pytest
from sqlalchemy import event, insert, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError, PendingRollbackError
from sqlalchemy.orm import Session

from fastapi_chatdify_db import Database, DatabaseSettings, TransactionAborted
from tests.either_driver import run
from tests.failing import DUPLICATE, NOT_A_NUMBER
from tests.models import Counter, Item
from tests.observing import Observer


@pytest.fixture(params=[True, False], ids=["lazy", "eager"])
async def database(request: pytest.FixtureRequest, observer: Observer) -> AsyncIterator[Database]:
    made = Database(settings=DatabaseSettings(db_lazy_begin=request.param, db_pool_pre_ping=request.param))
    yield made
    await made.dispose()


async def test_block_raises(database: Database, observer: Observer) -> None:
    """Explicit units raise at their end, on either driver, and so does the user's own commit."""

    def work(session: Session) -> None:
        session.add(Item("a"))
        session.flush()
        with suppress(IntegrityError):
            session.execute(DUPLICATE)

    async def in_block() -> None:
        async with database.transaction() as session:
            await session.run_sync(work)

    def commits(session: Session) -> None:
        work(session)
        session.commit()

    with pytest.raises(TransactionAborted):
        await in_block()
    for own in (work, commits):
        with pytest.raises(TransactionAborted), database.sync_transaction() as sync_session:
            own(sync_session)
    assert await observer.names() == []


async def test_error_names_the_first_failure(database: Database) -> None:
    """Not the later statements that PostgreSQL refused because of it."""

    def work(session: Session) -> None:
        session.execute(insert(Item).values(name="a"))
        for failing in (DUPLICATE, DUPLICATE, select(Item)):
            with suppress(DBAPIError):
                session.execute(failing)

    for driver in ("asyncpg", "psycopg2"):
        with pytest.raises(TransactionAborted, match="23505"):
            await run(database, driver, work)


@pytest.mark.parametrize(("driver", "unfit"), [("asyncpg", 1), ("psycopg2", "\0")])
async def test_failure_on_the_drivers_connection_after_one_that_the_server_never_saw(
    database: Database, observer: Observer, driver: str, unfit: object
) -> None:
    """The first one cost nothing; the other one, of which only the driver knows, what was written in between."""

    def work(session: Session) -> None:
        with suppress(ValueError, DBAPIError):
            session.execute(insert(Item).values(name=unfit))
        session.execute(insert(Item).values(name="a"))
        with pytest.raises(Exception, match="zero"):
            session.connection().connection.cursor().execute("SELECT 1 / 0")

    with pytest.raises(TransactionAborted):
        await run(database, driver, work)
    assert await observer.names() == []


def execute_many(session: Session, *ids: int) -> None:
    session.execute(text("INSERT INTO counter VALUES (:id, 1)"), [{"id": each} for each in ids])


def execute_without_parameters(session: Session, *ids: int) -> None:
    connection = session.connection().execution_options(no_parameters=True)
    connection.exec_driver_sql(f"INSERT INTO counter VALUES {', '.join(f'({each}, 1)' for each in ids)}")


@pytest.mark.parametrize("execute", [execute_many, execute_without_parameters])
async def test_error_names_the_failure_however_it_was_executed(
    database: Database, observer: Observer, execute: Callable[..., None]
) -> None:
    """SQLAlchemy has other ways for lists of parameters, and for none."""

    def work(session: Session) -> None:
        execute(session, 1, 2)
        with suppress(IntegrityError):
            execute(session, 3, 3)

    for driver in ("asyncpg", "psycopg2"):
        with pytest.raises(TransactionAborted, match="23505"):
            await run(database, driver, work)
    assert await observer.connection.fetchval("SELECT count(*) FROM counter") == 0


async def test_flush_that_fails_before_its_first_statement(database: Database, observer: Observer) -> None:
    """The server knows nothing of it, but the row is as lost as after a failed statement."""

    def fail(*_: object) -> None:
        raise ZeroDivisionError

    async def ignore_a_failed_flush() -> None:
        async with database.transaction() as session:
            await session.scalars(select(Item))
            session.add(Item("lost"))
            with suppress(ZeroDivisionError):
                await session.flush()

    event.listen(Item, "before_insert", fail)
    try:
        with pytest.raises(PendingRollbackError):
            await ignore_a_failed_flush()
    finally:
        event.remove(Item, "before_insert", fail)
    assert await observer.names() == []


async def test_savepoint_keeps_the_rest(database: Database, observer: Observer) -> None:
    """What may fail in a savepoint takes only that with it."""

    def work(session: Session, name: str) -> None:
        session.add(Item(name))
        session.flush()
        with suppress(IntegrityError), session.begin_nested():
            session.execute(DUPLICATE)

    async with database.transaction() as session:
        await session.run_sync(work, "a")
    with database.sync_transaction() as sync_session:
        work(sync_session, "b")
    assert await observer.names() == ["a", "b"]


async def test_nothing_lost_is_no_error(database: Database, observer: Observer) -> None:
    """Where nothing but reads came before the failure, and nothing after it, handling it is the end of it."""

    def lose(session: Session) -> None:
        write_without_parameters(session)
        with suppress(DBAPIError):
            session.execute(DUPLICATE)
        database.rollback_only()

    async with database.transaction() as session:
        session.add(Item("not a number"))
    async with database.transaction() as session:
        await session.run_sync(lose)
    with database.sync_transaction() as sync_session:
        lose(sync_session)
    for failing in (DUPLICATE, NOT_A_NUMBER):
        async with database.transaction() as session:
            await session.get(Counter, 1)
            with suppress(DBAPIError):
                await session.execute(failing)
        with database.sync_transaction() as sync_session:
            sync_session.get(Counter, 1)
            with suppress(DBAPIError):
                sync_session.execute(failing)
    assert await observer.in_transaction() == 0


async def test_error_shows_no_parameter(database: Database) -> None:
    """What users typed is in no traceback, unless all statements are logged."""

    def fail(session: Session) -> None:
        with pytest.raises(DBAPIError, match="division by zero") as caught, session.begin_nested():
            session.execute(text("SELECT CAST(:typed AS text), 1 / 0"), {"typed": "hunter2"})
        assert "hunter2" not in str(caught.value)

    async with database.transaction() as session:
        await session.run_sync(fail)
    with database.sync_transaction() as sync_session:
        fail(sync_session)


def write_many(session: Session) -> None:
    session.execute(insert(Item), [{"name": "a"}, {"name": "b"}])


def write_and_read(session: Session) -> None:
    session.execute(insert(Item).values(name="a"))
    session.scalars(select(Counter)).all()


def write_without_parameters(session: Session) -> None:
    session.connection().execution_options(no_parameters=True).exec_driver_sql("INSERT INTO item (name) VALUES ('a')")


def write_by_cursor(session: Session) -> None:
    session.connection().connection.cursor().execute("INSERT INTO item (name) VALUES ('a')")


def write_by_cursor_and_read(session: Session) -> None:
    write_by_cursor(session)
    session.scalars(select(Item)).all()


def fail_by_cursor(session: Session) -> None:
    with suppress(Exception):
        session.connection().connection.cursor().execute("SELECT 1 / 0")


@pytest.mark.parametrize(
    "write", [write_many, write_and_read, write_without_parameters, write_by_cursor, write_by_cursor_and_read]
)
@pytest.mark.parametrize("by_cursor", [False, True])
async def test_whatever_was_written(
    database: Database, observer: Observer, write: Callable[[Session], None], by_cursor: bool
) -> None:
    """Rows of an executemany, of a cursor, or before a read that succeeded, are lost as well, which is said as well."""

    def work(session: Session) -> None:
        write(session)
        if by_cursor:
            fail_by_cursor(session)
            return
        with suppress(IntegrityError):
            session.execute(DUPLICATE)

    for driver in ("asyncpg", "psycopg2"):
        with pytest.raises(TransactionAborted):
            await run(database, driver, work)
    assert await observer.names() == []
