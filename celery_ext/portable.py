"""What a task's result, and a durable task's row, say of its failure: never the values of a statement."""

from __future__ import annotations

from typing import Final

from celery.exceptions import Retry
from sqlalchemy.exc import MultipleResultsFound, NoResultFound, SQLAlchemyError, StatementError

from celery_ext.errors import StatementFailed
from fastapi_chatdify_db.exceptions import DatabaseUnavailable
from fastapi_chatdify_db.sqlstates import sqlstate

# Names in the schema may be shown; PostgreSQL's messages and details quote values.
# psycopg2: https://www.psycopg.org/docs/extensions.html#psycopg2.extensions.Diagnostics
# asyncpg has these fields on its exception, which is the cause of the one that SQLAlchemy's adapter raises.
_NAMES: Final = ("constraint_name", "table_name", "column_name")


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


def as_text(error: BaseException | None) -> str | None:
    """What the row says of an error: its class and text, without the values of a statement."""
    if error is None:
        return None
    try:
        if isinstance(error, BaseExceptionGroup):  # whose own text only counts the errors
            text = f"{type(error).__name__}: {error}: {'; '.join(filter(None, map(as_text, error.exceptions)))}"
        else:
            shown = portable(error)
            text = f"{type(error).__name__}: {error}" if shown is error else str(shown)
    except Exception as broken:
        text = f"{type(error).__name__}, whose text cannot be had: {type(broken).__name__}"
    # PostgreSQL stores neither NUL nor halves of surrogate pairs, but the failure has to be stored.
    return text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00")[:2000]


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
