"""Tasks run eagerly, or called as functions, in any process."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any

import pytest
from celery import Celery
from celery.app.trace import trace_task
from celery.result import AsyncResult, allow_join_result
from celery.signals import worker_shutdown
from celery.utils import uuid
from fastapi import FastAPI
from pydantic import BaseModel
from sqlalchemy import select, text
from sqlalchemy.exc import SQLAlchemyError

import celery_ext
from celery_ext import ResultNotSerializable, StatementFailed, event_loop
from celery_ext.dispatch import lineage
from fastapi_chatdify_db import Database, DatabaseSettings, DBSessionMiddleware, OutsideUnitOfWork, db
from tests.models import Item
from tests.observing import Observer
from tests.serving import serve
from tests.test_engines import in_a_new_process
from tests.worker.application import create_app


@pytest.fixture
def eager() -> Iterator[dict[str, Any]]:
    """The tasks, run at once where they are sent."""
    app = create_app("memory://", "cache+memory://", "eager")
    app.conf.task_always_eager = True
    yield {name.rpartition(".")[2]: task for name, task in app.tasks.items()}
    app.close()


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


class Number(BaseModel):
    """What a task may take and return with ``pydantic=True``."""

    value: int


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


@pytest.mark.parametrize("kind", ["def", "async def"])
def test_lineage(empty_tables: Observer, kind: str) -> None:
    """What a task sends has it as its parent; in a coroutine too, where Celery does not know of the task."""
    app = Celery("lineage", backend="cache+memory://", set_as_current=False)
    celery_ext.init_app(app)

    @app.task(shared=False)
    def parent() -> dict[str, Any]:
        return lineage()

    @app.task(shared=False)
    async def async_parent() -> dict[str, Any]:
        return lineage()

    task = parent if kind == "def" else async_parent
    assert task.apply(task_id="parent").get() == {"parent_id": "parent", "root_id": "parent"}
    assert lineage() == {}
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

    assert wrapped.apply().get() == "returned"
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
    assert eager["without_session"]() == "OutsideUnitOfWork"
    assert add("alone") == "alone"
    await add_async("alone async")
    with pytest.raises(Exception, match="uq_item_name"):
        add("lost", "duplicate")
    with db.sync_transaction():
        add("joined")
        db.rollback_only()
    async with db.transaction():
        await add_async("joined async")
        db.rollback_only()
    assert await empty_tables.names() == ["alone", "alone async"]


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
        db.sync_session.execute(text(f"DO $$ BEGIN RAISE EXCEPTION USING ERRCODE = '{code}'; END $$"))

    with pytest.raises(StatementFailed, match=code):
        fails.apply().get()
    assert ran == [code] * runs


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


def test_fork_after_use() -> None:
    """A forked child has an event loop, and a thread that sends, of its own: its parent's do not run in it."""
    in_a_new_process(
        """
import signal
from celery_ext import event_loop
from celery_ext.sender import send_within
from tests.test_engines import fork_and_wait

async def nothing(): pass

def both():
    assert send_within(2, bool) is None
    event_loop.run(nothing())

def child():
    signal.alarm(5)
    both()

both()
assert fork_and_wait(child) == 0
"""
    )


def test_late_shared_task_of_two_applications() -> None:
    """Each application's task has that application's database, whatever base they share."""
    in_a_new_process(
        """
from celery import Celery, shared_task
import celery_ext
from fastapi_chatdify_db import Database

databases = {}
for name in ("a", "b"):
    app = Celery(name, broker="memory://", set_as_current=False)
    databases[app] = Database(name)
    celery_ext.init_app(app, db=databases[app])
    app.finalize()

@shared_task(base=celery_ext.Task, name="late")
def late(): ...

assert {app: app.tasks["late"].database for app in databases} == databases
"""
    )


def test_fork_while_the_broker_hangs() -> None:
    """The messages that its parent's threads wait with do not keep a forked child from sending its own."""
    in_a_new_process(
        """
import threading
from celery_ext.sender import send_within
from tests.test_engines import fork_and_wait

hang = threading.Event().wait
while "already" not in str(send_within(0.001, hang)): pass

def child():
    assert send_within(2, bool) is None

assert fork_and_wait(child) == 0
"""
    )


def test_interrupt_that_a_coroutine_survives() -> None:
    """What ends the waiting thread, unlike a soft time limit, ends it although the coroutine has returned."""
    in_a_new_process(
        """
import asyncio, os, signal
from celery_ext import event_loop

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
ended = []

async def survive():
    os.kill(os.getpid(), signal.SIGINT)
    try:
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        ended.append("cancelled")

try:
    event_loop.run(survive())
except KeyboardInterrupt:
    ended.append("interrupted")
assert ended == ["cancelled", "interrupted"], ended
"""
    )


@pytest.mark.parametrize("scheduled", [True, False])
def test_interrupt_while_a_coroutine_is_scheduled(scheduled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A time limit can come at any instruction: the coroutine does not go on with nobody waiting for it."""
    loop = event_loop.run(_running_loop())
    schedule = loop.call_soon_threadsafe

    def interrupted(callback: Callable[[], object]) -> None:
        monkeypatch.undo()
        if scheduled:
            schedule(callback)
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "call_soon_threadsafe", interrupted)
    with pytest.raises(KeyboardInterrupt):
        event_loop.run(asyncio.Event().wait())

    assert asyncio.run_coroutine_threadsafe(_other_tasks(), loop).result() == 0


async def _running_loop() -> asyncio.AbstractEventLoop:
    return asyncio.get_running_loop()


async def _other_tasks() -> int:
    return len(asyncio.all_tasks()) - 1


async def test_worker_in_a_process_that_goes_on(empty_tables: Observer) -> None:
    """At its shutdown, as of ``celery.contrib.testing``'s, it closes its connections; tasks may be run after it."""
    own = Database("own", settings=DatabaseSettings(db_application_name="shut down"))
    app = Celery("shut down", backend="cache+memory://", set_as_current=False)
    celery_ext.init_app(app, db=own)

    @app.task(shared=False)
    async def ask() -> int:
        return int(await own.session.scalar(text("SELECT 42")))

    for _ in range(2):
        assert ask.apply().get() == 42
        assert await empty_tables.connections("shut down") == 1
        await asyncio.to_thread(worker_shutdown.send, None)
        async with asyncio.timeout(10):
            await empty_tables.until_connections("shut down", 0)
        assert not [thread for thread in threading.enumerate() if thread.name == "celery_ext.event_loop"]
    app.close()


async def test_task_in_a_request(eager: dict[str, Any], empty_tables: Observer) -> None:
    """A ``def`` endpoint that calls a task as a function shares its unit."""
    app = FastAPI()
    app.add_middleware(DBSessionMiddleware)

    @app.post("/{outcome}")
    def call(outcome: str) -> None:
        eager["add_item"](outcome)
        if outcome == "refused":
            raise ValueError(outcome)

    async with serve(app) as client:
        assert (await client.post("/kept")).status_code == 200
        assert (await client.post("/refused")).status_code == 500
    assert await empty_tables.names() == ["kept"]


async def test_async_task_in_a_def_endpoint(eager: dict[str, Any], empty_tables: Observer) -> None:
    """It runs on a loop of its own, and so in a unit of its own: the request's session belongs to the server's loop."""
    app = FastAPI()
    app.add_middleware(DBSessionMiddleware)

    @app.post("/{name}")
    def call(name: str) -> None:
        db.sync_session.add(Item(f"{name} endpoint"))
        eager["add_item_async"](f"{name} task")

    async with serve(app) as client:
        for name in ("first", "second"):
            assert (await client.post(f"/{name}")).status_code == 200
    assert await empty_tables.names() == ["first endpoint", "first task", "second endpoint", "second task"]


async def test_own_call_that_skips_ours_is_reported(empty_tables: Observer, caplog: pytest.LogCaptureFixture) -> None:
    """A class whose ``__call__`` bypasses the commit loses its rows loudly."""
    app: Celery[Any] = Celery("bypass", broker="memory://", backend="cache+memory://")
    celery_ext.init_app(app)

    class Bypass(app.Task):  # type: ignore[name-defined,misc]
        def __call__(self, *args: object, **kwargs: object) -> object:
            return self.run(*args, **kwargs)

    @app.task(base=Bypass)
    def bypassing() -> None:
        db.sync_session.add(Item("lost"))
        db.sync_session.flush()

    assert bypassing.apply().state == "SUCCESS"
    assert "let its own __call__ call super().__call__()" in caplog.text
    assert await empty_tables.names() == []
    assert await empty_tables.in_transaction() == 0


def test_tasks_of_an_application_without_us_are_left_alone() -> None:
    """Another Celery application in the same process keeps its plain tasks."""
    other: Celery[Any] = Celery("other", broker="memory://", backend="cache+memory://")

    @other.task
    def plain() -> str:
        return "plain"

    assert plain.apply().get() == "plain"
    assert not isinstance(plain, celery_ext.Task)


def test_worker_imports_no_web_framework() -> None:
    """Neither ``celery_ext`` nor a module of tasks brings FastAPI or Starlette along."""
    code = """
import sys, celery_ext
from celery import Celery
from fastapi_chatdify_db import Base, db, get_sync_session
app = Celery("worker", task_cls=celery_ext.Task)
celery_ext.init_app(app)
@app.task
def task() -> None: db.sync_session
app.finalize()
assert not {"fastapi", "starlette"} & set(sys.modules), sorted(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


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


async def test_eager_durable_task_runs_after_the_commit(eager: dict[str, Any], empty_tables: Observer) -> None:
    """Where there is no worker there is no relay."""
    async with db.transaction():
        eager["add_item"].delay_durably("x")
        assert await empty_tables.names() == []
    assert await empty_tables.names() == ["x"]
