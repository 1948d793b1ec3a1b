"""Tasks that run at once where they are sent keep the same promises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from celery import Celery
from celery.result import allow_join_result
from fastapi import FastAPI
from sqlalchemy import select, text
from sqlalchemy.exc import MultipleResultsFound

import celery_ext
from celery_ext import ArgumentsNotSerializable, StatementFailed
from fastapi_chatdify_db import db
from tests.failing import raising
from tests.models import Item
from tests.observing import Observer
from tests.serving import serve


async def test_eager_tasks_have_their_own_unit(eager: dict[str, Any], empty_tables: Observer) -> None:
    """An eager task commits, fails at COMMIT, retries and calls back like one in a worker."""
    add = eager["add_item"]
    assert add.apply_async(("ok",), link=eager["record"].s()).get() == "ok"
    with pytest.raises(StatementFailed, match="uq_item_name"):
        add.apply_async(("lost", "duplicate"), link_error=eager["errback"].s("lost")).get()
    assert eager["unique_at_second_try"].delay("retried").get() == 1
    assert eager["add_item_async"].delay("async").get() is not None
    assert eager["unique_at_second_try_async"].delay("async retried").get() == 1
    assert await empty_tables.names() == ["async", "async retried", "errback lost", "linked ok", "ok", "retried"]


async def test_eager_coroutines_run_others_eagerly(eager: dict[str, Any], empty_tables: Observer) -> None:
    """Each in a unit of its own; what waits for another's end blocks its own loop only."""
    app: Celery[celery_ext.Task] = eager["record"].app

    @app.task(bind=True, shared=False)
    async def countdown(self: celery_ext.Task, number: int) -> list[str | None]:
        own = self.request.id
        db.session.add(Item(f"before {number}"))
        await db.session.flush()
        ran = self.delay(number - 1).get(disable_sync_subtasks=False) if number else []
        db.session.add(Item(f"after {number}"))
        assert self.request.id == own
        return [own, *ran]

    assert len(set(countdown.delay(2).get())) == 3
    assert await empty_tables.names() == [f"{when} {number}" for when in ("after", "before") for number in range(3)]


@pytest.mark.parametrize("kind", ["def", "async def"])
def test_what_is_kept_on_self(eager: dict[str, Any], empty_tables: Observer, kind: str) -> None:
    """It is there for the task's next execution: ``self`` is the task itself."""
    app: Celery[celery_ext.Task] = eager["record"].app

    def count(self: celery_ext.Task) -> int:
        number: int = getattr(self, "number", 0) + 1
        vars(self)["number"] = number
        return number

    async def count_async(self: celery_ext.Task) -> int:
        return count(self)

    counting = app.task(bind=True, shared=False)(count if kind == "def" else count_async)
    assert [counting.delay().get() for _ in range(3)] == [1, 2, 3]


async def test_eager_task_may_return_anything(eager: dict[str, Any], empty_tables: Observer) -> None:
    """Its result is not stored."""
    assert type(eager["unserializable"].delay("x").get()) is object
    assert await empty_tables.names() == ["x"]


def test_eager_task_that_is_replaced(eager: dict[str, Any], empty_tables: Observer) -> None:
    """It returns what its successor does, as Celery has it."""

    app: Celery[celery_ext.Task] = eager["record"].app

    @app.task(bind=True, shared=False)
    def first(self: celery_ext.Task, name: str) -> Any:
        with allow_join_result():  # or Celery refuses to wait for the successor
            return self.replace(eager["add_item"].s(name))

    assert first.delay("x").get() == "x"


SENDERS = [celery_ext.Task.delay_on_commit, celery_ext.Task.delay_durably]


@pytest.mark.parametrize("send", SENDERS)
async def test_eager_dispatch_waits_for_the_commit(
    eager: dict[str, Any], rows: Observer, send: Callable[..., str]
) -> None:
    """In tests with ``task_always_eager`` a task that was sent sees the row as well."""
    app: Celery[celery_ext.Task] = eager["record"].app
    found = []

    @app.task(shared=False)
    def look(name: str) -> None:
        found.append(db.sync_session.scalar(select(Item.name).where(Item.name == name)))

    async with db.transaction() as session:
        session.add(Item("row"))
        send(look, "row")
    assert found == ["row"]


@pytest.mark.parametrize("send", SENDERS)
async def test_eager_failure_is_told(eager: dict[str, Any], rows: Observer, send: Callable[..., str]) -> None:
    """With ``task_eager_propagates``, by whoever ended the unit: a test fails whose task has failed."""
    app: Celery[celery_ext.Task] = eager["record"].app
    app.conf.task_eager_propagates = True

    @app.task(shared=False)
    def fail() -> None:
        raise LookupError("nothing there")

    async def work() -> None:
        async with db.transaction() as session:
            session.add(Item("row"))
            send(fail)

    with pytest.raises(celery_ext.DispatchFailed, match="LookupError: nothing there") as told:
        await work()
    assert isinstance(told.value.__cause__, LookupError)
    assert await rows.names() == ["row"]
    with pytest.raises(LookupError):
        fail.delay_on_commit()


async def test_arguments_are_checked_at_the_call(eager: dict[str, Any], empty_tables: Observer) -> None:
    """And not after the commit, when there is nobody to tell any more."""
    async with db.transaction():
        with pytest.raises(TypeError, match="missing 1 required"):
            eager["read_item"].delay_on_commit()
        with pytest.raises(ArgumentsNotSerializable, match="send ids, not objects"):
            eager["read_item"].delay_on_commit(object())


@pytest.mark.parametrize("kind", ["def", "async def"])
async def test_own_commit_of_a_task_that_fails(eager: dict[str, Any], empty_tables: Observer, kind: str) -> None:
    """What it has committed by itself stays, and what was to run on that commit runs."""
    app: Celery[celery_ext.Task] = eager["record"].app
    ran: list[str] = []

    def fails() -> None:
        db.sync_session.add(Item("kept"))
        db.on_commit(lambda: ran.append(kind))
        db.sync_session.commit()
        db.sync_session.add(Item("lost"))
        raise ValueError

    async def fails_async() -> None:
        fails()

    task = app.task(shared=False)(fails if kind == "def" else fails_async)
    assert task.apply().state == "FAILURE"
    assert (ran, await empty_tables.names()) == ([kind], ["kept"])


@pytest.mark.parametrize(("db_retry", "code", "runs"), [(True, "40001", 3), (True, "22012", 1), (False, "40P01", 1)])
def test_db_retry(eager: dict[str, Any], empty_tables: Observer, db_retry: bool, code: str, runs: int) -> None:
    """It is opt-in, and for what PostgreSQL asks to retry."""
    app: Celery[celery_ext.Task] = eager["record"].app
    ran: list[str] = []

    @app.task(shared=False, db_retry=db_retry, max_retries=2)
    def fails() -> None:
        ran.append(code)
        db.sync_session.execute(text(raising(code)))

    with pytest.raises(StatementFailed, match=code):
        fails.apply().get()
    assert ran == [code] * runs


def test_what_an_error_names(eager: dict[str, Any], empty_tables: Observer) -> None:
    """The column, where there is no constraint; an exception of ``one()``, which quotes no row, is what it is."""
    app: Celery[celery_ext.Task] = eager["record"].app

    @app.task(shared=False)
    def insert_null() -> None:
        db.sync_session.execute(text("INSERT INTO item (name) VALUES (NULL)"))

    @app.task(shared=False)
    def one_of_two() -> None:
        db.sync_session.add_all([Item("a"), Item("b")])
        db.sync_session.scalars(select(Item)).one()

    with pytest.raises(StatementFailed, match=r"^IntegrityError: SQLSTATE 23502, table item, column name$"):
        insert_null.apply().get()
    with pytest.raises(MultipleResultsFound):
        one_of_two.apply().get()


async def test_body_that_is_run_twice(eager: dict[str, Any], empty_tables: Observer) -> None:
    """A ``__call__`` that tries again by itself may, where there is no row: each time in a unit of its own."""
    eager["tries_again"].apply(("x",)).get()
    assert await empty_tables.names() == ["x"]


async def test_task_in_a_request(app: FastAPI, eager: dict[str, Any], empty_tables: Observer) -> None:
    """A ``def`` endpoint that calls a task as a function shares its unit."""

    @app.post("/{outcome}")
    def call(outcome: str) -> None:
        eager["add_item"](outcome)
        if outcome == "refused":
            raise ValueError(outcome)

    async with serve(app) as client:
        assert (await client.post("/kept")).status_code == 200
        assert (await client.post("/refused")).status_code == 500
    assert await empty_tables.names() == ["kept"]


async def test_async_task_in_a_def_endpoint(app: FastAPI, eager: dict[str, Any], empty_tables: Observer) -> None:
    """It runs on a loop of its own, and so in a unit of its own: the request's session belongs to the server's loop."""

    @app.post("/{name}")
    def call(name: str) -> None:
        db.sync_session.add(Item(f"{name} endpoint"))
        eager["add_item_async"](f"{name} task")

    async with serve(app) as client:
        for name in ("first", "second"):
            assert (await client.post(f"/{name}")).status_code == 200
    assert await empty_tables.names() == ["first endpoint", "first task", "second endpoint", "second task"]


async def test_eager_durable_task_runs_after_the_commit(eager: dict[str, Any], empty_tables: Observer) -> None:
    """Where there is no worker there is no relay."""
    async with db.transaction():
        eager["add_item"].delay_durably("x")
        assert await empty_tables.names() == []
    assert await empty_tables.names() == ["x"]
