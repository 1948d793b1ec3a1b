"""The tasks of the tests."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import wraps
from typing import Any

import celery
from celery import shared_task
from celery.exceptions import Ignore, Reject
from opentelemetry.trace import get_current_span
from sqlalchemy import event, func, select, text
from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from celery_ext import DispatchFailed, Task
from fastapi_chatdify_db import Database, DatabaseSettings, UnitOfWorkFilter, db, get_sync_session
from fastapi_chatdify_db.request_id import current_request_id
from tests.models import Counter, Item


def insert(name: str) -> None:
    """A row in the unit around the caller."""
    db.sync_session.add(Item(name))
    db.sync_session.flush()


def first_time() -> bool:
    """Whether nobody has asked before; counted by a sequence, which no rollback takes back."""
    return bool(db.sync_session.scalar(text("SELECT nextval('kills')")) == 1)


@shared_task(base=Task)
def add_item(name: str, outcome: str = "succeed") -> str:
    """Insert, and then end as ``outcome`` says; a ``duplicate`` fails only at COMMIT."""
    insert(name)
    if outcome == "duplicate":
        db.sync_session.add(Item(name))
    if outcome == "raise":
        raise ValueError(name)
    if outcome == "ignore":
        raise Ignore
    if outcome == "reject":
        raise Reject(name, requeue=False)
    return name


@shared_task
def record(result: str, prefix: str = "linked ") -> None:
    """A callback that leaves a row of the result it was given."""
    with get_sync_session() as session:
        session.add(Item(prefix + result))


@shared_task
def errback(request: Any, error: BaseException, traceback: object, name: str) -> None:
    """A new-style error callback, called inside the failed task's process."""
    insert(f"errback {name}")


@shared_task
def failing_errback(request: Any, error: BaseException, traceback: object, name: str) -> None:
    """An error callback that fails itself."""
    insert(f"errback {name}")
    raise ValueError(name)


class WithHandlers(celery.Task):  # type: ignore[type-arg]  # a base of the user's, that knows nothing of ours
    """Writes a row in each of Celery's handlers."""

    def on_failure(self, exc: BaseException, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        insert(f"on_failure {args[0]}")

    def on_success(self, retval: Any, task_id: str, args: Any, kwargs: Any) -> None:
        insert(f"on_success {args[0]}")
        if args[0] == "handler fails":
            db.sync_session.add(Item(f"on_success {args[0]}"))

    def on_retry(self, exc: BaseException, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        insert(f"on_retry {args[0]}")

    def after_return(self, status: str, retval: Any, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        insert(f"after_return {args[0]} {status}")


@shared_task(base=WithHandlers, bind=True, max_retries=1, default_retry_delay=0)
def handled(self: WithHandlers, name: str, outcome: str) -> None:
    """Insert and end as ``outcome`` says; the handlers write as well."""
    insert(f"{name} {self.request.retries}")
    if outcome == "duplicate":
        db.sync_session.add(Item(f"{name} {self.request.retries}"))
    if outcome == "raise":
        raise ValueError(name)
    if outcome == "retry" and self.request.retries == 0:
        raise self.retry()


@shared_task(base=Task, bind=True, autoretry_for=(IntegrityError,), max_retries=2, default_retry_delay=0)
def unique_at_second_try(self: Task, name: str) -> int:
    """Fail at COMMIT the first time."""
    insert(name)
    if self.request.retries == 0:
        insert(name)
    return self.request.retries


@shared_task(
    base=Task, db_isolation_level="SERIALIZABLE", db_retry=True, max_retries=50, default_retry_delay=0, acks_late=True
)
def increment() -> None:
    """Read, then write what was read plus one."""
    counter = db.sync_session.get_one(Counter, 1)
    counter.value += 1


@shared_task(base=Task, db_session=False)
def without_session() -> str:
    """What a task that wants no unit gets."""
    try:
        db.sync_session.execute(text("SELECT 1"))
    except Exception as error:
        return type(error).__name__
    return "a session"


@shared_task
def bad_statement(secret: str) -> None:
    """Fail in a statement whose error message quotes its parameter."""
    db.sync_session.execute(text("SELECT CAST(:secret AS integer)"), {"secret": secret})


@shared_task(base=Task, bind=True, max_retries=1, default_retry_delay=0, autoretry_for=(SQLAlchemyError,))
def bad_statement_retried(self: Task, secret: str) -> None:
    """The same, retried."""
    db.sync_session.execute(text("SELECT CAST(:secret AS integer)"), {"secret": secret})


@shared_task
def one_of_none(secret: str) -> None:
    """Ask for the one row that is not there, after an error whose message quotes a parameter."""
    try:
        with db.sync_session.begin_nested():
            db.sync_session.execute(text("SELECT CAST(:secret AS integer)"), {"secret": secret})
    except SQLAlchemyError:
        db.sync_session.scalars(select(Item).where(Item.name == "nobody")).one()


@shared_task
def elsewhere() -> None:
    """Ask a database that is not there."""
    gone = Database("gone", settings=DatabaseSettings(database_url="postgresql://127.0.0.1:1/gone"))
    gone.sync_session.execute(text("SELECT 1"))


@shared_task(base=Task)
def read_item(name: str) -> bool:
    """Whether a row is visible."""
    return db.sync_session.scalar(select(Item.id).where(Item.name == name)) is not None


@shared_task
def sleep_after_insert(name: str, seconds: float) -> None:
    """Insert, then be slow, so that a time limit or a signal finds an open transaction."""
    insert(name)
    time.sleep(seconds)


@shared_task
async def sleep_after_insert_async(name: str, seconds: float) -> None:
    """The same in a coroutine."""
    db.session.add(Item(name))
    await db.session.flush()
    await asyncio.sleep(seconds)


@shared_task
def pid_after_insert(name: str) -> int:
    """Insert and tell the process."""
    insert(name)
    return os.getpid()


@shared_task(base=Task, bind=True, acks_late=True, reject_on_worker_lost=True)
def killed_once(self: Task, name: str) -> str:
    """Kill the own process in the middle of the first delivery."""
    insert(name)
    if first_time():
        os.kill(os.getpid(), signal.SIGKILL)
    return name


@shared_task
def both_sessions(name: str) -> None:
    """A function call joins the unit around it: ``add_item`` is rolled back with its caller."""
    add_item(f"{name} called")
    raise ValueError(name)


@shared_task
def count_items(results: Sequence[object]) -> int:
    """A chord's body."""
    return db.sync_session.scalar(select(func.count()).select_from(Item)) or 0


@shared_task(base=Task, bind=True)
async def add_item_async(self: Task, name: str, outcome: str = "succeed") -> str | None:
    """``add_item`` on the event loop; returns the id that its request has."""
    db.session.add(Item(name))
    await db.session.flush()
    if outcome == "duplicate":
        db.session.add(Item(name))
    if outcome == "raise":
        raise ValueError(name)
    if outcome == "retry" and self.request.retries == 0:
        raise self.retry(countdown=0)
    if outcome == "sleep":
        await asyncio.sleep(60)
    if outcome == "cancel":
        raise asyncio.CancelledError
    return self.request.id


@shared_task
async def apply_in_thread(name: str) -> str:
    """Run another task eagerly without blocking the loop; returns how it ended."""
    return str((await asyncio.to_thread(add_item.apply, (name,))).state)


@shared_task(base=Task, autoretry_for=(IntegrityError,), max_retries=2, default_retry_delay=0, bind=True)
async def unique_at_second_try_async(self: Task, name: str) -> int:
    """Fail at COMMIT the first time."""
    db.session.add_all([Item(name)] if self.request.retries else [Item(name), Item(name)])
    return self.request.retries


_met: set[int] = set()


@shared_task
async def loop_id(number: int, together: int) -> int:
    """Which loop runs this; waits until ``together`` such tasks are running in this process."""
    _met.add(number)
    while len(_met) < together:
        await asyncio.sleep(0.01)
    await db.session.execute(text("SELECT 1"))
    return id(asyncio.get_running_loop())


@shared_task(base=Task, bind=True)
async def own_id(self: Task, number: int, together: int) -> list[str | None]:
    """The id of its request, alone, beside ``together`` such tasks, in a thread and in SQLAlchemy's greenlet."""
    first = self.request.id
    _met.add(number)
    while len(_met) < together:
        await asyncio.sleep(0.01)
    in_thread = await asyncio.to_thread(lambda: self.request.id)
    return [first, self.request.id, in_thread, await db.session.run_sync(lambda _: self.request.id)]


@shared_task(base=Task)
def insert_and_send(name: str, outcome: str = "succeed") -> str:
    """A task that sends another one, of the row that it inserts."""
    insert(name)
    task_id = read_item.delay_on_commit(name)
    if outcome == "raise":
        raise ValueError(name)
    return str(task_id)


@shared_task
def seen_context() -> dict[str, object]:
    """What the task inherited, and what its log records carry."""
    record = logging.makeLogRecord({})
    UnitOfWorkFilter().filter(record)
    return {
        "request_id": current_request_id(),
        "logged": {name: getattr(record, name) for name in ("request_id", "task_id", "unit_id")},
        "trace": f"{get_current_span().get_span_context().trace_id:032x}",
    }


@shared_task
def wait_for_lock(key: int) -> None:
    """Wait in PostgreSQL until somebody gives up an advisory lock."""
    db.sync_session.execute(text("SELECT pg_advisory_xact_lock_shared(:key)"), {"key": key})


@shared_task
def killed_once_acked_early(name: str) -> None:
    """The same, when the broker has forgotten the message already."""
    insert(name)
    if first_time():
        os.kill(os.getpid(), signal.SIGKILL)


@shared_task
async def release_and_wait(name: str, key: int) -> None:
    """Write, commit, and wait for something slow without the row's lock."""
    db.session.add_all([Item(f"{name} begun"), Item(f"{os.getpid()}")][: 2 if name == "pid" else 1])
    await db.release()
    async with db.transaction() as waiting:
        await waiting.execute(text("SELECT pg_advisory_xact_lock_shared(:key)"), {"key": key})
    await db.session.execute(text("SELECT 1"))
    await db.release()
    db.session.add(Item(f"{name} ended"))


@shared_task(expires=3600)
def expiring(name: str) -> None:
    """Expire by its own option."""
    insert(name)


@shared_task
def commit_halfway(name: str, outcome: str = "succeed") -> None:
    """Write, commit, and then end as ``outcome`` says."""
    insert(f"{name} begun")
    db.sync_session.commit()
    insert(f"{name} ended")
    if outcome == "raise":
        raise ValueError(name)


@shared_task
async def commit_halfway_async(name: str, outcome: str = "succeed") -> None:
    """The same in a coroutine."""
    db.session.add(Item(f"{name} begun"))
    await db.release()
    db.session.add(Item(f"{name} ended"))
    if outcome == "raise":
        raise ValueError(name)


@shared_task
def append(key: str, number: int) -> None:
    """One row, whose id tells the order."""
    insert(f"{key} {number}")


@shared_task
def rolled_back_by_itself(name: str) -> None:
    """Succeed, and leave nothing."""
    insert(name)
    db.rollback_only()


@shared_task
async def rolled_back_by_itself_async(name: str) -> None:
    """Likewise."""
    db.session.add(Item(name))
    db.rollback_only()


@shared_task
def start_others(name: str, count: int, fail: bool = False) -> None:
    """Store further tasks."""
    for number in range(count):
        add_item.delay_durably(f"{name} {number}")
    if fail:
        raise ValueError(name)


@shared_task
def start_under_key(name: str, key: str) -> None:
    """Store a further task, which has its order."""
    add_item.apply_durably((name,), ordering_key=key)


@shared_task
def cut_off_once(name: str) -> None:
    """Lose the database's connection before the COMMIT, the first time."""
    insert(name)
    if first_time():
        _terminate(db.sync_session.scalar(text("SELECT pg_backend_pid()")))


@shared_task
async def cut_off_once_async(name: str) -> None:
    """The same in a coroutine, when asyncpg has read PostgreSQL's last words but not that the connection is closed."""
    db.session.add(Item(name))
    if await db.session.scalar(text("SELECT nextval('kills')")) == 1:
        _terminate(await db.session.scalar(text("SELECT pg_backend_pid()")))
        await asyncio.sleep(0)
        await asyncio.sleep(0)


@shared_task
def cut_off_once_unnoticed(name: str) -> None:
    """The same, in a task that handles the error and goes on."""
    insert(name)
    if first_time():
        with suppress(SQLAlchemyError):
            db.sync_session.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))


@shared_task
def cut_off_once_renamed(name: str) -> None:
    """The same, in a task that makes an error of its own of it."""
    insert(name)
    if first_time():
        try:
            db.sync_session.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))
        except SQLAlchemyError as error:
            raise ValueError("cannot be looked up") from error


@shared_task
async def cut_off_once_in_a_group(name: str) -> None:
    """The same, in one of several tasks of the event loop."""

    async def branch() -> None:
        async with db.transaction() as session:
            await session.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))

    db.session.add(Item(name))
    if await db.session.scalar(text("SELECT nextval('kills')")) == 1:
        async with asyncio.TaskGroup() as group:
            group.create_task(branch())


@shared_task
def refused_once(name: str) -> None:
    """Find the server out of connections, the first time, as a task that was released and begins again may."""
    insert(name)
    if first_time():
        db.sync_session.execute(text("DO $$ BEGIN RAISE 'too many clients' USING ERRCODE = '53300'; END $$"))


@shared_task
def raise_text(utf_16: str) -> None:
    """Fail with a text that may be none PostgreSQL stores."""
    raise ValueError(bytes.fromhex(utf_16).decode("utf-16", "surrogatepass"))


@shared_task(base=Task, bind=True)
def replaced(self: Task, name: str) -> None:
    """Hand over to another task."""
    insert(name)
    self.replace(record.s(name))


@shared_task(base=Task, bind=True)
def three_times(self: Task, name: str) -> None:
    """Insert, and ask to be run again without giving up what was done."""
    insert(f"{name} {self.request.retries}")
    if self.request.retries < 2:
        self.retry(countdown=0, throw=False)


@shared_task(base=Task, bind=True)
def retried_with(self: Task, name: str, options: dict[str, Any]) -> None:
    """Retry with options, and tell which ones the next attempt has."""
    if self.request.retries == 0:
        raise self.retry(**{"countdown": 0, **options})
    insert(f"{name} {(self.request.timelimit or [None])[0]} {(self.request.headers or {}).get('x')}")


@shared_task(soft_time_limit=1)
def slow_commit(name: str) -> str:
    """Have a COMMIT that takes longer than the limit."""
    insert(name)
    return name


@shared_task(soft_time_limit=1)
async def slow_commit_async(name: str) -> str:
    """The same in a coroutine."""
    db.session.add(Item(name))
    return name


@shared_task
async def exit_async() -> None:
    """What a library may do that is meant for command lines."""
    raise SystemExit(1)


class NeverStarts(celery.Task):  # type: ignore[type-arg]  # a base of the user's
    """Fails before its body."""

    def before_start(self, task_id: str, args: Any, kwargs: Any) -> None:
        raise ValueError("not today")


@shared_task(base=NeverStarts)
def never_starts() -> None:
    """What nobody gets to see."""


@shared_task
def unserializable(name: str) -> object:
    """Succeed with what JSON does not carry."""
    insert(name)
    return object()


@shared_task
async def unserializable_async(name: str) -> object:
    """The same in a coroutine."""
    db.session.add(Item(name))
    return object()


@shared_task
def handled_flush_error(secret: str) -> None:
    """Go on after a flush that failed."""
    db.sync_session.add(Item(secret))
    db.sync_session.flush()
    with suppress(IntegrityError):
        db.sync_session.execute(text("SET CONSTRAINTS ALL IMMEDIATE"))
        db.sync_session.add(Item(secret))
        db.sync_session.flush()


def _terminate(backend: int | None) -> None:
    with db.sync_transaction() as session:
        session.execute(text("SELECT pg_terminate_backend(:backend, 5000)"), {"backend": backend})


@shared_task(base=Task, acks_late=True)
def rejected_once(name: str) -> None:
    """Give the message back to the broker, the first time."""
    insert(name)
    if first_time():
        raise Reject(name, requeue=True)


class StartsLater(celery.Task):  # type: ignore[type-arg]  # a base of the user's
    """Finds the server out of connections before its body, the first time."""

    def before_start(self, task_id: str, args: Any, kwargs: Any) -> None:
        if first_time():
            db.sync_session.execute(text("DO $$ BEGIN RAISE 'too many clients' USING ERRCODE = '53300'; END $$"))


@shared_task(base=StartsLater)
def starts_later(name: str) -> None:
    """Insert, once it is let."""
    insert(name)


@shared_task
def without_connection_once(name: str) -> None:
    """Find no connection free, the first time."""
    insert(name)
    if first_time():
        raise PoolTimeout


@shared_task
def unreachable_once(name: str) -> None:
    """Find another database unreachable, the first time."""
    insert(name)
    if first_time():
        with GONE.sync_transaction() as session:
            session.execute(text("SELECT 1"))


@shared_task
async def unreachable_once_async(name: str) -> None:
    """The same in a coroutine."""
    db.session.add(Item(name))
    if await db.session.scalar(text("SELECT nextval('kills')")) == 1:
        async with GONE.transaction() as session:
            await session.execute(text("SELECT 1"))


GONE = Database("gone", settings=DatabaseSettings(database_url="postgresql://nobody@127.0.0.1:1/gone"))


@shared_task
def count_run(name: str) -> None:
    """Insert, and count in a sequence, which no rollback takes back."""
    insert(name)
    db.sync_session.execute(text("SELECT nextval('kills')"))


@shared_task(bind=True, base=Task)
def pass_on_headers(self: Task, name: str) -> None:
    """Send another task with the headers of this one."""
    add_item.apply_async((f"passed on {name}",), headers=self.request.headers)


@shared_task
async def die_between_commits_once(name: str) -> None:
    """Write with both sessions; the first time, the process dies at the COMMIT of the second one."""
    db.session.add(Item(name))
    run = await db.session.scalar(text("SELECT nextval('kills')"))
    await asyncio.to_thread(insert, f"{name} sync {run}")
    if run == 1:
        event.listen(db.session.sync_session, "before_commit", lambda _: os.kill(os.getpid(), signal.SIGKILL))


class TriesAgain(Task):
    """Runs its body again when it failed."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().__call__(*args, **kwargs)
        except ZeroDivisionError:
            return super().__call__(*args, **kwargs)


@shared_task(base=TriesAgain, bind=True)
def tries_again(self: Task, name: str) -> None:
    """Fail the first time."""
    insert(name)
    if not self.__dict__.setdefault("tried", []):
        self.__dict__["tried"].append(name)
        raise ZeroDivisionError


def with_a_plain_wrapper(function: Any) -> Any:
    """A decorator that was written for ``def``."""

    @wraps(function)
    def wrapper(*args: Any) -> Any:
        return function(*args)

    return wrapper


@shared_task(ignore_result=True)
@with_a_plain_wrapper
async def decorated(name: str) -> None:
    """Insert, if it is ever awaited."""
    db.session.add(Item(name))


def _fail_to_send() -> None:
    raise DispatchFailed("not sent")


@shared_task(autoretry_for=(Exception,), default_retry_delay=0)
def fails_to_send(name: str) -> None:
    """Insert, and then not send what was to be sent on commit."""
    insert(name)
    db.on_commit(_fail_to_send)


@shared_task(autoretry_for=(Exception,), default_retry_delay=0)
async def fails_to_send_async(name: str) -> None:
    """The same in a coroutine."""
    db.session.add(Item(name))
    db.on_commit(_fail_to_send)
