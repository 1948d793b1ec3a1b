"""The unit of work of ``fastapi_chatdify_db`` for Celery tasks: ``celery_ext.init_app(celery_app)``."""

from __future__ import annotations

from celery_ext.binding import init_app
from celery_ext.errors import (
    ArgumentsNotSerializable,
    AsyncTaskNotSupported,
    BodyBypassed,
    CoroutineReturned,
    DispatchFailed,
    DurableDispatchUnsupported,
    NotInitialized,
    ResultNotSerializable,
    StatementFailed,
    TaskCancelled,
)
from celery_ext.task import Task

__all__ = [
    "ArgumentsNotSerializable",
    "AsyncTaskNotSupported",
    "BodyBypassed",
    "CoroutineReturned",
    "DispatchFailed",
    "DurableDispatchUnsupported",
    "NotInitialized",
    "ResultNotSerializable",
    "StatementFailed",
    "Task",
    "TaskCancelled",
    "init_app",
]
