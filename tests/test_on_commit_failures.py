"""A callback of ``db.on_commit`` that fails stops nothing but itself, and leaves nothing."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
from fastapi import FastAPI

from fastapi_chatdify_db import AfterCommitError, db
from tests.models import Item
from tests.observing import Observer, Other
from tests.serving import serve


async def test_error_in_a_callback_stops_nothing(
    app: FastAPI, observer: Observer, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged with its traceback, not its arguments; the others run and the client gets its response."""
    ran: list[str] = []

    @app.post("/")
    async def handler() -> str:
        async def fails(name: str) -> None:
            db.session.add(Item(name))
            await db.session.flush()
            raise ZeroDivisionError

        db.on_commit(partial(fails, "private"))
        db.on_commit(lambda: ran.append("second"))
        return "fine"

    with caplog.at_level(logging.ERROR):
        async with serve(app) as client:
            assert (await client.post("/")).json() == "fine"
    assert ran == ["second"]
    assert await observer.names() == []
    [record] = caplog.records
    assert "fails" in record.getMessage()
    assert "private" not in record.getMessage()
    assert record.exc_info is not None
    assert record.exc_info[0] is ZeroDivisionError


async def test_callback_whose_task_was_cancelled_stops_nothing(
    app: FastAPI, observer: Observer, caplog: pytest.LogCaptureFixture
) -> None:
    """A cancellation of something that it waits for is its failure, not the request's end."""
    ran: list[str] = []

    @app.post("/")
    async def handler() -> str:
        db.session.add(Item("a"))
        db.on_commit(waits_for_the_cancelled)
        db.on_commit(lambda: ran.append("second"))
        return "fine"

    async def waits_for_the_cancelled() -> None:
        db.session.add(Item("by the callback"))
        other = asyncio.create_task(asyncio.Event().wait())
        other.cancel()
        await other

    async with serve(app) as client:
        assert (await client.post("/")).json() == "fine"
    assert (ran, await observer.names()) == (["second"], ["a"])
    assert "waits_for_the_cancelled failed" in caplog.text


async def test_callback_whose_failure_is_told_leaves_nothing(observer: Observer) -> None:
    """What it wrote is not committed with what the next callback writes."""

    async def fails() -> None:
        db.session.add(Item("lost"))
        await db.session.flush()
        raise AfterCommitError

    async def writes() -> None:
        db.session.add(Item("kept"))

    async def in_block() -> None:
        async with db.transaction():
            db.on_commit(fails)
            db.on_commit(writes)

    with pytest.raises(AfterCommitError):
        await in_block()
    assert await observer.names() == ["kept"]


@pytest.mark.parametrize("failure", [ZeroDivisionError, AfterCommitError])
async def test_callback_that_fails_in_a_sync_unit_leaves_nothing(other: Other, failure: type[Exception]) -> None:
    """What it wrote is not committed with what the next callback writes, be its failure told or logged."""

    def write_and_fail() -> None:
        db.sync_session.add(Item("lost"))
        db.sync_session.flush()
        raise failure

    def work() -> None:
        with suppress(AfterCommitError), db.sync_transaction():
            db.on_commit(write_and_fail)
            db.on_commit(lambda: db.sync_session.add(Item("kept")))

    await asyncio.to_thread(work)
    assert other.names() == "kept"


async def test_first_failure_is_told(tables: None) -> None:
    """Of several errors that shall be told the first is raised, in a unit of either kind."""

    def fail(name: str) -> None:
        raise AfterCommitError(name)

    async def in_block() -> None:
        async with db.transaction():
            db.on_commit(partial(fail, "first"))
            db.on_commit(partial(fail, "second"))

    def work() -> None:
        with db.sync_transaction():
            db.on_commit(partial(fail, "first"))
            db.on_commit(partial(fail, "second"))

    with pytest.raises(AfterCommitError, match="first"):
        await in_block()
    with pytest.raises(AfterCommitError, match="first"):
        await asyncio.to_thread(work)


async def test_coroutine_of_a_plain_function_is_an_error_in_a_sync_unit(
    observer: Observer, caplog: pytest.LogCaptureFixture
) -> None:
    """``lambda: notify()`` looks plain; what it returns would never be awaited, which the log says."""
    ran: list[str] = []

    async def notify() -> None:
        ran.append("never")

    def work() -> None:
        with db.sync_transaction() as session:
            session.add(Item("a"))
            db.on_commit(lambda: notify())
            db.on_commit(lambda: ran.append("second"))

    await asyncio.to_thread(work)
    assert (ran, await observer.names()) == (["second"], ["a"])
    assert "returned a coroutine" in caplog.text


def notify() -> None: ...


async def notify_async() -> None: ...


@pytest.mark.parametrize("function", [notify, notify_async])
async def test_what_a_call_returned_is_refused_before_the_commit(
    app: FastAPI, observer: Observer, function: Callable[[], Any]
) -> None:
    """``on_commit(notify())`` has called it already: that is an error of the request, not a line in the log."""

    @app.post("/")
    async def handler() -> None:
        db.session.add(Item("a"))
        await db.session.flush()
        db.on_commit(function())

    async with serve(app) as client:
        assert (await client.post("/")).status_code == 500
    assert await observer.names() == []
    with pytest.raises(TypeError, match=r"write: db\.on_commit\(lambda: notify\(\.\.\.\)\)"):
        async with db.transaction():
            db.on_commit(function())
