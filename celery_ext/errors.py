"""The errors of this package."""

from __future__ import annotations

from fastapi_chatdify_db.exceptions import AfterCommitError, ChatdifyDBError


class AsyncTaskNotSupported(ChatdifyDBError):
    """An ``async def`` task was started in a pool that cannot run an event loop: gevent or eventlet."""


class ArgumentsNotSerializable(ChatdifyDBError, TypeError):
    """The arguments or options of a task that is sent later cannot be stored, or cannot be sent."""


class ResultNotSerializable(ChatdifyDBError, TypeError):
    """A task that wrote returned, or was given, what its result backend cannot store; its unit was rolled back."""


class CoroutineReturned(ChatdifyDBError, TypeError):
    """A task is an ``async def`` behind a decorator that is not: its body would never run."""


class BodyBypassed(ChatdifyDBError):
    """A task's own ``__call__`` called its body past ``Task.run``: logged, and a durable task fails for it."""


class NotInitialized(ChatdifyDBError):
    """``init_app`` was not called for a Celery application."""


class DurableDispatchUnsupported(ChatdifyDBError):
    """The database is not PostgreSQL; the task has no session, runs in batches, calls ``replace()`` or runs twice."""


class TaskCancelled(ChatdifyDBError):
    """A task was cancelled from inside; its unit was rolled back."""


class DispatchFailed(AfterCommitError):
    """A task could not be sent after the commit, and its caller asked to be told: ``on_error="raise"``.

    With ``task_always_eager`` and ``task_eager_propagates``: it was run in place of being sent, and failed.
    """


class StatementFailed(ChatdifyDBError):
    """A statement or COMMIT failed in a task.

    ``AsyncResult.get()`` raises it, and error callbacks get it, in place of SQLAlchemy's own exception, which neither
    JSON nor pickle carries and whose text may quote rows. Inside the task, so in ``except`` and ``autoretry_for``, the
    exception is still SQLAlchemy's.
    """
