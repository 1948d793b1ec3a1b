"""Sending a task once its row is visible: after the commit, in bounded time."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from contextvars import copy_context
from difflib import get_close_matches
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal, get_args
from weakref import WeakKeyDictionary

from celery.utils import uuid
from kombu.exceptions import OperationalError
from kombu.serialization import dumps

from celery_ext.errors import ArgumentsNotSerializable, DispatchFailed
from celery_ext.execution import Execution
from celery_ext.sender import send_within
from fastapi_chatdify_db.nesting import innermost_unit
from fastapi_chatdify_db.unit_of_work import UnitOfWork

if TYPE_CHECKING:
    from celery_ext.task import Task

logger: Final = logging.getLogger(__name__)

OnError = Literal["log", "raise"]

_SIMILARITY: Final = 0.8
"""From which likeness an option is one of ours misspelt: ``order_key`` (0.86) is, ``routing_key`` (0.70) is not."""

_TIME_LIMIT: Final = 4.0
"""Seconds where ``broker_connection_timeout`` is unset, as in a worker of greenlets; Celery's default."""

_broker_failed_at: Final[WeakKeyDictionary[UnitOfWork, float]] = WeakKeyDictionary()
"""When the broker last failed a unit's send, on the monotonic clock: its next sends would each wait as long."""


def send_on_commit(
    task: Task, args: Sequence[object], kwargs: Mapping[str, object], on_error: OnError, options: Mapping[str, Any]
) -> str:
    """Send ``task`` when the innermost unit of work is committed, or at once where there is none; returns its id.

    Raises:
        TypeError: The task does not take these arguments, or ``on_error`` is unknown.
        ArgumentsNotSerializable: Its serializer does not carry them.
        DispatchFailed: It could not be sent at once, and ``on_error`` is ``"raise"``.
    """
    if on_error not in get_args(OnError):
        raise TypeError(f"on_error={on_error!r} is unknown; write on_error='log' or on_error='raise'")
    check_arguments(task, args, kwargs)
    task_id = str(options.get("task_id") or uuid())
    options = {**inherited_options(task), **options, "task_id": task_id}
    _check_serializable(task, args, kwargs, options)
    send = partial(copy_context().run, task.apply_async, tuple(args), dict(kwargs), **options)
    unit = innermost_unit()
    publish = partial(_publish, task, task_id, send, on_error, unit)
    if unit is None:
        publish()
    else:
        unit.on_commit(unit.only or task.database.engines, publish)
    return task_id


def check_arguments(task: Task, args: Sequence[object], kwargs: Mapping[str, object]) -> None:
    """Check now what Celery checks at the send, when it is too late to raise.

    Raises:
        TypeError: The task does not take these arguments.
    """
    check = getattr(task, "__header__", None)  # a task that is written as a class has none
    if task.typing and check is not None:
        check(*args, **kwargs)


def refuse_durable_options(task: Task, options: Mapping[str, object], instead: str) -> None:
    """Refuse options of ``apply_durably``, or misspellings: Celery would pass them to the broker, which ignores them.

    Raises:
        TypeError: There is such an option.
    """
    for name in options:
        if meant := get_close_matches(name, ("ordering_key", "idempotency_key"), 1, _SIMILARITY):
            raise TypeError(f"{task.name} got the unknown option {name}; write {instead.format(*meant)}")


def _check_serializable(
    task: Task, args: Sequence[object], kwargs: Mapping[str, object], options: Mapping[str, Any]
) -> None:
    # Before 5.7, Celery does not dump models itself.
    if getattr(task, "_dump_pydantic_arguments", None) is not None:
        return
    try:
        dumps((tuple(args), dict(kwargs)), options.get("serializer") or task.serializer)
    except Exception as error:  # whatever a serializer raises
        raise ArgumentsNotSerializable(
            f"the arguments of {task.name} cannot be sent ({error}); send ids, not objects"
        ) from error


def inherited_options(task: Task) -> dict[str, Any]:
    """The options that ``task`` inherits from its sender: the lineage and, where Celery is set so, the priority.

    Celery would look for the sender by thread, in vain: in the thread that publishes, or the event loop's.
    """
    execution = Execution.current()
    if execution is None:
        return {}
    request = execution.request
    options: dict[str, Any] = {"parent_id": request.id, "root_id": request.root_id or request.id}
    if task.app.conf.task_inherit_parent_priority and task.priority is None:
        priority = (request.delivery_info or {}).get("priority")
        if priority is not None:
            options["priority"] = priority
    return options


def _publish(task: Task, task_id: str, send: partial[Any], on_error: OnError, unit: UnitOfWork | None) -> None:
    if task.app.conf.task_always_eager:
        _run_eagerly(task, task_id, send, unit)
        return
    error = _send(task, send, unit)
    if error is None:
        execution = Execution.current()
        if execution is not None and execution.task.trail:  # as Celery does for the task of its thread
            execution.request.children.append(task.AsyncResult(task_id))  # type: ignore[arg-type]  # wrong in the stubs
        return
    message = f"task {task.name}[{task_id}] was not sent: {type(error).__name__}: {error}"
    if on_error == "raise":
        raise DispatchFailed(message) from error
    logger.error(message)


def _run_eagerly(task: Task, task_id: str, send: partial[Any], unit: UnitOfWork | None) -> None:
    try:
        send()
    except Exception as error:  # the task's own, with task_eager_propagates
        if unit is None:
            raise
        raise DispatchFailed(f"task {task.name}[{task_id}] failed in place: {type(error).__name__}: {error}") from error


def _send(task: Task, send: partial[Any], unit: UnitOfWork | None) -> BaseException | None:
    limit = float(task.app.conf.broker_connection_timeout or _TIME_LIMIT)
    if unit is not None and time.monotonic() < _broker_failed_at.get(unit, -math.inf) + limit:
        return TimeoutError("not tried, since the broker has just failed another task of the same unit")
    error = send_within(limit, send)
    if unit is not None and isinstance(error, OperationalError | TimeoutError):
        _broker_failed_at[unit] = time.monotonic()
    return error
