"""A task's body in its unit of work: committed before Celery hears that it returned."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from threading import Lock
from typing import TYPE_CHECKING, Any, Final

from celery.exceptions import SoftTimeLimitExceeded
from celery.utils.time import get_exponential_backoff_interval
from greenlet import GreenletExit
from sqlalchemy.exc import DBAPIError

from celery_ext import event_loop
from celery_ext.errors import CoroutineReturned, TaskCancelled
from celery_ext.execution import Execution, joinable_unit
from celery_ext.portable import portable
from celery_ext.result import check_result
from celery_ext.soft_limit import soft_limit_held_back
from fastapi_chatdify_db.async_unit_of_work import AsyncUnitOfWork
from fastapi_chatdify_db.exceptions import AfterCommitError
from fastapi_chatdify_db.sqlstates import asks_to_retry
from fastapi_chatdify_db.surroundings import in_event_loop
from fastapi_chatdify_db.unit_of_work import UnitOfWork

if TYPE_CHECKING:
    from celery_ext.task import Task

logger: Final = logging.getLogger(__name__)

Body = Callable[..., Any]

_WORKER_EXITS: Final = (KeyboardInterrupt, SystemExit, GreenletExit)
"""Exceptions that say nothing about the task, which is run again."""

_lock: Final = Lock()


def put_in_unit(task: Task) -> None:
    """Wrap a task's ``run`` so that it has a unit of work, whoever calls it: also a ``__call__`` of the user's."""
    with _lock:
        if task.runs_in_unit:
            return
        # Inside autoretry_for's wrapper, so that a failed commit is retried like a failed body.
        name = "_orig_run" if "_orig_run" in vars(task) else "run"
        setattr(task, name, _in_unit(task, getattr(task, name)))
        setattr(task, "run", _translating(task, task.run))  # noqa: B010
        task.runs_in_unit = True


def _in_unit(task: Task, body: Body) -> Body:
    run_in_unit = _run_async if task.is_async else _run

    @wraps(body)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return run_in_unit(task, body, args, kwargs)
        except DBAPIError as error:
            if task.db_retry and asks_to_retry(error.orig):
                raise _retry_exception(task, error) from None
            raise

    return run


def _translating(task: Task, run: Body) -> Body:
    """Turn what a worker's task raises into what a result can carry; a durable task's row has it first."""

    @wraps(run)
    def run_translated(*args: Any, **kwargs: Any) -> Any:
        execution = Execution.beginning(task)
        try:
            return run(*args, **kwargs)
        except _WORKER_EXITS:
            raise
        except BaseException as error:  # e.g. gevent.Timeout
            if execution is None:
                raise
            if isinstance(error, (asyncio.CancelledError, GeneratorExit)):
                # Celery takes a BaseException for the end of the worker.
                cancelled = TaskCancelled(f"{task.name} let out a {type(error).__name__}; catch it where it was meant")
                error = cancelled.with_traceback(error.__traceback__)
            if execution.delivery is not None:
                error = execution.delivery.record_end(error)
            raise portable(error)  # noqa: B904  # it has its cause, or hides it

    return run_translated


def _run(task: Task, body: Body, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    execution = Execution.beginning(task)
    if execution is None:
        if not task.db_session or joinable_unit() is not None:
            return body(*args, **kwargs)
        with UnitOfWork(isolation_level=task.db_isolation_level):
            return body(*args, **kwargs)
    if (unit := execution.begin()) is None:
        return body(*args, **kwargs)
    delivery = execution.delivery
    try:
        try:
            if delivery is not None:
                delivery.begin(unit.sync_session(task.database.engines))
            result = body(*args, **kwargs)
            if inspect.iscoroutine(result):
                result.close()
                raise CoroutineReturned(
                    f"{task.name} returned a coroutine, which nobody awaits; make what decorates it an async def too"
                )
            if not unit.untouched:
                check_result(task, execution.request, result)
            if delivery is not None:
                delivery.finish(unit.sync_session(task.database.engines))
        except BaseException:
            with _error_of_the_body_first(task):
                unit.finish(commit=False)
            raise
        _commit(unit, task)
        if delivery is not None and unit.rollback_only:
            delivery.finish_without_effects()
        return result
    finally:
        execution.body_ended()


@contextmanager
def _error_of_the_body_first(task: Task) -> Iterator[None]:
    """Log what callbacks raise after a commit of the body's own: it may have sent its retry, or its replacement."""
    try:
        yield
    except AfterCommitError:
        logger.exception("an on_commit callback of %s failed, which then ended in an error of its own", task.name)


def _commit(unit: UnitOfWork, task: Task) -> None:
    """Commit; a soft time limit that passes meanwhile does not make a committed task a failure."""
    if unit.untouched:
        return  # nothing to commit; holding the limit back would cost more than the rest
    committed = False
    try:
        with soft_limit_held_back:
            unit.finish(commit=True)
            committed = True
    except SoftTimeLimitExceeded:
        if not committed:
            raise
        logger.warning("%s was cancelled during its commit, which succeeded: by its soft time limit", task.name)


def _run_async(task: Task, body: Body, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    execution = Execution.beginning(task)
    if execution is None:
        if in_event_loop():
            return _run_joining(task, body, args, kwargs) if task.db_session else body(*args, **kwargs)
        return event_loop.run(_run_in_own_unit(task, body, args, kwargs) if task.db_session else body(*args, **kwargs))
    if (unit := execution.begin()) is None:
        return event_loop.run(body(*args, **kwargs))
    assert isinstance(unit, AsyncUnitOfWork)
    try:
        result = event_loop.run(_committed(unit, execution, partial(body, *args, **kwargs)))
        if execution.delivery is not None and unit.rollback_only:
            execution.delivery.finish_without_effects()
        return result
    finally:
        execution.body_ended()


async def _committed(unit: AsyncUnitOfWork, execution: Execution, body: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    task, delivery = execution.task, execution.delivery
    try:
        if delivery is not None:
            await unit.async_session(task.database.engines).run_sync(delivery.begin)
        result = await body()
        if not unit.untouched:
            check_result(task, execution.request, result)
        if delivery is not None:
            # Before the mark, which locks the task's ordering key: a task that a thread stores may wait for that.
            await unit.commit_sync_sessions()
            await unit.async_session(task.database.engines).run_sync(delivery.finish)
    except BaseException:
        with _error_of_the_body_first(task):
            await unit.finish_async(commit=False)
        raise
    try:
        await unit.finish_async(commit=True)
    except asyncio.CancelledError:
        if not unit.ended_in_commit:
            raise
        logger.warning(
            "%s was cancelled during its commit, which succeeded: by a time limit, a cold shutdown or revoke()",
            task.name,
        )
    return result


async def _run_joining(task: Task, body: Body, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if isinstance(joinable_unit(), AsyncUnitOfWork):
        return await body(*args, **kwargs)
    return await _run_in_own_unit(task, body, args, kwargs)


async def _run_in_own_unit(task: Task, body: Body, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """In a unit of its own; also when called in a request's thread, whose session belongs to the server's loop."""
    async with AsyncUnitOfWork(isolation_level=task.db_isolation_level):
        return await body(*args, **kwargs)


def _retry_exception(task: Task, error: DBAPIError) -> Exception:
    backoff = float(getattr(task, "retry_backoff", 0))
    countdown = None
    if backoff:
        countdown = get_exponential_backoff_interval(
            factor=max(1, int(backoff)),
            retries=task.request.retries,
            maximum=int(getattr(task, "retry_backoff_max", 600)),
            full_jitter=bool(getattr(task, "retry_jitter", True)),
        )
    return task.retry(exc=error, countdown=countdown, throw=False)
