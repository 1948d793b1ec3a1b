"""What operators do with durable tasks: count, list, retry, cancel, prune."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from sqlalchemy import Row
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from celery_ext.durable import statements
from fastapi_chatdify_db.database import Database
from fastapi_chatdify_db.sqlstates import timed_out

_PRUNED_AT_ONCE: Final = 10_000
_COUNTED: Final = 1_000_000
"""Rows that a health check counts at most: a backlog must not make it late, and a process unready."""


def figures(database: Database) -> dict[str, float | None]:
    """How many tasks are ``pending`` (of them ``sent``, ``rerung``) and ``failed``.

    ``oldest_pending_age`` is in seconds, of those that are due.
    """
    with database.sync_transaction() as session:
        return _figures(session.execute(statements.FIGURES, {"most": None}).one())


async def health_figures(connection: AsyncConnection) -> dict[str, float | None]:
    """``figures`` for the health check, none above ``_COUNTED``; empty where the table was not made, or is locked."""
    if connection.dialect.name != "postgresql" or await connection.scalar(statements.TABLE) is None:
        return {}
    try:
        return _figures((await connection.execute(statements.FIGURES, {"most": _COUNTED})).one())
    except DBAPIError as error:  # by a migration or VACUUM FULL, say; the database answers all the same
        if not timed_out(error.orig):
            raise
        await connection.rollback()
        return {}


def _figures(row: Row[Any]) -> dict[str, float | None]:
    age = row.oldest_pending_age
    return {**row._mapping, "oldest_pending_age": None if age is None else float(age)}


def failed(database: Database, limit: int) -> Sequence[Row[Any]]:
    """The tasks that failed for good, the newest first."""
    with database.sync_transaction() as session:
        return session.execute(statements.FAILED, {"limit": limit}).all()


def retry(database: Database, task_id: str | None) -> int:
    """Run a failed task again, or with None all of them; returns how many."""
    with database.sync_transaction() as session:
        rows = session.execute(statements.RETRY_FAILED, {"id": task_id}).all()
        if keys := sorted({row.ordering_key for row in rows if row.ordering_key is not None}):
            session.execute(statements.LOCK_KEYS, {"keys": keys})
            session.execute(statements.RING_FORGOTTEN)
        return len(rows)


def cancel(database: Database, task_id: str) -> bool:
    """Do not run a pending task; False when it is running, ended or unknown."""
    with database.sync_transaction() as session:
        key = session.scalar(statements.KEY_OF_PENDING, {"id": task_id})
        if key is not None:  # before the row's, in the order of a worker that ends a task; else both could deadlock
            session.execute(statements.LOCK_KEYS, {"keys": [key]})
        cancelled = session.execute(statements.CANCEL, {"id": task_id}).one_or_none() is not None
        if key is not None:
            session.execute(statements.RING_NEXT_OF_KEY, {"key": key})
        return cancelled


def prune(database: Database, days: int) -> int:
    """Delete what was done or cancelled more than ``days`` days ago; returns how many rows."""
    deleted = 0
    while True:
        with database.sync_transaction() as session:
            rows = len(session.execute(statements.PRUNE, {"days": days, "batch": _PRUNED_AT_ONCE}).all())
        deleted += rows
        if rows < _PRUNED_AT_ONCE:
            return deleted
