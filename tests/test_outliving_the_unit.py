"""Whoever outlives a unit of work, or comes too late for it, is told; nothing of it is left."""

from __future__ import annotations

import asyncio
import gc
import weakref

import pytest
from fastapi import BackgroundTasks, FastAPI, HTTPException
from sqlalchemy import select, text
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncSession

from fastapi_chatdify_db import Database, DatabaseSettings, OutsideUnitOfWork, db
from tests.models import Item
from tests.observing import Observer
from tests.serving import serve


async def test_session_that_outlives_its_request_is_refused(app: FastAPI, observer: Observer) -> None:
    """A task that goes on after the response is told, instead of opening a transaction that nobody ends."""
    ended = asyncio.Event()
    tasks: list[asyncio.Task[None]] = []

    async def go_on(session: AsyncSession) -> None:
        await ended.wait()
        with pytest.raises(OutsideUnitOfWork, match=r"until the request or block ends .* db\.transaction\(\)"):
            db.session  # noqa: B018
        with pytest.raises(InvalidRequestError, match="permanently closed"):
            await session.execute(select(Item))

    @app.get("/")
    async def handler() -> None:
        tasks.append(asyncio.create_task(go_on(db.session)))

    async with serve(app) as client:
        await client.get("/")
    ended.set()
    await tasks[0]
    assert await observer.in_transaction() == 0


async def test_pipelined_request_is_none_of_the_one_before(app: FastAPI, observer: Observer) -> None:
    """A server may begin it in the context of that one's response; whoever outlives it has no unit all the same."""
    ended = asyncio.Event()
    outcome: asyncio.Future[tuple[object]] = asyncio.get_running_loop().create_future()

    async def outlive() -> None:
        await ended.wait()
        outcome.set_result(await asyncio.gather(write(), return_exceptions=True))

    async def write() -> None:
        db.session.add(Item("late"))

    @app.get("/first")
    async def first(background: BackgroundTasks) -> None:
        db.session.add(Item("first"))
        background.add_task(asyncio.wait_for, outcome, 10)

    @app.get("/second")
    async def second() -> None:
        app.state.task = asyncio.create_task(outlive())
        raise HTTPException(400)

    async with serve(app) as client:
        reader, writer = await asyncio.open_connection("127.0.0.1", client.base_url.port)
        writer.write(b"".join(b"GET /%s HTTP/1.1\r\nHost: x\r\n\r\n" % path for path in (b"first", b"second")))
        await reader.readuntil(b" 200 ")
        await reader.readuntil(b" 400 ")
        ended.set()
        [raised] = await outcome
        writer.close()
    assert isinstance(raised, OutsideUnitOfWork)
    assert await observer.names() == ["first"]


@pytest.mark.parametrize("kind", ["thread", "task"])
async def test_connection_that_comes_after_the_end_is_refused(
    observer: Observer, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Who is still waiting for one when the unit is cancelled opens no transaction that nobody ends."""
    database = Database(settings=DatabaseSettings(db_pool_size=1, db_max_overflow=0))
    begun = asyncio.Event()
    waiting: list[asyncio.Task[object]] = []

    async def unit() -> None:
        async with database.transaction() as session:
            if kind == "task":
                waiting.append(asyncio.create_task(session.execute(text("SELECT 1"))))
                in_use = session.sync_session
            else:
                in_use = database.sync_session
                waiting.append(asyncio.create_task(asyncio.to_thread(in_use.execute, text("SELECT 1"))))
            while not in_use.in_transaction():
                await observer.connection.execute("SELECT pg_sleep(0.01)")
            begun.set()
            await asyncio.Event().wait()

    async with database.async_engine.connect(), asyncio.timeout(20):
        with database.sync_engine.connect():
            cancelled = asyncio.create_task(unit())
            await begun.wait()
            cancelled.cancel()
            with pytest.raises(asyncio.CancelledError):
                await cancelled
    with pytest.raises(OutsideUnitOfWork, match="has ended meanwhile"):
        await waiting[0]
    for pool in (database.async_engine.pool, database.sync_engine.pool):
        assert pool.status().endswith("Current Checked out connections: 0")
    assert await observer.in_transaction() == 0
    assert caplog.messages == ["a session was still in use elsewhere when its unit of work ended"]
    await database.dispose()


@pytest.mark.usefixtures("tables")
async def test_session_is_freed_at_its_end() -> None:
    """And not when the garbage collector comes by, after many a request."""
    gc.collect()
    gc.disable()
    try:
        with db.sync_transaction() as session:
            session.add(Item("x"))
            session.flush()
            freed = weakref.ref(session)
        del session
        assert freed() is None
    finally:
        gc.enable()


async def test_jobs_that_start_the_next_leave_nothing_behind() -> None:
    """Each begins within the unit of the one before it; the last does not hold on to all of them."""
    sessions: weakref.WeakSet[AsyncSession] = weakref.WeakSet()
    done: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    jobs: set[asyncio.Task[None]] = set()

    async def job(left: int, begun: asyncio.Event, one_before_ended: asyncio.Event) -> None:
        ended, next_begun = asyncio.Event(), asyncio.Event()
        async with db.transaction() as session:
            sessions.add(session)
            begun.set()
            await one_before_ended.wait()
            if left:
                task = asyncio.create_task(job(left - 1, next_begun, ended))
                jobs.add(task)
                task.add_done_callback(jobs.discard)
                await next_begun.wait()
            else:
                gc.collect()
                done.set_result(len(sessions))
        ended.set()

    at_once = asyncio.Event()
    at_once.set()
    await job(50, asyncio.Event(), at_once)
    assert await done <= 3


async def test_connection_keeps_nothing_of_the_task_that_opened_it(observer: Observer) -> None:
    """It keeps the context in which it was made, and so the unit, but not what the unit's task returned."""

    class Result:
        pass

    async def branch() -> Result:
        async with db.transaction() as session:
            await session.execute(text("SELECT 1"))
        return Result()

    async with db.transaction() as session:
        await session.execute(text("SELECT 1"))  # on the one that is there already
        freed = weakref.ref(await asyncio.create_task(branch()))
    await asyncio.sleep(0)  # in this turn, the event loop still has it
    gc.collect()
    assert freed() is None
