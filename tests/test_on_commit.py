"""``db.on_commit`` runs what must only happen when the rows are there."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from contextvars import copy_context
from functools import partial
from typing import Annotated

import pytest
from anyio import to_thread
from fastapi import Depends, FastAPI, HTTPException
from sqlalchemy import select, text
from sqlalchemy.exc import IntegrityError

from fastapi_chatdify_db import OutsideUnitOfWork, db
from tests.models import Item
from tests.observing import Observer
from tests.serving import serve


async def test_callback_finds_the_row_before_the_response_leaves(app: FastAPI, observer: Observer) -> None:
    """Coroutine functions run on the loop and plain ones in a thread, in order, each after the commit."""
    seen: list[object] = []

    @app.post("/")
    async def handler() -> None:
        db.session.add(Item("a"))

        async def on_the_loop() -> None:
            seen.append(await observer.names())

        db.on_commit(on_the_loop)
        db.on_commit(lambda: seen.append(threading.current_thread() is threading.main_thread()))
        seen.append(await observer.names())

    async with serve(app) as client:
        await client.post("/")
        assert seen == [[], ["a"], False]


@pytest.mark.parametrize("path", ["/refused", "/conflict", "/dry-run"])
async def test_nothing_runs_after_a_rollback(app: FastAPI, observer: Observer, path: str) -> None:
    """An error status, a commit that fails and ``rollback_only`` drop the callbacks."""
    ran: list[str] = []

    @app.post("/refused")
    async def refused() -> None:
        db.on_commit(lambda: ran.append("before any statement"))
        db.session.add(Item("a"))
        await db.session.flush()
        db.on_commit(lambda: ran.append("after one"))
        raise HTTPException(409)

    @app.post("/conflict")
    async def conflict() -> None:
        db.session.add_all([Item("a"), Item("a")])
        db.on_commit(lambda: ran.append("conflict"))

    @app.post("/dry-run")
    async def dry_run() -> None:
        db.on_commit(lambda: ran.append("dry run"))
        db.rollback_only()

    async with serve(app) as client:
        await client.post(path)
    assert ran == []


async def greeting() -> str:
    return str(await db.session.scalar(text("SELECT 'hello'")))


async def test_def_endpoint_is_decided_by_its_own_session(app: FastAPI, observer: Observer) -> None:
    """Also when an async dependency has used the other one: no callback of a commit that fails."""
    ran: list[str] = []

    @app.post("/")
    def handler(greeting: Annotated[str, Depends(greeting)]) -> None:
        db.sync_session.add_all([Item("a"), Item("a")])
        db.sync_session.flush()
        db.on_commit(lambda: ran.append(greeting))

    async with serve(app) as client:
        assert (await client.post("/")).status_code == 500
    assert ran == []


async def test_savepoint_of_a_def_endpoint_decides_about_its_callbacks(app: FastAPI, observer: Observer) -> None:
    """They are bound to the session that the endpoint uses, though the request has another kind as well."""
    ran: list[str] = []

    @app.post("/")
    def handler() -> None:
        doomed = db.sync_session.begin_nested()
        db.on_commit(lambda: ran.append("dropped"))
        doomed.rollback()
        db.on_commit(lambda: ran.append("kept"))

    async with serve(app) as client:
        assert (await client.post("/")).status_code == 200
    assert ran == ["kept"]


async def test_savepoint_decides_about_its_own_callbacks(observer: Observer) -> None:
    """A savepoint's rollback drops what was registered inside it, also inside savepoints that it contains."""
    ran: list[str] = []
    async with db.transaction() as session:
        session.add(Item("a"))
        db.on_commit(lambda: ran.append("outer"))
        async with session.begin_nested():
            db.on_commit(lambda: ran.append("kept"))
        doomed = await session.begin_nested()
        db.on_commit(lambda: ran.append("dropped"))
        async with session.begin_nested():
            db.on_commit(lambda: ran.append("released, then dropped"))
        await doomed.rollback()
        db.on_commit(lambda: ran.append("last"))
        assert ran == []
    assert ran == ["outer", "kept", "last"]


async def test_savepoint_that_fails_drops_its_callbacks(observer: Observer) -> None:
    """The same when the savepoint's block ends with an exception."""
    ran: list[str] = []

    async def store_twice(name: str) -> None:
        async with db.session.begin_nested():
            db.on_commit(lambda: ran.append(name))
            db.session.add_all([Item(name), Item(name)])
            await db.session.execute(text("SET CONSTRAINTS ALL IMMEDIATE"))

    async with db.transaction() as session:
        session.add(Item("a"))
        db.on_commit(lambda: ran.append("a"))
        with pytest.raises(IntegrityError):
            await store_twice("b")
    assert ran == ["a"]
    assert await observer.names() == ["a"]


async def test_savepoint_whose_flush_fails_drops_its_callbacks(observer: Observer) -> None:
    """The same when it is a flush that fails, which takes the savepoint with it; what is around it stays."""
    ran: list[str] = []

    async def store(name: str) -> None:
        async with db.session.begin_nested():
            async with db.session.begin_nested():
                db.on_commit(lambda: ran.append("released, then dropped"))
            db.session.add(Item(None))  # type: ignore[arg-type]  # what the column refuses
            db.on_commit(lambda: ran.append(name))
            try:
                await db.session.flush()
            finally:
                db.on_commit(lambda: ran.append("afterwards"))

    async with db.transaction() as session:
        session.add(Item("a"))
        await session.flush()
        db.on_commit(lambda: ran.append("a"))
        with pytest.raises(IntegrityError):
            await store("b")
        db.on_commit(lambda: ran.append("c"))
    assert ran == ["a", "c"]
    assert await observer.names() == ["a"]


async def test_own_commit_makes_its_callbacks_due(observer: Observer) -> None:
    """What a handler committed itself is committed, so its callbacks run although the rest is rolled back."""
    ran: list[str] = []

    async def work() -> None:
        async with db.transaction() as session:
            session.add(Item("a"))
            db.on_commit(lambda: ran.append("committed"))
            await session.commit()
            session.add(Item("b"))
            db.on_commit(lambda: ran.append("rolled back"))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await work()
    assert ran == ["committed"]
    assert await observer.names() == ["a"]


async def test_thousands_of_callbacks(observer: Observer) -> None:
    """Each costs as much as the first."""
    ran: list[int] = []

    def work() -> float:
        with db.sync_transaction() as session:
            session.add(Item("a"))
            session.flush()
            for number in range(5000):
                db.on_commit(partial(ran.append, number))
            start = time.perf_counter()
        return time.perf_counter() - start

    assert await asyncio.to_thread(work) < 2
    assert ran == list(range(5000))


@pytest.mark.parametrize("end", ["rollback", "close"])
async def test_own_rollback_drops_its_callbacks(observer: Observer, end: str) -> None:
    """After ``session.rollback()`` or ``session.close()`` the unit goes on with what comes later."""
    ran: list[str] = []
    async with db.transaction() as session:
        session.add(Item("a"))
        db.on_commit(lambda: ran.append("rolled back"))
        await getattr(session, end)()
        session.add(Item("b"))
        db.on_commit(lambda: ran.append("committed"))
    assert ran == ["committed"]
    assert await observer.names() == ["b"]


async def test_callback_may_write_and_register_another(observer: Observer) -> None:
    """What a callback writes is committed, and then the callbacks that it registered run."""
    names: list[list[str]] = []

    async def first() -> None:
        db.session.add(Item("by the callback"))
        db.on_commit(second)

    async def second() -> None:
        names.append(await observer.names())

    async with db.transaction() as session:
        session.add(Item("a"))
        db.on_commit(first)
    assert names == [["a", "by the callback"]]


async def test_release_runs_what_is_due(observer: Observer) -> None:
    """``db.release()`` commits, so callbacks run there, once, and the session goes on."""
    ran: list[str] = []
    async with db.transaction() as session:
        session.add(Item("a"))
        db.on_commit(lambda: ran.append("at release"))
        await db.release()
        assert ran == ["at release"]
        assert await observer.names() == ["a"]
        assert await observer.in_transaction() == 0
        session.add(Item("b"))
    assert ran == ["at release"]
    assert await observer.names() == ["a", "b"]


async def test_sync_unit_takes_plain_functions(observer: Observer) -> None:
    """In synchronous code a coroutine function has no loop to run on, which registering it says."""
    ran: list[str] = []

    async def never() -> None:
        ran.append("never")

    def work() -> None:
        with db.sync_transaction() as session:
            session.add(Item("a"))
            db.on_commit(lambda: ran.append("sync"))
            assert ran == []
            with pytest.raises(OutsideUnitOfWork, match="plain function"):
                db.on_commit(never)

    await asyncio.to_thread(work)
    assert ran == ["sync"]


async def test_threads_that_register_their_first_one_at_once(observer: Observer) -> None:
    """None is lost, however close they come."""

    def work() -> None:
        with db.sync_transaction(), ThreadPoolExecutor(8) as threads:
            at_once = threading.Barrier(8)

            def register() -> None:
                at_once.wait()
                db.on_commit(lambda: ran.append(1))

            for _ in range(8):
                threads.submit(copy_context().run, register)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(300):
            ran: list[int] = []
            await asyncio.to_thread(work)
            assert len(ran) == 8
    finally:
        sys.setswitchinterval(interval)


async def test_callback_on_the_event_loop_beside_a_sync_session(observer: Observer) -> None:
    """It belongs to the async one, and so to its savepoint."""
    ran: list[str] = []
    async with db.transaction() as session:
        await to_thread.run_sync(lambda: db.sync_session.scalar(select(Item)))
        with suppress(ZeroDivisionError):
            async with session.begin_nested():
                db.on_commit(lambda: ran.append("lost"))
                raise ZeroDivisionError
    assert ran == []
