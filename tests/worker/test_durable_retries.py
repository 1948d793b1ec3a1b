"""The attempts of a durable task are counted in its row, which keeps what the next one is sent with, and when."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from celery import Celery
from celery.exceptions import Reject
from sqlalchemy import text

import celery_ext
from celery_ext.durable import statements
from celery_ext.durable.relay import relaying
from fastapi_chatdify_db import db
from tests.failing import ASKS_TO_RETRY
from tests.observing import Observer
from tests.worker.running import Worker, deliver


@pytest.mark.parametrize(
    ("options", "retries", "seconds"),
    [
        ({"retry_backoff": 30, "retry_jitter": False}, 0, 30),
        ({"retry_backoff": 30, "retry_jitter": False}, 2, 120),
        ({"retry_backoff": 3000, "retry_jitter": False}, 0, 600),
        ({"retry_backoff": True, "retry_backoff_max": 0}, 0, 0),
        ({"default_retry_delay": 40}, 0, 40),
    ],
)
async def test_db_retry_waits(
    unheard: Celery[celery_ext.Task], rows: Observer, options: dict[str, Any], retries: int, seconds: int
) -> None:
    """The next attempt is due when Celery's own options say."""

    @unheard.task(shared=False, db_retry=True, **options)
    def fails() -> None:
        db.sync_session.execute(text(ASKS_TO_RETRY))

    async with db.transaction():
        task_id = fails.delay_durably()
    await rows.connection.execute("UPDATE durable_task SET retries = $1", retries)
    deliver(fails, task_id)
    pause = await rows.connection.fetchval(
        "SELECT due_at - clock_timestamp() FROM durable_task WHERE retries = $1", retries + 1
    )
    assert round(pause.total_seconds(), -1) == seconds


async def test_retries_are_kept_in_the_row(relayed: Worker, rows: Observer) -> None:
    """``autoretry_for`` and ``self.retry`` count in the row, ``def`` or ``async def``; another attempt succeeds."""
    async with db.transaction():
        ids = [
            relayed.task("unique_at_second_try").delay_durably("def"),
            relayed.task("unique_at_second_try_async").delay_durably("async def"),
            relayed.task("add_item_async").delay_durably("retry", "retry"),
        ]
    assert [await relayed.result(task_id) for task_id in ids] == [1, 1, ids[2]]
    query = "SELECT retries FROM durable_task WHERE id = ANY($1)"
    assert [row["retries"] for row in await rows.connection.fetch(query, ids)] == [1, 1, 1]


@pytest.mark.parametrize("name", ["unique_at_second_try", "unique_at_second_try_async"])
async def test_late_message_has_the_retries_of_the_row(prefork: Worker, rows: Observer, name: str) -> None:
    """The message may be older than the latest attempt."""
    retried = prefork.task(name)
    async with db.transaction():
        task_id = retried.delay_durably("x")
    await rows.connection.execute("UPDATE durable_task SET retries = 1")
    retried.apply_async(("x",), task_id=task_id, headers={"durable": task_id})
    assert await prefork.result(task_id) == 1


async def test_retry_begins_anew(unheard: Celery[celery_ext.Task], rows: Observer) -> None:
    """The next attempt is rung as a new task is, and the row has the error of the last one."""

    @unheard.task(bind=True, shared=False)
    def retries(self: celery_ext.Task) -> None:
        raise self.retry(exc=ValueError("not yet"), countdown=60)

    async with db.transaction():
        task_id = retries.delay_durably()
    await rows.connection.execute("UPDATE durable_task SET rings = 5")
    deliver(retries, task_id)
    row = await rows.connection.fetchrow("SELECT status, retries, rings, error FROM durable_task")
    assert row == ("pending", 1, 0, "ValueError: not yet")


async def test_retry_of_a_task_that_has_committed_before(prefork: Worker, rows: Observer) -> None:
    """It is not taken for work that still goes on, however soon it comes."""
    with relaying(prefork.app, db, grace=3600):
        async with db.transaction():
            task_id = prefork.task("committed_and_retried").delay_durably("x")
        await rows.until_status(task_id, "done")
    assert await rows.names() == ["x 0", "x 1", "x 2", "x 3"]


async def test_retry_that_does_not_give_up(relayed: Worker, rows: Observer) -> None:
    """After a ``retry(throw=False)`` the body's effects stay, and it is run again."""
    async with db.transaction():
        task_id = relayed.task("three_times").delay_durably("x")
    await rows.until_status(task_id, "done")
    assert await rows.names() == ["x 0", "x 1", "x 2"]


async def test_task_that_was_put_off_waits_for_its_time(unheard: Celery[celery_ext.Task], rows: Observer) -> None:
    """Its worker may take it for interrupted, when the answer to that COMMIT was lost; it is not sent before."""

    @unheard.task(shared=False, bind=True)
    def puts_off(self: celery_ext.Task) -> None:
        self.retry(countdown=3600, throw=False)

    async with db.transaction():
        task_id = puts_off.delay_durably()
    deliver(puts_off, task_id)
    async with db.transaction() as session:
        await session.execute(statements.RING_SOON, {"id": task_id, "error": "lost"})
    row = await rows.connection.fetchrow("SELECT status, retries, ring_at >= due_at, error FROM durable_task")
    assert row == ("pending", 1, True, None)


async def test_retry_with_options(relayed: Worker, rows: Observer) -> None:
    """``self.retry(time_limit=..., queue=...)``: the row keeps them for its next attempts, which are durable too."""
    options = {"time_limit": 77, "headers": {"x": "sent"}}
    async with db.transaction():
        first = relayed.task("retried_with").apply_durably(("first", options), time_limit=88)
        other = relayed.task("retried_with").apply_durably(("other", {}), time_limit=88)
        moved = relayed.task("retried_with").delay_durably("moved", {"queue": "nobody-listens", "priority": 3})
    await rows.until_status(first, "done")
    await rows.until_status(other, "done")
    assert await rows.names() == ["first 77 sent", "other 88 None"]
    await rows.until("(SELECT retries FROM durable_task WHERE id = $1) > 0", moved)
    query = "SELECT CAST(options AS json) ->> $1 FROM durable_task WHERE id = $2"
    assert [await rows.connection.fetchval(query, name, moved) for name in ("queue", "priority")] == [
        "nobody-listens",
        "3",
    ]


async def test_retry_that_cannot_be_stored(relayed: Worker, rows: Observer) -> None:
    """Celery rejects a task whose retry it cannot send; neither is its row run for ever."""
    async with db.transaction():
        ids = [
            relayed.task("retried_with").delay_durably("x", {"countdown": "soon"}),
            relayed.task("retried_with").delay_durably("x", {"eta": "soon"}),
            relayed.task("retried_with").delay_durably("x", {"serializer": "pickle"}),  # which no worker accepts
        ]
    for task_id in ids:
        await rows.until_status(task_id, "cancelled")


async def test_retry_with_an_option_that_cannot_be_stored(unheard: Celery[celery_ext.Task], rows: Observer) -> None:
    """An option that no message can carry ends the row too."""

    @unheard.task(bind=True, shared=False)
    def retries(self: celery_ext.Task) -> None:
        raise self.retry(countdown=0, shadow=object())  # type: ignore[arg-type]

    async with db.transaction():
        task_id = retries.delay_durably()
    deliver(retries, task_id)
    assert await rows.durable_tasks() == [("cancelled", "[[], {}]")]


async def test_retry_that_cannot_be_stored_is_none(unheard: Celery[celery_ext.Task], rows: Observer) -> None:
    """A task that handles its rejection, and goes on, is done."""

    @unheard.task(bind=True, shared=False)
    def goes_on(self: celery_ext.Task) -> None:
        with suppress(Reject):
            self.retry(countdown=0, throw=False, shadow=object())  # type: ignore[arg-type]

    async with db.transaction():
        task_id = goes_on.delay_durably()
    deliver(goes_on, task_id)
    assert await rows.durable_tasks() == [("done", "[[], {}]")]
