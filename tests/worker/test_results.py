"""What a task returns reaches whoever asked for it, or fails the task before its commit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import celery
import pytest
from celery import Celery
from celery.app.trace import trace_task
from celery.result import AsyncResult
from celery.utils import uuid
from pydantic import BaseModel
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

import celery_ext
from celery_ext import ResultNotSerializable
from fastapi_chatdify_db import db
from tests.models import Item
from tests.observing import Observer


class Number(BaseModel):
    """What a task may take and return with ``pydantic=True``."""

    value: int


@pytest.mark.skipif(celery.VERSION < (5, 6), reason="before 5.6, Celery does not see models in textual annotations")
async def test_coroutine_that_returns_a_model(empty_tables: Observer) -> None:
    """Celery does not dump it, as it does that of a ``def`` task; the error says what to write."""
    app = Celery("models", backend="cache+memory://", set_as_current=False)
    celery_ext.init_app(app)

    @app.task(shared=False, pydantic=True, store_eager_result=True)
    async def double(number: Number) -> Number:
        db.session.add(Item("x"))
        await db.session.flush()
        return Number(value=2 * number.value)

    with pytest.raises(ResultNotSerializable, match=r"""return m\.model_dump\(mode="json"\)"""):
        double.apply(({"value": 1},)).get()
    assert await empty_tables.names() == []
    app.close()


@pytest.mark.parametrize("extended", [False, True])
async def test_arguments_that_the_result_includes(empty_tables: Observer, extended: bool) -> None:
    """With ``result_extended`` they are stored after the COMMIT, too, so that they are tried before it."""
    app = Celery("extended", backend="cache+memory://", set_as_current=False)
    app.conf.result_extended = extended
    celery_ext.init_app(app)
    app.finalize()

    @app.task(shared=False)
    def takes(anything: object) -> None:
        db.sync_session.add(Item("x"))
        db.sync_session.flush()

    arguments = (object(),)  # as of a pickled message
    outcome = trace_task(takes, "id", arguments, {}, {"id": "id", "args": arguments, "kwargs": {}}, app=app)
    assert await empty_tables.names() == ([] if extended else ["x"])
    assert ("does not carry its arguments" in str(outcome.retval)) is extended
    app.close()


@contextmanager
def written_and_returned(
    result: Callable[[Celery], object],
    backend: str | None,
    *,
    ignore_result: bool = False,
    headers: Mapping[str, object] = {},
) -> Iterator[AsyncResult[Any]]:
    """Do with a task that writes and returns ``result(app)`` what a worker does; yields what its sender gets."""
    app = Celery("returning", backend=backend, set_as_current=False)
    celery_ext.init_app(app)
    app.finalize()

    @app.task(shared=False, ignore_result=ignore_result)
    def returns() -> object:
        db.sync_session.add(Item("x"))
        db.sync_session.flush()
        return result(app)

    task_id = uuid()
    trace_task(returns, task_id, (), {}, {"id": task_id, **headers}, app=app)
    yield app.AsyncResult(task_id)
    app.close()


@pytest.mark.parametrize(("backend", "ignore_result"), [(None, False), ("cache+memory://", True)])
async def test_result_that_nobody_stores(empty_tables: Observer, backend: str | None, ignore_result: bool) -> None:
    """A task without a result backend, or with ``ignore_result=True``, may write and return what it likes."""
    with written_and_returned(lambda _: object(), backend, ignore_result=ignore_result):
        assert await empty_tables.names() == ["x"]


async def test_retry_shows_no_parameter(empty_tables: Observer) -> None:
    """Nor does what is stored of a task between two attempts quote what the first one met."""
    app = Celery("retrying", broker="memory://", backend="cache+memory://", set_as_current=False)
    celery_ext.init_app(app)
    app.finalize()

    @app.task(shared=False, autoretry_for=(SQLAlchemyError,), default_retry_delay=60)
    def fails(secret: str) -> None:
        db.sync_session.execute(text("SELECT CAST(:secret AS integer)"), {"secret": secret})

    trace_task(fails, "retrying", ("hunter2",), {}, {"id": "retrying"}, app=app)
    waiting = app.AsyncResult("retrying")
    assert waiting.state == "RETRY"
    assert "22P02" in repr(waiting.result)
    assert "hunter2" not in f"{waiting.result!r}{waiting.traceback}"
    app.control.purge()  # the next attempt, in the one broker of this process
    app.close()


@pytest.mark.skipif(celery.VERSION < (5, 6, 3), reason="before 5.6.3, Celery does not ask the message")
async def test_result_that_its_sender_wants(empty_tables: Observer) -> None:
    """``ignore_result=False`` of a message counts for more than ``True`` of its task: Celery will store the result."""
    wanted = {"ignore_result": False}
    with written_and_returned(lambda _: object(), "cache+memory://", ignore_result=True, headers=wanted) as stored:
        assert type(stored.result) is ResultNotSerializable
    assert await empty_tables.names() == []


async def test_result_of_another_task(empty_tables: Observer) -> None:
    """A task may return what it got for sending another: Celery stores that by its id."""
    with written_and_returned(lambda app: app.AsyncResult("other"), "cache+memory://") as stored:
        assert stored.get() == [["other", None], None]
    assert await empty_tables.names() == ["x"]
