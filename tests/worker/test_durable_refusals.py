"""What cannot be stored as a durable task is an error at the call, which says what to write instead."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import pytest
from celery import Celery
from celery.exceptions import SoftTimeLimitExceeded
from sqlalchemy import inspect
from sqlalchemy.orm import DeclarativeBase

import celery_ext
from celery_ext import ArgumentsNotSerializable, DurableDispatchUnsupported
from celery_ext.binding import database_of
from fastapi_chatdify_db import Database, DatabaseSettings, OutsideUnitOfWork, db
from tests.observing import Observer
from tests.worker.running import task


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
        with pytest.raises(TypeError, match="order_key; write ordering_key="):
            task(unheard, "record").apply_durably(("x",), order_key="k")
        with pytest.raises(TypeError, match="leave out on_error="):
            task(unheard, "record").apply_durably(("x",), on_error="raise")
    with pytest.raises(OutsideUnitOfWork, match=r"async with db\.transaction\(\)"):
        task(unheard, "record").delay_durably("x")
    assert await rows.durable_tasks() == []


async def test_tasks_that_run_in_batches_are_refused(unheard: Celery[celery_ext.Task], rows: Observer) -> None:
    """One run of celery-batches' tasks is that of many messages, so that none of their rows would ever be done."""

    class Batches(celery_ext.Task):
        abstract = True

        def Strategy(self, *_: object) -> None: ...  # type: ignore[override]  # noqa: N802  # as theirs

    @unheard.task(base=Batches, shared=False)
    def together(requests: list[object]) -> None: ...

    async with db.transaction():
        with pytest.raises(DurableDispatchUnsupported, match="takes its messages together"):
            together.delay_durably([])
    assert await rows.durable_tasks() == []


async def test_time_limit_that_passes_meanwhile_is_none_of_the_arguments(
    unheard: Celery[celery_ext.Task], rows: Observer
) -> None:
    """The task that sends gets its soft time limit."""

    class Late:
        def __json__(self) -> str:
            raise SoftTimeLimitExceeded

    async with db.transaction():
        with pytest.raises(SoftTimeLimitExceeded):
            task(unheard, "record").delay_durably(Late())
    assert await rows.durable_tasks() == []


@pytest.mark.parametrize("option", ["ordering_key", "idempotency_key"])
async def test_keys_that_cannot_be_stored_fail_at_the_call(
    unheard: Celery[celery_ext.Task], rows: Observer, option: str
) -> None:
    """Whoever means a number or a UUID writes it as a string."""
    record = task(unheard, "record")
    async with db.transaction():
        for key in (7, uuid4(), "a\0b", "\ud800"):
            with pytest.raises(ArgumentsNotSerializable, match=rf"write a string.*: {option}=str\(\.\.\.\)"):
                record.apply_durably(("x",), **cast("dict[str, Any]", {option: key}))
    assert await rows.durable_tasks() == []


async def test_length_of_keys(unheard: Celery[celery_ext.Task], rows: Observer) -> None:
    """An index has room for an ordering key of 500 characters, whichever; others are only made an id of."""
    record = task(unheard, "record")
    longest = "".join(chr(0x10000 + (number * 7919) % 0xFFFFF) for number in range(500))  # nothing to compress
    async with db.transaction():
        with pytest.raises(ArgumentsNotSerializable, match="write a string of at most 500 characters"):
            record.apply_durably(("x",), ordering_key="k" * 501)
        record.apply_durably(("x",), ordering_key=longest, idempotency_key=longest * 20)
    assert len(await rows.durable_tasks()) == 1


@pytest.mark.parametrize("serializer", ["pickle", "none of kombu's"])
async def test_serializer_that_no_worker_accepts(
    unheard: Celery[celery_ext.Task], rows: Observer, serializer: str
) -> None:
    """Its message would be rung for ever; whose task it is, or whose call, makes no difference."""
    record = task(unheard, "record")

    @unheard.task(serializer=serializer, shared=False)
    def differently() -> None: ...

    async with db.transaction():
        with pytest.raises(ArgumentsNotSerializable, match="accept_content"):
            record.apply_durably(("x",), serializer=serializer)
        with pytest.raises(ArgumentsNotSerializable, match="accept_content"):
            differently.delay_durably()
        differently.apply_durably(serializer="json")
        unheard.conf.accept_content = ["application/json", "pickle"]
        if serializer == "pickle":
            differently.delay_durably()
    assert len(await rows.durable_tasks()) == (2 if serializer == "pickle" else 1)


async def test_serializer_where_workers_accept_all(unheard: Celery[celery_ext.Task], rows: Observer) -> None:
    """Without ``accept_content`` there is nothing to refuse."""
    unheard.conf.accept_content = None
    async with db.transaction():
        task(unheard, "record").apply_durably(("x",), serializer="pickle")
    assert len(await rows.durable_tasks()) == 1


async def test_other_databases_are_refused(tmp_path: Path) -> None:
    """On SQLite the error says what to write instead, no table is made there, and none is missing for readiness."""

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
    async with notes.async_engine.connect() as connection:
        assert await notes.figures["durable_tasks"](connection) == {}
    await notes.dispose()
