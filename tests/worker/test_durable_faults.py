"""Whose fault the failure of a durable task is: its own, and it has failed, or another's, and it will be run again."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import psycopg2
import pytest
from celery import Celery
from sqlalchemy import Connection, event, text
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

import celery_ext
from celery_ext.durable import statements
from fastapi_chatdify_db import AfterCommitError, DatabaseUnavailable, db
from tests.models import Item
from tests.observing import PATIENCE, Observer
from tests.worker.running import deliver, task


async def test_task_that_is_not_implemented(unheard: Celery[celery_ext.Task], rows: Observer) -> None:
    """Celery's handlers alone say by this error that the worker leaves."""

    @unheard.task(shared=False)
    def fails() -> None:
        raise NotImplementedError

    async with db.transaction():
        task_id = fails.delay_durably()
    deliver(fails, task_id)
    assert await rows.durable_tasks() == [("failed", "[[], {}]")]


async def test_statement_after_one_that_failed(unheard: Celery[celery_ext.Task], rows: Observer) -> None:
    """The session refuses it as it does after a lost connection; but here the task is to blame."""

    @unheard.task(shared=False)
    def fails() -> None:
        db.sync_session.add(Item(None))  # type: ignore[arg-type]
        with suppress(DBAPIError):
            db.sync_session.flush()
        db.sync_session.execute(text("SELECT 1"))

    async with db.transaction():
        task_id = fails.delay_durably()
    deliver(fails, task_id)
    assert await rows.durable_tasks() == [("failed", "[[], {}]")]


async def test_row_that_is_refused(unheard: Celery[celery_ext.Task], rows: Observer) -> None:
    """What the table refuses, unlike what it makes wait, it would refuse each time."""
    other = task(unheard, "add_item")

    @unheard.task(shared=False)
    def stores() -> None:
        other.apply_durably(["x"])

    async with db.transaction():
        task_id = stores.delay_durably()
    await rows.connection.execute("ALTER TABLE durable_task ADD CONSTRAINT no_more CHECK (seq <= 1)")
    try:
        await asyncio.to_thread(deliver, stores, task_id)
    finally:
        await rows.connection.execute("ALTER TABLE durable_task DROP CONSTRAINT no_more")
    assert await rows.durable_tasks() == [("failed", "[[], {}]")]


async def test_database_lost_while_a_failure_is_stored(unheard: Celery[celery_ext.Task], rows: Observer) -> None:
    """The task's result does not say FAILURE, since the task is run again."""

    def terminate(connection: Connection) -> None:
        connection.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))

    @unheard.task(shared=False)
    def fails() -> None:
        raise ValueError

    async with db.transaction():
        task_id = fails.delay_durably()
    event.listen(db.sync_engine, "commit", terminate)
    deliver(fails, task_id)
    event.remove(db.sync_engine, "commit", terminate)
    assert await rows.durable_tasks() == [("pending", "[[], {}]")]
    assert fails.AsyncResult(task_id).state == "PENDING"


@pytest.mark.parametrize("fails", [True, False])
async def test_end_whose_row_stays_locked(
    unheard: Celery[celery_ext.Task], rows: Observer, monkeypatch: pytest.MonkeyPatch, database_url: str, fails: bool
) -> None:
    """By a session of the task's own, say, that a silent network has cut off: it is not waited for without end."""
    monkeypatch.setattr(statements, "LIMIT_LOCKS", text("SELECT set_config('lock_timeout', '200ms', true)"))
    ghost = psycopg2.connect(database_url)

    def lock(_: Session) -> None:
        ghost.cursor().execute("SELECT FROM durable_task FOR UPDATE")

    def unlock(_: ExceptionContext) -> None:
        ghost.close()

    @unheard.task(shared=False)
    def rolls_back() -> None:
        event.listen(db.sync_session, "after_rollback", lock)
        db.rollback_only()
        if fails:
            raise ValueError

    async with db.transaction():
        task_id = rolls_back.delay_durably()
    event.listen(db.sync_engine, "handle_error", unlock)
    async with asyncio.timeout(PATIENCE):
        await asyncio.to_thread(deliver, rolls_back, task_id)
    event.remove(db.sync_engine, "handle_error", unlock)
    assert await rows.durable_tasks() == [("pending", "[[], {}]")]


async def test_row_that_could_not_be_read(unheard: Celery[celery_ext.Task], rows: Observer) -> None:
    """Whoever did not begin a task does not end it either, whatever the database said."""
    adds = task(unheard, "add_item")
    async with db.transaction():
        task_id = adds.delay_durably("x")
    await rows.connection.execute("ALTER TABLE durable_task RENAME expires_at TO elsewhere")
    try:
        await asyncio.to_thread(deliver, adds, task_id)
    finally:
        await rows.connection.execute("ALTER TABLE durable_task RENAME elsewhere TO expires_at")
    assert [status for status, _ in await rows.durable_tasks()] == ["pending"]


async def test_callback_that_fails_halfway(unheard: Celery[celery_ext.Task], rows: Observer) -> None:
    """One of a block within the task is no end of the row; nor is it told of, since the task is run again."""

    def tell() -> None:
        raise AfterCommitError from DatabaseUnavailable("away")

    @unheard.task(shared=False)
    def adds() -> None:
        with db.sync_transaction():
            db.on_commit(tell)

    async with db.transaction():
        task_id = adds.delay_durably()
    await asyncio.to_thread(deliver, adds, task_id)
    assert await rows.durable_tasks() == [("pending", "[[], {}]")]
    assert adds.AsyncResult(task_id).state == "PENDING"
