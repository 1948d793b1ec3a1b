"""The session is SQLAlchemy's: what the application does to it by hand, and in events, works as it does elsewhere."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from fastapi import BackgroundTasks, Depends, FastAPI, HTTPException, WebSocket
from fastapi.responses import StreamingResponse
from sqlalchemy import event, select, text
from sqlalchemy.orm import Session
from sqlalchemy.util import greenlet_spawn

from fastapi_chatdify_db import Database, DatabaseSettings, db
from tests.models import Item
from tests.observing import Observer
from tests.serving import connected, serve

PID = text("SELECT pg_backend_pid()")


@contextmanager
def listening(name: str, handler: Callable[..., Any]) -> Iterator[None]:
    """Have a handler called by the sessions of the whole process."""
    event.listen(Session, name, handler)
    try:
        yield
    finally:
        event.remove(Session, name, handler)


async def test_closed_session_begins_anew(app: FastAPI, observer: Observer, caplog: pytest.LogCaptureFixture) -> None:
    """``close()``, and the ``with`` that calls it, end a transaction; what they drop is in the log."""

    @app.post("/async")
    async def in_async() -> None:
        for name in "ab":
            async with db.session as session:
                session.add(Item(name))
                await session.commit()
        await db.session.invalidate()
        db.session.add(Item("c"))

    @app.post("/def")
    def in_def() -> None:
        with db.sync_session as session:
            session.add(Item("d"))
            session.commit()
        db.sync_session.add(Item("e"))

    @app.post("/forgetful")
    async def forgetful(flushed: bool) -> None:
        async with db.session as session:
            session.add(Item("lost"))
            if flushed:
                await session.flush()

    async with serve(app) as client:
        for path in ("/async", "/def"):
            assert (await client.post(path)).status_code == 200
        assert caplog.messages == []
        for flushed in (False, True):
            await client.post("/forgetful", params={"flushed": flushed})
    assert await observer.names() == [*"abcde"]
    assert ["what was done with it is lost" in message for message in caplog.messages] == [True, True]


async def whole() -> AsyncIterator[None]:
    async with db.session.begin():
        yield


async def nested() -> AsyncIterator[None]:
    async with db.session.begin_nested():
        yield


def whole_def() -> Iterator[None]:
    with db.sync_session.begin():
        yield


@pytest.mark.parametrize("block", [whole, nested, whole_def])
async def test_dependency_that_yields_in_a_block_of_sqlalchemys(
    app: FastAPI, observer: Observer, block: Callable[[], Any]
) -> None:
    """The commit before the response ends the block, and what the body and background tasks do is another."""

    def add(name: str) -> None:
        (db.session if block is not whole_def else db.sync_session).add(Item(name))

    async def add_later() -> None:
        add("later")

    @app.post("/", dependencies=[Depends(block)])
    async def handler(tasks: BackgroundTasks) -> StreamingResponse:
        async def body() -> AsyncIterator[str]:
            yield ",".join(await db.session.scalars(select(Item.name)))

        add("first")
        tasks.add_task(add_later)
        return StreamingResponse(body(), background=tasks)

    async with serve(app) as client:
        response = await client.post("/")
    assert (response.status_code, response.text) == (200, "first")
    assert await observer.names() == ["first", "later"]


@pytest.mark.parametrize("nested", [False, True])
async def test_connection_that_broke_in_a_rollback(
    app: FastAPI, observer: Observer, caplog: pytest.LogCaptureFixture, nested: bool
) -> None:
    """The next message of the websocket has another one, also if it broke in a savepoint; the log tells of it."""

    @app.websocket("/")
    async def handler(socket: WebSocket) -> None:
        await socket.accept()
        async for name in socket.iter_text():
            db.session.add(Item(name))
            await db.session.flush()
            if name == "broken":
                pid = (await db.session.execute(PID)).scalar_one()
                if nested:
                    await db.session.begin_nested()
                await observer.connection.execute("SELECT pg_terminate_backend($1, 5000)", pid)
                db.rollback_only()
            await socket.send_text(name)

    async with connected(app) as socket:
        for name in ("a", "broken", "b"):
            await socket.send(name)
            assert await socket.recv() == name
    assert await observer.names() == ["a", "b"]
    assert "its connection is discarded" in caplog.text


@pytest.mark.parametrize("name", ["after_rollback", "after_soft_rollback"])
async def test_handler_of_a_rollback_may_ask(
    app: FastAPI, observer: Observer, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    """Also when the unit has only read, and could end without waiting for the server."""
    asked: list[object] = []

    def ask(session: Session, *_: object) -> None:
        if session.is_active:
            asked.append(session.execute(PID).scalar_one())

    @app.get("/")
    async def handler() -> None:
        await db.session.scalars(select(Item))
        raise HTTPException(404)

    with listening(name, ask):
        async with serve(app) as client:
            assert (await client.get("/")).status_code == 404
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert bool(asked) == (name == "after_soft_rollback")  # in the other one SQLAlchemy has no transaction yet


async def test_handler_of_a_rollback_that_fails(observer: Observer, caplog: pytest.LogCaptureFixture) -> None:
    """Its error is logged, also when there was nothing to roll back."""

    def fail(_: Session) -> None:
        raise ZeroDivisionError

    with listening("after_rollback", fail):
        async with db.transaction() as session:
            await session.scalars(select(Item))
            db.rollback_only()
    assert "ZeroDivisionError" in caplog.text


async def test_callback_of_a_handler_of_the_commit(observer: Observer) -> None:
    """The transaction is committed, so the callback runs when the unit ends."""
    ran: list[str] = []

    def notify(session: Session) -> None:
        db.on_commit(lambda: ran.append("ran"))

    def in_thread() -> None:
        with db.sync_transaction() as session:
            session.add(Item("b"))

    with listening("after_commit", notify):
        async with db.transaction() as session:
            session.add(Item("a"))
        assert ran == ["ran"]
        await asyncio.to_thread(in_thread)
        assert ran == ["ran"] * 2
        with pytest.raises(ZeroDivisionError):
            await in_savepoint_of_a_failure()
    assert ran == ["ran"] * 2
    assert await observer.names() == ["a", "b"]


async def in_savepoint_of_a_failure() -> None:
    async with db.transaction() as session:
        async with session.begin_nested():
            session.add(Item("lost"))
        raise ZeroDivisionError


async def test_engine_that_is_disposed_of_under_way(observer: Observer, caplog: pytest.LogCaptureFixture) -> None:
    """Connections beyond the pool's size are closed when they are given back, though there is another pool by then."""
    database = Database(settings=DatabaseSettings(db_pool_size=1, db_max_overflow=1))
    async with database.transaction() as first, database.transaction() as second:
        for session in (first, second):
            await session.scalars(select(Item))
        pool = database.async_engine.pool
        await database.dispose()
    assert caplog.messages == []
    await greenlet_spawn(pool.dispose)  # SQLAlchemy leaves what is given back to it to the garbage collector
