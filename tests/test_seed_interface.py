"""The names that users start from work as their documentation writes them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from typing import Annotated, Any

import pytest
from fastapi import Depends, FastAPI
from sqlalchemy import inspect, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from starlette.requests import Request
from starlette.responses import JSONResponse

from fastapi_chatdify_db import Base, TransactionAborted, db, legacy
from fastapi_chatdify_db.session import get_async_session, get_session, get_sync_session
from fastapi_chatdify_db.utils import create_db_tables, drop_db_tables
from tests.models import Item
from tests.observing import Observer
from tests.serving import serve


async def test_async_session_pattern(observer: Observer) -> None:
    """``async for session in get_session()`` works, and leaves nothing behind when broken out of."""
    async for session in get_session():
        result = await session.execute(text("SELECT 1"))
        assert result.scalar() == 1
        break
    async with asyncio.timeout(10):
        while "Current Checked out connections: 0" not in db.async_engine.pool.status():
            await asyncio.sleep(0)  # the loop closes the generator in a task of its own
    assert await observer.in_transaction() == 0


@pytest.mark.parametrize("get_session", [get_session, legacy.get_session], ids=["session", "legacy"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
async def test_what_follows_a_loop_left_by_break_stands_alone(
    observer: Observer, get_session: Callable[[], AsyncGenerator[AsyncSession]]
) -> None:
    """The next session is another one, although the event loop has not come round to ending the first."""

    async def look_and_break() -> AsyncSession:
        async for session in get_session():
            session.add(Item("left"))
            await session.flush()
            break
        return session

    left = await look_and_break()
    with get_sync_session() as sync_session:
        sync_session.add(Item("sync"))
    left = await look_and_break()
    async with get_async_session() as session:
        assert session is not left
        session.add(Item("async"))
    left = await look_and_break()
    async for session in get_session():
        assert session is not left
        session.add(Item("loop"))
    assert await observer.names() == ["async", "loop", "sync"]


def test_sync_session_pattern(database_url: str) -> None:
    """``with get_sync_session()`` works in plain synchronous code."""
    with get_sync_session() as session:
        result = session.execute(text("SELECT 1"))
        assert result.scalar() == 1


async def test_programmatic_sessions_commit_and_roll_back(observer: Observer) -> None:
    """Both context managers commit at their end, and roll back on an exception."""
    async with get_async_session() as session:
        session.add(Item("async"))

    def work() -> None:
        with get_sync_session() as session:
            session.add(Item("sync"))

    async def fail() -> None:
        async with get_async_session() as session:
            session.add(Item("lost"))
            await session.flush()
            raise ZeroDivisionError

    await asyncio.to_thread(work)
    with pytest.raises(ZeroDivisionError):
        await fail()
    assert await observer.names() == ["async", "sync"]


async def test_programmatic_sessions_join_the_unit_around_them(observer: Observer) -> None:
    """Inside a unit of work both are its session, and leave the commit to it."""
    async with db.transaction() as session:
        async with get_async_session() as joined:
            assert joined is session
            joined.add(Item("a"))
        assert await observer.names() == []

    def work() -> None:
        with db.sync_transaction() as session, get_sync_session() as joined:
            assert joined is session

    await asyncio.to_thread(work)
    assert await observer.names() == ["a"]


async def test_loop_inside_a_synchronous_unit_has_sessions_of_its_own(observer: Observer) -> None:
    """A synchronous task that runs a coroutine gives it an async session, committed on its own."""

    async def coroutine() -> None:
        async with get_async_session() as session:
            session.add(Item("coroutine"))
        await db.dispose()

    def task() -> None:
        with db.sync_transaction():
            asyncio.run(coroutine())

    await asyncio.to_thread(task)
    assert await observer.names() == ["coroutine"]


async def test_dependency_without_the_middleware(observer: Observer) -> None:
    """With ``scope="function"`` it commits before the response, so a failed commit is the app's conflict."""
    app = FastAPI()

    @app.exception_handler(IntegrityError)
    async def conflict(request: Request, error: IntegrityError) -> JSONResponse:
        return JSONResponse("taken", status_code=409)

    @app.post("/")
    async def handler(session: Annotated[AsyncSession, Depends(get_session, scope="function")]) -> bool:
        session.add(Item("a"))
        return db.session is session

    async with serve(app) as client:
        async with client.stream("POST", "/") as response:
            assert response.status_code == 200
            assert await observer.names() == ["a"]
            assert await response.aread() == b"true"
        assert (await client.post("/")).status_code == 409
    assert await observer.in_transaction() == 0


async def test_dependency_in_its_plain_spelling_without_the_middleware(observer: Observer) -> None:
    """``Depends(get_session)`` works as ever, FastAPI ending it after the response."""
    app = FastAPI()

    @app.get("/")
    async def handler(session: Annotated[AsyncSession, Depends(get_session)]) -> list[str]:
        return list(await session.scalars(select(Item.name)))

    async with serve(app) as client:
        assert (await client.get("/")).json() == []


async def test_engines_are_importable(observer: Observer) -> None:
    """Both engines can be imported by name and used directly."""
    # Not at the top, where pytest would make them before tests of other files assign db.settings.
    from fastapi_chatdify_db.session import async_engine, sync_engine

    async with async_engine.connect() as connection:
        assert await connection.scalar(text("SELECT 1")) == 1

    def work() -> None:
        with sync_engine.connect() as connection:
            assert connection.scalar(text("SELECT 1")) == 1

    await asyncio.to_thread(work)


async def test_tables_are_created_and_dropped(observer: Observer) -> None:
    """Creating twice is creating once."""
    await create_db_tables()
    await create_db_tables()
    async with db.async_engine.connect() as connection:
        assert "item" in await connection.run_sync(lambda sync: inspect(sync).get_table_names())
    await drop_db_tables()
    async with db.async_engine.connect() as connection:
        assert "item" not in await connection.run_sync(lambda sync: inspect(sync).get_table_names())


def test_base_names_constraints() -> None:
    """Alembic finds every constraint by a name."""
    names = {str(constraint.name) for constraint in Base.metadata.tables["item"].constraints}
    assert names == {"pk_item", "uq_item_name"}


async def test_legacy_dependencies(observer: Observer) -> None:
    """``get_db`` and ``get_session`` of the predecessor work, and warn with the new spelling."""
    app = FastAPI()

    @app.post("/db")
    def with_db(session: Annotated[Session, Depends(legacy.get_db)]) -> None:
        session.add(Item("get_db"))
        session.commit()

    @app.post("/session")
    async def with_session(session: Annotated[AsyncSession, Depends(legacy.get_session)]) -> None:
        session.add(Item("get_session"))

    async with serve(app) as client:
        with pytest.warns(DeprecationWarning, match=r"write: .* db\.sync_session"):
            assert (await client.post("/db")).status_code == 200
        with pytest.warns(DeprecationWarning, match="write: from fastapi_chatdify_db import get_session"):
            assert (await client.post("/session")).status_code == 200
    assert await observer.names() == ["get_db", "get_session"]


@pytest.mark.parametrize("end", [Session.commit, Session.flush], ids=["own commit", "left to the block"])
async def test_legacy_session_local(observer: Observer, end: Callable[[Session], Any]) -> None:
    """``with SessionLocal()`` works with and without a commit of one's own, and warns at the caller's line."""

    def work() -> None:
        with legacy.SessionLocal() as session:
            session.add(Item("a"))
            end(session)

    with pytest.warns(DeprecationWarning, match="import get_sync_session") as warned:
        await asyncio.to_thread(work)
    assert warned[0].filename == __file__
    assert await observer.names() == ["a"]


async def test_legacy_session_local_after_a_failed_statement(observer: Observer) -> None:
    """PostgreSQL has given up the transaction, so its end is no success."""

    def work() -> None:
        with legacy.SessionLocal() as session:
            session.add(Item("a"))
            session.flush()
            with suppress(DBAPIError):
                session.execute(text("SELECT 1 / 0"))

    with pytest.warns(DeprecationWarning, match="SessionLocal"), pytest.raises(TransactionAborted):
        await asyncio.to_thread(work)
    assert await observer.names() == []


async def test_legacy_session_local_that_is_closed_by_hand(
    observer: Observer, caplog: pytest.LogCaptureFixture
) -> None:
    """``SessionLocal()`` is a session: what was committed is kept, and ``close()`` rolls back the rest."""

    def work() -> None:
        session = legacy.SessionLocal()
        try:
            session.add(Item("kept"))
            session.commit()
            session.add(Item("lost"))
            session.flush()
        finally:
            session.close()

    def fail() -> None:
        with legacy.SessionLocal() as session:
            session.add(Item("lost"))
            session.flush()
            raise ZeroDivisionError

    with pytest.warns(DeprecationWarning, match="SessionLocal"):
        await asyncio.to_thread(work)
    with pytest.warns(DeprecationWarning, match="SessionLocal"), pytest.raises(ZeroDivisionError):
        await asyncio.to_thread(fail)
    assert await observer.names() == ["kept"]
    assert await observer.in_transaction() == 0
    assert caplog.text == ""  # nothing was forgotten
