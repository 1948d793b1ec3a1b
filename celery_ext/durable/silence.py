"""Watching for a silent database: libpq waits for an answer without end, in C, where no signal handler runs."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from socket import AF_INET, SHUT_RDWR, SOCK_STREAM, fromfd, socket
from threading import Timer
from typing import Any, Final

from sqlalchemy import Connection, Engine, TextClause, event
from sqlalchemy.pool import ConnectionPoolEntry

from fastapi_chatdify_db.engine_beside import connect_beside

logger: Final = logging.getLogger(__name__)


class Silence:
    """Lets one thread see how long another has waited for the database, and end the wait."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._socket: socket | None = None

    @property
    def seconds(self) -> float:
        """For how long a statement or a connect has been unanswered; 0 if none is."""
        since = self._since
        return 0.0 if since is None else time.monotonic() - since

    def end(self) -> None:
        """Let the statement under way fail, as if the server had closed the connection; a connect has its own limit."""
        connected = self._socket
        if connected is not None:
            _cut(connected, self.seconds)

    @contextmanager
    def connection(self, engine: Engine) -> Iterator[Connection]:
        """A connection in AUTOCOMMIT, outside the pool, whose statements are watched."""
        self._asked()
        try:
            with connect_beside(engine, self._connected) as connection:
                event.listen(connection, "before_cursor_execute", self._asked)
                event.listen(connection, "after_cursor_execute", self._answered)
                self._answered()
                yield connection
        finally:
            self._forget_socket()
            self._answered()

    def _connected(self, driver: Any, _: ConnectionPoolEntry) -> None:
        """Watch a new connection, before anything is asked on it."""
        self._forget_socket()
        self._socket = _socket_of(driver)
        self._asked()  # anew: the connect has a limit of its own, which may be longer

    def _forget_socket(self) -> None:
        connected, self._socket = self._socket, None
        if connected is not None:
            connected.close()

    def _asked(self, *_: object) -> None:
        self._since = time.monotonic()

    def _answered(self, *_: object) -> None:
        self._since = None


def scalar_within(
    seconds: float, connection: Connection, statement: TextClause, parameters: Mapping[str, object] | None = None
) -> Any:
    """``connection.scalar``, for which the connection counts as broken when there is no answer in time.

    Parameters:
        seconds: How long to wait.
        connection: One of psycopg2's.
        statement: What is asked.
        parameters: Its parameters.

    Raises:
        sqlalchemy.exc.DBAPIError: There was no answer, or an error.
    """
    with _socket_of(connection.connection.dbapi_connection) as connected:
        limit = Timer(seconds, _cut, (connected, seconds))
        limit.start()
        try:
            return connection.scalar(statement, parameters)
        finally:
            limit.cancel()
            limit.join()  # if it is cutting, with the descriptor still open


def _socket_of(driver: Any) -> socket:
    # A descriptor of our own: the driver's may be closed and reused by the time of the cut. The family makes no
    # difference to a shutdown.
    return fromfd(driver.fileno(), AF_INET, SOCK_STREAM)


def _cut(connected: socket, seconds: float) -> None:
    logger.warning("the database has not answered for %.0f s; its connection is cut", seconds)
    with suppress(OSError):  # it has just been closed
        connected.shutdown(SHUT_RDWR)
