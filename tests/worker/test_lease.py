"""The lease of a durable task that has ended its first transaction."""

from __future__ import annotations

import asyncio
from threading import Timer

import pytest
from celery import Celery
from celery.app.task import Context
from sqlalchemy import event, make_url, text
from sqlalchemy.exc import DBAPIError

import celery_ext
from celery_ext.durable import lease
from celery_ext.durable.delivery import Delivery
from celery_ext.durable.relay import relaying
from fastapi_chatdify_db import Database, DatabaseSettings, DatabaseUnavailable, db
from tests.forking import in_a_new_process
from tests.forwarding import Forwarder
from tests.models import Item
from tests.observing import PATIENCE, Observer
from tests.worker.running import brokers, deliver, task, worker

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


@pytest.mark.parametrize("ends", [False, True])
async def test_lease_whose_connection_died(rows: Observer, ends: bool) -> None:
    """It has gone with the connection, also for a task that ends then, and is taken again, not remembered."""
    database = Database("leasing")
    assert lease.hold(database, "a")
    await rows.terminate_others()
    with pytest.raises(DBAPIError):
        lease.hold(database, "b")
    if ends:
        lease.free(database, "a")
    assert lease.hold(database, "a")
    assert not await rows.connection.fetchval(IS_FREE)
    lease.free(database, "a")
    assert await rows.connection.fetchval(IS_FREE)


async def test_lease_of_a_silent_database(
    rows: Observer, database_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody waits for it without end, and the tasks that begin later have a connection of their own."""
    monkeypatch.setattr(lease, "_LIMIT", 0.5)
    forwarder = Forwarder(database_url)
    database = Database("leasing", settings=DatabaseSettings(database_url=forwarder.url))
    async with asyncio.timeout(PATIENCE), forwarder.opened():
        assert await asyncio.to_thread(lease.hold, database, "a")
        assert await asyncio.to_thread(lease.hold, database, "b")
        forwarder.fall_silent()
        with pytest.raises(DBAPIError):
            await asyncio.to_thread(lease.hold, database, "c")
        await asyncio.to_thread(lease.free, database, "a")
        forwarder.speak_again()
        assert await asyncio.to_thread(lease.hold, database, "d")
        forwarder.fall_silent()
        await asyncio.to_thread(lease.free, database, "d")
    assert caplog.text.count("its connection is cut") == 2


async def test_lease_whose_connection_is_closed_already(rows: Observer) -> None:
    """As by a time limit of gevent's in the midst of a question: it is replaced like any that broke."""
    database = Database("leasing")
    assert lease.hold(database, "a")
    driver = lease._connections[database].connection.dbapi_connection
    assert driver is not None
    driver.close()
    with pytest.raises(DBAPIError):
        lease.hold(database, "b")
    assert lease.hold(database, "b")
    lease.free(database, "b")


async def test_lease_of_a_server_that_is_silent_from_the_start(
    rows: Observer, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is asked on a new connection has the same limit, and so has the wait for one's turn."""
    monkeypatch.setattr(lease, "_LIMIT", 0.5)
    forwarder = Forwarder(database_url)
    database = Database("leasing", settings=DatabaseSettings(database_url=forwarder.url))
    event.listen(database.sync_engine.pool, "connect", lambda *_: forwarder.fall_silent(), insert=True)
    async with asyncio.timeout(PATIENCE), forwarder.opened():
        holds = [asyncio.to_thread(lease.hold, database, task_id) for task_id in "abc"]
        ends = await asyncio.gather(*holds, return_exceptions=True)
    assert all(isinstance(end, DatabaseUnavailable | DBAPIError) for end in ends)


async def test_lease_outlives_a_limit_for_idle_sessions(rows: Observer, database_url: str) -> None:
    """A task may wait longer for something slow than the server lets other sessions idle."""
    url = make_url(database_url).update_query_dict({"options": "-c idle_session_timeout=1000"})
    given = DatabaseSettings(database_url=url.render_as_string(hide_password=False), db_application_name="leasing")
    database = Database("leasing", settings=given)
    assert lease.hold(database, "a")
    with database.sync_engine.connect():
        pass
    await rows.until_connections("leasing", 1)  # that of the pool has ended
    assert not await rows.connection.fetchval(IS_FREE)
    lease.free(database, "a")
    assert await rows.connection.fetchval(IS_FREE)


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


async def test_cancellation_while_the_lease_is_taken(unheard: Celery[celery_ext.Task], rows: Observer) -> None:
    """It is heard when the lease is there to be given up; taken later, it would outlive the task."""
    delivery = Delivery(task(unheard, "record"), "a", Context())
    loop, waits = asyncio.get_running_loop(), asyncio.Event()

    async def commits() -> None:
        async with db.transaction() as session:
            event.listen(session.sync_session, "before_commit", lambda _: loop.call_soon(waits.set))
            event.listen(session.sync_session, "before_commit", delivery._keep_lease)
            await session.execute(text("SELECT 1"))
            await session.commit()

    lease._lock.acquire()
    committing = asyncio.create_task(commits())
    await waits.wait()
    committing.cancel()
    ended, _ = await asyncio.wait([committing], timeout=0.1)
    lease._lock.release()
    with pytest.raises(asyncio.CancelledError):
        await committing
    delivery.close()
    assert not ended
    assert await rows.connection.fetchval(IS_FREE)


def test_fork_during_a_lease(database_url: str) -> None:
    """A forked child frees nothing of its parent's, wherever it leaves its task, and waits for nobody."""
    in_a_new_process(
        """
import signal
from celery_ext.durable import lease
from fastapi_chatdify_db import Database
from tests.forking import fork_and_wait

def child():
    signal.alarm(10)
    lease.free(database, "a")
    assert not lease.hold(database, "a")

database = Database()
assert lease.hold(database, "a")
with lease._lock:
    assert fork_and_wait(child) == 0
lease.free(database, "a")
assert lease.hold(database, "a")
lease.free(database, "a")
""",
        DATABASE_URL=database_url,
    )
