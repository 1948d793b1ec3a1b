"""What is known of a pooled connection between its statements, without asking the server."""

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
    """Of one connection to PostgreSQL."""

    connection: Any
    """The driver's, or the adapter that the dialect puts around it."""
    in_transaction: Callable[[], bool]
    """Whether the server has begun one, by the driver's word; no I/O."""
    in_flight: Callable[[], bool]
    """Whether a statement waits for its answer, be it another task's or thread's."""
    reads_alone: bool = False
    """Whether plain reads may run without a transaction."""
    started: bool = False
    """Whether anything but plain reads was run since the checkout."""
    has_effects: bool = False
    """Whether anything but plain reads has succeeded since, which a rollback would undo."""
    failure: str | None = None
    """What a later statement failed with: PostgreSQL may have given up the transaction."""
    given_up: Callable[[], bool] = bool
    """Whether PostgreSQL has given the transaction up, where the driver says so without asking: psycopg2."""
    was_cut_off: bool = False
    """Whether we have ended the connection under a statement, which then is not to be run on another one."""
    idle_since: float = math.inf
    """When it was last given back, in seconds of the monotonic clock; infinity before that."""

    @property
    def has_something_to_lose(self) -> bool:
        """Whether a transaction that is rolled back instead of committed was for anything."""
        return self.has_effects or self.failure is not None

    def cut_off(self) -> None:
        """End the connection under a statement that is in flight, whose task gets an error.

        Otherwise asyncpg would be asked for two things at once. psycopg2 lets the second one wait.
        """
        terminate = getattr(getattr(self.connection, "driver_connection", None), "terminate", None)
        if terminate is not None:
            self.was_cut_off = True
            terminate()


def follow(engine: Engine) -> None:
    """Know the state of every connection that the engine's pool makes from now on; listen to ``connect`` after this.

    A connection that is given back while somebody else is in the middle of a statement or transaction is closed: the
    next unit of work would go on in it.
    """
    event.listen(engine, "connect", _begin)
    event.listen(engine, "checkin", _note_return)


def state_of(connection: Connection) -> ConnectionState | None:
    """None for a connection that is detached from its pool, still being made, or of an engine nobody follows."""
    information = connection.connection.record_info
    return None if information is None else information.get(_STATE)


def state_in(record: ConnectionPoolEntry) -> ConnectionState:
    """The state of a connection in a handler of the pool's events."""
    state: ConnectionState = record.record_info[_STATE]  # type: ignore[index]  # None only if detached
    return state


def has_begun(connection: Connection) -> bool:
    """Whether the server has, or had until the connection died, a transaction of this connection; in doubt it has."""
    state = None if connection.invalidated else state_of(connection)
    return state is None or state.started or state.in_transaction()


def _begin(connection: Any, record: ConnectionPoolEntry) -> None:
    state = ConnectionState(connection, _transaction_probe(connection), _flight_probe(connection))
    record.record_info[_STATE] = state  # type: ignore[index]
    if hasattr(connection, "driver_connection"):
        connection.driver_connection.state = state  # which WatchedConnection looks at
    else:
        state.given_up = lambda: bool(connection.info.transaction_status == _IN_ERROR)


def _note_return(connection: Any, record: ConnectionPoolEntry) -> None:
    state = state_in(record)
    if connection is not None and (state.in_flight() or state.in_transaction()):
        record.invalidate()
    state.started = state.has_effects = False
    state.failure = None
    state.idle_since = time.monotonic()


def _transaction_probe(connection: Any) -> Callable[[], bool]:
    driver_connection = getattr(connection, "driver_connection", connection)
    if not hasattr(driver_connection, "is_in_transaction"):
        return lambda: bool(driver_connection.info.transaction_status)

    def in_transaction() -> bool:
        try:
            return bool(driver_connection.is_in_transaction())
        except AttributeError:  # asyncpg's way to say that the connection was aborted
            return False

    return in_transaction


def _flight_probe(connection: Any) -> Callable[[], bool]:
    if hasattr(connection, "_execute_mutex"):  # what asyncpg's adapter has to queue statements of several tasks
        locked: Callable[[], bool] = connection._execute_mutex.locked
        return locked
    return lambda: bool(connection.info.transaction_status == _ACTIVE)
