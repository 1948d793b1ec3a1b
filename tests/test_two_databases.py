"""One middleware serves every database of the application."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, Response
from sqlalchemy import UniqueConstraint, event, func, select, text
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, MappedAsDataclass, Session, mapped_column

from fastapi_chatdify_db import (
    ChatdifyDBError,
    Database,
    DatabaseSettings,
    DBSessionMiddleware,
    InvalidSettings,
    OutsideUnitOfWork,
    SessionInUse,
    db,
)
from tests.either_driver import backend_of
from tests.models import Item
from tests.observing import Observer, Other
from tests.serving import serve


class ReportsBase(MappedAsDataclass, DeclarativeBase):
    pass


class Report(ReportsBase):
    __tablename__ = "report"
    __table_args__ = (UniqueConstraint("title", deferrable=True, initially="DEFERRED"),)

    id: Mapped[int] = mapped_column(primary_key=True, init=False)
    title: Mapped[str]


@pytest.fixture
async def reports(observer: Observer) -> AsyncIterator[Database]:
    """A second database: its own engines and models, on the same server."""
    reports = Database("reports", settings=DatabaseSettings(), base=ReportsBase)
    await reports.create_tables()
    yield reports
    await reports.drop_tables()
    await reports.dispose()


def app_on_both(reports: Database) -> FastAPI:
    app = FastAPI()
    app.add_middleware(DBSessionMiddleware)

    @app.post("/{status}")
    async def handler(status: int, title: str = "a") -> None:
        db.session.add(Item("a"))
        reports.session.add(Report(title))
        if status >= 400:
            await db.session.flush()
            await reports.session.flush()
            raise HTTPException(status)

    @app.post("/def/{status}")
    def plain_def(status: int, title: str = "a") -> None:
        db.sync_session.add(Item("a"))
        reports.sync_session.add(Report(title))

    return app


async def count(reports: Database) -> int:
    async with reports.transaction() as session:
        return (await session.scalars(select(func.count(Report.id)))).one()


async def test_both_commit(reports: Database, observer: Observer) -> None:
    """A success is kept in both."""
    async with serve(app_on_both(reports)) as client:
        assert (await client.post("/200")).status_code == 200
    assert await observer.names() == ["a"]
    assert await count(reports) == 1


async def test_both_roll_back(reports: Database, observer: Observer) -> None:
    """A refusal is kept in neither."""
    async with serve(app_on_both(reports)) as client:
        assert (await client.post("/409")).status_code == 409
    assert await observer.names() == []
    assert await count(reports) == 0


@pytest.mark.parametrize("path", ["/200", "/def/200"])
async def test_statement_that_fails_on_the_second_keeps_the_first_from_committing(
    reports: Database, observer: Observer, path: str
) -> None:
    """Everything is flushed to every database before any commits."""
    async with serve(app_on_both(reports)) as client:
        assert (await client.post(path, params={"title": "\0"})).status_code == 500
    assert await observer.names() == []


async def fail(session: AsyncSession) -> None:
    with suppress(DBAPIError):
        await session.execute(text("SELECT 1 / 0"))


async def fail_in_a_flush(session: AsyncSession) -> None:
    session.add(Report("\0"))
    with suppress(ValueError, DBAPIError):
        await session.flush()


async def fail_safely_and_lose_the_connection(session: AsyncSession) -> None:
    async with session.begin_nested() as savepoint:
        await fail(session)
        await savepoint.rollback()
    async with db.transaction() as other:
        await other.execute(select(func.pg_terminate_backend(await session.run_sync(backend_of))))


background: set[asyncio.Task[object]] = set()
"""Statements that go on after their request; the event loop alone keeps no task."""


async def go_on_elsewhere(session: AsyncSession) -> None:
    background.add(asyncio.create_task(session.execute(text("SELECT pg_sleep(1)"))))
    await asyncio.sleep(0)


@pytest.mark.parametrize(
    ("failing", "flushed", "error"),
    [
        (fail, True, "TransactionAborted"),
        (fail_in_a_flush, True, "PendingRollbackError"),
        (fail_in_a_flush, False, "PendingRollbackError"),
        (fail_safely_and_lose_the_connection, True, "DBAPIError"),
        (go_on_elsewhere, True, "SessionInUse"),
    ],
)
async def test_failure_that_was_swallowed_keeps_the_first_from_committing(
    app: FastAPI,
    reports: Database,
    observer: Observer,
    failing: Callable[[AsyncSession], Awaitable[None]],
    flushed: bool,
    error: str,
) -> None:
    """What is known to end in a rollback is told, by its name, before any database commits."""

    @app.exception_handler(SQLAlchemyError)
    @app.exception_handler(ChatdifyDBError)
    async def tell(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse("DBAPIError" if isinstance(error, DBAPIError) else type(error).__name__, status_code=409)

    @app.post("/")
    async def handler() -> None:
        db.session.add(Item("a"))
        if flushed:
            reports.session.add(Report("a"))
            await reports.session.flush()
        await failing(reports.session)

    async with serve(app) as client:
        response = await client.post("/")
    await asyncio.gather(*background, return_exceptions=True)
    background.clear()
    assert (response.status_code, response.json()) == (409, error)
    assert await observer.names() == []
    assert await count(reports) == 0


async def test_session_that_waits_for_its_connection_keeps_the_first_from_committing(
    app: FastAPI, observer: Observer
) -> None:
    """It is in use, like one that waits for its statement."""
    single = Database("single", settings=DatabaseSettings(db_pool_size=1, db_max_overflow=0))

    @app.exception_handler(SessionInUse)
    async def tell(request: Request, error: SessionInUse) -> Response:
        return Response(status_code=409)

    @app.post("/")
    async def handler() -> None:
        db.session.add(Item("a"))
        await go_on_elsewhere(single.session)

    async with serve(app) as client, single.transaction() as session:
        await session.execute(text("SELECT 1"))
        assert (await client.post("/")).status_code == 409
    await asyncio.gather(*background, return_exceptions=True)
    background.clear()
    await single.dispose()
    assert await observer.names() == []


async def test_failure_in_a_savepoint_is_none(app: FastAPI, reports: Database, observer: Observer) -> None:
    """Both databases commit after a statement of one has failed in a savepoint."""

    @app.post("/")
    async def handler() -> None:
        db.session.add(Item("a"))
        reports.session.add(Report("a"))
        with suppress(DBAPIError):
            async with reports.session.begin_nested():
                await reports.session.execute(text("SELECT 1 / 0"))

    async with serve(app) as client:
        assert (await client.post("/")).status_code == 200
    assert await observer.names() == ["a"]
    assert await count(reports) == 1


async def test_second_commit_that_fails_is_an_error_though_the_first_stays(
    app: FastAPI, reports: Database, observer: Observer, other: Other
) -> None:
    """Two databases have no common commit: the client gets the error, the first one keeps its row."""

    @app.post("/")
    async def handler() -> None:
        db.session.add(Item("a"))
        reports.session.add(Report("a"))
        backend = await reports.session.run_sync(backend_of)

        def lose_the_connection(_: Session) -> None:
            assert other.ask(f"SELECT pg_terminate_backend({backend})")

        event.listen(db.session.sync_session, "after_commit", lose_the_connection)

    async with serve(app) as client:
        assert (await client.post("/")).status_code == 500
    assert await observer.names() == ["a"]
    assert await count(reports) == 0


@pytest.mark.parametrize("status", [200, 404])
async def test_callback_waits_for_its_own_database(
    app: FastAPI, reports: Database, observer: Observer, status: int
) -> None:
    """That the other one is committed, by the application, neither runs it nor drops it."""
    ran: list[str] = []

    @app.post("/")
    async def handler() -> None:
        for database in (db, reports):
            await database.session.execute(text("SELECT txid_current()"))
            database.on_commit(partial(ran.append, database.name))
        await reports.session.commit()
        if status != 200:
            raise HTTPException(status)

    async with serve(app) as client:
        assert (await client.post("/")).status_code == status
    assert ran == (["reports", "db"] if status == 200 else ["reports"])


async def test_transaction_block_is_for_its_own_database(reports: Database, observer: Observer) -> None:
    """Inside ``reports.transaction()`` the other database's session is not there, or the outer unit's."""
    async with db.transaction() as session, reports.transaction():
        assert db.session is session
    async with reports.transaction():
        with pytest.raises(OutsideUnitOfWork, match=r"db\.session .* db\.transaction"):
            db.session  # noqa: B018


async def test_one_session_on_two_engines(observer: Observer) -> None:
    """A read of another database, by the same session, is not taken for all that it did."""
    other = Database("other")
    async with db.transaction() as session:
        await session.execute(text("INSERT INTO item (name) VALUES ('a')"))
        await session.scalars(select(Item), bind_arguments={"bind": other.async_engine.sync_engine})
    assert await observer.in_transaction() == 0
    assert await observer.names() == ["a"]
    await other.dispose()


@pytest.mark.parametrize("given", ["postgresql://user:s3cr3t@host/name", {"database_url": "sqlite://"}])
def test_url_in_place_of_settings_is_refused_where_it_is_given(given: Any) -> None:
    """Neither a name nor settings can be a URL or a dictionary; no message shows what was given."""
    with pytest.raises(InvalidSettings, match=r"write: settings=DatabaseSettings\(database_url=") as in_place:
        Database("reports", settings=given)
    with pytest.raises(InvalidSettings, match=r"write: settings=DatabaseSettings\(database_url=") as assigned:
        Database("reports").settings = given
    with pytest.raises(InvalidSettings, match=r"Database\('reports', settings=") as as_name:
        Database("postgresql://user:s3cr3t@host/name")
    assert "s3cr3t" not in f"{in_place.value} {assigned.value} {as_name.value}"
