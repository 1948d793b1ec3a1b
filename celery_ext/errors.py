"""The errors of this package, and what becomes of SQLAlchemy's on their way into a task's result."""

from __future__ import annotations

from typing import Final

from celery.exceptions import Retry
from sqlalchemy.exc import MultipleResultsFound, NoResultFound, SQLAlchemyError, StatementError

from fastapi_chatdify_db.exceptions import AfterCommitError, ChatdifyDBError, DatabaseUnavailable
from fastapi_chatdify_db.sqlstates import sqlstate

# Names in the schema may be shown; PostgreSQL's messages and details quote values.
# psycopg2: https://www.psycopg.org/docs/extensions.html#psycopg2.extensions.Diagnostics
# asyncpg has these fields on its exception, which is the cause of the one that SQLAlchemy's adapter raises.
_NAMES: Final = ("constraint_name", "table_name", "column_name")


class AsyncTaskNotSupported(ChatdifyDBError):
    """An ``async def`` task was started in a pool that cannot run an event loop: gevent."""


class ArgumentsNotSerializable(ChatdifyDBError, TypeError):
    """The arguments or options of a task that is sent later cannot be stored, or cannot be sent."""


class ResultNotSerializable(ChatdifyDBError, TypeError):
    """A task that wrote returned, or was given, what its result backend cannot store; its unit was rolled back."""


class CoroutineReturned(ChatdifyDBError, TypeError):
    """A task is an ``async def`` behind a decorator that is not: its body would never run."""


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


def portable(error: BaseException) -> BaseException:
    """The exception with which a task ends: ``StatementFailed`` for SQLAlchemy's, in a group too; any other itself."""
    if not isinstance(error, Retry):
        return _shown(error)
    shown = None if error.exc is None else _shown(error.exc)
    if isinstance(shown, Exception) and shown is not error.exc:
        error.exc = shown
        error.excs = repr(shown)  # type: ignore[attr-defined]  # missing in the stubs
        error.__cause__, error.__suppress_context__ = None, True
    return error


def _shown(error: BaseException) -> BaseException:
    if isinstance(error, SQLAlchemyError):
        return _without_values(error)
    if isinstance(error, BaseExceptionGroup) and error.subgroup(SQLAlchemyError) is not None:  # a TaskGroup's
        group = error.derive([_shown(each) for each in error.exceptions])
        group.__suppress_context__ = True
        return group.with_traceback(error.__traceback__)
    return error


def _without_values(error: SQLAlchemyError) -> Exception:
    if isinstance(error, DatabaseUnavailable | NoResultFound | MultipleResultsFound):
        error.__suppress_context__ = True  # what failed before may quote rows
        return error
    original = error.orig if isinstance(error, StatementError) else None  # PendingRollbackError only quotes one
    fields = getattr(original, "diag", None) or getattr(original, "__cause__", None)
    details = [f"SQLSTATE {state}"] if (state := sqlstate(original)) else []
    details += [f"{name.removesuffix('_name')} {value}" for name in _NAMES if (value := getattr(fields, name, None))]
    failed = StatementFailed(": ".join(filter(None, [type(error).__name__, ", ".join(details)])))
    failed.__suppress_context__ = True  # the original's text would be in the stored traceback
    return failed.with_traceback(error.__traceback__)
