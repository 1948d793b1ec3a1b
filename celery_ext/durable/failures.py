"""Which failures a durable task is run again for, without counting as failed."""

from __future__ import annotations

from traceback import walk_tb
from typing import Final

from celery.exceptions import TaskPredicate
from sqlalchemy.exc import DBAPIError, PendingRollbackError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from celery_ext.durable import statements
from fastapi_chatdify_db.exceptions import DatabaseUnavailable
from fastapi_chatdify_db.liveness import is_outdated_statement
from fastapi_chatdify_db.sqlstates import asks_to_retry, sqlstate, timed_out

# connection_exception; insufficient_resources (53000: too many open files), without a setting's limit (53400);
# operator_intervention, without query_canceled: https://www.postgresql.org/docs/current/errcodes-appendix.html
_SERVER_FAILURES: Final = ("08", "530", "531", "532", "533", "57P")

_CONNECTION_LOST: Final = "8s2b"
"""SQLAlchemy's code for a transaction whose connection broke: https://docs.sqlalchemy.org/en/20/errors.html."""


def is_transient(error: BaseException | None) -> bool:
    """Whether the database or the worker is to blame, also for the cause of an exception that the task raised."""
    if isinstance(error, BaseExceptionGroup):
        return all(map(is_transient, error.exceptions))
    if error is None or isinstance(error, TaskPredicate):  # Retry, Ignore and Reject are the task's decision
        return False
    if isinstance(error, (PoolTimeout, DatabaseUnavailable)):
        return True
    if isinstance(error, NotImplementedError) and _came_from_cold_shutdown(error):
        return True
    if isinstance(error, DBAPIError):
        original = error.orig
        # A time limit of the task may also pass while a statement of ours waits for others, which is not its fault.
        return (
            error.connection_invalidated
            or asks_to_retry(original)
            or is_outdated_statement(original)
            or _is_server_failure(original)
            or (statements.waits_for_others(error.statement) and timed_out(original))
        )
    if isinstance(error, PendingRollbackError) and error.code == _CONNECTION_LOST:
        return True
    return _is_server_failure(error) or is_transient(error.__cause__)


def _came_from_cold_shutdown(error: NotImplementedError) -> bool:
    """Whether Celery's signal handler raised it: the pool solo cannot end a task, and says so within that task."""
    return any(frame.f_code.co_name == "on_cold_shutdown" for frame, _ in walk_tb(error.__traceback__))


def _is_server_failure(error: BaseException | None) -> bool:
    return (sqlstate(error) or "").startswith(_SERVER_FAILURES)
