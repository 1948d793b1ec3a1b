"""A task is sent once what it needs is committed, and never after a rollback."""

from __future__ import annotations

import asyncio
import threading
import weakref
from typing import Any

import pytest
from celery import Celery
from fastapi import FastAPI, HTTPException

import celery_ext
from celery_ext import ArgumentsNotSerializable
from celery_ext.sender import send_within
from fastapi_chatdify_db import Database, DatabaseSettings, db
from tests.models import Item
from tests.observing import PATIENCE, Observer
from tests.serving import serve
from tests.worker.running import Worker, publishing, task

REQUESTS = 500


async def test_no_task_misses_its_row(app: FastAPI, prefork: Worker, empty_tables: Observer) -> None:
    """Of 500 requests, each task finds the row that its request inserted."""
    read, at_a_time = prefork.task("read_item"), asyncio.Semaphore(10)

    @app.post("/items/{name}")
    async def add(name: str) -> str:
        db.session.add(Item(name))
        return read.delay_on_commit(name)

    async def ask(number: int) -> str:
        async with at_a_time:
            task_id: str = (await client.post(f"/items/{number}")).json()
        return task_id

    async with serve(app) as client:
        ids = await asyncio.gather(*map(ask, range(REQUESTS)))
    assert len(set(ids)) == REQUESTS
    for task_id in ids:
        assert await asyncio.to_thread(read.AsyncResult(task_id).get, timeout=30) is True
    assert await empty_tables.in_transaction() == 0


async def test_nothing_is_sent_after_a_rollback(app: FastAPI, prefork: Worker, empty_tables: Observer) -> None:
    """A rolled back request, block, savepoint or task sends nothing; what is around a savepoint does."""
    record, started = prefork.task("record"), len(prefork.log)

    @app.post("/refused")
    async def refused() -> None:
        record.delay_on_commit("refused")
        raise HTTPException(422)

    @app.post("/def")
    def synchronous() -> None:
        record.delay_on_commit("def")

    async with serve(app) as client:
        assert (await client.post("/refused")).status_code == 422
        assert (await client.post("/def")).status_code == 200
    async with db.transaction():
        record.delay_on_commit("block")
        db.rollback_only()
    async with db.transaction() as session:
        savepoint = await session.begin_nested()
        record.delay_on_commit("savepoint")
        await savepoint.rollback()
        record.delay_on_commit("outer")
    failed = prefork.task("insert_and_send").delay("failing task", "raise")
    await asyncio.to_thread(failed.get, timeout=20, propagate=False)
    last = record.delay_on_commit("last")  # outside any unit: at once
    await asyncio.to_thread(record.AsyncResult(last).get, timeout=20)
    await empty_tables.until_names(["linked def", "linked last", "linked outer"])
    assert "read_item" not in prefork.log[started:]


def test_unit_of_another_database(unheard: Celery[celery_ext.Task], database_url: str, rows: Observer) -> None:
    """Its commit and its savepoints decide, as those of any unit around the call do."""
    other = Database("other", settings=DatabaseSettings(database_url=database_url))
    published: list[object] = []

    def note(headers: dict[str, object], **_: object) -> None:
        published.append(headers["id"])

    with publishing(note):
        with other.sync_transaction() as session:
            savepoint = session.begin_nested()
            task(unheard, "read_item").delay_on_commit("x")
            savepoint.rollback()
            kept = task(unheard, "read_item").delay_on_commit("x")
            assert published == []
        assert published == [kept]
    other.engines.dispose_sync()


def test_messages_go_the_same_way(prefork: Worker) -> None:
    """One after the other, they share a thread: each thread would open connections to the result backend."""
    threads: set[threading.Thread] = set()

    def note(**_: object) -> None:
        threads.add(threading.current_thread())

    with publishing(note):
        for _ in range(10):
            prefork.task("record").delay_on_commit("x")
    assert len(threads) == 1
    assert threads != {threading.current_thread()}


async def test_a_task_sends_another(prefork: Worker, empty_tables: Observer) -> None:
    """In a task it is sent when the body's commit is done, with the task as its parent."""
    result = prefork.task("insert_and_send").delay("x")
    child = await asyncio.to_thread(result.get, timeout=20)
    assert await prefork.result(child) is True


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ordering_key": "k"}, r"unknown option ordering_key; write apply_durably\(\.\.\., ordering_key=\.\.\.\)"),
        ({"idempotence_key": "k"}, r"unknown option idempotence_key; write .*idempotency_key="),
        ({"ordering": "k"}, r"unknown option ordering; write .*ordering_key="),
        ({"idempotency": "k"}, r"unknown option idempotency; write .*idempotency_key="),
        ({"on_error": "ignore"}, "write on_error='log' or on_error='raise'"),
    ],
)
def test_options_without_effect(unheard: Celery[celery_ext.Task], options: Any, message: str) -> None:
    """Celery would pass them to the broker, which ignores them."""
    with pytest.raises(TypeError, match=message):
        task(unheard, "read_item").apply_async_on_commit(("x",), **options)


def test_options_of_celery(unheard: Celery[celery_ext.Task]) -> None:
    """A name that is only a little like ours is Celery's."""
    task(unheard, "read_item").apply_async_on_commit(("x",), routing_key="nobody-listens", on_error="raise")


def test_idle_thread_keeps_no_message() -> None:
    """What was sent, the unit and the request around it are given up when it is sent, not with the next message."""

    class Message:
        def __call__(self) -> None: ...

    message, given_up = Message(), threading.Event()
    weakref.finalize(message, given_up.set)
    assert send_within(PATIENCE, message) is None
    del message
    assert given_up.wait(10)


@pytest.mark.parametrize("send", ["delay_on_commit", "apply_async_on_commit"])
async def test_arguments_that_cannot_be_sent(unheard: Celery[celery_ext.Task], rows: Observer, send: str) -> None:
    """They are an error at the call, so that the unit is rolled back: after the commit nobody could be told."""
    add = task(unheard, "add_item")
    item = Item("x")
    arguments = (item,) if send == "delay_on_commit" else ([item],)

    async def insert_and_send() -> None:
        async with db.transaction() as session:
            session.add(item)
            getattr(add, send)(*arguments)

    with pytest.raises(ArgumentsNotSerializable, match="send ids, not objects"):
        await insert_and_send()
    assert await rows.names() == []


def test_arguments_that_the_task_does_not_check(unheard: Celery[celery_ext.Task]) -> None:
    """With ``typing=False`` it is sent with whatever it is given."""

    @unheard.task(typing=False, shared=False)
    def untyped() -> None: ...

    assert untyped.apply_async_on_commit(("x",), on_error="raise")


async def test_serializer_of_the_task(unheard: Celery[celery_ext.Task], rows: Observer) -> None:
    """What it carries is sent, although JSON does not carry it."""
    add = task(unheard, "add_item")

    @unheard.task(serializer="pickle", shared=False)
    def takes_a_set(names: set[str]) -> None: ...

    async with db.transaction():
        assert add.apply_async_on_commit(None, {"name": {"x"}}, serializer="pickle", task_id=None)
        assert takes_a_set.delay_on_commit({"x"})
