"""A durable task that is interrupted or held up is run to its end, once."""

from __future__ import annotations

import asyncio
import socket
from contextlib import closing
from typing import Any

import psycopg2
import pytest
from celery import Celery
from celery.exceptions import Ignore
from sqlalchemy import event, text
from sqlalchemy.exc import DBAPIError

import celery_ext
from celery_ext.durable import lease, statements
from celery_ext.durable.relay import relaying
from fastapi_chatdify_db import Database, DatabaseSettings, DatabaseUnavailable, db
from tests.models import Item
from tests.observing import Observer
from tests.worker.running import Worker, brokers, deliver, task, worker


@pytest.mark.parametrize(
    "name",
    [
        "cut_off_once",
        "cut_off_once_async",
        "cut_off_once_unnoticed",
        "cut_off_once_renamed",
        "cut_off_once_in_a_group",
        "refused_once",
        "rejected_once",
        "starts_later",
        "without_connection_once",
        "unreachable_once",
        "unreachable_once_async",
    ],
)
@pytest.mark.usefixtures("kills")
async def test_database_lost_before_the_commit(relayed: Worker, rows: Observer, name: str) -> None:
    """What is wrong with the server or the connection is no failure of the task: it is run again."""
    async with db.transaction():
        task_id = relayed.task(name).delay_durably("x")
    await rows.until_status(task_id, "done")
    assert await rows.names() == ["x"]


@pytest.mark.parametrize("name", ["sleep_after_insert", "sleep_after_insert_async"])
async def test_cold_shutdown_of_the_pool_solo(rows: Observer, name: str) -> None:
    """Celery, which cannot end a task there, raises an error in its midst; that is no failure of the task."""
    in_body = "EXISTS (SELECT FROM pg_stat_activity WHERE datname = current_database() AND query LIKE 'INSERT%')"
    cold = worker(brokers()[-1], pool="solo", environment={"REMAP_SIGTERM": "SIGQUIT"})
    with cold as ending, relaying(ending.app, db):
        async with db.transaction():
            task_id = ending.task(name).delay_durably("x", 2)
        await rows.until(in_body)
    assert "NotImplementedError" in ending.log
    with worker(brokers()[-1], pool="solo") as other, relaying(other.app, db):
        await rows.until_status(task_id, "done")
    assert await rows.names() == ["x"]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        *(("40001", "pending"), ("08006", "pending"), ("57P03", "pending"), ("57014", "failed")),
        *(("refused", "failed"), ("given up", "cancelled")),
        *(("the driver's", "pending"), ("one of two", "failed")),
    ],
)
async def test_whose_failure_it_is(
    unheard: Celery[celery_ext.Task], rows: Observer, database_url: str, error: str, status: str
) -> None:
    """PostgreSQL's codes tell, without SQLAlchemy too.

    A connection of the task's own that is refused is its failure, as is one of two errors, and Ignore is its word.
    """

    @unheard.task(shared=False)
    def fails() -> None:
        if error == "refused":
            socket.create_connection(("127.0.0.1", 1))
        if error == "given up":
            raise Ignore from DatabaseUnavailable("gone")
        if error == "one of two":
            raise ExceptionGroup("both", [DatabaseUnavailable("gone"), ValueError()])
        if error == "the driver's":
            with closing(psycopg2.connect(database_url)) as own:
                own.cursor().execute("DO $$ BEGIN RAISE EXCEPTION USING ERRCODE = '57P01'; END $$")
        db.sync_session.execute(text(f"DO $$ BEGIN RAISE EXCEPTION USING ERRCODE = '{error}'; END $$"))

    async with db.transaction():
        task_id = fails.delay_durably()
    deliver(fails, task_id)
    assert await rows.durable_tasks() == [(status, "[[], {}]")]


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
    """As long as Celery's own options say."""

    @unheard.task(shared=False, db_retry=True, **options)
    def fails() -> None:
        db.sync_session.execute(text("DO $$ BEGIN RAISE EXCEPTION USING ERRCODE = '40001'; END $$"))

    async with db.transaction():
        task_id = fails.delay_durably()
    await rows.connection.execute("UPDATE durable_task SET retries = $1", retries)
    deliver(fails, task_id)
    pause = await rows.connection.fetchval(
        "SELECT due_at - clock_timestamp() FROM durable_task WHERE retries = $1", retries + 1
    )
    assert round(pause.total_seconds(), -1) == seconds


async def test_interrupted_task_runs_again_after_growing_pauses(
    unheard: Celery[celery_ext.Task], rows: Observer
) -> None:
    """What the database interrupts each time anew is run again after a second, and then less and less often."""
    async with db.transaction():
        task_id = task(unheard, "add_item").delay_durably("x")
    seconds = []
    for rings in (0, 1, 2, 4, 40):
        await rows.connection.execute("UPDATE durable_task SET rings = $1", rings)
        async with db.transaction() as session:
            await session.execute(statements.RING_SOON, {"id": task_id})
        distance = await rows.connection.fetchval("SELECT ring_at - now() FROM durable_task")
        seconds.append(round(distance.total_seconds()))
    assert seconds == [1, 1, 2, 8, 512]


async def test_rows_are_rung_again_after_growing_pauses(unheard: Celery[celery_ext.Task], rows: Observer) -> None:
    """A row that is sent and not done is rung again after the time of grace, and then less and less often."""
    async with db.transaction():
        task(unheard, "add_item").delay_durably("x")
    seconds = []
    for rings in (0, 1, 2, 6, 40):
        await rows.connection.execute("UPDATE durable_task SET rings = $1, ring_at = now()", rings)
        async with db.transaction() as session:
            await session.execute(statements.CLAIM, {"batch": 1, "grace": 10})
        distance = await rows.connection.fetchval("SELECT ring_at - now() FROM durable_task")
        seconds.append(round(distance.total_seconds()))
    assert seconds == [10, 20, 40, 640, 640]


async def test_who_has_waited_longest_is_sent_first(unheard: Celery[celery_ext.Task], rows: Observer) -> None:
    """So that a relay with more to do than it can has no row wait for ever."""
    async with db.transaction():
        ids = [task(unheard, "add_item").delay_durably(f"{number}") for number in range(3)]
    await rows.connection.execute("UPDATE durable_task SET ring_at = now() - seq * interval '1 second'")
    one = {"batch": 1, "grace": 10}
    async with db.transaction() as session:
        await session.execute(text("SET LOCAL enable_indexscan = off"))  # which has them in that order by itself
        await session.execute(text("SET LOCAL enable_bitmapscan = off"))
        assert [(await session.execute(statements.CLAIM, one)).one().id for _ in ids] == ids[::-1]


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


async def test_duplicate_in_the_process_of_the_lease(rows: Observer) -> None:
    """In a pool of threads, a message that is dropped leaves the lease to the task beside it, which has it."""
    await rows.connection.execute("SELECT pg_advisory_lock(9)")
    with worker(brokers()[-1], "-c", "2", pool="threads") as running, relaying(running.app, db):
        released = running.task("release_and_wait")
        async with db.transaction():
            task_id = released.delay_durably("x", 9)
        await rows.until_somebody_waits_for_a_lock()
        for _ in range(5):
            released.apply_async(("x", 9), task_id=task_id, headers={"durable": task_id})
        await asyncio.to_thread(running.task("add_item").delay("after the duplicates").get, timeout=20)
        await rows.connection.execute("SELECT pg_advisory_unlock(9)")
        await rows.until_status(task_id, "done")
    assert await rows.names() == ["after the duplicates", "x begun", "x ended"]


async def test_leases_of_one_process(rows: Observer) -> None:
    """Each is held until its own end, on one connection, which is replaced when it is lost and closed by the last."""
    database = Database("leasing", settings=DatabaseSettings(db_application_name="leasing"))
    free = """SELECT CASE WHEN pg_try_advisory_lock(hashtextextended($1, 21))
                     THEN pg_advisory_unlock(hashtextextended($1, 21)) ELSE false END"""
    assert all(lease.hold(database, task_id) for task_id in "aab")
    assert await rows.connections("leasing") == 1
    lease.free(database, "a")
    assert [await rows.connection.fetchval(free, task_id) for task_id in "ab"] == [True, False]
    await rows.terminate_others()
    with pytest.raises(DBAPIError):
        lease.hold(database, "c")
    assert lease.hold(database, "c")
    lease.free(database, "b")
    assert not await rows.connection.fetchval(free, "c")
    await rows.terminate_others()
    lease.free(database, "c")
    assert lease.hold(database, "d")
    lease.free(database, "d")
    await rows.until_connections("leasing", 0)


async def test_lease_beside_a_pool_of_one(rows: Observer) -> None:
    """Its connection is one beyond the pool, of which a task may hold the last one, and needs one at its end."""
    smallest = {"DB_POOL_SIZE": "1", "DB_MAX_OVERFLOW": "0", "DB_POOL_TIMEOUT": "1"}
    with worker(brokers()[-1], "-c", "1", environment=smallest) as running, relaying(running.app, db):
        async with db.transaction():
            ends = {
                running.task(name).delay_durably(f"{name} {outcome}", outcome): status
                for name in ("commit_halfway", "commit_halfway_async")
                for outcome, status in (("succeed", "done"), ("raise", "failed"))
            }
        for task_id, status in ends.items():
            await rows.until_status(task_id, status)
    assert "will be run again" not in running.log


async def test_long_task_leaves_the_relay_at_rest(relayed: Worker, rows: Observer) -> None:
    """A row whose worker takes longer than the grace time is looked at now and then, not all the time."""
    seen: list[str] = []

    def count(_: object, __: object, statement: str, *___: object) -> None:
        seen.append(statement)

    await rows.connection.execute("SELECT pg_advisory_lock(9)")
    async with db.transaction():
        task_id = relayed.task("wait_for_lock").delay_durably(9)
    await rows.until_somebody_waits_for_a_lock()
    await rows.until("(SELECT ring_at < clock_timestamp() FROM durable_task)")
    event.listen(db.sync_engine, "before_cursor_execute", count)
    await rows.connection.execute("SELECT pg_sleep(2)")
    event.remove(db.sync_engine, "before_cursor_execute", count)
    await rows.connection.execute("SELECT pg_advisory_unlock(9)")
    await rows.until_status(task_id, "done")
    assert 0 < len(seen) < 20


async def test_lost_connection_to_the_broker_does_not_wait_for_tasks(relayed: Worker, rows: Observer) -> None:
    """Rows that are to be sent again, since the broker is gone, are left alone while their workers run."""
    await rows.connection.execute("SELECT pg_advisory_lock(9)")
    async with db.transaction():
        task_id = relayed.task("wait_for_lock").delay_durably(9)
    await rows.until_somebody_waits_for_a_lock()
    async with asyncio.timeout(5), db.transaction() as session:
        await session.execute(statements.UNCLAIM, {"ids": [task_id]})
        await session.execute(statements.RING_SOON, {"id": task_id})
    await rows.connection.execute("SELECT pg_advisory_unlock(9)")
    await rows.until_status(task_id, "done")


async def test_retry_that_does_not_give_up(relayed: Worker, rows: Observer) -> None:
    """After a ``retry(throw=False)`` the body's effects stay, and it is run again."""
    async with db.transaction():
        task_id = relayed.task("three_times").delay_durably("x")
    await rows.until_status(task_id, "done")
    assert await rows.names() == ["x 0", "x 1", "x 2"]


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
    """Nor does what goes on to ask for another attempt leave anything more."""

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


async def test_retry_with_an_option_that_cannot_be_stored(unheard: Celery[celery_ext.Task], rows: Observer) -> None:
    """Nor is that one run for ever."""

    @unheard.task(bind=True, shared=False)
    def retries(self: celery_ext.Task) -> None:
        raise self.retry(countdown=0, shadow=object())

    async with db.transaction():
        task_id = retries.delay_durably()
    deliver(retries, task_id)
    assert await rows.durable_tasks() == [("cancelled", "[[], {}]")]


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
