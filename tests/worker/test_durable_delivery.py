"""A durable task is run once, whatever the broker and the worker do."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest
from celery import Celery
from sqlalchemy import text

import celery_ext
from celery_ext.durable import administration, statements
from celery_ext.durable.relay import relaying
from fastapi_chatdify_db import db
from tests.models import Item
from tests.observing import Observer
from tests.worker.running import Worker, brokers, deliver, task, worker


async def test_duplicate_messages_are_dropped(relayed: Worker, rows: Observer) -> None:
    """A broker that delivers twice, at the same time or later, runs the task once."""
    add = relayed.task("add_item")
    async with db.transaction():
        task_id = add.delay_durably("x")
    for _ in range(20):
        add.apply_async(("x",), task_id=task_id, headers={"durable": task_id})
    await rows.until_status(task_id, "done")
    last = add.delay("last")
    await asyncio.to_thread(last.get, timeout=20)
    assert await rows.names() == ["last", "x"]


async def test_duplicate_of_a_coroutine_is_dropped_quietly(relayed: Worker, rows: Observer) -> None:
    """A duplicate message of an ``async def`` task is dropped without a word."""
    task = relayed.task("release_and_wait")
    async with db.transaction():
        task_id = task.delay_durably("x", 9)
    await rows.until_status(task_id, "done")
    for _ in range(200):  # enough for the garbage collector, which tells of coroutines that nobody awaited
        task.apply_async(("x", 9), task_id=task_id, headers={"durable": task_id})
    await asyncio.to_thread(relayed.task("add_item").delay("last").get, timeout=20)
    assert "never awaited" not in relayed.log


@pytest.mark.usefixtures("kills")
async def test_duplicate_does_not_begin(relayed: Worker, rows: Observer) -> None:
    """The body of a task that is done, or not due, is not even entered: it may act outside of the database."""
    count_run = relayed.task("count_run")
    async with db.transaction():
        done = count_run.delay_durably("done")
        later = count_run.apply_durably(("later",), countdown=3600)
    await rows.until_status(done, "done")
    for _ in range(5):
        for task_id in (done, later):
            count_run.apply_async(("again",), task_id=task_id, headers={"durable": task_id})
    for number in range(5):  # one for each process, and more
        await asyncio.to_thread(relayed.task("add_item").delay(f"{number}").get, timeout=20)
    assert await rows.connection.fetchval("SELECT last_value FROM kills") == 1
    assert "done" in await rows.names()


async def test_message_that_the_broker_lost(relayed: Worker, rows: Observer) -> None:
    """A row that was sent, and never arrived, is rung again."""
    async with db.transaction():
        task_id = relayed.task("add_item").apply_durably(("x",), queue="nobody-listens")
    await rows.until_sent(task_id)
    await rows.connection.execute("""UPDATE durable_task SET options = '{"headers": {"durable": "' || id || '"}}'""")
    assert await relayed.result(task_id) == "x"
    await rows.until_status(task_id, "done")


@pytest.mark.usefixtures("kills")
async def test_worker_killed_in_the_middle(relayed: Worker, rows: Observer) -> None:
    """Early acknowledged or not, the task is run again, and its effect is there once."""
    async with db.transaction():
        task_id = relayed.task("killed_once_acked_early").delay_durably("x")
    await rows.until_status(task_id, "done")
    assert await rows.names() == ["x"]


async def test_row_lock_is_the_lease(relayed: Worker, rows: Observer) -> None:
    """While one process is in the task's transaction, another one drops its message at once."""
    waiting = relayed.task("wait_for_lock")
    await rows.connection.execute("SELECT pg_advisory_lock(11)")
    async with db.transaction():
        task_id = waiting.delay_durably(11)
    await rows.until_somebody_waits_for_a_lock()
    for _ in range(5):
        waiting.apply_async((11,), task_id=task_id, headers={"durable": task_id})
    await asyncio.to_thread(relayed.task("add_item").delay("after the duplicates").get, timeout=20)
    query = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted AND objid = 11"
    assert await rows.connection.fetchval(query) == 1
    await rows.connection.execute("SELECT pg_advisory_unlock(11)")
    await rows.until_status(task_id, "done")


async def test_lease_outlives_the_transaction(relayed: Worker, rows: Observer) -> None:
    """After ``db.release()`` no second copy starts while the first one waits; its end is marked once, and frees all."""
    released = relayed.task("release_and_wait")
    await rows.connection.execute("SELECT pg_advisory_lock(9)")
    async with db.transaction():
        task_id = released.delay_durably("x", 9)
    await rows.until_somebody_waits_for_a_lock()
    assert await rows.names() == ["x begun"]
    assert await rows.in_transaction() == 0
    for _ in range(5):
        released.apply_async(("x", 9), task_id=task_id, headers={"durable": task_id})
    await asyncio.to_thread(relayed.task("add_item").delay("other").get, timeout=20)
    await rows.connection.execute("SELECT pg_advisory_unlock(9)")
    await rows.until_status(task_id, "done")
    assert await rows.names() == ["other", "x begun", "x ended"]
    await rows.until_no_advisory_locks()


async def test_lease_ends_with_its_process(rows: Observer) -> None:
    """A worker that is killed while its task waits, its transaction released, is replaced at once."""
    await rows.connection.execute("SELECT pg_advisory_lock(9)")
    with worker(brokers()[0], "-c", "1") as running, relaying(running.app, db, grace=0.5):
        async with db.transaction():
            task_id = running.task("release_and_wait").delay_durably("pid", 9)
        await rows.until_somebody_waits_for_a_lock()
        os.kill(await rows.connection.fetchval("SELECT name::int FROM item WHERE name ~ '^[0-9]+$'"), signal.SIGKILL)
        await rows.connection.execute("DELETE FROM item")
        await rows.connection.execute("SELECT pg_advisory_unlock(9)")
        await rows.until_status(task_id, "done")
    names = [name for name in await rows.names() if not name.isdigit()]
    assert names == ["pid begun", "pid ended"]


async def test_failed_for_good(relayed: Worker, rows: Observer) -> None:
    """The row stays with its error, which names no value, until it is retried by hand."""
    async with db.transaction():
        task_id = relayed.task("add_item").delay_durably("x", "duplicate")
        bad = relayed.task("bad_statement_retried").delay_durably("hunter2")
    for each in (task_id, bad):
        await rows.until_status(each, "failed")
    errors = {row.id: row.error for row in administration.failed(db, 10)}
    assert errors[task_id] == "IntegrityError: SQLSTATE 23505, constraint uq_item_name, table item"
    assert "hunter2" not in errors[bad]
    await rows.connection.execute("""UPDATE durable_task SET arguments = '[["x"], {}]' WHERE id = $1""", task_id)
    assert administration.retry(db, task_id) == 1
    await rows.until_status(task_id, "done")
    assert await rows.names() == ["x"]


async def test_failure_is_told(relayed: Worker, rows: Observer) -> None:
    """Who asks Celery for the result of a durable task that failed is told, and so are its error callbacks."""
    async with db.transaction():
        task_id = relayed.task("add_item").apply_durably(("x", "raise"), link_error=relayed.task("errback").s("x"))
    with pytest.raises(ValueError, match="x"):
        await asyncio.to_thread(relayed.app.AsyncResult(task_id).get, timeout=20)
    await rows.until_status(task_id, "failed")


async def test_rollback_only_is_done(relayed: Worker, rows: Observer) -> None:
    """A task that rolls itself back and succeeds has succeeded."""
    async with db.transaction():
        ids = [relayed.task(f"rolled_back_by_itself{kind}").delay_durably("x") for kind in ("", "_async")]
    for task_id in ids:
        await rows.until_status(task_id, "done")
    assert await rows.names() == []


async def test_cancelled_while_it_ends(unheard: Celery[celery_ext.Task], rows: Observer) -> None:
    """Whoever cancels a task of a key waits for whoever is ending it, and not the other way round as well."""
    async with db.transaction():
        first, second = (task(unheard, "add_item").apply_durably((name,), ordering_key="k") for name in "ab")
    with db.sync_transaction() as session:
        session.execute(statements.LOCK_KEYS, {"keys": ["k"]})
        cancelling = asyncio.create_task(asyncio.to_thread(administration.cancel, db, first))
        await rows.until_somebody_waits_for_a_lock()
        session.execute(statements.FINISH, {"id": first, "status": "done", "error": None}).one()
        session.execute(statements.RING_NEXT_OF_KEY, {"key": "k"})
    assert not await cancelling
    assert await asyncio.to_thread(administration.cancel, db, second)
    assert [status for status, _ in await rows.durable_tasks()] == ["done", "cancelled"]


async def test_a_durable_task_starts_others(relayed: Worker, rows: Observer) -> None:
    """All of them with its commit, or none when it fails."""
    async with db.transaction():
        good = relayed.task("start_others").delay_durably("good", 3)
        bad = relayed.task("start_others").delay_durably("bad", 3, fail=True)
    await rows.until_status(good, "done")
    await rows.until_status(bad, "failed")
    await rows.until_no_pending_tasks()
    assert await rows.names() == ["good 0", "good 1", "good 2"]


async def test_passing_on_the_headers(relayed: Worker, rows: Observer) -> None:
    """A task that sends another one with its own headers, as tenants and traces are passed on, sends that one too."""
    async with db.transaction():
        task_id = relayed.task("pass_on_headers").delay_durably("x")
    await rows.until_status(task_id, "done")
    await rows.until_names(["passed on x"])


@pytest.mark.usefixtures("kills")
async def test_sessions_of_both_kinds(relayed: Worker, rows: Observer) -> None:
    """What a coroutine wrote with the other session is not lost when its process dies between their two COMMITs."""
    async with db.transaction():
        task_id = relayed.task("die_between_commits_once").delay_durably("x")
    await rows.until_status(task_id, "done")
    assert await rows.names() == ["x", "x sync 1", "x sync 2"]


async def test_body_that_is_run_twice(relayed: Worker, rows: Observer) -> None:
    """A ``__call__`` that tries again by itself does not do it without the row: that has failed."""
    async with db.transaction():
        task_id = relayed.task("tries_again").delay_durably("x")
    await rows.until_status(task_id, "failed")
    assert "has ended" in str(await relayed.result(task_id))
    assert await rows.names() == []


@pytest.mark.parametrize("durably", [True, False])
async def test_coroutine_behind_a_decorator(relayed: Worker, rows: Observer, durably: bool) -> None:
    """It would never run, and so is no success, although its result is ignored."""
    decorated = relayed.task("decorated")
    if durably:
        async with db.transaction():
            task_id = decorated.delay_durably("x")
        await rows.until_status(task_id, "failed")
        assert "CoroutineReturned" in str(await rows.connection.fetchval("SELECT error FROM durable_task"))
    else:
        decorated.delay("x")
        await asyncio.to_thread(relayed.until_logged, "CoroutineReturned")
    assert await rows.names() == []


async def test_task_that_was_ended_elsewhere_leaves_nothing_more(relayed: Worker, rows: Observer) -> None:
    """Who goes on after the row was ended by somebody else leaves nothing more."""
    await rows.connection.execute("SELECT pg_advisory_lock(9)")
    async with db.transaction():
        task_id = relayed.task("release_and_wait").delay_durably("x", 9)
    await rows.until_somebody_waits_for_a_lock()
    await rows.connection.execute("UPDATE durable_task SET status = 'done' WHERE id = $1", task_id)
    await rows.connection.execute("SELECT pg_advisory_unlock(9)")
    await asyncio.to_thread(relayed.until_logged, f"[{task_id}] was ended elsewhere")
    await asyncio.to_thread(relayed.task("add_item").delay("other").get, timeout=20)
    assert await rows.names() == ["other", "x begun"]


async def test_retry_of_a_task_that_was_ended_elsewhere(unheard: Celery[celery_ext.Task], rows: Observer) -> None:
    """Who asks for another attempt after that leaves nothing more either."""

    @unheard.task(bind=True, shared=False)
    def goes_on(self: celery_ext.Task) -> None:
        db.sync_session.add(Item("begun"))
        db.sync_session.commit()
        with db.sync_transaction() as other:
            other.execute(text("UPDATE durable_task SET status = 'cancelled'"))
        db.sync_session.add(Item("lost"))
        self.retry(countdown=0, throw=False)

    async with db.transaction():
        task_id = goes_on.delay_durably()
    await asyncio.to_thread(deliver, goes_on, task_id)
    assert await rows.names() == ["begun"]
    assert await rows.durable_tasks() == [("cancelled", "[[], {}]")]
