"""What is wrong with one durable task is no harm to the others."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from celery import Celery
from celery.app.trace import trace_task
from celery.exceptions import Ignore, Reject
from sqlalchemy import event, text
from sqlalchemy.exc import IntegrityError, InvalidRequestError
from sqlalchemy.orm import Session

import celery_ext
from celery_ext import ArgumentsNotSerializable
from celery_ext.durable import administration
from celery_ext.durable.relay import relaying
from fastapi_chatdify_db import db
from tests.models import Item
from tests.observing import Observer
from tests.worker.running import Worker, brokers, deliver, task, urls


def savepoint_that_fails(session: Session, store: Callable[[], str]) -> None:
    store()
    savepoint = session.begin_nested()
    session.add_all([Item("a"), Item("a")])
    session.flush()
    with pytest.raises(IntegrityError):
        session.execute(text("SET CONSTRAINTS ALL IMMEDIATE"))
    savepoint.rollback()


def inner_savepoint_released(session: Session, store: Callable[[], str]) -> None:
    store()
    savepoint = session.begin_nested()
    with session.begin_nested():
        session.add(Item("inner"))
    savepoint.rollback()


def handler_of_the_commits_flush(session: Session, store: Callable[[], str]) -> None:
    event.listen(Item, "after_insert", lambda *_: store(), once=True)
    session.add(Item("b"))


def handler_of_another_flush(session: Session, store: Callable[[], str]) -> None:
    handler_of_the_commits_flush(session, store)
    session.flush()


def handler_of_the_commit(session: Session, store: Callable[[], str]) -> None:
    session.add(Item("b"))
    event.listen(session, "before_commit", lambda _: store())


def later_handler_of_the_commit(session: Session, store: Callable[[], str]) -> None:
    savepoint = session.begin_nested()
    store()
    savepoint.rollback()
    handler_of_the_commit(session, store)


def savepoint_of_a_handler_of_the_commit(session: Session, store: Callable[[], str]) -> None:
    def store_in_a_savepoint(_: Session) -> None:
        if not session.in_nested_transaction():  # its release is a commit too
            with session.begin_nested():
                store()

    session.add(Item("b"))
    event.listen(session, "before_commit", store_in_a_savepoint)


def savepoint_of_a_later_handler_of_the_commit(session: Session, store: Callable[[], str]) -> None:
    savepoint = session.begin_nested()
    store()
    savepoint.rollback()
    savepoint_of_a_handler_of_the_commit(session, store)


def released_transaction_that_somebody_keeps(session: Session, store: Callable[[], str]) -> None:
    session.execute(text("INSERT INTO item (name) VALUES ('b')"))
    kept = session.get_transaction()
    session.commit()
    store()
    assert kept is not session.get_transaction()


def another_transaction_reset(session: Session, store: Callable[[], str]) -> None:
    store()
    session.reset()
    store()


@pytest.mark.parametrize(
    "work",
    [
        savepoint_that_fails,
        inner_savepoint_released,
        handler_of_the_commits_flush,
        handler_of_another_flush,
        handler_of_the_commit,
        later_handler_of_the_commit,
        savepoint_of_a_handler_of_the_commit,
        savepoint_of_a_later_handler_of_the_commit,
        released_transaction_that_somebody_keeps,
        another_transaction_reset,
    ],
)
async def test_stored_with_the_transaction_of_the_call(
    unheard: Celery[celery_ext.Task], rows: Observer, work: Callable[[Session, Callable[[], str]], None]
) -> None:
    """Savepoints that come and go after the call do not matter, nor whether it is called within a flush or commit."""
    with db.sync_transaction() as session:
        work(session, lambda: task(unheard, "record").delay_durably("x"))
    assert await rows.durable_tasks() == [("pending", '[["x"], {}]')]


async def test_handler_of_a_savepoints_flush(unheard: Celery[celery_ext.Task], rows: Observer) -> None:
    """What it stores takes nothing away from what was stored before the savepoint."""
    record = task(unheard, "record")
    event.listen(Item, "after_insert", lambda *_: record.delay_durably("inner"), once=True)
    with db.sync_transaction() as session:
        record.delay_durably("outer")
        with session.begin_nested():
            session.add(Item("x"))
            session.flush()
    assert sorted(arguments for _, arguments in await rows.durable_tasks()) == ['[["inner"], {}]', '[["outer"], {}]']


async def test_call_after_the_commit_is_refused(unheard: Celery[celery_ext.Task], rows: Observer) -> None:
    """A handler of ``after_commit`` has no transaction to store it in, and is told so."""
    refused = []

    def store(_: Session) -> None:
        with pytest.raises(InvalidRequestError) as error:
            task(unheard, "record").delay_durably("x")
        refused.append(error)

    with db.sync_transaction() as session:
        event.listen(session, "after_commit", store)
        session.execute(text("SELECT 1"))
    assert len(refused) == 1


@pytest.mark.parametrize("argument", [{"__type__": "x", "__value__": 1}, {"__type__": "datetime", "__value__": "now"}])
async def test_what_cannot_be_read_back_is_not_stored(
    unheard: Celery[celery_ext.Task], rows: Observer, argument: object
) -> None:
    """A dictionary that only looks like kombu's way to write a date is refused at the call, and no relay meets it."""
    async with db.transaction():
        with pytest.raises(ArgumentsNotSerializable):
            task(unheard, "record").delay_durably(argument)
    assert await rows.durable_tasks() == []


async def test_row_that_cannot_be_read_is_passed_over(
    relayed: Worker, rows: Observer, caplog: pytest.LogCaptureFixture
) -> None:
    """Nor can one that was stored by something else, or was rung for weeks, stop a relay."""
    add = relayed.task("add_item")
    async with db.transaction() as session:
        bad, old = add.apply_durably(("bad",), countdown=3600), add.apply_durably(("old",), countdown=3600)
        await session.flush()
    await rows.connection.execute("UPDATE durable_task SET rings = 2000 WHERE id = $1", old)
    await rows.connection.execute("""UPDATE durable_task SET arguments = '{"__type__": "x"' WHERE id = $1""", bad)
    await rows.connection.execute("UPDATE durable_task SET due_at = now(), ring_at = now()")
    async with db.transaction():
        innocent = add.delay_durably("innocent")
    await rows.until_status(old, "done")
    await rows.until_status(innocent, "done")
    assert f"[{bad}] can not be sent" in caplog.text


@pytest.mark.skipif("rabbitmq" not in brokers(), reason="needs RabbitMQ")
@pytest.mark.parametrize("alone", [False, True])
async def test_row_that_the_broker_refuses(
    rows: Observer, prefork: Worker, caplog: pytest.LogCaptureFixture, alone: bool
) -> None:
    """An exchange that is not there closes the channel; the other rows of the batch are sent, once each."""
    caplog.set_level(logging.INFO, logger="celery_ext")
    app = Celery("refused", broker=urls("rabbitmq")[0], task_cls=celery_ext.Task, set_as_current=False)
    app.conf.task_default_queue = prefork.app.conf.task_default_queue
    app.conf.broker_transport_options = {"confirm_publish": True}
    celery_ext.init_app(app)
    app.set_default()
    try:
        add = task(app, "add_item")
        async with db.transaction():
            good = [] if alone else [add.delay_durably(name) for name in ("a", "b")]
            add.apply_durably(("refused",), exchange="chatdify-test-nowhere", routing_key="x")
            good += [] if alone else [add.delay_durably("c")]
        with relaying(app, db):
            while "can not be sent" not in caplog.text or "relayed sent=" not in caplog.text:
                await asyncio.sleep(0.02)
                assert "relay pauses (3)" not in caplog.text
    finally:
        app.close()
    figures = administration.figures(db)
    assert figures["rerung"] == 0
    assert "pauses" not in caplog.text
    assert f"relayed sent={len(good)} rerung=0 refused=1" in caplog.text


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


async def test_end_of_the_worker_is_no_failure(unheard: Celery[celery_ext.Task], rows: Observer) -> None:
    """A task that a leaving process interrupts is run again."""

    @unheard.task(shared=False)
    def interrupted() -> None:
        raise SystemExit

    async with db.transaction():
        task_id = interrupted.delay_durably()
    with pytest.raises(SystemExit):
        deliver(interrupted, task_id)
    assert await rows.durable_tasks() == [("pending", "[[], {}]")]


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


@pytest.mark.parametrize(("how", "status"), [("ignore", "cancelled"), ("reject", "cancelled"), ("retry", "pending")])
async def test_end_before_the_body(unheard: Celery[celery_ext.Task], rows: Observer, how: str, status: str) -> None:
    """Celery's other ways to end count in ``before_start`` as they do in the body."""

    class Gate(celery_ext.Task):
        def before_start(self, *_: object) -> None:
            if how == "retry":
                self.retry(countdown=60)
            raise Ignore if how == "ignore" else Reject("not today", requeue=False)

    @unheard.task(base=Gate, shared=False)
    def never_starts() -> None: ...

    async with db.transaction():
        task_id = never_starts.delay_durably()
    deliver(never_starts, task_id)
    row = await rows.connection.fetchrow(
        "SELECT status, retries, due_at - clock_timestamp() > '50 s' AS later FROM durable_task WHERE id = $1", task_id
    )
    assert tuple(row) == (status, how == "retry", how == "retry")


async def test_failure_before_the_body_of_what_is_not_due(unheard: Celery[celery_ext.Task], rows: Observer) -> None:
    """A message that is too early, or one too many, ends nothing."""
    never_starts = task(unheard, "never_starts")
    async with db.transaction():
        task_id = never_starts.apply_durably(countdown=3600)
    deliver(never_starts, task_id)
    assert await rows.durable_tasks() == [("pending", "[[], {}]")]


async def test_replace_is_refused(relayed: Worker, rows: Observer) -> None:
    """The successor would be an ordinary task, sent before the commit; the error says what to write instead."""
    async with db.transaction():
        task_id = relayed.task("replaced").delay_durably("x")
    await rows.until_status(task_id, "failed")
    [failed] = administration.failed(db, 10)
    assert "delay_durably" in failed.error
    assert await rows.names() == []


async def test_running_task_that_was_released_is_not_cancelled(relayed: Worker, rows: Observer) -> None:
    """``cancel`` says no, and the next of its key does not begin beside it."""
    await rows.connection.execute("SELECT pg_advisory_lock(9)")
    async with db.transaction():
        running = relayed.task("release_and_wait").apply_durably(("x", 9), ordering_key="k")
    await rows.until_somebody_waits_for_a_lock()
    assert not await asyncio.to_thread(administration.cancel, db, running)
    await rows.connection.execute("SELECT pg_advisory_unlock(9)")
    await rows.until_status(running, "done")


async def test_task_of_an_included_module(
    unheard: Celery[celery_ext.Task], rows: Observer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relay knows its options, as a worker does, which imports more than the application's own module, too."""
    (tmp_path / "included_module.py").write_text(
        "import celery\n\n@celery.shared_task(name='included', time_limit=77)\ndef included(name: str) -> None: ...\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    app = Celery("relayed", broker="memory://", include=["included_module"], set_as_current=False)
    celery_ext.init_app(app)
    async with db.transaction():
        task_id = task(unheard, "record").delay_durably("x")
    await rows.connection.execute("UPDATE durable_task SET name = 'included'")
    with relaying(app, db), app.connection_for_read() as connection:
        message = await asyncio.to_thread(connection.SimpleQueue("celery").get, timeout=20)
    assert (message.headers["id"], str(message.headers["timelimit"])) == (task_id, "[77, None]")
    app.close()
