"""A statement that failed, and whose error was handled, takes no success with it.

PostgreSQL has then given up the transaction, and answers COMMIT with a ROLLBACK that drivers take for a success.
"""

from __future__ import annotations

import io
from collections.abc import AsyncIterator, Callable
from contextlib import suppress

import asyncpg
import psycopg2
import pytest
from fastapi import FastAPI, WebSocket
from sqlalchemy import Integer, cast, event, insert, make_url, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError, PendingRollbackError
from sqlalchemy.orm import Session

from fastapi_chatdify_db import Database, DatabaseSettings, DBSessionMiddleware, TransactionAborted, db
from tests.models import Counter, Item
from tests.observing import Observer
from tests.serving import connected, serve

DUPLICATE = text("INSERT INTO counter VALUES (1, 1), (1, 1)")
NOT_A_NUMBER = select(cast(Item.name, Integer))


@pytest.fixture
def ran() -> list[str]:
    """The callbacks that ran."""
    return []


@pytest.fixture
def app(ran: list[str]) -> FastAPI:
    app = FastAPI()
    app.add_middleware(DBSessionMiddleware)

    @app.post("/async")
    async def handler() -> None:
        db.session.add(Item("a"))
        await db.session.flush()
        db.on_commit(lambda: ran.append("callback"))
        with suppress(IntegrityError):
            await db.session.execute(DUPLICATE)

    @app.post("/def")
    def plain_def() -> None:
        db.sync_session.add(Item("a"))
        db.sync_session.flush()
        db.on_commit(lambda: ran.append("callback"))
        with suppress(IntegrityError):
            db.sync_session.execute(DUPLICATE)

    @app.post("/read")
    async def read() -> None:
        db.session.add(Item("a"))
        await db.session.flush()
        with suppress(DBAPIError):
            await db.session.scalar(NOT_A_NUMBER)

    @app.post("/release")
    async def release() -> None:
        db.session.add(Item("a"))
        await db.session.flush()
        with suppress(IntegrityError):
            await db.session.execute(DUPLICATE)
        await db.release()

    @app.post("/first")
    async def first() -> None:
        with suppress(IntegrityError):
            await db.session.execute(DUPLICATE)
        with suppress(DBAPIError):
            await db.session.execute(text("INSERT INTO item (name) VALUES ('a')"))

    return app


@pytest.mark.parametrize("path", ["/async", "/def", "/read", "/release", "/first"])
async def test_client_is_told_that_nothing_was_stored(
    app: FastAPI, observer: Observer, ran: list[str], path: str
) -> None:
    """A 500, no row and no callback; and an error that names what had failed, and what to write instead."""
    errors: list[BaseException] = []

    async def noting(scope: object, receive: object, send: object) -> None:
        try:
            await app(scope, receive, send)  # type: ignore[arg-type]  # as they came
        except TransactionAborted as error:
            errors.append(error)

    async with serve(noting) as client:
        assert (await client.post(path)).status_code == 500
        assert await observer.in_transaction() == 0
    assert (await observer.names(), ran) == ([], [])
    assert "begin_nested()" in str(errors[0])
    assert "SQLSTATE 2" in str(errors[0])


@pytest.mark.parametrize("path", ["/copy", "/copy-def"])
async def test_failure_of_the_drivers_own_connection_counts(app: FastAPI, observer: Observer, path: str) -> None:
    """Also one that SQLAlchemy does not see makes the COMMIT none, which only PostgreSQL's answer to it tells."""

    @app.post("/copy")
    async def copy() -> None:
        db.session.add(Item("a"))
        await db.session.flush()
        driver = (await (await db.session.connection()).get_raw_connection()).driver_connection
        assert driver is not None
        with suppress(asyncpg.UniqueViolationError):
            await driver.copy_records_to_table("counter", records=[(1, 1), (1, 1)])

    @app.post("/copy-def")
    def copy_def() -> None:
        db.sync_session.add(Item("a"))
        db.sync_session.flush()
        cursor = db.sync_session.connection().connection.cursor()
        with suppress(psycopg2.IntegrityError):
            cursor.copy_expert("COPY counter FROM STDIN", io.StringIO("1\t1\n1\t1\n"))

    async with serve(app) as client:
        assert (await client.post(path)).status_code == 500
        assert await observer.in_transaction() == 0
    assert await observer.names() == []


async def test_websocket_is_not_told_either(app: FastAPI, observer: Observer) -> None:
    """The commit before an answer fails where the handler sends it."""

    @app.websocket("/")
    async def handler(socket: WebSocket) -> None:
        await socket.accept()
        db.session.add(Item(await socket.receive_text()))
        await db.session.flush()
        with suppress(IntegrityError):
            await db.session.execute(DUPLICATE)
        try:
            await socket.send_text("stored")
        except TransactionAborted:
            await socket.send_text("not stored")

    async with connected(app) as socket:
        await socket.send("a")
        assert await socket.recv() == "not stored"
    assert await observer.names() == []


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

    async def in_block() -> None:
        async with database.transaction() as session:
            await session.run_sync(work)

    with pytest.raises(TransactionAborted):
        await in_block()
    with pytest.raises(TransactionAborted), database.sync_transaction() as sync_session:
        work(sync_session)
    assert await observer.names() == []


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
