"""A durable task is stored with the commit of what calls it, and nothing is left of it after a rollback."""

from __future__ import annotations

import asyncio
import tracemalloc
from typing import Any

import pytest
from celery import Celery
from fastapi import FastAPI, HTTPException
from sqlalchemy import event, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

import celery_ext
from celery_ext.durable import statements
from fastapi_chatdify_db import db
from tests.models import Item
from tests.observing import Observer
from tests.serving import serve
from tests.worker.running import Worker, task


async def test_every_kind_of_unit_sends(relayed: Worker, rows: Observer) -> None:
    """Requests, ``async def`` or ``def``, and blocks of either kind store the task with what they write."""
    read = relayed.task("read_item")
    app = FastAPI()
    db.init_app(app)

    @app.post("/async/{name}")
    async def in_async(name: str) -> str:
        db.session.add(Item(name))
        return read.delay_durably(name)

    @app.post("/def/{name}")
    def in_def(name: str) -> str:
        db.sync_session.add(Item(name))
        return read.delay_durably(name)

    async with serve(app) as client:
        ids = [(await client.post(path)).json() for path in ("/async/a", "/def/b")]
    async with db.transaction() as session:
        session.add(Item("c"))
        ids.append(read.delay_durably("c"))
    with db.sync_transaction() as sync_session:
        sync_session.add(Item("d"))
        ids.append(read.delay_durably("d"))
    assert [await relayed.result(task_id) for task_id in ids] == [True] * 4
    for task_id in ids:
        await rows.until_status(task_id, "done")


async def test_serializable_transactions_side_by_side(unheard: Celery[Any], rows: Observer) -> None:
    """Tasks without an ordering key have nothing in common: none makes the commit of another one fail."""
    record = task(unheard, "record")

    async def begin(session: AsyncSession) -> None:
        await session.connection(execution_options={"isolation_level": "SERIALIZABLE"})
        await session.execute(text("SELECT count(*) FROM item WHERE false"))

    async with db.transaction() as session:
        await begin(session)
        async with db.transaction() as inner:
            await begin(inner)
            record.delay_durably("first")
        record.delay_durably("second")
        record.apply_durably(("third",), idempotency_key="third")
    assert len(await rows.durable_tasks()) == 3


async def test_a_task_alone_is_stored_too(unheard: Celery[Any], rows: Observer) -> None:
    """A transaction that does nothing else commits the row."""
    async with db.transaction():
        task(unheard, "record").delay_durably("x")
    with db.sync_transaction():
        task(unheard, "record").delay_durably("y", prefix="z")
    assert await rows.durable_tasks() == [("pending", '[["x"], {}]'), ("pending", '[["y"], {"prefix": "z"}]')]


async def test_task_that_is_a_class(unheard: Celery[Any], rows: Observer) -> None:
    """Celery checks no arguments of it; it is stored, or sent, with those that it is given."""

    class Written(celery_ext.Task):
        name = "written"

        def run(self, name: str) -> None: ...

    written = unheard.register_task(Written())
    assert isinstance(written, celery_ext.Task)
    async with db.transaction():
        written.delay_durably("x")
        assert written.delay_on_commit("x")
    assert await rows.durable_tasks() == [("pending", '[["x"], {}]')]


async def test_delay_is_apply(unheard: Celery[celery_ext.Task], rows: Observer) -> None:
    """A class that gives all its tasks an option needs one method of each kind, as with Celery's own ``delay``."""

    class Hasty(celery_ext.Task):
        def apply_durably(self, *args: Any, **options: Any) -> str:
            return super().apply_durably(*args, countdown=7, **options)

        def apply_async_on_commit(self, *args: Any, **options: Any) -> str:
            return super().apply_async_on_commit(*args, task_id="sent", **options)

    @unheard.task(base=Hasty, shared=False)
    def hasty() -> None: ...

    async with db.transaction():
        hasty.delay_durably()
        assert hasty.delay_on_commit() == "sent"
    assert await rows.connection.fetchval("SELECT due_at > clock_timestamp() FROM durable_task")


async def test_stored_with_the_session_that_is_there(unheard: Celery[Any], rows: Observer) -> None:
    """Where an ``async def`` endpoint has the synchronous session alone, its commit decides about the task."""
    app = FastAPI()
    db.init_app(app)

    @app.post("/")
    async def handler() -> None:
        db.sync_session.add_all([Item("same"), Item("same")])
        task(unheard, "record").delay_durably("x")

    async with serve(app) as client:
        assert (await client.post("/")).status_code == 500
    assert (await rows.names(), await rows.durable_tasks()) == ([], [])


async def test_savepoint_around_a_released_one(unheard: Celery[Any], rows: Observer) -> None:
    """What was stored in a savepoint that was kept goes with the one around it."""
    async with db.transaction() as session:
        outer = await session.begin_nested()
        async with session.begin_nested():
            task(unheard, "record").delay_durably("x")
        await outer.rollback()
    assert await rows.durable_tasks() == []


@pytest.mark.parametrize("name", ["before_flush", "after_flush", "after_flush_postexec"])
@pytest.mark.parametrize("explicit", [False, True])
async def test_stored_by_a_handler_of_a_flush(unheard: Celery[Any], rows: Observer, name: str, explicit: bool) -> None:
    """Be it the COMMIT's own flush, or one before; each task once."""

    def store(session: Session, *_: object) -> None:
        if not session.info.setdefault("stored", False):
            session.info["stored"] = True
            task(unheard, "record").delay_durably("by a handler")

    def in_thread() -> None:
        with db.sync_transaction() as session:
            session.add(Item("b"))
            if explicit:
                session.flush()

    event.listen(Session, name, store)
    try:
        async with db.transaction() as session:
            session.add(Item("a"))
            if explicit:
                await session.flush()
        await asyncio.to_thread(in_thread)
    finally:
        event.remove(Session, name, store)
    assert await rows.names() == ["a", "b"]
    assert await rows.connection.fetchval("SELECT count(*) FROM durable_task") == 2


async def test_relays_are_told_of_each_commit(unheard: Celery[Any], rows: Observer) -> None:
    """Once, however many tasks it stored, and never of a rollback: nobody has to poll."""
    told: asyncio.Queue[None] = asyncio.Queue()
    await rows.connection.add_listener(statements.CHANNEL, lambda *_: told.put_nowait(None))
    record = task(unheard, "record")
    for outcome in ("commit", "roll back", "roll back a savepoint"):
        async with db.transaction() as session:
            if outcome == "roll back a savepoint":
                async with session.begin_nested() as savepoint:
                    record.delay_durably("x")
                    await savepoint.rollback()
                continue
            record.delay_durably("x")
            record.delay_durably("y")
            if outcome == "roll back":
                db.rollback_only()
    await asyncio.wait_for(told.get(), 30)
    await rows.connection.execute("SELECT 1")  # what the server had to tell comes before the answer
    assert told.empty()
    await rows.connection.reset()


async def test_nothing_is_left_of_a_rollback(unheard: Celery[Any], rows: Observer) -> None:
    """Neither of a refused request nor of a savepoint, while what is around the savepoint stays."""
    record = task(unheard, "record")
    app = FastAPI()
    db.init_app(app)

    @app.post("/")
    async def refused() -> None:
        record.delay_durably("refused")
        raise HTTPException(422)

    async with serve(app) as client:
        assert (await client.post("/")).status_code == 422
    async with db.transaction() as session:
        record.delay_durably("before")
        savepoint = await session.begin_nested()
        record.delay_durably("one")
        record.delay_durably("two")
        await savepoint.rollback()
        async with session.begin_nested():
            record.delay_durably("kept")
        record.delay_durably("after")
    assert [arguments for _, arguments in await rows.durable_tasks()] == [
        f'[["{name}"], {{}}]' for name in ("before", "kept", "after")
    ]


async def test_nothing_is_left_of_a_savepoint_whose_flush_fails(unheard: Celery[Any], rows: Observer) -> None:
    """Be it stored before the flush, by a handler of it, or after it."""
    record = task(unheard, "record")
    event.listen(Item, "before_insert", lambda *_: record.delay_durably("by a handler"), once=True)

    async def fail() -> None:
        async with db.session.begin_nested():
            record.delay_durably("inside")
            db.session.add(Item(None))  # type: ignore[arg-type]  # what the column refuses
            try:
                await db.session.flush()
            finally:
                record.delay_durably("afterwards")

    async with db.transaction():
        record.delay_durably("before")
        with pytest.raises(IntegrityError):
            await fail()
        record.delay_durably("after")
    assert [arguments for _, arguments in await rows.durable_tasks()] == ['[["before"], {}]', '[["after"], {}]']


async def test_many_rows_in_one_transaction(unheard: Celery[Any], rows: Observer) -> None:
    """10,000 calls in one transaction are inserted in batches; memory stays within a few rows' worth each."""
    record = task(unheard, "record")
    async with db.transaction():
        record.delay_durably("warm")
    tracemalloc.start()
    async with db.transaction():
        for number in range(10_000):
            record.delay_durably(f"{number}")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert await rows.connection.fetchval("SELECT count(*) FROM durable_task") == 10_001
    assert peak < 64 * 1024 * 1024
