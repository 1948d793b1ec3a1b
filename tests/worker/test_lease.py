"""The lease of a durable task that has ended its first transaction."""

from __future__ import annotations

import asyncio
from threading import Timer

import pytest
from celery import Celery
from celery.app.task import Context
from sqlalchemy import event, text
from sqlalchemy.exc import DBAPIError

import celery_ext
from celery_ext.durable import lease
from celery_ext.durable.delivery import Delivery
from fastapi_chatdify_db import Database, db
from tests.models import Item
from tests.observing import Observer
from tests.worker.running import deliver, task

LOCK = "hashtextextended('a', 21)"
IS_FREE = f"SELECT CASE WHEN pg_try_advisory_lock({LOCK}) THEN pg_advisory_unlock({LOCK}) ELSE false END"


async def test_lease_of_somebody_else(rows: Observer) -> None:
    """It is refused until the other process has given it up, and then it is really there."""
    database = Database("leasing")
    await rows.connection.execute(f"SELECT pg_advisory_lock({LOCK})")
    assert not lease.hold(database, "a")
    await rows.connection.execute(f"SELECT pg_advisory_unlock({LOCK})")
    assert lease.hold(database, "a")
    assert not await rows.connection.fetchval(IS_FREE)
    lease.free(database, "a")
    assert await rows.connection.fetchval(IS_FREE)


async def test_lease_whose_connection_died(rows: Observer) -> None:
    """It has gone with the connection, and is taken again, not remembered."""
    database = Database("leasing")
    assert lease.hold(database, "a")
    await rows.terminate_others()
    with pytest.raises(DBAPIError):
        lease.hold(database, "b")
    assert lease.hold(database, "a")
    assert not await rows.connection.fetchval(IS_FREE)
    lease.free(database, "a")
    assert await rows.connection.fetchval(IS_FREE)


@pytest.mark.parametrize("kind", ["def", "async def"])
async def test_task_of_one_transaction_takes_none(
    unheard: Celery[celery_ext.Task], rows: Observer, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """It has its row's lock to its end, savepoints or not, and costs no second connection."""

    def hold(*_: object) -> bool:
        raise AssertionError("a lease was taken")

    @unheard.task(shared=False)
    def in_def() -> None:
        with db.sync_session.begin_nested():
            db.sync_session.add(Item("x"))

    @unheard.task(shared=False)
    async def in_async() -> None:
        async with db.session.begin_nested():
            db.session.add(Item("x"))

    monkeypatch.setattr(lease, "hold", hold)
    worked = in_def if kind == "def" else in_async
    async with db.transaction():
        task_id = worked.delay_durably()
    await asyncio.to_thread(deliver, worked, task_id)
    assert await rows.durable_tasks() == [("done", "[[], {}]")]


async def test_lease_that_another_has_taken(unheard: Celery[celery_ext.Task], rows: Observer) -> None:
    """Whoever gave up the row by a rollback of its own commits nothing more once another process has begun."""

    @unheard.task(bind=True, shared=False)
    def goes_on(self: celery_ext.Task) -> None:
        db.sync_session.rollback()
        other.execute(text("SELECT pg_advisory_lock(hashtextextended(:id, 21))"), {"id": self.request.id})
        db.sync_session.add(Item("lost"))
        db.sync_session.commit()

    async with db.transaction():
        task_id = goes_on.delay_durably()
    with db.sync_engine.connect() as other:
        await asyncio.to_thread(deliver, goes_on, task_id)
        assert await rows.names() == []
        other.invalidate()
    assert await rows.durable_tasks() == [("pending", "[[], {}]")]


async def test_event_loop_goes_on_meanwhile(unheard: Celery[celery_ext.Task], rows: Observer) -> None:
    """While one task of a worker waits for its lease, the others on its event loop run."""
    delivery = Delivery(task(unheard, "record"), "a", Context())
    seen: list[str] = []

    def give_way() -> None:
        seen.append("another task ran")
        lease._lock.release()

    lease._lock.acquire()
    last_resort = Timer(10, lambda: seen.append("nobody ran") or lease._lock.release())  # type: ignore[func-returns-value]
    last_resort.start()
    async with db.transaction() as session:
        event.listen(session.sync_session, "before_commit", delivery._keep_lease)
        await session.execute(text("SELECT 1"))
        asyncio.get_running_loop().call_soon(give_way)
        await session.commit()
        last_resort.cancel()
    assert seen == ["another task ran"]
    assert not await rows.connection.fetchval(IS_FREE)
    delivery.close()
