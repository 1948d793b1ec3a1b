"""Watching for a silent database: libpq waits for an answer without end, in C, where no signal handler runs."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from socket import AF_INET, SHUT_RDWR, SOCK_STREAM, fromfd, socket
from threading import Timer
from typing import Any, Final

import psycopg2
from sqlalchemy import Connection, Engine, event
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


@contextmanager
def cut_after(seconds: float) -> Iterator[Callable[[Any], None]]:
    """Yields what makes psycopg2's connections fail, as if the server had closed them, if the block takes too long.

    Parameters:
        seconds: How long it may take.
    """
    watched: list[socket] = []

    def watch(driver: Any) -> None:
        with suppress(OSError, psycopg2.Error):  # it has ended already, as who asks on it will find out
            watched.append(_socket_of(driver))

    def cut() -> None:
        for each in watched:
            _cut(each, seconds)

    limit = Timer(seconds, cut)
    limit.daemon = True
    with suppress(RuntimeError):  # the interpreter ends, and starts no more threads
        limit.start()
    try:
        yield watch
    finally:
        limit.cancel()
        if limit.ident is not None:
            limit.join()  # if it is cutting, with the descriptors still open
        for each in watched:
            each.close()


def _socket_of(driver: Any) -> socket:
    # A descriptor of our own: the driver's may be closed and reused by the time of the cut. The family makes no
    # difference to a shutdown.
    return fromfd(driver.fileno(), AF_INET, SOCK_STREAM)


def _cut(connected: socket, seconds: float) -> None:
    logger.warning("the database has not answered for %.0f s; its connection is cut", seconds)
    with suppress(OSError):  # it has just been closed
        connected.shutdown(SHUT_RDWR)
