"""A durable task that is interrupted or held up is run to its end, once."""

from __future__ import annotations

import asyncio
import socket
from contextlib import closing

import psycopg2
import pytest
from celery import Celery
from celery.exceptions import Ignore
from sqlalchemy import Connection, TextClause, event, select, text
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import DBAPIError

import celery_ext
from celery_ext.durable import statements
from celery_ext.durable.relay import relaying
from fastapi_chatdify_db import DatabaseUnavailable, db
from tests.failing import raising
from tests.models import Item
from tests.observing import Observer
from tests.worker.running import Worker, brokers, deliver, needs_a_broker, task, worker


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


@needs_a_broker
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


async def test_cold_shutdown_while_a_failure_is_stored(
    unheard: Celery[celery_ext.Task], rows: Observer, caplog: pytest.LogCaptureFixture
) -> None:
    """What comes between the body and the note of its end is no failure to tell of, either: the task is run again."""

    def on_cold_shutdown(_: Connection) -> None:
        raise NotImplementedError

    @unheard.task(shared=False)
    def fails() -> None:
        raise ValueError

    async with db.transaction():
        task_id = fails.delay_durably()
    event.listen(db.sync_engine, "commit", on_cold_shutdown)
    deliver(fails, task_id)
    event.remove(db.sync_engine, "commit", on_cold_shutdown)
    assert await rows.durable_tasks() == [("pending", "[[], {}]")]
    assert "raised unexpected" not in caplog.text


@pytest.mark.parametrize(
    ("error", "status"),
    [
        *(("40001", "pending"), ("08006", "pending"), ("57P03", "pending"), ("57014", "failed")),
        *(("53000", "pending"), ("53100", "pending"), ("53200", "pending"), ("53300", "pending")),
        ("53400", "failed"),
        *(("refused", "failed"), ("given up", "cancelled")),
        *(("the driver's", "pending"), ("one of two", "failed")),
    ],
)
async def test_whose_failure_it_is(
    unheard: Celery[celery_ext.Task], rows: Observer, database_url: str, error: str, status: str
) -> None:
    """PostgreSQL's codes tell, whoever raises them; a refused socket, or one error of a group, is the task's.

    Either way the row has the error.
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
                own.cursor().execute(raising("57P01"))
        db.sync_session.execute(text(raising(error)))

    async with db.transaction():
        task_id = fails.delay_durably()
    deliver(fails, task_id)
    assert await rows.durable_tasks() == [(status, "[[], {}]")]
    assert await rows.connection.fetchval("SELECT error FROM durable_task") is not None


async def test_row_names_the_errors_of_a_group(unheard: Celery[celery_ext.Task], rows: Observer) -> None:
    """The group's own text only counts them; SQLAlchemy's quote no row, as ever."""

    @unheard.task(shared=False)
    def fails() -> None:
        try:
            db.sync_session.execute(text("SELECT CAST(:secret AS integer)"), {"secret": "hunter2"})
        except DBAPIError as error:
            raise ExceptionGroup("of branches", [KeyError("ana"), error]) from None

    async with db.transaction():
        task_id = fails.delay_durably()
    deliver(fails, task_id)
    assert await rows.connection.fetchval("SELECT error FROM durable_task WHERE status = 'failed'") == (
        "ExceptionGroup: of branches (2 sub-exceptions): KeyError: 'ana'; DataError: SQLSTATE 22P02"
    )


async def test_altered_table(unheard: Celery[celery_ext.Task], rows: Observer) -> None:
    """A statement that was prepared before a migration is no failure of the task: it is run again."""

    @unheard.task(shared=False)
    async def counts() -> None:
        names = (await db.session.scalars(select(Item.name))).all()
        db.session.add(Item(str(len(names))))

    async def deliver_one() -> str:
        async with db.transaction():
            task_id = counts.delay_durably()
        await asyncio.to_thread(deliver, counts, task_id)
        return task_id

    for _ in range(db.settings.db_pool_size):  # on each connection that an earlier task has left
        await deliver_one()
    before = await rows.names()
    await rows.connection.execute("ALTER TABLE item ALTER name TYPE varchar(60)")
    try:
        task_id = await deliver_one()
        assert await rows.names() == before
        await asyncio.to_thread(deliver, counts, task_id)
        assert len(await rows.names()) == len(before) + 1
    finally:
        await rows.connection.execute("ALTER TABLE item ALTER name TYPE varchar")


@pytest.mark.parametrize("limit", ["lock_timeout", "statement_timeout"])
@pytest.mark.parametrize(
    "lock",
    [statements.LOCK_KEYS.bindparams(keys=["a"]), text("LOCK TABLE durable_task IN SHARE MODE")],
    ids=["key", "table"],
)
async def test_limit_that_passes_while_the_end_waits(
    unheard: Celery[celery_ext.Task], rows: Observer, lock: TextClause, limit: str
) -> None:
    """Somebody else's COMMIT, or a migration, takes long; that is no failure of the task, which is run again."""
    locks = [lock]

    @unheard.task(shared=False)
    def adds() -> None:
        if locks:
            other.execute(locks.pop())
        db.sync_session.add(Item("x"))
        db.sync_session.execute(text(f"SET LOCAL {limit} = 100"))

    async with db.transaction():
        task_id = adds.apply_durably(ordering_key="a")
    with db.sync_engine.connect() as other:

        def release(_: ExceptionContext) -> None:
            other.rollback()

        event.listen(db.sync_engine, "handle_error", release)
        deliver(adds, task_id)
        event.remove(db.sync_engine, "handle_error", release)
    assert await rows.durable_tasks() == [("pending", "[[], {}]")]
    deliver(adds, task_id)
    assert await rows.durable_tasks() == [("done", "[[], {}]")]
    assert await rows.names() == ["x"]


@pytest.mark.parametrize("limit", ["lock_timeout", "statement_timeout"])
async def test_limit_that_passes_while_the_end_waits_for_an_idempotency_key(
    unheard: Celery[celery_ext.Task], rows: Observer, database_url: str, limit: str
) -> None:
    """Likewise, when somebody else is storing the same."""
    other = task(unheard, "add_item")

    @unheard.task(shared=False)
    def stores() -> None:
        other.apply_durably(["x"], idempotency_key="k")
        db.sync_session.execute(text(f"SET LOCAL {limit} = 100"))

    async with db.transaction():
        task_id = stores.delay_durably()
    async with db.transaction():
        stored = other.apply_durably(["x"], idempotency_key="k")
    with closing(psycopg2.connect(database_url)) as storing:
        # as if they had not committed yet: whoever stores the same waits until that is decided
        await rows.connection.execute("DELETE FROM durable_task WHERE id = $1", stored)
        storing.cursor().execute(
            "INSERT INTO durable_task (id, name, arguments, options, due_at, ring_at) "
            "VALUES (%s, '', '', '', now(), now())",
            [stored],
        )
        await asyncio.to_thread(deliver, stores, task_id)
    assert await rows.durable_tasks() == [("pending", "[[], {}]")]
    deliver(stores, task_id)
    assert [status for status, _ in await rows.durable_tasks()] == ["done", "pending"]


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
            await session.execute(statements.RING_SOON, {"id": task_id, "error": None})
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


async def test_task_that_waits_is_not_rung_again(unheard: Celery[celery_ext.Task], rows: Observer) -> None:
    """However long it has released its row, its next copy is sent within a grace time of its worker's death."""
    async with db.transaction():
        task_id = task(unheard, "add_item").delay_durably("x")
    claim = {"batch": 1, "grace": 10}
    for held in (True, True, False):
        lock = "pg_advisory_lock" if held else "pg_advisory_unlock_all"
        await rows.connection.execute(f"SELECT {lock}({'hashtextextended($1, 21)' if held else ''})", *[task_id] * held)
        await rows.connection.execute("UPDATE durable_task SET rings = 5, ring_at = now()")
        async with db.transaction() as session:
            claimed = (await session.execute(statements.CLAIM, claim)).all()
        rings, distance = await rows.connection.fetchrow("SELECT rings, ring_at - now() FROM durable_task")
        assert (len(claimed), rings, round(distance.total_seconds())) == ((0, 5, 10) if held else (1, 6, 320))


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
        await session.execute(statements.RING_SOON, {"id": task_id, "error": None})
    await rows.connection.execute("SELECT pg_advisory_unlock(9)")
    await rows.until_status(task_id, "done")
