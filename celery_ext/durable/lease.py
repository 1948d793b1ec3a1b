"""The lease of a task that has ended its first transaction: an advisory lock of its process.

PostgreSQL frees it when the process dies, as it does the row lock before it, so no heartbeat is needed. One connection
per process, besides those of its pool, holds the locks of all its tasks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Lock
from typing import Final

from sqlalchemy import Connection, TextClause
from sqlalchemy.exc import DBAPIError

from celery_ext.durable import statements
from celery_ext.durable.silence import cut_after
from fastapi_chatdify_db.database import Database
from fastapi_chatdify_db.engine_beside import connect_beside
from fastapi_chatdify_db.exceptions import DatabaseUnavailable
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
        DatabaseUnavailable: There is no connection to be had, or others have waited for one as long.
    """
    with _locked():
        connection = _connections.get(database)
        if connection is not None and connection.invalidated:
            connection = None
        if connection is not None and task_id in _held[database]:
            return True  # PostgreSQL counts locks: a second one would outlive a single unlock
        with cut_after(_LIMIT) as watch:
            if connection is None:
                # Not from the pool: the task itself may hold its last connection.
                connection = connect_beside(database.sync_engine, lambda driver, _: watch(driver))
                connection.execute(statements.KEEP_IDLE)
                _connections[database], _held[database] = connection, set()
            else:
                watch(connection.connection.dbapi_connection)
            held = bool(_ask(connection, statements.HOLD_LEASE, task_id))
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
            with suppress(DBAPIError), cut_after(_LIMIT) as watch:  # a broken connection has freed all of them
                watch(connection.connection.dbapi_connection)
                _ask(connection, statements.FREE_LEASE, task_id)
        if not _held[database]:
            connection.close()
            del _connections[database]


def _ask(connection: Connection, statement: TextClause, task_id: str) -> object:
    try:
        return connection.scalar(statement, {"id": task_id})
    except DBAPIError:
        raise
    except BaseException:  # e.g. a gevent.Timeout: nobody knows what the server has done
        connection.invalidate()
        raise


@contextmanager
def _locked() -> Iterator[None]:
    """Hold ``_lock``; whoever has it may be waiting for a silent database, and so may have others behind it.

    Raises:
        DatabaseUnavailable: It was not to be had in time.
    """
    if not _lock.acquire(timeout=_LIMIT):
        raise DatabaseUnavailable(f"no turn within {_LIMIT:g} s to ask the database for a task's lease")
    try:
        yield
    finally:
        _lock.release()


@in_forked_child
def _forget_parents_locks() -> None:
    global _lock
    _lock = Lock()
    _connections.clear()
    _held.clear()
