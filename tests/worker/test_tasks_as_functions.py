"""Tasks are called as functions, decorated and derived from one another."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from functools import wraps
from typing import Any

import pytest
from celery import Celery, current_task
from celery.app.trace import trace_task
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

import celery_ext
from celery_ext.dispatch import inherited_options
from fastapi_chatdify_db import OutsideUnitOfWork, db
from tests.models import Item
from tests.observing import Observer


@pytest.mark.parametrize("kind", ["def", "async def"])
def test_lineage(empty_tables: Observer, kind: str) -> None:
    """What a task sends has it as its parent; in a coroutine too, where Celery does not know of the task."""
    app = Celery("lineage", backend="cache+memory://", set_as_current=False, task_cls=celery_ext.Task)
    celery_ext.init_app(app)

    @app.task(shared=False)
    def parent() -> dict[str, Any]:
        return inherited_options(parent)

    @app.task(shared=False)
    async def async_parent() -> dict[str, Any]:
        return inherited_options(async_parent)

    task = parent if kind == "def" else async_parent
    assert task.apply(task_id="parent").get() == {"parent_id": "parent", "root_id": "parent"}
    grandchild = {"id": "child", "root_id": "grandparent"}
    assert trace_task(task, "child", (), {}, grandchild, app=app).retval == {
        "parent_id": "child",
        "root_id": "grandparent",
    }
    assert inherited_options(task) == {}
    app.close()


def test_decorator_that_runs_a_coroutine(empty_tables: Observer) -> None:
    """A function that is synchronous to its caller is a ``def`` task, whatever it wraps."""

    def synchronous(function: Callable[[], Coroutine[Any, Any, str]]) -> Callable[[], str]:
        @wraps(function)
        def run() -> str:
            return asyncio.run(function())

        return run

    app = Celery("decorated", backend="cache+memory://", set_as_current=False)
    celery_ext.init_app(app)

    @app.task(shared=False)
    @synchronous
    async def wrapped() -> str:
        return "returned"

    @app.task(shared=False, autoretry_for=(ValueError,))
    async def retried() -> str:
        return "awaited"

    class Synchronous:
        """The same, written as a class."""

        def __init__(self, function: Callable[[], Coroutine[Any, Any, str]]) -> None:
            self.function = function
            wraps(function)(self)

        def __call__(self) -> str:
            return asyncio.run(self.function())

    @app.task(shared=False)
    @Synchronous
    async def wrapped_by_a_class() -> str:
        return "returned"

    assert wrapped.apply().get() == "returned"
    assert wrapped_by_a_class.apply().get() == "returned"
    assert retried.apply().get() == "awaited"
    app.close()


async def test_called_functions(eager: dict[str, Any], empty_tables: Observer) -> None:
    """Called as a function, a task joins the unit around it and elsewhere opens one, with SQLAlchemy's errors."""
    add, add_async = eager["add_item"], eager["add_item_async"]
    app: Celery[celery_ext.Task] = eager["record"].app

    @app.task(shared=False, db_session=False)
    async def without_session_async() -> None:
        with pytest.raises(OutsideUnitOfWork):
            db.session.add(Item("lost"))

    await without_session_async()
    await asyncio.to_thread(without_session_async)
    await asyncio.to_thread(without_session_async.apply().get)
    assert eager["without_session"]() == "OutsideUnitOfWork"
    assert add("alone") == "alone"
    await add_async("alone async")
    with pytest.raises(IntegrityError, match="uq_item_name"):
        add("lost", "duplicate")
    with db.sync_transaction():
        add("joined")
        db.rollback_only()
    async with db.transaction():
        await add_async("joined async")
        db.rollback_only()
    with db.sync_transaction():
        await add_async("beside a synchronous unit")
        db.rollback_only()
    assert await empty_tables.names() == ["alone", "alone async", "beside a synchronous unit"]


async def test_called_function_has_a_request_of_its_own(eager: dict[str, Any], empty_tables: Observer) -> None:
    """Neither ``self.request`` nor, in a ``def``, ``celery.current_task`` is that of the task around it."""
    app: Celery[celery_ext.Task] = eager["record"].app

    @app.task(bind=True, shared=False)
    def inner(self: celery_ext.Task) -> str | None:
        assert current_task == self
        return self.request.id

    @app.task(bind=True, shared=False)
    async def inner_async(self: celery_ext.Task) -> str | None:
        return self.request.id

    @app.task(bind=True, shared=False)
    def outer(self: celery_ext.Task) -> list[str | None]:
        return [self.request.id, inner()]

    @app.task(bind=True, shared=False)
    async def outer_async(self: celery_ext.Task) -> list[str | None]:
        return [self.request.id, inner(), await inner_async()]

    assert outer.apply(task_id="outer").get() == ["outer", None]
    assert outer_async.apply(task_id="outer").get() == ["outer", None, None]


async def test_nested_calls_commit_nothing(eager: dict[str, Any], empty_tables: Observer) -> None:
    """What runs inside a task, be it the same one again or another application's, leaves the commit to it."""
    app: Celery[celery_ext.Task] = eager["record"].app

    @Celery("plain", set_as_current=False).task(shared=False)
    def plain() -> None: ...

    class Prepared(celery_ext.Task):
        def before_start(self, *_: object) -> None:
            eager["add_item"]("before")

    @app.task(base=Prepared, bind=True, shared=False)
    def fails_at_its_end(self: celery_ext.Task, depth: int) -> None:
        db.sync_session.add(Item(f"{depth}"))
        if depth:
            self(depth - 1)
            plain.apply().get()
            raise ValueError("the end")

    with pytest.raises(ValueError, match="the end"):
        fails_at_its_end.apply((1,)).get()
    assert await empty_tables.names() == []


def test_tasks_of_an_application_without_us_are_left_alone() -> None:
    """Another Celery application in the same process keeps its plain tasks."""
    other: Celery[Any] = Celery("other", broker="memory://", backend="cache+memory://")

    @other.task
    def plain() -> str:
        return "plain"

    assert plain.apply().get() == "plain"
    assert not isinstance(plain, celery_ext.Task)


@pytest.mark.parametrize("kind", ["def", "async def"])
def test_isolation_level(empty_tables: Observer, kind: str) -> None:
    """``db_isolation_level`` counts in a worker, and where a task is called as a function."""
    app = Celery("isolated", backend="cache+memory://", set_as_current=False)
    celery_ext.init_app(app)
    show = text("SHOW transaction_isolation")

    @app.task(shared=False, db_isolation_level="REPEATABLE READ")
    def in_def() -> Any:
        return db.sync_session.scalar(show)

    @app.task(shared=False, db_isolation_level="REPEATABLE READ")
    async def in_async() -> Any:
        return await db.session.scalar(show)

    task = in_def if kind == "def" else in_async
    assert task.apply().get() == "repeatable read"
    assert task() == "repeatable read"
    app.close()
