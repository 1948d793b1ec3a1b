"""A durable task is a row of its sender's transaction: there with it, run once, whatever the broker does."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import tracemalloc
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import pytest
from celery import Celery
from fastapi import FastAPI, HTTPException
from sqlalchemy import event, inspect
from sqlalchemy.orm import DeclarativeBase

import celery_ext
from celery_ext import ArgumentsNotSerializable, DurableDispatchUnsupported
from celery_ext.binding import database_of
from celery_ext.durable import administration, statements
from celery_ext.durable.relay import relaying
from fastapi_chatdify_db import Database, DatabaseSettings, OutsideUnitOfWork, db, health_router
from tests.models import Item
from tests.observing import Observer
from tests.serving import serve
from tests.worker.running import Worker, brokers, deliver, task, worker

NO_ADVISORY_LOCKS = """
    NOT EXISTS (SELECT FROM pg_locks JOIN pg_database ON pg_database.oid = database
                WHERE locktype = 'advisory' AND datname = current_database())
"""
NO_PENDING_TASKS = "NOT EXISTS (SELECT FROM durable_task WHERE status = 'pending')"


async def result(worker: Worker, task_id: str) -> object:
    return await asyncio.to_thread(worker.app.AsyncResult(task_id).get, timeout=20, propagate=False)


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
    assert [await result(relayed, task_id) for task_id in ids] == [True] * 4
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
        for key in (7, uuid4(), "a\0b", "\ud800"):
            with pytest.raises(ArgumentsNotSerializable, match=r"ordering_key=str\(\.\.\.\)"):
                task(unheard, "record").apply_durably(("x",), ordering_key=cast("str", key))
    with pytest.raises(OutsideUnitOfWork, match=r"async with db\.transaction\(\)"):
        task(unheard, "record").delay_durably("x")
    assert await rows.durable_tasks() == []


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


async def test_idempotency_key(relayed: Worker, rows: Observer) -> None:
    """The same key again, at once or after it is done, stores nothing and gives the first one's id."""
    add = relayed.task("add_item")
    ids, key = [], str(uuid4())
    for _ in range(3):
        async with db.transaction():
            ids += [add.apply_durably(("x",), idempotency_key=key) for _ in range(2)]
        assert await result(relayed, ids[0]) == "x"
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
    assert await result(relayed, late) == "late"
    assert await result(relayed, later) == "later"
    early = await rows.connection.fetchval("SELECT count(*) FROM durable_task WHERE finished_at < due_at")
    assert early == 0
    assert administration.cancel(db, never)
    assert not administration.cancel(db, late)


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


async def test_inherited_priority(unheard: Celery[celery_ext.Task], rows: Observer) -> None:
    """With ``task_inherit_parent_priority`` what a task sends has its priority, where nothing else says one."""
    unheard.conf.task_inherit_parent_priority = True
    child = task(unheard, "record")

    @unheard.task(shared=False)
    def parent() -> list[str]:
        return [
            child.delay_on_commit("x"),
            child.delay_durably("x"),
            child.apply_async_on_commit(("x",), priority=1),
            child.apply_durably(("x",), priority=1),
        ]

    with unheard.connection_for_read() as connection:
        queue = connection.SimpleQueue("nowhere")
        queue.clear()  # of what other tests sent
        ids = parent.apply(priority=6).get()
        with relaying(unheard, db):
            messages = [await asyncio.to_thread(queue.get, timeout=20) for _ in ids]
    priorities = {message.headers["id"]: str(message.properties["priority"]) for message in messages}
    assert "".join(priorities[task_id] for task_id in ids) == "6611"


async def test_moments_are_kept_by_a_late_commit(unheard: Celery[celery_ext.Task], rows: Observer) -> None:
    """``eta`` and the ``expires`` of a datetime do not move by the time until the COMMIT."""
    moment = datetime.now(UTC) + timedelta(hours=1)
    async with db.transaction():
        task(unheard, "add_item").apply_durably(("x",), eta=moment, expires=moment)
        await rows.connection.execute("SELECT pg_sleep(1)")
    row = await rows.connection.fetchrow("SELECT due_at, expires_at FROM durable_task")
    assert row is not None
    assert all(abs(kept - moment) < timedelta(seconds=0.5) for kept in row.values())


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


async def test_retries_are_kept_in_the_row(relayed: Worker, rows: Observer) -> None:
    """``autoretry_for`` and ``self.retry`` count in the row, ``def`` or ``async def``; another attempt succeeds."""
    async with db.transaction():
        ids = [
            relayed.task("unique_at_second_try").delay_durably("def"),
            relayed.task("unique_at_second_try_async").delay_durably("async def"),
            relayed.task("add_item_async").delay_durably("retry", "retry"),
        ]
    assert [await result(relayed, task_id) for task_id in ids] == [1, 1, ids[2]]
    query = "SELECT retries FROM durable_task WHERE id = ANY($1)"
    assert [row["retries"] for row in await rows.connection.fetch(query, ids)] == [1, 1, 1]


@pytest.mark.parametrize("name", ["unique_at_second_try", "unique_at_second_try_async"])
async def test_late_message_has_the_retries_of_the_row(prefork: Worker, rows: Observer, name: str) -> None:
    """The message may be older than the latest attempt."""
    retried = prefork.task(name)
    async with db.transaction():
        task_id = retried.delay_durably("x")
    await rows.connection.execute("UPDATE durable_task SET retries = 1")
    retried.apply_async(("x",), task_id=task_id, headers={"durable": True})
    assert await result(prefork, task_id) == 1


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


async def test_duplicate_messages_are_dropped(relayed: Worker, rows: Observer) -> None:
    """A broker that delivers twice, at the same time or later, runs the task once."""
    add = relayed.task("add_item")
    async with db.transaction():
        task_id = add.delay_durably("x")
    for _ in range(20):
        add.apply_async(("x",), task_id=task_id, headers={"durable": True})
    await rows.until_status(task_id, "done")
    last = add.delay("last")
    await asyncio.to_thread(last.get, timeout=20)
    assert await rows.names() == ["last", "x"]


async def test_rollback_only_is_done(relayed: Worker, rows: Observer) -> None:
    """A task that rolls itself back and succeeds has succeeded."""
    async with db.transaction():
        ids = [relayed.task(f"rolled_back_by_itself{kind}").delay_durably("x") for kind in ("", "_async")]
    for task_id in ids:
        await rows.until_status(task_id, "done")
    assert await rows.names() == []


async def test_row_lock_is_the_lease(relayed: Worker, rows: Observer) -> None:
    """While one process is in the task's transaction, another one drops its message at once."""
    waiting = relayed.task("wait_for_lock")
    await rows.connection.execute("SELECT pg_advisory_lock(11)")
    async with db.transaction():
        task_id = waiting.delay_durably(11)
    await rows.until_somebody_waits_for_a_lock()
    for _ in range(5):
        waiting.apply_async((11,), task_id=task_id, headers={"durable": True})
    await asyncio.to_thread(relayed.task("add_item").delay("after the duplicates").get, timeout=20)
    query = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted AND objid = 11"
    assert await rows.connection.fetchval(query) == 1
    await rows.connection.execute("SELECT pg_advisory_unlock(11)")
    await rows.until_status(task_id, "done")


async def test_message_that_the_broker_lost(relayed: Worker, rows: Observer) -> None:
    """A row that was sent, and never arrived, is rung again."""
    async with db.transaction():
        task_id = relayed.task("add_item").apply_durably(("x",), queue="nobody-listens")
    await rows.until("(SELECT rings FROM durable_task WHERE id = $1) > 0", task_id)
    await rows.connection.execute('UPDATE durable_task SET options = \'{"headers": {"durable": true}}\'')
    assert await result(relayed, task_id) == "x"
    await rows.until_status(task_id, "done")


@pytest.mark.usefixtures("kills")
async def test_worker_killed_in_the_middle(relayed: Worker, rows: Observer) -> None:
    """Early acknowledged or not, the task is run again, and its effect is there once."""
    async with db.transaction():
        task_id = relayed.task("killed_once_acked_early").delay_durably("x")
    await rows.until_status(task_id, "done")
    assert await rows.names() == ["x"]


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
        released.apply_async(("x", 9), task_id=task_id, headers={"durable": True})
    await asyncio.to_thread(relayed.task("add_item").delay("other").get, timeout=20)
    await rows.connection.execute("SELECT pg_advisory_unlock(9)")
    await rows.until_status(task_id, "done")
    assert await rows.names() == ["other", "x begun", "x ended"]
    await rows.until(NO_ADVISORY_LOCKS)


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


async def test_ordering_key(relayed: Worker, rows: Observer) -> None:
    """Tasks of one key run in order, one at a time, beside those of others; one that failed lets the next begin."""
    append = relayed.task("append")
    for number in range(10):
        async with db.transaction():
            for key in ("a", "b", "c"):
                append.apply_durably((key, number), ordering_key=key)
    async with db.transaction():
        relayed.task("add_item").apply_durably(("lost", "raise"), ordering_key="a")
        last = append.apply_durably(("a", 10), ordering_key="a")
    await rows.until_status(last, "done")
    await rows.until(NO_PENDING_TASKS)
    names = [row["name"] for row in await rows.connection.fetch("SELECT name FROM item ORDER BY id")]
    for key, count in (("a", 11), ("b", 10), ("c", 10)):
        assert [name for name in names if name.startswith(key)] == [f"{key} {number}" for number in range(count)]


async def test_two_heads_of_one_key(relayed: Worker, rows: Observer) -> None:
    """Where a transaction did not see its predecessor, the later task still waits for the earlier one."""
    append = relayed.task("append")
    async with db.transaction():
        first = append.apply_durably(("a", 0), ordering_key="a", countdown=1)
        second = append.apply_durably(("a", 1), ordering_key="a")
    await rows.connection.execute("UPDATE durable_task SET ring_at = now() WHERE id = $1", second)
    await rows.until_status(second, "done")
    await rows.until_status(first, "done")
    assert [row["name"] for row in await rows.connection.fetch("SELECT name FROM item ORDER BY id")] == ["a 0", "a 1"]


async def test_a_durable_task_starts_others(relayed: Worker, rows: Observer) -> None:
    """All of them with its commit, or none when it fails."""
    async with db.transaction():
        good = relayed.task("start_others").delay_durably("good", 3)
        bad = relayed.task("start_others").delay_durably("bad", 3, fail=True)
    await rows.until_status(good, "done")
    await rows.until_status(bad, "failed")
    await rows.until(NO_PENDING_TASKS)
    assert await rows.names() == ["good 0", "good 1", "good 2"]


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


async def test_relay_beside_the_application(prefork: Worker, rows: Observer) -> None:
    """``init_app(..., relay=True)`` relays in the lifespan; the health check shows what is left."""
    services = list(db.services)
    celery_ext.init_app(prefork.app, relay=True)
    app = FastAPI()
    db.init_app(app)
    app.include_router(health_router)

    @app.post("/")
    async def send() -> str:
        prefork.task("add_item").apply_durably(("later",), countdown=3600)
        return prefork.task("add_item").delay_durably("x")

    try:
        async with serve(app) as client:
            assert await result(prefork, (await client.post("/")).json()) == "x"
            ready = (await client.get("/health/ready")).json()
            assert ready["databases"]["db"]["figures"]["durable_tasks"]["pending"] == 1
    finally:
        db.services[:] = services


async def test_command_line(prefork: Worker, rows: Observer) -> None:
    """The relay as a process sends what is there, ends at SIGTERM, and its other commands look after the rows."""
    command = [sys.executable, "-m", "celery_ext.relay", "-A", "tests.worker.application"]
    environment = os.environ | prefork.environment

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, check=False)

    async with db.transaction():
        done = prefork.task("add_item").delay_durably("x")
        failing = prefork.task("add_item").delay_durably("y", "raise")
        cancelled = prefork.task("add_item").apply_durably(("z",), countdown=3600)
    relay = await asyncio.create_subprocess_exec(*command, "run", env=environment, stderr=subprocess.PIPE)
    await rows.until_status(done, "done")
    await rows.until_status(failing, "failed")
    relay.terminate()
    _, log = await relay.communicate()
    assert relay.returncode == 0
    assert b"relayed sent=2" in log
    status = await asyncio.to_thread(run, "status")
    assert status.stdout.split()[:2] == ["pending", "1"]
    assert failing in (await asyncio.to_thread(run, "failed")).stdout
    assert (await asyncio.to_thread(run, "cancel", cancelled)).returncode == 0
    assert (await asyncio.to_thread(run, "cancel", done)).returncode == 1
    assert (await asyncio.to_thread(run, "retry", failing)).stdout == "1 to be run again\n"
    assert (await asyncio.to_thread(run, "retry")).returncode == 2
    assert (await asyncio.to_thread(run, "prune", "--days", "0")).stdout == "2 deleted\n"
    assert [status for status, _ in await rows.durable_tasks()] == ["pending"]


async def test_failure_is_told(relayed: Worker, rows: Observer) -> None:
    """Who asks Celery for the result of a durable task that failed is told, and so are its error callbacks."""
    async with db.transaction():
        task_id = relayed.task("add_item").apply_durably(("x", "raise"), link_error=relayed.task("errback").s("x"))
    with pytest.raises(ValueError, match="x"):
        await asyncio.to_thread(relayed.app.AsyncResult(task_id).get, timeout=20)
    await rows.until_status(task_id, "failed")


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
            count_run.apply_async(("again",), task_id=task_id, headers={"durable": True})
    for number in range(5):  # one for each process, and more
        await asyncio.to_thread(relayed.task("add_item").delay(f"{number}").get, timeout=20)
    assert await rows.connection.fetchval("SELECT last_value FROM kills") == 1
    assert "done" in await rows.names()


async def test_later_transactions_of_a_key_wait(unheard: Celery[Any], rows: Observer) -> None:
    """Only the first row of a key is for a relay to send, whichever transaction the others are of."""
    for name in ("a", "b"):
        async with db.transaction():
            for _ in range(2):
                task(unheard, "record").apply_durably((name,), ordering_key="k")
    query = "SELECT ring_at = 'infinity' AS waits FROM durable_task ORDER BY seq"
    assert [row["waits"] for row in await rows.connection.fetch(query)] == [False, True, True, True]


async def test_transactions_of_a_key_take_turns(unheard: Celery[Any], rows: Observer) -> None:
    """Who stores under a key during another one's COMMIT waits for it, with the locks before that one in order."""
    record, key_lock = task(unheard, "record"), "hashtextextended($1, 20)"
    stored_first, may_commit = threading.Event(), threading.Event()

    def wait(_: object) -> None:
        stored_first.set()
        may_commit.wait(60)

    def first() -> None:
        with db.sync_transaction() as session:
            record.apply_durably(("first",), ordering_key="k")
            event.listen(session, "before_commit", wait)

    def second() -> None:
        with db.sync_transaction():
            for key in "kjihgf":
                record.apply_durably(("second",), ordering_key=key)

    both = [asyncio.create_task(asyncio.to_thread(first))]
    await asyncio.to_thread(stored_first.wait, 60)
    both.append(asyncio.create_task(asyncio.to_thread(second)))
    waits = asyncio.create_task(rows.until_somebody_waits_for_a_lock())
    try:
        await asyncio.wait([*both, waits], return_when=asyncio.FIRST_COMPLETED)
        assert waits.done()
        free = [await rows.connection.fetchval(f"SELECT pg_try_advisory_lock({key_lock})", key) for key in "fghij"]
        assert not any(free)
    finally:
        may_commit.set()
    await asyncio.gather(*both)
    query = "SELECT ring_at = 'infinity' FROM durable_task WHERE ordering_key = 'k' ORDER BY seq"
    assert [row[0] for row in await rows.connection.fetch(query)] == [False, True]


async def test_relays_are_told(unheard: Celery[Any], rows: Observer) -> None:
    """Whatever leaves something to send says so, and no relay finds it only when it looks again."""
    told: asyncio.Queue[object] = asyncio.Queue()
    await rows.connection.add_listener(statements.CHANNEL, lambda *_: told.put_nowait(_))

    async def until_told() -> None:
        await asyncio.wait_for(told.get(), 10)
        assert told.empty()

    @unheard.task(bind=True, shared=False, max_retries=1)
    def retried(self: celery_ext.Task) -> None:
        raise self.retry(countdown=0)

    async with db.transaction():
        ids = [retried.apply_durably(ordering_key="k") for _ in range(3)]
    await until_told()
    assert await asyncio.to_thread(administration.cancel, db, ids[0])
    await until_told()  # of the second one
    deliver(retried, ids[1])
    await until_told()  # of its next attempt
    deliver(retried, ids[1])
    await until_told()  # of the third one, since the second has failed
    assert await asyncio.to_thread(administration.retry, db, ids[1]) == 1
    await until_told()


async def test_cancelling_does_not_wait_for_the_worker(unheard: Celery[Any], rows: Observer) -> None:
    """Of a row that is locked, which its worker does, it is said at once that it cannot be cancelled."""
    async with db.transaction():
        task_id = task(unheard, "record").delay_durably("x")
    async with rows.connection.transaction():
        await rows.connection.execute("SELECT FROM durable_task FOR UPDATE")
        assert not await asyncio.wait_for(asyncio.to_thread(administration.cancel, db, task_id), 10)
    assert administration.cancel(db, task_id)


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


async def test_key_whose_next_was_forgotten(relayed: Worker, rows: Observer) -> None:
    """The relay finds what nobody rang when the one before it had ended."""
    add = relayed.task("add_item")
    async with db.transaction():
        first = add.apply_durably(("first",), ordering_key="k", countdown=3600)
        second = add.apply_durably(("second",), ordering_key="k")
    await rows.connection.execute("UPDATE durable_task SET status = 'done' WHERE id = $1", first)
    await rows.until_status(second, "done")


async def test_prune_keeps_what_is_young_or_failed(unheard: Celery[Any], rows: Observer) -> None:
    """Deleted is what was done, or cancelled, before those days."""
    async with db.transaction():
        for name in ("done", "cancelled", "failed", "pending", "young"):
            task(unheard, "record").delay_durably(name)
    await rows.connection.execute(
        """UPDATE durable_task SET
           status = CASE arguments::json -> 0 ->> 0 WHEN 'young' THEN 'done' ELSE arguments::json -> 0 ->> 0 END,
           finished_at = now() - CASE arguments::json -> 0 ->> 0 WHEN 'young' THEN 6 ELSE 8 END * interval '1 day'"""
    )
    assert administration.prune(db, 7) == 2
    assert [status for status, _ in await rows.durable_tasks()] == ["failed", "pending", "done"]


async def test_savepoint_around_a_released_one(unheard: Celery[Any], rows: Observer) -> None:
    """What was stored in a savepoint that was kept goes with the one around it."""
    async with db.transaction() as session:
        outer = await session.begin_nested()
        async with session.begin_nested():
            task(unheard, "record").delay_durably("x")
        await outer.rollback()
    assert await rows.durable_tasks() == []


async def test_idempotency_key_is_the_tasks_own(unheard: Celery[Any], rows: Observer) -> None:
    """Two tasks may use the same key, e.g. an order's number."""
    async with db.transaction():
        for name in ("record", "add_item"):
            task(unheard, name).apply_durably(("x",), idempotency_key="k")
    assert len(await rows.durable_tasks()) == 2
