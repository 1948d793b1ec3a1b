"""Threads that nobody waits for any more: what they go on to do is in no transaction of anybody's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from threading import Event

import httpx
import pytest
from fastapi import FastAPI
from sqlalchemy import Connection, event, insert, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session
from starlette.background import BackgroundTask
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from fastapi_chatdify_db import Database, DatabaseSettings, DBSessionMiddleware, OutsideUnitOfWork, db
from tests.models import Item
from tests.observing import PATIENCE, Observer
from tests.serving import serve


@asynccontextmanager
async def impatient(endpoint: Callable[[], object]) -> AsyncIterator[tuple[httpx.AsyncClient, asyncio.Future[object]]]:
    """A client of an application whose ``def`` endpoint is cancelled after 0.2 s, and how its thread will end."""
    app = FastAPI()
    app.add_middleware(DBSessionMiddleware)
    loop = asyncio.get_running_loop()
    outcome: asyncio.Future[object] = loop.create_future()

    @app.post("/")
    def work() -> None:
        try:
            result = endpoint()
        except Exception as error:
            result = error
        loop.call_soon_threadsafe(outcome.set_result, result)

    async def within_a_limit(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(0.2):
                await app(scope, receive, send)
        await PlainTextResponse("late", 504)(scope, receive, send)

    async with serve(within_a_limit) as client:
        yield client, outcome


async def test_thread_commits_nothing(observer: Observer) -> None:
    """``asyncio.timeout`` does not wait for a ``def`` endpoint, whose own commit is then refused: nothing is there."""

    def work() -> str:
        db.sync_session.add(Item("a"))
        db.sync_session.flush()
        db.sync_session.execute(text("SELECT pg_sleep(0.5)"))
        db.sync_session.commit()
        return "committed"

    async with impatient(work) as (client, outcome):
        assert (await client.post("/")).status_code == 504
        assert isinstance(await outcome, SQLAlchemyError | OutsideUnitOfWork)
    assert await observer.names() == []


async def test_block_of_a_thread_is_its_own(app: FastAPI, observer: Observer) -> None:
    """It is committed as a whole, also when the request ends first; the block may be a helper's of the application."""
    written, go_on, ended = asyncio.Event(), Event(), asyncio.Event()
    loop, tasks = asyncio.get_running_loop(), []

    @contextmanager
    def block() -> Iterator[Session]:
        with db.sync_transaction() as session:
            yield session

    def work() -> None:
        with block() as session:
            session.add(Item("first half"))
            session.flush()
            loop.call_soon_threadsafe(written.set)
            go_on.wait(60)
            session.add(Item("second half"))

    @app.post("/")
    async def handler() -> None:
        tasks.append(asyncio.create_task(asyncio.to_thread(work)))
        await written.wait()

    async def to_its_end(scope: Scope, receive: Receive, send: Send) -> None:
        await app(scope, receive, send)
        ended.set()

    async with serve(to_its_end) as client:
        assert (await client.post("/")).status_code == 200
        await ended.wait()
        go_on.set()
        await asyncio.gather(*tasks)
    assert await observer.names() == ["first half", "second half"]


@pytest.mark.parametrize("many", [False, True], ids=["one row", "many rows"])
async def test_next_statement_of_the_thread_is_in_no_transaction(observer: Observer, many: bool) -> None:
    """It waits behind the ROLLBACK, and is not run on the connection that somebody else has by then."""
    single = Database("single", settings=DatabaseSettings(db_pool_size=1, db_max_overflow=0))
    write = text("INSERT INTO item (name) SELECT CAST(:name AS text) FROM pg_sleep(0.04)")

    def work() -> str:
        for number in range(20):
            names = [{"name": f"{number} {each}"} for each in "ab"]
            single.sync_session.execute(write, names if many else names[0])
        return "all done"

    try:
        for round_ in range(3):
            async with impatient(work) as (client, outcome):
                assert (await client.post("/")).status_code == 504
                assert isinstance(await outcome, SQLAlchemyError | OutsideUnitOfWork)
            async with single.transaction():
                await asyncio.to_thread(single.sync_session.add, Item(str(round_)))
            assert await observer.in_transaction() == 0
        assert await observer.names() == ["0", "1", "2"]
    finally:
        await single.dispose()


async def test_thread_in_its_begin_runs_no_statement(observer: Observer) -> None:
    """The session cannot be rolled back while a handler of ``after_begin`` is running in it."""
    go_on = Event()

    def work() -> str:
        session = db.sync_session
        event.listen(session, "after_begin", lambda *_: go_on.wait(60))
        session.execute(insert(Item).values(name="a"))
        return "inserted"

    async with impatient(work) as (client, outcome):
        assert (await client.post("/")).status_code == 504
        go_on.set()
        assert isinstance(await outcome, OutsideUnitOfWork)
    assert await observer.in_transaction() == 0
    assert await observer.names() == []


def test_thread_that_rolls_back_goes_on(tables: None) -> None:
    """Its own statements are none of a thread left behind: a handler of the application's may ask something last."""
    asked: list[int] = []

    def ask(connection: Connection) -> None:
        asked.append(connection.execute(text("SELECT 1")).scalar_one())

    event.listen(db.sync_engine, "rollback", ask)
    try:
        with suppress(ValueError), db.sync_transaction() as session:
            session.add(Item("x"))
            session.flush()
            raise ValueError
    finally:
        event.remove(db.sync_engine, "rollback", ask)
    assert asked == [1]


async def test_session_goes_on_after_a_thread_that_nobody_waited_for(app: FastAPI, observer: Observer) -> None:
    """A background task writes to the session whose statement, in a thread, took too long for the response."""

    def slow() -> None:
        db.sync_session.execute(text("SELECT pg_sleep(0.5)"))

    def note() -> None:
        db.sync_session.add(Item("noted"))

    @app.post("/")
    async def handler() -> Response:
        with suppress(TimeoutError):
            async with asyncio.timeout(0.2):
                await asyncio.to_thread(slow)
        return PlainTextResponse("late", 504, background=BackgroundTask(note))

    async with serve(app) as client:
        assert (await client.post("/")).status_code == 504
    assert await observer.names() == ["noted"]


async def test_thread_of_a_stream_left_by_its_client(app: FastAPI, observer: Observer) -> None:
    """It goes on when its block has been rolled back, and begins no transaction that nobody would end."""
    go_on = Event()
    bodies: list[Iterator[bytes]] = []
    steps: list[asyncio.Future[bytes]] = []

    def body() -> Iterator[bytes]:
        with db.sync_transaction() as session:
            session.add(Item("lost"))
            session.flush()
            yield b"first"
            go_on.wait(PATIENCE)
            session.execute(insert(Item).values(name="later"))
            yield b"last"

    @app.get("/")
    async def stream() -> StreamingResponse:
        left = body()
        bodies.append(left)  # or it would end with the response

        async def chunks() -> AsyncIterator[bytes]:
            while True:
                steps.append(asyncio.ensure_future(asyncio.to_thread(next, left)))
                yield await asyncio.shield(steps[-1])

        return StreamingResponse(chunks())

    async with serve(app) as client:
        async with client.stream("GET", "/") as response:
            assert await anext(response.aiter_raw()) == b"first"
        await observer.until_no_transactions()
        go_on.set()
        with pytest.raises(OutsideUnitOfWork):
            await steps[-1]
    assert await observer.names() == []
