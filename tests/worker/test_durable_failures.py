"""A durable task that fails, before its body or by whatever it raises, has failed; the next of its key begins."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest
from celery import Celery
from celery.app.trace import trace_task
from celery.exceptions import Ignore, Reject, Retry
from greenlet import GreenletExit
from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError

import celery_ext
from celery_ext.durable import administration
from fastapi_chatdify_db import AfterCommitError, Database, DatabaseSettings, DatabaseUnavailable, db
from tests.models import Item
from tests.observing import Observer
from tests.worker.application import create_app
from tests.worker.running import Worker, deliver, task


@pytest.mark.parametrize("text", ["a\0b", "\udcff"])
async def test_error_that_cannot_be_stored_as_it_is(relayed: Worker, rows: Observer, text: str) -> None:
    """A failure is a failure, whatever its text, and the next task of its key begins."""
    async with db.transaction():
        failing = relayed.task("raise_text").apply_durably(
            (text.encode("utf-16", "surrogatepass").hex(),), ordering_key="k"
        )
        behind = relayed.task("add_item").apply_durably(("behind",), ordering_key="k")
    await rows.until_status(failing, "failed")
    await rows.until_status(behind, "done")


async def test_error_that_cannot_be_told(unheard: Celery[celery_ext.Task], rows: Observer) -> None:
    """An error whose own text fails is a failure, too, and of a text without end the row keeps the beginning."""

    class Untold(Exception):
        def __str__(self) -> str:
            raise LookupError

    @unheard.task(shared=False)
    def fails(*, long: bool) -> None:
        raise ValueError("x" * 10_000) if long else Untold

    async with db.transaction():
        ids = [fails.delay_durably(long=long) for long in (False, True)]
    for task_id, long in zip(ids, (False, True), strict=True):
        trace_task(fails, task_id, (), {"long": long}, {"id": task_id, "durable": task_id}, app=unheard)
    errors = [row["error"] for row in await rows.connection.fetch("SELECT error FROM durable_task ORDER BY seq")]
    assert errors[0] == "Untold, whose text cannot be had: LookupError"
    assert len(errors[1]) == 2000


async def test_retry_by_hand_is_a_failure(unheard: Celery[celery_ext.Task], rows: Observer) -> None:
    """Celery's exception without ``self.retry``, which sends the next attempt, says of none when it is to be."""

    @unheard.task(shared=False)
    def fails() -> None:
        raise Retry("later")

    async with db.transaction():
        task_id = fails.delay_durably()
    deliver(fails, task_id)
    assert await rows.durable_tasks() == [("failed", "[[], {}]")]


async def test_end_that_cannot_be_stored(database_url: str, rows: Observer, caplog: pytest.LogCaptureFixture) -> None:
    """Where there is no connection for it, the relay rings the row again."""
    settings = DatabaseSettings(database_url=database_url, db_pool_size=1, db_max_overflow=0, db_pool_timeout=0.1)
    small = Database("small", settings=settings)
    app = create_app("memory://", "cache+memory://", "nowhere")
    celery_ext.init_app(app, db=small)

    @app.task(shared=False)
    def fails() -> None:
        small.sync_session.rollback()
        taken.append(small.sync_engine.connect())
        raise ValueError

    taken: list[Connection] = []
    async with small.transaction():
        task_id = fails.delay_durably()
    deliver(fails, task_id)
    taken[0].close()
    assert await rows.durable_tasks() == [("pending", "[[], {}]")]
    assert f"[{task_id}] will be run again, unless its end is stored: ValueError" in caplog.text
    await small.dispose()
    app.close()


@pytest.mark.parametrize("error", [ValueError, Retry])
async def test_failure_after_the_end(
    unheard: Celery[celery_ext.Task], rows: Observer, caplog: pytest.LogCaptureFixture, error: type[Exception]
) -> None:
    """The row has ended elsewhere, or by the COMMIT whose answer was lost, so there is nothing else to tell."""

    @unheard.task(bind=True, shared=False)
    def goes_on(self: celery_ext.Task) -> None:
        db.sync_session.commit()
        with db.sync_transaction() as other:
            other.execute(text("UPDATE durable_task SET status = 'done'"))
        raise self.retry(countdown=0) if error is Retry else error

    async with db.transaction():
        task_id = goes_on.delay_durably()
    with caplog.at_level("INFO"):
        await asyncio.to_thread(deliver, goes_on, task_id)
    assert await rows.durable_tasks() == [("done", "[[], {}]")]
    assert f"[{task_id}] had ended already, and does not end in {error.__name__}" in caplog.text
    assert f"[{task_id}] ignored" in caplog.text


@pytest.mark.parametrize("cause", [None, DatabaseUnavailable("away")])
async def test_callback_that_fails_to_be_heard(
    unheard: Celery[celery_ext.Task], rows: Observer, cause: Exception | None
) -> None:
    """The row has ended by the task's own COMMIT, and the result tells what came after it, as that of any task."""

    def tell() -> None:
        raise AfterCommitError from cause

    @unheard.task(shared=False)
    def adds() -> None:
        db.sync_session.add(Item("x"))
        db.on_commit(tell)

    async with db.transaction():
        task_id = adds.delay_durably()
    await asyncio.to_thread(deliver, adds, task_id)
    assert await rows.durable_tasks() == [("done", "[[], {}]")]
    assert await rows.names() == ["x"]
    assert adds.AsyncResult(task_id).state == "FAILURE"


@pytest.mark.parametrize("kind", ["def", "async def"])
async def test_callback_that_fails_after_a_commit_of_the_bodys_own(
    unheard: Celery[celery_ext.Task], rows: Observer, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The row ends as the body did, whose retry is stored; the log has the callback's error."""

    def tell() -> None:
        raise AfterCommitError("not to be reached")

    @unheard.task(shared=False, bind=True)
    def in_def(self: celery_ext.Task) -> None:
        db.sync_session.add(Item("x"))
        db.on_commit(tell)
        db.sync_session.commit()
        raise self.retry(countdown=3600)

    @unheard.task(shared=False, bind=True)
    async def in_async(self: celery_ext.Task) -> None:
        db.session.add(Item("x"))
        db.on_commit(tell)
        await db.session.commit()
        raise self.retry(countdown=3600)

    retried = in_def if kind == "def" else in_async
    async with db.transaction():
        task_id = retried.delay_durably()
    await asyncio.to_thread(deliver, retried, task_id)
    assert await rows.connection.fetchrow("SELECT status, retries FROM durable_task") == ("pending", 1)
    assert await rows.names() == ["x"]
    assert "not to be reached" in caplog.text


@pytest.mark.parametrize("kind", ["def", "async def"])
async def test_statement_whose_failure_was_swallowed(
    unheard: Celery[celery_ext.Task], rows: Observer, kind: str
) -> None:
    """The row says, as a result does, which error it was and what to do about it."""

    @unheard.task(shared=False)
    def in_def() -> None:
        with suppress(DBAPIError):
            db.sync_session.execute(text("SELECT 1 / 0"))

    @unheard.task(shared=False)
    async def in_async() -> None:
        with suppress(DBAPIError):
            await db.session.execute(text("SELECT 1 / 0"))

    failing = in_def if kind == "def" else in_async
    async with db.transaction():
        task_id = failing.delay_durably()
    await asyncio.to_thread(deliver, failing, task_id)
    [[error]] = await rows.connection.fetch("SELECT error FROM durable_task WHERE status = 'failed'")
    assert "SQLSTATE 22012" in error
    assert "begin_nested" in error


@pytest.mark.parametrize("kind", ["def", "async def"])
async def test_failure_that_is_no_exception(unheard: Celery[celery_ext.Task], rows: Observer, kind: str) -> None:
    """A ``BaseException`` of a library's own, as gevent's ``Timeout`` is, ends a task as well."""

    class Outcome(BaseException): ...

    @unheard.task(shared=False)
    def in_def() -> None:
        db.sync_session.add(Item("lost"))
        raise Outcome("not today")

    @unheard.task(shared=False)
    async def in_async() -> None:
        db.session.add(Item("lost"))
        raise Outcome("not today")

    failing = in_def if kind == "def" else in_async
    async with db.transaction():
        task_id = failing.delay_durably()
    with pytest.raises(Outcome):
        await asyncio.to_thread(deliver, failing, task_id)
    assert await rows.connection.fetchrow("SELECT status, error FROM durable_task") == ("failed", "Outcome: not today")
    assert await rows.names() == []


@pytest.mark.parametrize("error", [asyncio.CancelledError, GeneratorExit])
async def test_what_ends_no_worker(
    unheard: Celery[celery_ext.Task], rows: Observer, error: type[BaseException]
) -> None:
    """What leaks out of an ``asyncio.run()`` of the task's own would do so each time that it is run again."""

    @unheard.task(shared=False)
    def leaks() -> None:
        raise error

    async with db.transaction():
        task_id = leaks.delay_durably()
    deliver(leaks, task_id)
    assert await rows.durable_tasks() == [("failed", "[[], {}]")]


@pytest.mark.parametrize("end", [SystemExit, KeyboardInterrupt, GreenletExit])
async def test_end_of_the_worker_is_no_failure(
    unheard: Celery[celery_ext.Task], rows: Observer, end: type[BaseException]
) -> None:
    """A task that a leaving process interrupts is run again."""

    @unheard.task(shared=False)
    def interrupted() -> None:
        raise end

    async with db.transaction():
        task_id = interrupted.delay_durably()
    with pytest.raises(end):
        deliver(interrupted, task_id)
    assert await rows.durable_tasks() == [("pending", "[[], {}]")]


async def test_replace_is_refused(relayed: Worker, rows: Observer) -> None:
    """The successor would be an ordinary task, sent before the commit; the error says what to write instead."""
    async with db.transaction():
        task_id = relayed.task("replaced").delay_durably("x")
    await rows.until_status(task_id, "failed")
    [failed] = administration.failed(db, 10)
    assert "delay_durably" in failed.error
    assert await rows.names() == []


async def test_failure_before_the_body(relayed: Worker, rows: Observer) -> None:
    """Celery says FAILURE of it, and so does the row, which is not sent again."""
    async with db.transaction():
        failing = relayed.task("never_starts").apply_durably(ordering_key="k")
        behind = relayed.task("add_item").apply_durably(("behind",), ordering_key="k")
    await rows.until_status(failing, "failed")
    await rows.until_status(behind, "done")
    assert await rows.connection.fetchval("SELECT error FROM durable_task WHERE id = $1", failing) == (
        "ValueError: not today"
    )


async def test_failure_before_the_body_that_has_written(
    unheard: Celery[celery_ext.Task], rows: Observer, caplog: pytest.LogCaptureFixture
) -> None:
    """It is rolled back like the body, without a word about the class's ``__call__``."""

    class Gate(celery_ext.Task):
        def before_start(self, *_: object) -> None:
            db.sync_session.add(Item("lost"))
            raise ValueError

    @unheard.task(base=Gate, shared=False)
    def never_starts() -> None: ...

    trace_task(never_starts, "1", (), {}, {"id": "1"}, app=unheard)
    assert await rows.names() == []
    assert "super().__call__" not in caplog.text


async def test_failure_before_the_body_of_what_is_not_due(unheard: Celery[celery_ext.Task], rows: Observer) -> None:
    """A message that is too early, or one too many, ends nothing."""
    never_starts = task(unheard, "never_starts")
    async with db.transaction():
        task_id = never_starts.apply_durably(countdown=3600)
    deliver(never_starts, task_id)
    assert await rows.durable_tasks() == [("pending", "[[], {}]")]


@pytest.mark.parametrize(
    ("how", "status"),
    [("ignore", "cancelled"), ("reject", "cancelled"), ("give back", "pending"), ("retry", "pending")],
)
async def test_end_before_the_body(unheard: Celery[celery_ext.Task], rows: Observer, how: str, status: str) -> None:
    """Celery's other ways to end count in ``before_start`` as they do in the body."""

    class Gate(celery_ext.Task):
        def before_start(self, *_: object) -> None:
            if how == "retry":
                self.retry(countdown=60)
            raise Ignore if how == "ignore" else Reject("not today", requeue=how == "give back")

    @unheard.task(base=Gate, shared=False)
    def never_starts() -> None: ...

    async with db.transaction():
        task_id = never_starts.delay_durably()
    deliver(never_starts, task_id)
    row = await rows.connection.fetchrow(
        "SELECT status, retries, due_at - clock_timestamp() > '50 s' AS later FROM durable_task WHERE id = $1", task_id
    )
    assert tuple(row) == (status, how == "retry", how == "retry")
