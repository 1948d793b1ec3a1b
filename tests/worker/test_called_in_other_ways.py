"""Tasks that are called in other ways keep the promise, too: by a ``__call__`` of the user's, through a proxy."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from celery import Celery
from celery.app.trace import trace_task
from celery.local import Proxy

import celery_ext
from celery_ext import StatementFailed
from fastapi_chatdify_db import db
from tests.models import Item
from tests.observing import Observer
from tests.worker.running import Worker, deliver, task

either_kind = pytest.mark.parametrize("name", ["in_context", "in_context_async"])


@either_kind
async def test_success(prefork: Worker, empty_tables: Observer, name: str) -> None:
    """The rows are there before the result and the callbacks."""
    result = prefork.task(name).apply_async(("x",), link=prefork.task("record").s())
    assert await asyncio.to_thread(result.get, timeout=20) == "x"
    await empty_tables.until_names(["x", "linked x"])


@either_kind
async def test_failed_commit(prefork: Worker, empty_tables: Observer, name: str) -> None:
    """It fails the task, with an exception that the result carries."""
    result = prefork.task(name).delay("x", 2)
    with pytest.raises(StatementFailed, match="23505"):
        await asyncio.to_thread(result.get, timeout=20)
    assert await empty_tables.names() == []


async def test_failed_commit_that_is_retried(prefork: Worker, empty_tables: Observer) -> None:
    """By ``autoretry_for``."""
    result = prefork.task("in_context_at_second_try").delay("x")
    assert await asyncio.to_thread(result.get, timeout=20) == 1
    assert await empty_tables.names() == ["x"]


@either_kind
async def test_durable(relayed: Worker, rows: Observer, name: str) -> None:
    """The row says how the task ended."""
    async with db.transaction():
        done = relayed.task(name).delay_durably("x")
        failed = relayed.task(name).delay_durably("y", 2)
    await rows.until_status(done, "done")
    await rows.until_status(failed, "failed")
    assert await rows.names() == ["x"]


@either_kind
async def test_called_as_a_function(eager: dict[str, Any], empty_tables: Observer, name: str) -> None:
    """It opens a unit of its own, without a worker."""
    assert await asyncio.to_thread(eager[name], "x") == "x"
    assert await empty_tables.names() == ["x"]


async def test_proxy_of_a_task(unheard: Celery[celery_ext.Task], rows: Observer) -> None:
    """As New Relic's agent puts one in the place of each task."""
    proxied: Any = Proxy(lambda: task(unheard, "in_context"))
    assert trace_task(proxied, "id", ("x",), {}, {}, app=unheard).retval == "x"
    assert await rows.names() == ["x"]


async def test_durable_body_that_is_called_past_run(
    unheard: Celery[celery_ext.Task], rows: Observer, caplog: pytest.LogCaptureFixture
) -> None:
    """Its row ends all the same, or what the body does by itself would be done again and again."""

    class Bypass(celery_ext.Task):
        def __call__(self, *args: object, **kwargs: object) -> object:
            return self.__wrapped__(*args, **kwargs)  # type: ignore[attr-defined]

    @unheard.task(base=Bypass, shared=False)
    def by_itself() -> None:
        with db.sync_transaction() as session:
            session.add(Item("x"))

    async with db.transaction():
        task_id = by_itself.delay_durably()
    deliver(by_itself, task_id)
    row = await rows.connection.fetchrow("SELECT status, error FROM durable_task WHERE id = $1", task_id)
    assert row["status"] == "failed"
    assert row["error"].startswith("BodyBypassed: ")
    assert "super().__call__()" in caplog.text


@pytest.mark.parametrize("leaves", [SystemExit, KeyboardInterrupt])
async def test_durable_task_whose_worker_leaves_first(
    unheard: Celery[celery_ext.Task], rows: Observer, leaves: type[BaseException]
) -> None:
    """A body that did not run because the worker ends is no success past ``run``: the row is rung again."""

    class Leaves(celery_ext.Task):
        def before_start(self, *_: object) -> None:
            raise leaves

    @unheard.task(base=Leaves, shared=False)
    def never() -> None: ...

    async with db.transaction():
        task_id = never.delay_durably()
    with pytest.raises(leaves):
        deliver(never, task_id)
    assert await rows.durable_tasks() == [("pending", "[[], {}]")]


async def test_body_that_is_called_past_run(empty_tables: Observer, caplog: pytest.LogCaptureFixture) -> None:
    """A class whose ``__call__`` calls the function itself bypasses the commit, and loses its rows loudly."""
    app: Celery[Any] = Celery("bypass", broker="memory://", backend="cache+memory://", set_as_current=False)
    celery_ext.init_app(app)

    class Bypass(app.Task):  # type: ignore[name-defined,misc]
        def __call__(self, *args: object, **kwargs: object) -> object:
            return self.__wrapped__(*args, **kwargs)

    @app.task(base=Bypass, shared=False)
    def without_a_word() -> None: ...

    assert without_a_word.apply().state == "SUCCESS"
    assert caplog.text == ""

    @app.task(base=Bypass, shared=False)
    def bypassing() -> None:
        db.sync_session.add(Item("lost"))
        db.sync_session.flush()

    assert bypassing.apply().state == "SUCCESS"
    assert "let its own __call__ call self.run() or super().__call__()" in caplog.text
    assert await empty_tables.names() == []
    assert await empty_tables.in_transaction() == 0
    app.close()
