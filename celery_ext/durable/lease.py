"""The lease of a task that has ended its first transaction: an advisory lock of its process.

PostgreSQL frees it when the process dies, as it does the row lock before it, so no heartbeat is needed. One connection
per process, besides those of its pool, holds the locks of all its tasks.
"""

from __future__ import annotations

from contextlib import suppress
from threading import Lock
from typing import Final

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

from celery_ext.durable import statements
from celery_ext.durable.silence import scalar_within
from fastapi_chatdify_db.database import Database
from fastapi_chatdify_db.engine_beside import connect_beside
from fastapi_chatdify_db.forks import in_forked_child

_LIMIT: Final = 30.0
"""Seconds for the database to answer; as long as the relay waits."""

_lock = Lock()
_connections: dict[Database, Connection] = {}
_held: dict[Database, set[str]] = {}


def hold(database: Database, task_id: str) -> bool:
    """Keep other processes from starting this task; False if one already has.

    Raises:
        sqlalchemy.exc.DBAPIError: The connection is broken, or the database does not answer in time.
    """
    with _lock:
        connection = _connections.get(database)
        if connection is None or connection.invalidated:
            # Not from the pool: the task itself may hold its last connection.
            connection = _connections[database] = connect_beside(database.sync_engine)
            _held[database] = set()
            scalar_within(_LIMIT, connection, statements.KEEP_IDLE)
        if task_id in _held[database]:
            return True  # PostgreSQL counts locks: a second one would outlive a single unlock
        held = bool(scalar_within(_LIMIT, connection, statements.HOLD_LEASE, {"id": task_id}))
        if held:
            _held[database].add(task_id)
        return held


def free(database: Database, task_id: str) -> None:
    """Give up what ``hold`` took; the process's last one closes the connection."""
    with _lock:
        if task_id not in _held.get(database, ()):
            return
        connection = _connections[database]
        _held[database].discard(task_id)
        if not connection.invalidated:
            with suppress(DBAPIError):  # a broken connection has freed all of them
                scalar_within(_LIMIT, connection, statements.FREE_LEASE, {"id": task_id})
        if not _held[database]:
            connection.close()
            del _connections[database]


@in_forked_child
def _forget_parents_locks() -> None:
    global _lock
    _lock = Lock()
    _connections.clear()
    _held.clear()
