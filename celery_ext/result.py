"""Checks before the commit that a task's result can be stored: Celery would find out after it, and say FAILURE."""

from __future__ import annotations

from typing import TYPE_CHECKING

from celery.app.task import Context
from celery.backends.base import DisabledBackend

from celery_ext.errors import ResultNotSerializable

if TYPE_CHECKING:
    from celery_ext.task import Task


def check_result(task: Task, request: Context, result: object) -> None:
    """Encode a result as the result backend will, to see whether it can; with ``result_extended``, the arguments too.

    Parameters:
        task: The task.
        request: Its request.
        result: What the body returned.

    Raises:
        ResultNotSerializable: The backend cannot store it.
    """
    extended = task.app.conf.result_extended
    if (result is None and not extended) or _is_ignored(task, request):
        return
    backend = task.backend
    if isinstance(backend, DisabledBackend):
        return
    try:
        backend.encode(backend.prepare_value(result))
    except Exception as error:
        # Celery dumps the model that a def task with pydantic=True returns, but not what a coroutine will return.
        model = hasattr(result, "model_dump")
        instead = 'return m.model_dump(mode="json")' if model else "return ids, or set ignore_result=True"
        raise _not_serializable(task, "result", error, instead) from error
    if extended:
        try:
            backend.encode([request.args, request.kwargs])
        except Exception as error:
            raise _not_serializable(task, "arguments", error, "send ids, or set result_extended=False") from error


def _not_serializable(task: Task, what: str, error: Exception, instead: str) -> ResultNotSerializable:
    serializer = task.app.conf.result_serializer
    return ResultNotSerializable(
        f"{task.name} was rolled back: {serializer} does not carry its {what} ({error}); {instead}"
    )


def _is_ignored(task: Task, request: Context) -> bool:
    if request.is_eager and not task.store_eager_result:
        return True
    asked = vars(request).get("ignore_result")
    return bool(task.ignore_result if asked is None else asked)
