"""The same promise in every pool of Celery's."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator

import celery
import pytest
from celery.exceptions import SoftTimeLimitExceeded, TimeLimitExceeded, WorkerLostError

from celery_ext import AsyncTaskNotSupported, StatementFailed
from celery_ext.durable.relay import relaying
from fastapi_chatdify_db import db
from tests.observing import PATIENCE, Observer
from tests.serving import free_socket
from tests.worker.running import Worker, brokers, needs_a_broker, worker

GREEN = ("gevent", "eventlet")
POOLS = ["prefork", "threads", "solo", *GREEN]
BROKER = brokers()[-1]


@pytest.fixture(scope="module", params=POOLS)
def pooled(request: pytest.FixtureRequest) -> Iterator[Worker]:
    """A worker of each pool."""
    concurrency = "20" if request.param in GREEN else "2"
    with worker(BROKER, "-c", concurrency, pool=request.param) as running:
        yield running


async def test_commit_and_rollback(pooled: Worker, empty_tables: Observer) -> None:
    """Rows of what succeeds, and no others, whatever runs beside."""
    task = pooled.task("add_item")
    outcomes = ["succeed", "raise", "duplicate"] * 10
    results = [task.delay(f"{n:02}", outcome) for n, outcome in enumerate(outcomes)]
    states = []
    for result in results:
        await asyncio.to_thread(result.get, timeout=20, propagate=False)
        states.append(result.state)
    assert states == ["SUCCESS", "FAILURE", "FAILURE"] * 10
    assert await empty_tables.names() == [f"{n:02}" for n in range(0, 30, 3)]
    assert await empty_tables.in_transaction() == 0


async def test_error_callbacks_and_handlers_write(pooled: Worker, empty_tables: Observer) -> None:
    """After the body there is a unit for each errback, and one for the handlers."""
    result = pooled.task("handled").apply_async(("x", "raise"), link_error=pooled.task("errback").s("x"))
    await asyncio.to_thread(result.get, timeout=20, propagate=False)
    await asyncio.to_thread(pooled.until_logged, "raised unexpected: ValueError")
    await empty_tables.until_names(["after_return x FAILURE", "errback x", "on_failure x"])


async def test_tasks_send_others(pooled: Worker, empty_tables: Observer) -> None:
    """What a task sends on its commit finds the committed row, message after message."""
    for name in "abc":
        child = await asyncio.to_thread(pooled.task("insert_and_send").delay(name).get, timeout=20)
        assert await pooled.result(child) is True


async def test_durable_tasks(pooled: Worker, rows: Observer) -> None:
    """Each is run once, those of a key in their order; one that fails leaves nothing, and its error in its row."""
    append, add_item = pooled.task("append"), pooled.task("add_item")
    with relaying(pooled.app, db, grace=0.5):
        async with db.transaction():
            for number in range(5):
                append.apply_durably(("key", number), ordering_key="key")
            add_item.delay_durably("lost", "raise")
            add_item.delay_durably("other")
        await rows.until("7 = (SELECT count(*) FROM durable_task WHERE status IN ('done', 'failed'))")
    written = [row["name"] for row in await rows.connection.fetch("SELECT name FROM item ORDER BY id")]
    assert [name for name in written if name != "other"] == [f"key {number}" for number in range(5)]
    assert "other" in written
    [failed] = await rows.connection.fetch("SELECT name, error FROM durable_task WHERE status = 'failed'")
    assert failed["name"] == add_item.name
    assert failed["error"].startswith("ValueError")


async def test_async_tasks(pooled: Worker, empty_tables: Observer) -> None:
    """``async def`` tasks commit, fail and retry likewise; on greenlets they are refused."""
    task = pooled.task("add_item_async")
    results = {
        outcome: task.delay(outcome, outcome) for outcome in ("succeed", "raise", "duplicate", "retry", "cancel")
    }
    if any(pool in pooled.log for pool in GREEN):
        for result in results.values():
            with pytest.raises(AsyncTaskNotSupported, match="write def"):
                await asyncio.to_thread(result.get, timeout=20)
        assert "never awaited" not in pooled.log
        return
    for outcome in ("succeed", "retry"):
        assert await asyncio.to_thread(results[outcome].get, timeout=20) == results[outcome].id
    with pytest.raises(ValueError, match="raise"):
        await asyncio.to_thread(results["raise"].get, timeout=20)
    with pytest.raises(StatementFailed, match="IntegrityError"):
        await asyncio.to_thread(results["duplicate"].get, timeout=20)
    with pytest.raises(Exception, match="was cancelled"):
        await asyncio.to_thread(results["cancel"].get, timeout=20)
    assert await empty_tables.names() == ["retry", "succeed"]
    assert await empty_tables.in_transaction() == 0


async def test_threads_share_one_loop(empty_tables: Observer) -> None:
    """``async def`` tasks in a pool of threads meet on the process's one loop."""
    with worker(BROKER, "-c", "4", pool="threads") as running:
        results = [running.task("loop_id").delay(number, 4) for number in range(4)]
        loops = {await asyncio.to_thread(result.get, timeout=20) for result in results}
    assert len(loops) == 1


async def test_coroutines_of_one_task_know_their_requests(empty_tables: Observer) -> None:
    """``self`` is one object to all of them, and ``self.request`` each one's own."""
    with worker(BROKER, "-c", "4", pool="threads") as running:
        results = [running.task("own_id").delay(number, 4) for number in range(4)]
        for result in results:
            assert await asyncio.to_thread(result.get, timeout=20) == [result.id] * 4


@pytest.mark.parametrize("pool", GREEN)
async def test_greenlets_wait_together(empty_tables: Observer, pool: str) -> None:
    """Tasks that wait for PostgreSQL let others run: all of them hold one lock queue at once."""
    await empty_tables.connection.execute("SELECT pg_advisory_lock(7)")
    with worker(BROKER, "-c", "8", pool=pool) as running:
        results = [running.task("wait_for_lock").delay(7) for _ in range(8)]
        waiting = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted AND objid = 7"
        await empty_tables.until(f"8 = ({waiting})")
        await empty_tables.connection.execute("SELECT pg_advisory_unlock(7)")
        for result in results:
            await asyncio.to_thread(result.get, timeout=20)


@pytest.mark.parametrize("pool", GREEN)
def test_connect_among_greenlets_has_its_limit(pool: str) -> None:
    """libpq does not know of ``connect_timeout`` where it does not wait itself; a silent server would keep the task."""
    patch = {
        "gevent": "from gevent.monkey import patch_all",
        "eventlet": "from eventlet import monkey_patch as patch_all",
    }
    code = """
patch_all()
from celery.signals import worker_init
import celery_ext
from fastapi_chatdify_db import DatabaseUnavailable, db
worker_init.send(None)
try:
    db.sync_engine.connect()
except DatabaseUnavailable as error:
    assert "timeout expired" in str(error), error
else:
    raise AssertionError
"""
    with free_socket() as silent:
        url = f"postgresql://127.0.0.1:{silent.getsockname()[1]}/nobody?connect_timeout=1"
        subprocess.run(
            [sys.executable, "-c", patch[pool] + code],
            env=os.environ | {"DATABASE_URL": url},
            check=True,
            timeout=PATIENCE,
        )


@pytest.mark.parametrize("task", ["sleep_after_insert", "add_item_async"])
async def test_soft_time_limit_rolls_back(empty_tables: Observer, task: str) -> None:
    """The unit is rolled back, and the next task of the same process finds a clean connection."""
    with worker(BROKER, "-c", "1") as running:
        arguments = ("x", 60) if task == "sleep_after_insert" else ("x", "sleep")
        slow = running.task(task).apply_async(arguments, soft_time_limit=1)
        with pytest.raises(SoftTimeLimitExceeded):
            await asyncio.to_thread(slow.get, timeout=20)
        await asyncio.to_thread(running.task("add_item").delay("y").get, timeout=20)
        assert await empty_tables.names() == ["y"]
        assert await empty_tables.in_transaction() == 0


@pytest.fixture
async def slow_commits(empty_tables: Observer) -> AsyncIterator[None]:
    """COMMITs of inserted items that take two seconds."""
    await empty_tables.connection.execute("""
        CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(2); RETURN NULL; END';
        CREATE CONSTRAINT TRIGGER slow AFTER INSERT ON item DEFERRABLE INITIALLY DEFERRED
            FOR EACH ROW EXECUTE FUNCTION slow()
    """)
    yield
    await empty_tables.connection.execute("DROP FUNCTION slow CASCADE")


@pytest.mark.usefixtures("slow_commits")
async def test_soft_time_limit_during_the_commit(empty_tables: Observer) -> None:
    """What is committed is a success, although the limit passed while PostgreSQL was at it; what fails is a failure."""
    with worker(BROKER, "-c", "1", environment={"TEST_USE_BEFORE_FORK": "1"}) as running:
        results = {name: running.task(name).delay(name) for name in ("slow_commit", "slow_commit_async")}
        for name, result in results.items():
            assert await asyncio.to_thread(result.get, timeout=20) == name
            running.until_logged(f"{name} was cancelled during its commit")
        for name in ("add_item", "add_item_async"):
            lost = running.task(name).apply_async((name, "duplicate"), soft_time_limit=1)
            await asyncio.to_thread(lost.get, timeout=20, propagate=False)
            assert lost.failed()
        assert await asyncio.to_thread(running.task("pid_after_insert").delay("next").get, timeout=20)
    assert running.log.count("was cancelled during its commit") == 2
    assert await empty_tables.names() == ["next", "slow_commit", "slow_commit_async"]


@needs_a_broker
@pytest.mark.usefixtures("slow_commits")
async def test_cold_shutdown_during_the_commit(empty_tables: Observer) -> None:
    """Nor does Celery's error in the midst of the pool solo's task make a failure of a coroutine that is committed."""
    with worker(BROKER, pool="solo", environment={"REMAP_SIGTERM": "SIGQUIT"}) as running:
        result = running.task("slow_commit_async").delay("x")
        await empty_tables.until_committing()
    assert await asyncio.to_thread(result.get, timeout=20) == "x"
    assert await empty_tables.names() == ["x"]


async def test_task_in_a_thread_of_another(empty_tables: Observer) -> None:
    """Its commit has no signals to hold back, which a process's main thread gets."""
    with worker(BROKER, "-c", "1") as running:
        inner = running.task("apply_in_thread").delay("x")
        assert await asyncio.to_thread(inner.get, timeout=20) == "SUCCESS"
    assert await empty_tables.names() == ["x"]


@pytest.mark.skipif(celery.VERSION < (5, 7), reason="before 5.7, Celery fails to store that a process has exited")
async def test_coroutine_that_exits(empty_tables: Observer) -> None:
    """It ends its process, as in a ``def`` task, and not the loop under the next task."""
    with worker(BROKER, "-c", "1") as running:
        exits = running.task("exit_async").delay()
        last = running.task("add_item_async").delay("x")
        assert await asyncio.to_thread(last.get, timeout=20)
        assert isinstance(await asyncio.to_thread(exits.get, timeout=20, propagate=False), Exception)
    assert "InvalidStateError" not in running.log
    assert await empty_tables.names() == ["x"]


async def test_hard_time_limit_rolls_back(empty_tables: Observer) -> None:
    """The process is killed, PostgreSQL rolls back, and the next process serves."""
    with worker(BROKER, "-c", "1") as running:
        slow = running.task("sleep_after_insert").apply_async(("x", 60), time_limit=1)
        with pytest.raises(TimeLimitExceeded):
            await asyncio.to_thread(slow.get, timeout=20)
        await asyncio.to_thread(running.task("add_item").delay("y").get, timeout=20)
        assert await empty_tables.names() == ["y"]
        while await empty_tables.in_transaction():  # until the server has noticed
            await empty_tables.connection.execute("SELECT pg_sleep(0.01)")


async def test_processes_that_are_replaced(empty_tables: Observer) -> None:
    """With ``worker_max_tasks_per_child`` every process has connections of its own, and closes them."""
    with worker(BROKER, "-c", "1", "--max-tasks-per-child", "2") as running:
        pids = [
            await asyncio.to_thread(running.task("pid_after_insert").delay(f"{n}").get, timeout=20) for n in range(6)
        ]
        assert len(set(pids)) == 3
        assert len(await empty_tables.names()) == 6


async def test_parent_that_used_the_engine_before_it_forked(empty_tables: Observer) -> None:
    """Children leave the connections of a parent that is connected alone."""
    with worker(BROKER, "-c", "2", environment={"TEST_USE_BEFORE_FORK": "1"}) as running:
        results = [running.task("pid_after_insert").delay(f"{n}") for n in range(20)]
        pids = {await asyncio.to_thread(result.get, timeout=20) for result in results}
        assert running.process.pid not in pids
        assert len(await empty_tables.names()) == 20
        assert "OperationalError" not in running.log


@needs_a_broker
@pytest.mark.usefixtures("kills")
async def test_killed_in_the_middle(empty_tables: Observer) -> None:
    """A process killed in a task with ``acks_late`` leaves no row; the redelivered task leaves one."""
    for broker in brokers():
        await empty_tables.connection.execute("SELECT setval('kills', 1, false)")
        with worker(broker, "-c", "1") as running:
            result = running.task("killed_once").delay(broker)
            try:
                assert await asyncio.to_thread(result.get, timeout=30) == broker
            except WorkerLostError:  # stored for the first delivery, before the second one succeeds
                await asyncio.to_thread(running.until_logged, "succeeded")
    assert await empty_tables.names() == sorted(brokers())
    assert await empty_tables.in_transaction() == 0


async def test_database_restarted_under_a_worker(empty_tables: Observer) -> None:
    """When all connections were ended the next task succeeds, ``def`` or ``async def``."""
    with worker(BROKER, "-c", "1") as running:
        for number, name in enumerate(["add_item", "add_item_async"] * 2):
            await asyncio.to_thread(running.task(name).delay(f"{number}").get, timeout=20)
            await empty_tables.terminate_others()
        await asyncio.to_thread(running.task("add_item").delay("last").get, timeout=20)
    assert len(await empty_tables.names()) == 5
    assert await empty_tables.in_transaction() == 0
