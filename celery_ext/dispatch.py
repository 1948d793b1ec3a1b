"""Sending a task once its row is visible: after the commit, in bounded time."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, wait
from contextvars import copy_context
from functools import partial
from threading import Thread
from typing import TYPE_CHECKING, Any, Final, Literal

from celery import current_task
from celery.utils import uuid

from celery_ext.errors import DispatchFailed
from fastapi_chatdify_db.unit_of_work import innermost_unit

if TYPE_CHECKING:
    from celery_ext.task import Task

logger: Final = logging.getLogger(__name__)

OnError = Literal["log", "raise"]


def send_on_commit(
    task: Task, args: Sequence[object], kwargs: Mapping[str, object], on_error: OnError, options: Mapping[str, Any]
) -> str:
    """Send ``task`` when the innermost unit of work is committed, or at once where there is none; returns its id.

    Raises:
        DispatchFailed: It could not be sent at once, and ``on_error`` is ``"raise"``.
    """
    options = {"task_id": uuid(), **_lineage(), **options}
    send = partial(copy_context().run, partial(task.apply_async, tuple(args), dict(kwargs), **options))
    publish = partial(_publish, task, str(options["task_id"]), send, on_error)
    unit = innermost_unit()
    if unit is None:
        publish()
    else:
        unit.on_commit(unit.only or task.database.engines, publish)
    return str(options["task_id"])


def _lineage() -> dict[str, Any]:
    """Which task sends; the thread that publishes would not know."""
    request = current_task.request if current_task else None
    if request is None or request.id is None:
        return {}
    return {"parent_id": request.id, "root_id": request.root_id or request.id}


def _publish(task: Task, task_id: str, send: partial[Any], on_error: OnError) -> None:
    if task.app.conf.task_always_eager:
        send()
        return
    limit = float(task.app.conf.broker_connection_timeout)
    sent: Future[None] = Future()
    # Nothing bounds all of a broker's ways not to answer, so the waiting is bounded instead.
    Thread(target=_settle, args=(sent, send), name=f"send {task.name}", daemon=True).start()
    done, _ = wait([sent], limit)
    error = sent.exception() if done else TimeoutError(f"no answer in {limit:g} s; it may still be sent")
    if error is None:
        return
    message = f"task {task.name}[{task_id}] was not sent after the commit: {type(error).__name__}: {error}"
    if on_error == "raise":
        raise DispatchFailed(message) from error
    logger.error(message)


def _settle(sent: Future[None], send: partial[Any]) -> None:
    try:
        send()
    except BaseException as error:  # handed to the thread that waits
        sent.set_exception(error)
    else:
        sent.set_result(None)
