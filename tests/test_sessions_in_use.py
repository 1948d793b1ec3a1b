"""A session that another task or thread is in the middle of: nobody else is harmed by the mistake."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from contextvars import copy_context
from threading import Barrier, BrokenBarrierError

import httpx
import pytest
from fastapi import FastAPI
from sqlalchemy import Executable, event, select, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from fastapi_chatdify_db import SessionInUse, db
from fastapi_chatdify_db.engines import Engines
from tests.models import Counter, Item
from tests.observing import Observer
from tests.serving import serve


@pytest.fixture
async def client(app: FastAPI, observer: Observer) -> AsyncIterator[httpx.AsyncClient]:
    @app.post("/branches")
    async def branches() -> None:
        """What ``asyncio.gather`` leaves running when one branch fails."""
        began = asyncio.Event()

        async def slow() -> None:
            began.set()
            await db.session.execute(text("INSERT INTO item SELECT 1, 'branch' FROM pg_sleep(0.3)"))

        async def fails() -> None:
            await began.wait()
            await asyncio.sleep(0)
            raise ZeroDivisionError

        await asyncio.gather(slow(), fails())

    @app.post("/left-running")
    async def left_running() -> str:
        """A task that nobody waits for, on the request's session."""
        db.session.add(Item("the handler's"))
        app.state.task = asyncio.create_task(
            db.session.execute(text("INSERT INTO item SELECT 1, 'task' FROM pg_sleep(0.3)"))
        )
        await asyncio.sleep(0.05)
        return "stored"

    @app.post("/left-running/not-modified", status_code=304)
    @app.post("/left-running/no-content", status_code=204)
    async def left_running_without_content() -> None:
        await left_running()

    @app.post("/left-reading")
    async def left_reading() -> None:
        """The same with a read, which begins no transaction."""
        app.state.task = asyncio.create_task(db.session.scalar(select(Item)))
        await asyncio.sleep(0.1)

    @app.get("/other")
    async def other() -> None:
        await db.session.get(Counter, 1)

    @app.post("/ordinary")
    async def ordinary(name: str) -> None:
        db.session.add(Item(name))

    async with serve(app) as client:
        yield client


@pytest.mark.parametrize(
    "path", ["/branches", "/left-running", *(f"/left-running/{empty}" for empty in ("no-content", "not-modified"))]
)
async def test_mistake_is_nobody_elses(client: httpx.AsyncClient, observer: Observer, path: str) -> None:
    """Who ends a unit in the middle of another task's statement gets an error; the next requests are as always."""
    for name in ("a", "b"):
        await client.post("/ordinary", params={"name": name})
    assert (await client.post(path)).status_code == 500
    assert await observer.in_transaction() == 0
    statuses = [(await client.post("/ordinary", params={"name": name})).status_code for name in "cdef"]
    assert statuses == [200] * 4
    assert await observer.names() == list("abcdef")
    assert await observer.in_transaction() == 0


@pytest.mark.parametrize(("statement", "warnings"), [(text("INSERT INTO item SELECT 1, 'a'"), 1), (select(Item), 0)])
async def test_statement_that_was_cut_off_is_not_run_again(
    observer: Observer, statement: Executable, warnings: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Its unit has ended: unlike one that found its connection dead it gets no other one."""
    connected: list[object] = []
    running: asyncio.Task[object]

    async def leave_it_running() -> None:
        nonlocal running
        async with db.transaction() as session:
            await session.get(Counter, 1)
            event.listen(db.async_engine.sync_engine, "connect", count)
            running = asyncio.create_task(session.execute(statement))
            await observer.until_somebody_waits_for_a_lock()
            raise ZeroDivisionError

    def count(*_: object) -> None:
        connected.append(1)

    async with observer.connection.transaction():
        await observer.connection.execute("LOCK TABLE item IN ACCESS EXCLUSIVE MODE")
        with pytest.raises(ZeroDivisionError):
            await leave_it_running()
        with pytest.raises(SQLAlchemyError, match="clos"):
            await asyncio.wait_for(running, 30)
    event.remove(db.async_engine.sync_engine, "connect", count)
    assert connected == []
    cut_off = "a rollback came in the middle of a statement, whose connection is discarded"
    assert caplog.messages == [cut_off] * warnings


async def test_read_that_nobody_waits_for_holds_up_nobody(client: httpx.AsyncClient, observer: Observer) -> None:
    """Its connection is not given to the next request, which would have to wait for the answer."""
    await client.get("/other")
    async with observer.connection.transaction():
        await observer.connection.execute("LOCK TABLE item IN ACCESS EXCLUSIVE MODE")
        assert (await client.post("/left-reading")).status_code == 200
        assert (await client.get("/other", timeout=30)).status_code == 200


@pytest.mark.parametrize("connected", [True, False])
async def test_commit_in_the_middle_of_a_statement_is_refused(observer: Observer, connected: bool) -> None:
    """The driver would send none, since it does not know yet that a transaction began."""

    statement: asyncio.Task[object]

    async def leave_it_running() -> None:
        nonlocal statement
        async with db.transaction() as session:
            statement = asyncio.create_task(session.execute(text("INSERT INTO item SELECT 1, 'a' FROM pg_sleep(0.3)")))
            await (observer.until_active() if connected else asyncio.sleep(0))

    with pytest.raises(SessionInUse, match=r"db\.transaction\(\)"):
        await leave_it_running()
    with pytest.raises(SQLAlchemyError, match="clos"):
        await statement
    assert await observer.names() == []


@pytest.mark.parametrize("waits", [True, False])
async def test_commit_that_was_refused_may_be_handled(app: FastAPI, observer: Observer, waits: bool) -> None:
    """The unit goes on: it commits all of it later, or is refused again, and is no success without its rows."""
    statements: list[asyncio.Task[object]] = []

    @app.post("/")
    async def handler() -> None:
        db.session.add(Item("a"))
        await db.session.flush()
        statements.append(asyncio.create_task(db.session.execute(text("SELECT pg_sleep(0.3)"))))
        await asyncio.sleep(0)
        with pytest.raises(SessionInUse):
            await db.session.commit()
        if waits:
            await asyncio.wait(statements)

    async with serve(app) as client:
        assert (await client.post("/")).status_code == (200 if waits else 500)
    await asyncio.gather(*statements, return_exceptions=True)
    assert await observer.names() == (["a"] if waits else [])


async def test_response_does_not_wait_for_the_commit_of_a_task(app: FastAPI, observer: Observer) -> None:
    """If that fails, the response's would find nothing to do, and be a success without its rows."""
    commits: list[asyncio.Task[None]] = []

    @app.post("/")
    async def handler() -> None:
        db.session.add(Item("a"))
        commits.append(asyncio.create_task(db.release()))
        await observer.until_somebody_waits_for_a_lock()

    async with serve(app) as client, observer.connection.transaction():
        await observer.connection.execute("INSERT INTO item (name) VALUES ('a')")
        async with asyncio.timeout(30):
            assert (await client.post("/")).status_code == 500
    await asyncio.gather(*commits, return_exceptions=True)
    assert await observer.names() == ["a"]


def test_threads_that_ask_at_once_get_one_session(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two would be two transactions, of which one may fail."""
    made, both = Engines.new_sync_session, Barrier(2)

    def make(engines: Engines, isolation_level: str | None = None) -> Session:
        with suppress(BrokenBarrierError):  # nobody else is making one
            both.wait(0.2)
        return made(engines, isolation_level)

    monkeypatch.setattr(Engines, "new_sync_session", make)

    async def ask_twice() -> list[Session]:
        async with db.transaction():
            asks = [asyncio.to_thread(copy_context().run, lambda: db.sync_session) for _ in range(2)]
            return list(await asyncio.gather(*asks))

    first, second = asyncio.run(ask_twice())
    assert first is second
