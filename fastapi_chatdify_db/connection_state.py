"""What is known about a pooled connection without asking the server."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Connection, Engine, event
from sqlalchemy.pool import ConnectionPoolEntry

_STATE: Final = "fastapi_chatdify_db.connection_state"
# PQTRANS_ACTIVE and PQTRANS_INERROR: https://www.postgresql.org/docs/current/libpq-status.html
_ACTIVE: Final = 1
_IN_ERROR: Final = 3


@dataclass(slots=True)
class ConnectionState:
    """The state of one connection to PostgreSQL."""

    connection: Any
    """The driver's, or the adapter that the dialect puts around it."""
    in_transaction: Callable[[], bool]
    """Whether a transaction has begun on the server, as far as the driver knows; no I/O."""
    in_flight: Callable[[], bool]
    """Whether a statement, perhaps of another task or thread, is waiting for its answer."""
    reads_in_autocommit: bool = False
    """Whether plain reads may run without a transaction."""
    started: bool = False
    """Whether anything but plain reads was run since the checkout."""
    has_effects: bool = False
    """Whether anything but plain reads has succeeded since the checkout, which a rollback would undo."""
    failure: str | None = None
    """What a statement failed with after effects, or in a given-up transaction; an error at the commit names it."""
    failed_without_loss: bool = False
    """Whether a statement of ours failed before there were effects to lose."""
    given_up: Callable[[], bool] = bool
    """Whether PostgreSQL has given up the transaction. Only psycopg2 knows without asking; else it is False."""
    was_cut_off: bool = False
    """Whether we ended the connection during a statement, which must then not be run again on another one."""
    idle_since: float = math.inf
    """When it was last given back, in seconds of the monotonic clock; infinity before that."""

    @property
    def lost_something(self) -> bool:
        """Whether PostgreSQL, which answered the commit with a rollback, has undone anything."""
        # If no statement of ours failed, one of the driver's own cursor did, whose other statements are unknown.
        return self.has_effects or self.failure is not None or not self.failed_without_loss

    @property
    def adapter_began_none(self) -> bool:
        """Whether SQLAlchemy's adapter of asyncpg began no transaction, so that one under way is the driver's own."""
        return getattr(self.connection, "_transaction", ...) is None

    def note_drivers_work(self) -> None:
        """Assume effects of a transaction that no statement of ours began: the driver's own cursor began it."""
        if not self.started and self.in_transaction():
            self.has_effects = True

    def cut_off(self) -> None:
        """End the connection during a statement in flight, whose task gets an error.

        asyncpg cannot do two things at once; psycopg2 lets the second one wait.
        """
        if hasattr(self.connection, "driver_connection"):
            self.was_cut_off = True
            self.connection.driver_connection.terminate()


def follow(engine: Engine) -> None:
    """Track the state of every connection that the engine's pool makes from now on.

    Listeners to ``connect`` that ask for the state have to be added after this. A connection that is given back in the
    middle of a statement or transaction is closed, or else the next unit of work would go on in it.
    """
    event.listen(engine, "connect", _track_asyncpg if engine.dialect.is_async else _track_psycopg2)
    event.listen(engine, "checkin", _note_return)


def state_of(connection: Connection) -> ConnectionState | None:
    """The state; None for a connection that is detached, still being made, or of an engine that nobody follows."""
    information = connection.connection.record_info
    return None if information is None else information.get(_STATE)


def state_in(record: ConnectionPoolEntry) -> ConnectionState:
    """The state of a connection in a handler of the pool's events."""
    state: ConnectionState = record.record_info[_STATE]  # type: ignore[index]  # None only if detached
    return state


def has_begun(connection: Connection) -> bool:
    """Whether a transaction has begun on the server, or had when the connection died; True when in doubt."""
    state = None if connection.invalidated else state_of(connection)
    return state is None or state.started or state.in_transaction()


def _track_asyncpg(adapter: Any, record: ConnectionPoolEntry) -> None:
    driver_connection = adapter.driver_connection

    def in_transaction() -> bool:
        try:
            return bool(driver_connection.is_in_transaction())
        except AttributeError:  # asyncpg's way to say that the connection was aborted
            return False

    # The adapter queues the statements of several tasks by its mutex.
    state = ConnectionState(adapter, in_transaction, adapter._execute_mutex.locked)
    record.record_info[_STATE] = state  # type: ignore[index]  # None only if detached
    driver_connection.state = state  # for WatchedConnection


def _track_psycopg2(connection: Any, record: ConnectionPoolEntry) -> None:
    record.record_info[_STATE] = ConnectionState(  # type: ignore[index]
        connection,
        in_transaction=lambda: bool(connection.info.transaction_status),
        in_flight=lambda: bool(connection.info.transaction_status == _ACTIVE),
        given_up=lambda: bool(connection.info.transaction_status == _IN_ERROR),
    )


def _note_return(connection: Any, record: ConnectionPoolEntry) -> None:
    state = state_in(record)
    if connection is not None and (state.in_flight() or state.in_transaction()):
        record.invalidate()
    state.started = state.has_effects = state.failed_without_loss = False
    state.failure = None
    state.idle_since = time.monotonic()
