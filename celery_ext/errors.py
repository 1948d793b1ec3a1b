"""The errors of this package, and what becomes of SQLAlchemy's on their way into a task's result."""

from __future__ import annotations

from celery.exceptions import Retry
from sqlalchemy.exc import SQLAlchemyError, StatementError

from fastapi_chatdify_db.exceptions import AfterCommitError, ChatdifyDBError
from fastapi_chatdify_db.sqlstates import sqlstate

# Names of things in the schema; PostgreSQL's messages and details quote values.
# psycopg2: https://www.psycopg.org/docs/extensions.html#psycopg2.extensions.Diagnostics
# asyncpg keeps the same fields on the exception itself.
_NAMED = ("constraint_name", "table_name", "column_name")


class AsyncTaskNotSupported(ChatdifyDBError):
    """An ``async def`` task was started in a pool that has no place for an event loop."""


class ArgumentsNotSerializable(ChatdifyDBError, TypeError):
    """A durable task's arguments cannot be stored."""


class ResultNotSerializable(ChatdifyDBError, TypeError):
    """A task that wrote returned what its result backend cannot store; its unit was rolled back."""


class NotInitialized(ChatdifyDBError):
    """A Celery application was named that ``init_app`` has not seen."""


class DurableDispatchUnsupported(ChatdifyDBError):
    """The task's database is not PostgreSQL, or it has no session: durable dispatch is built on both."""


class AsyncTaskCancelled(ChatdifyDBError):
    """An ``async def`` task was cancelled by something inside it; its unit was rolled back."""


class DispatchFailed(AfterCommitError):
    """A task could not be sent after the commit, and its caller asked to be told: ``on_error="raise"``."""


class StatementFailed(ChatdifyDBError):
    """A statement or COMMIT failed in a task.

    What ``AsyncResult.get()`` raises, and error callbacks are given, in place of SQLAlchemy's own exception, which
    neither JSON nor pickle carries, and whose text may quote the rows. Inside the task it is still SQLAlchemy's, so
    ``except`` and ``autoretry_for`` name that.
    """


def portable(error: BaseException) -> BaseException:
    """The exception to leave a task: ``StatementFailed`` for SQLAlchemy's, with its traceback; any other as it is."""
    if isinstance(error, Retry):
        if isinstance(error.exc, SQLAlchemyError):
            error.exc = _statement_failed(error.exc)
            error.excs = repr(error.exc)  # type: ignore[attr-defined]  # missing in the stubs
            error.__cause__, error.__suppress_context__ = None, True
        return error
    return _statement_failed(error) if isinstance(error, SQLAlchemyError) else error


def _statement_failed(error: SQLAlchemyError) -> StatementFailed:
    original = error.orig if isinstance(error, StatementError) else None  # e.g. PendingRollbackError quotes one
    fields = getattr(original, "diag", original)
    details = [f"SQLSTATE {state}"] if (state := sqlstate(original)) else []
    details += [f"{name.removesuffix('_name')} {value}" for name in _NAMED if (value := getattr(fields, name, None))]
    failed = StatementFailed(": ".join(filter(None, [type(error).__name__, ", ".join(details)])))
    failed.__suppress_context__ = True  # the original's text would be in the stored traceback
    return failed.with_traceback(error.__traceback__)
