"""The options of ``apply_durably``: when, until when, how urgently, and only once."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest
from celery import Celery

import celery_ext
from celery_ext.durable import administration
from celery_ext.durable.relay import relaying
from fastapi_chatdify_db import db
from tests.observing import Observer
from tests.worker.running import Worker, task


@pytest.mark.parametrize("wrong", [float("nan"), 1e300, True, "5", "2030-01-01T00:00:00Z", timedelta(seconds=5)])
@pytest.mark.parametrize(
    ("option", "instead"),
    [("countdown", "write seconds$"), ("eta", "write a datetime$"), ("expires", "write seconds, or a datetime$")],
)
async def test_wrong_times_fail_at_the_call(
    unheard: Celery[Any], rows: Observer, option: str, wrong: object, instead: str
) -> None:
    """Each says what to write instead."""
    options: dict[str, Any] = {option: wrong}
    async with db.transaction():
        with pytest.raises(TypeError, match=instead):
            task(unheard, "record").apply_durably(("x",), **options)
    assert await rows.durable_tasks() == []


async def test_due_later(relayed: Worker, rows: Observer) -> None:
    """``countdown`` and ``eta`` are kept to, by the database's clock; what has expired is not started."""
    add = relayed.task("add_item")
    async with db.transaction():
        late = add.apply_durably(("late",), countdown=1)
        later = add.apply_durably(("later",), eta=datetime.now(UTC) + timedelta(seconds=1.2))
        expired = add.apply_durably(("expired",), expires=-1)
        never = add.apply_durably(("never",), countdown=3600)
    await rows.until_status(expired, "cancelled")
    assert await rows.names() == []
    assert await relayed.result(late) == "late"
    assert await relayed.result(later) == "later"
    early = await rows.connection.fetchval("SELECT count(*) FROM durable_task WHERE finished_at < due_at")
    assert early == 0
    assert administration.cancel(db, never)
    assert not administration.cancel(db, late)


async def test_moments_are_kept_by_a_late_commit(unheard: Celery[celery_ext.Task], rows: Observer) -> None:
    """``eta`` and the ``expires`` of a datetime do not move by the time until the COMMIT."""
    moment = datetime.now(UTC) + timedelta(hours=1)
    async with db.transaction():
        task(unheard, "add_item").apply_durably(("x",), eta=moment, expires=moment)
        await rows.connection.execute("SELECT pg_sleep(1)")
    row = await rows.connection.fetchrow("SELECT due_at, expires_at FROM durable_task")
    assert row is not None
    assert all(abs(kept - moment) < timedelta(seconds=0.5) for kept in row.values())


async def test_moment_without_a_time_zone(unheard: Celery[celery_ext.Task], rows: Observer) -> None:
    """It is one in UTC, as Celery reads it."""
    moment = datetime.now(UTC) + timedelta(hours=1)
    async with db.transaction():
        task(unheard, "add_item").apply_durably(("x",), eta=moment.replace(tzinfo=None))
    due_at = await rows.connection.fetchval("SELECT due_at FROM durable_task")
    assert abs(due_at - moment) < timedelta(seconds=1)


async def test_expires_of_the_task(unheard: Celery[celery_ext.Task], rows: Observer) -> None:
    """``@app.task(expires=...)`` counts from the commit too, unless the call says otherwise; no message has its own."""
    expiring = task(unheard, "expiring")
    async with db.transaction():
        ids = [expiring.delay_durably("x"), expiring.apply_durably(("y",), expires=7200)]
    expiry = dict(await rows.connection.fetch("SELECT id, expires_at - created_at FROM durable_task"))
    assert [round(expiry[task_id].total_seconds()) for task_id in ids] == [3600, 7200]
    with unheard.connection_for_read() as connection:
        queue = connection.SimpleQueue("nowhere")
        queue.clear()  # of what other tests sent
        with relaying(unheard, db):
            messages = [await asyncio.to_thread(queue.get, timeout=20) for _ in ids]
    assert {message.headers["id"]: message.headers["expires"] for message in messages} == dict.fromkeys(ids)


@pytest.mark.parametrize(("inherits", "expected"), [(True, "661122"), (False, "001122")])
async def test_inherited_priority(
    unheard: Celery[celery_ext.Task], rows: Observer, inherits: bool, expected: str
) -> None:
    """With ``task_inherit_parent_priority`` what a task sends has its priority, where nothing else says one."""
    unheard.conf.task_inherit_parent_priority = inherits
    child = task(unheard, "record")

    unheard.conf.task_default_priority = 2

    @unheard.task(shared=False)
    def urgent() -> None: ...

    @unheard.task(shared=False)
    def parent() -> list[str]:
        return [
            child.delay_on_commit("x"),
            child.delay_durably("x"),
            child.apply_async_on_commit(("x",), priority=1),
            child.apply_durably(("x",), priority=1),
            urgent.delay_on_commit(),
            urgent.delay_durably(),
        ]

    with unheard.connection_for_read() as connection:
        queue = connection.SimpleQueue("nowhere")
        queue.clear()  # of what other tests sent
        ids = parent.apply(priority=6).get()
        with relaying(unheard, db):
            messages = [await asyncio.to_thread(queue.get, timeout=20) for _ in ids]
    priorities = {message.headers["id"]: str(message.properties["priority"]) for message in messages}
    assert "".join(priorities[task_id] for task_id in ids) == expected


async def test_idempotency_key(relayed: Worker, rows: Observer) -> None:
    """The same key again, at once or after it is done, stores nothing and gives the first one's id."""
    add = relayed.task("add_item")
    ids, key = [], str(uuid4())
    for _ in range(3):
        async with db.transaction():
            ids += [add.apply_durably(("x",), idempotency_key=key) for _ in range(2)]
        assert await relayed.result(ids[0]) == "x"
    assert len(set(ids)) == 1
    assert await rows.names() == ["x"]
    assert len(await rows.durable_tasks()) == 1


async def test_used_idempotency_key_holds_nothing_up(unheard: Celery[celery_ext.Task], rows: Observer) -> None:
    """What is stored after it, under its ordering key, is due at once; what follows that one waits for its turn."""
    add, key = task(unheard, "add_item"), str(uuid4())
    async with db.transaction():
        add.apply_durably(("x",), ordering_key="k", idempotency_key=key)
    await rows.connection.execute("UPDATE durable_task SET status = 'done', finished_at = now()")
    async with db.transaction():
        add.apply_durably(("x",), ordering_key="k", idempotency_key=key)
        for name in ("next", "after that"):
            add.apply_durably((name,), ordering_key="k")
    query = "SELECT ring_at < 'infinity' AS due FROM durable_task WHERE status = 'pending' ORDER BY seq"
    assert [row["due"] for row in await rows.connection.fetch(query)] == [True, False]


async def test_first_of_a_key_counts(unheard: Celery[celery_ext.Task], rows: Observer) -> None:
    """Whichever options the second one has, and whatever becomes of what follows it."""
    add, key = task(unheard, "add_item"), str(uuid4())
    async with db.transaction():
        add.apply_durably(("first",), idempotency_key=key)
        add.apply_durably(("second",), idempotency_key=key, ordering_key="k")
        add.apply_durably(("next",), ordering_key="k")
    assert [arguments for _, arguments in await rows.durable_tasks()] == ['[["next"], {}]', '[["first"], {}]']
    due = "SELECT count(*) FROM durable_task WHERE ring_at < 'infinity'"
    assert await rows.connection.fetchval(due) == 2


async def test_idempotency_key_is_the_tasks_own(unheard: Celery[Any], rows: Observer) -> None:
    """Two tasks may use the same key, e.g. an order's number."""
    async with db.transaction():
        for name in ("record", "add_item"):
            task(unheard, name).apply_durably(("x",), idempotency_key="k")
    assert len(await rows.durable_tasks()) == 2
