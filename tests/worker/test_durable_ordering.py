"""Tasks of one ordering key run one at a time, in the order in which their transactions committed."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

from celery import Celery
from sqlalchemy import event

from celery_ext.durable import administration, statements
from fastapi_chatdify_db import db
from tests.observing import Observer
from tests.worker.running import Worker, deliver, task


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
    await rows.until_no_pending_tasks()
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


async def test_key_whose_next_was_forgotten(relayed: Worker, rows: Observer) -> None:
    """The relay finds what nobody rang when the one before it had ended."""
    add = relayed.task("add_item")
    async with db.transaction():
        first = add.apply_durably(("first",), ordering_key="k", countdown=3600)
        second = add.apply_durably(("second",), ordering_key="k")
    await rows.connection.execute("UPDATE durable_task SET status = 'done' WHERE id = $1", first)
    await rows.until_status(second, "done")


async def test_tasks_that_store_under_each_others_keys(relayed: Worker, rows: Observer) -> None:
    """Such a task locks its own key and those that it stores under in one order, and so waits in no circle."""
    lock = "hashtextextended($1, 20)"
    await rows.connection.execute(f"SELECT pg_advisory_lock({lock})", "a")
    async with db.transaction():
        first = relayed.task("start_under_key").apply_durably(("x", "a"), ordering_key="b")
    await rows.until_somebody_waits_for_a_lock()
    assert await rows.connection.fetchval(f"SELECT pg_try_advisory_lock({lock})", "b")
    await rows.connection.execute("SELECT pg_advisory_unlock_all()")
    await rows.until_status(first, "done")


async def test_task_whose_thread_stores_under_its_key(relayed: Worker, rows: Observer) -> None:
    """Neither of an ``async def`` task's two transactions waits for the other one."""
    async with db.transaction():
        first = relayed.task("start_under_key_in_a_thread").apply_durably(("next", "k"), ordering_key="k")
    await rows.until_status(first, "done")
    await rows.until_no_pending_tasks()
    assert await rows.names() == ["before next", "next"]


async def test_retried_by_hand_in_order(relayed: Worker, rows: Observer) -> None:
    """Failed tasks of a busy key wait until what runs has ended, and then go first, in their order."""
    await rows.connection.execute("SELECT pg_advisory_lock(9)")
    add, append, wait = (relayed.task(name) for name in ("add_item", "append", "wait_for_lock"))
    async with db.transaction():
        failing = [add.apply_durably((f"failed {n}", "raise"), ordering_key="a") for n in range(3)]
        wait.apply_durably((9,), ordering_key="a")
        last = append.apply_durably(("a", 4), ordering_key="a")
    await rows.until_somebody_waits_for_a_lock()
    for number, task_id in enumerate(failing):
        arguments = f'[["a {number}"], {{}}]'
        await rows.connection.execute("UPDATE durable_task SET arguments = $1 WHERE id = $2", arguments, task_id)
    assert administration.retry(db, None) == 3
    for number, task_id in enumerate(failing):  # messages of before, which a broker may have kept
        add.apply_async((f"a {number}",), task_id=task_id, headers={"durable": task_id})
    async with db.transaction():
        other = append.apply_durably(("b", 1), ordering_key="b")
    await rows.until_status(other, "done")
    assert await rows.names() == ["b 1"]
    await rows.connection.execute("SELECT pg_advisory_unlock(9)")
    await rows.until_status(last, "done")
    in_order = await rows.connection.fetch("SELECT name FROM item ORDER BY id")
    assert [row["name"] for row in in_order] == ["b 1", "a 0", "a 1", "a 2", "a 4"]


async def test_retried_by_hand_while_another_ends(unheard: Celery[Any], rows: Observer) -> None:
    """It waits for whoever is ending the last task of its key, which will not see it, and then rings it itself."""
    async with db.transaction():
        failed, last = (task(unheard, "record").apply_durably((name,), ordering_key="k") for name in "ab")
    await rows.connection.execute("UPDATE durable_task SET status = 'failed' WHERE id = $1", failed)
    await rows.connection.execute("UPDATE durable_task SET ring_at = due_at WHERE id = $1", last)
    with db.sync_transaction() as session:
        session.execute(statements.LOCK_KEYS, {"keys": ["k"]})
        session.execute(statements.FINISH, {"id": last, "status": "done", "error": None}).one()
        session.execute(statements.RING_NEXT_OF_KEY, {"key": "k"})
        retrying = asyncio.create_task(asyncio.to_thread(administration.retry, db, failed))
        waits = asyncio.create_task(rows.until_somebody_waits_for_a_lock())
        await asyncio.wait([retrying, waits], return_when=asyncio.FIRST_COMPLETED)
    assert await retrying == 1
    waits.cancel()
    due = "SELECT id FROM durable_task WHERE status = 'pending' AND ring_at < 'infinity'"
    assert [row["id"] for row in await rows.connection.fetch(due)] == [failed]


async def test_message_for_one_that_waits(unheard: Celery[Any], rows: Observer) -> None:
    """Whoever could not send it, or not begin it, does not give it the turn that it waits for."""
    async with db.transaction():
        first, waiting = (task(unheard, "record").apply_durably((name,), ordering_key="k") for name in "ab")
        other = task(unheard, "record").delay_durably("c")
    await rows.connection.execute("UPDATE durable_task SET rings = 1 WHERE id = $1", other)
    async with db.transaction() as session:
        await session.execute(statements.UNCLAIM, {"ids": [first, waiting, other]})
        await session.execute(statements.RING_SOON, {"id": waiting, "error": None})
    found = await rows.connection.fetch("SELECT rings, ring_at = 'infinity' AS waits FROM durable_task ORDER BY seq")
    assert [tuple(row) for row in found] == [(0, False), (0, True), (0, False)]


async def test_cancelling_one_that_waits(unheard: Celery[Any], rows: Observer) -> None:
    """It is not the end of the one that runs: a failed task that is retried by hand still waits for that."""
    add = task(unheard, "add_item")
    async with db.transaction():
        failed, running, waiting = [add.apply_durably((name,), ordering_key="a") for name in "abc"]
    await rows.connection.execute(
        "UPDATE durable_task SET status = 'failed', finished_at = now() WHERE id = $1", failed
    )
    with db.sync_transaction() as session:
        session.execute(statements.RING_NEXT_OF_KEY, {"key": "a"})
    assert administration.retry(db, failed) == 1
    assert administration.cancel(db, waiting)
    due = "SELECT id FROM durable_task WHERE status = 'pending' AND ring_at < 'infinity'"
    assert [row["id"] for row in await rows.connection.fetch(due)] == [running]


async def test_interrupted_before_an_earlier_one_is_retried(unheard: Celery[Any], rows: Observer) -> None:
    """The task that was under way runs again although the one that waits for it was stored before it."""

    @unheard.task(shared=False)
    def runs() -> None: ...

    async with db.transaction():
        failed, interrupted = [runs.apply_durably(ordering_key="k") for _ in range(2)]
    await rows.connection.execute("UPDATE durable_task SET status = 'failed' WHERE id = $1", failed)
    await rows.connection.execute("UPDATE durable_task SET ring_at = due_at WHERE id = $1", interrupted)
    assert administration.retry(db, failed) == 1
    deliver(runs, interrupted)
    await rows.until_status(interrupted, "done")


async def test_running_task_that_was_released_is_not_cancelled(relayed: Worker, rows: Observer) -> None:
    """``cancel`` says no, and the next of its key does not begin beside it."""
    await rows.connection.execute("SELECT pg_advisory_lock(9)")
    async with db.transaction():
        running = relayed.task("release_and_wait").apply_durably(("x", 9), ordering_key="k")
    await rows.until_somebody_waits_for_a_lock()
    assert not await asyncio.to_thread(administration.cancel, db, running)
    await rows.connection.execute("SELECT pg_advisory_unlock(9)")
    await rows.until_status(running, "done")
