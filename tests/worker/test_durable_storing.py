"""What calls a durable task stores it with its transaction, or says at once why it cannot."""

from __future__ import annotations

import asyncio
import tracemalloc
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import pytest
from celery import Celery
from fastapi import FastAPI, HTTPException
from sqlalchemy import event, inspect
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import DeclarativeBase, Session

import celery_ext
from celery_ext import ArgumentsNotSerializable, DurableDispatchUnsupported
from celery_ext.binding import database_of
from celery_ext.durable import statements
from fastapi_chatdify_db import Database, DatabaseSettings, OutsideUnitOfWork, db
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
    """Be it stored before the flush or by a handler of it."""
    record = task(unheard, "record")
    event.listen(Item, "before_insert", lambda *_: record.delay_durably("by a handler"), once=True)

    async def fail() -> None:
        async with db.session.begin_nested():
            record.delay_durably("inside")
            db.session.add(Item(None))  # type: ignore[arg-type]  # what the column refuses
            await db.session.flush()

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


async def test_wrong_arguments_fail_at_the_call(unheard: Celery[Any], rows: Observer) -> None:
    """What JSON does not carry, or the task does not take, is an error where it is written."""
    async with db.transaction():
        with pytest.raises(ArgumentsNotSerializable, match="send ids, not objects"):
            task(unheard, "record").delay_durably(object())
        with pytest.raises(TypeError, match="missing 1 required"):
            task(unheard, "record").delay_durably()
        with pytest.raises(DurableDispatchUnsupported, match="db_session=False"):
            task(unheard, "without_session").delay_durably()
        with pytest.raises(TypeError, match="write idempotency_key="):
            task(unheard, "record").apply_durably(("x",), task_id="mine")
        with pytest.raises(TypeError, match="order_key; write ordering_key="):
            task(unheard, "record").apply_durably(("x",), order_key="k")
        with pytest.raises(TypeError, match="leave out on_error="):
            task(unheard, "record").apply_durably(("x",), on_error="raise")
    with pytest.raises(OutsideUnitOfWork, match=r"async with db\.transaction\(\)"):
        task(unheard, "record").delay_durably("x")
    assert await rows.durable_tasks() == []


@pytest.mark.parametrize("option", ["ordering_key", "idempotency_key"])
async def test_keys_that_cannot_be_stored_fail_at_the_call(
    unheard: Celery[celery_ext.Task], rows: Observer, option: str
) -> None:
    """Whoever means a number or a UUID writes it as a string."""
    record = task(unheard, "record")
    async with db.transaction():
        for key in (7, uuid4(), "a\0b", "\ud800"):
            with pytest.raises(ArgumentsNotSerializable, match=rf"write a string.*: {option}=str\(\.\.\.\)"):
                record.apply_durably(("x",), **cast("dict[str, Any]", {option: key}))
    assert await rows.durable_tasks() == []


async def test_length_of_keys(unheard: Celery[celery_ext.Task], rows: Observer) -> None:
    """An index has room for an ordering key of 500 characters, whichever; others are only made an id of."""
    record = task(unheard, "record")
    longest = "".join(chr(0x10000 + (number * 7919) % 0xFFFFF) for number in range(500))  # nothing to compress
    async with db.transaction():
        with pytest.raises(ArgumentsNotSerializable, match="write a string of at most 500 characters"):
            record.apply_durably(("x",), ordering_key="k" * 501)
        record.apply_durably(("x",), ordering_key=longest, idempotency_key=longest * 20)
    assert len(await rows.durable_tasks()) == 1


@pytest.mark.parametrize("serializer", ["pickle", "none of kombu's"])
async def test_serializer_that_no_worker_accepts(
    unheard: Celery[celery_ext.Task], rows: Observer, serializer: str
) -> None:
    """Its message would be rung for ever; whose task it is, or whose call, makes no difference."""
    record = task(unheard, "record")

    @unheard.task(serializer=serializer, shared=False)
    def differently() -> None: ...

    async with db.transaction():
        with pytest.raises(ArgumentsNotSerializable, match="accept_content"):
            record.apply_durably(("x",), serializer=serializer)
        with pytest.raises(ArgumentsNotSerializable, match="accept_content"):
            differently.delay_durably()
        differently.apply_durably(serializer="json")
        unheard.conf.accept_content = ["application/json", "pickle"]
        if serializer == "pickle":
            differently.delay_durably()
    assert len(await rows.durable_tasks()) == (2 if serializer == "pickle" else 1)


async def test_serializer_where_workers_accept_all(unheard: Celery[celery_ext.Task], rows: Observer) -> None:
    """Without ``accept_content`` there is nothing to refuse."""
    unheard.conf.accept_content = None
    async with db.transaction():
        task(unheard, "record").apply_durably(("x",), serializer="pickle")
    assert len(await rows.durable_tasks()) == 1


async def test_other_databases_are_refused(tmp_path: Path) -> None:
    """On SQLite the error says what to write instead, and no table is made there."""

    class Other(DeclarativeBase):
        pass

    settings = DatabaseSettings(database_url=f"sqlite:///{tmp_path}/notes.db")
    notes = Database("notes", settings=settings, base=Other)
    app: Celery[celery_ext.Task] = Celery("notes", task_cls=celery_ext.Task)
    celery_ext.init_app(app, db=notes)
    assert database_of(app) is notes

    @app.task
    def nothing() -> None: ...

    await notes.create_tables()
    with notes.sync_transaction() as session:
        assert inspect(session.connection()).get_table_names() == []
        with pytest.raises(DurableDispatchUnsupported, match="delay_on_commit"):
            nothing.delay_durably()
    await notes.dispose()
