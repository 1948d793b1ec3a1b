"""The relay: rows that are due become messages. Any number may run side by side."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from selectors import EVENT_READ, DefaultSelector
from socket import socketpair
from threading import Thread
from typing import Any, Final

from celery import Celery
from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError

from celery_ext.durable import statements
from celery_ext.durable.broker import Broker
from celery_ext.durable.silence import Silence
from celery_ext.durable.table import MISSING, is_missing
from fastapi_chatdify_db.connecting import reason
from fastapi_chatdify_db.database import Database

logger: Final = logging.getLogger(__name__)

BATCH: Final = 500
"""How many rows are claimed, and then sent, together."""
GRACE: Final = 10.0
"""Seconds after which a row that was sent, and has neither ended nor is locked, is rung again; doubled each time."""
_WATCH_INTERVAL: Final = 1.0  # second between two looks at how long the database has been silent
_POLL_INTERVAL: Final = 1.0  # second; finds rows that were due but locked. Of all others notifications tell
_SEARCH_INTERVAL: Final = 5.0  # seconds between two searches for forgotten rows
_LONGEST_PAUSE: Final = 10.0  # seconds between tries while the broker or the database is down
_STATEMENT_LIMIT: Final = 30  # seconds for the database to answer
_SILENT: Final = _STATEMENT_LIMIT + 5.0  # seconds after which it will not answer: it would have cancelled the statement
_SILENT_AT_STOP: Final = 10.0  # seconds that a stopped relay waits for an answer


class Relay:
    """Sends what is due until it is stopped.

    Parameters:
        app: The Celery application whose tasks are sent.
        database: Where the rows are.
        grace: Seconds after which a sent row is rung again.

    Raises:
        Exception: kombu has no transport for ``broker_url``, or that one's library is not installed.
    """

    def __init__(self, app: Celery[Any], database: Database, *, grace: float) -> None:
        self._app = app
        self._broker = Broker(app)
        self._database = database
        self._grace = grace
        self._stopping = False
        self._wake_reader, self._wake_writer = socketpair()
        self._silence = Silence()
        self._looked_for_forgotten = 0.0
        self._failures = 0  # since the last round that went well

    def run(self) -> None:
        """Relay until ``stop`` is called; what is claimed by then is still sent, unless the database falls silent."""
        # In a thread: one that waits for the database runs no signal handler, and cannot look at the clock.
        work = Thread(target=self._relay_until_stopped, name="celery_ext.relay", daemon=True)
        work.start()
        while work.is_alive():
            work.join(_WATCH_INTERVAL)
            if self._silence.seconds > (_SILENT_AT_STOP if self._stopping else _SILENT):
                self._silence.end()
                if self._stopping:
                    work.join(_WATCH_INTERVAL)
                    return

    def stop(self) -> None:
        """End ``run``, from another thread or a signal handler."""
        self._stopping = True  # no threading.Event: this may be a signal handler that interrupts the holder of its lock
        with suppress(OSError):  # run() has ended, and closed the socket
            self._wake_writer.send(b"x")

    def _relay_until_stopped(self) -> None:
        self._app.set_current()  # for this thread, whose handlers of before_task_publish may ask
        try:
            while not self._stopping:
                try:
                    with self._silence.connection(self._database.sync_engine) as connection:
                        if not self._database.settings.db_pgbouncer:  # which may give this session to others
                            connection.execute(statements.LIMIT, {"limit": f"{_STATEMENT_LIMIT} s"})
                        connection.execute(statements.LISTEN)
                        self._relay(connection)
                except Exception as error:
                    self._failures += 1
                    foreseen = isinstance(error, (SQLAlchemyError, OSError, *self._broker.errors))
                    why = MISSING if is_missing(error) else reason(error)
                    logger.warning("relay pauses (%d): %s", self._failures, why, exc_info=not foreseen)
                    self._pause(min(_LONGEST_PAUSE, 0.1 * 2 ** min(self._failures, 10)))
        finally:
            self._broker.disconnect()
            self._wake_reader.close()
            self._wake_writer.close()

    def _relay(self, connection: Connection) -> None:
        while not self._stopping:
            number = self._send_batch(connection)
            self._failures = 0
            if number < BATCH:
                self._wait(connection)

    def _send_batch(self, connection: Connection) -> int:
        rows = connection.execute(statements.CLAIM, {"batch": BATCH, "grace": self._grace}).all()
        if not rows:
            return 0
        try:
            sent = self._broker.send(rows)
        except self._broker.errors:
            self._broker.drop()
            connection.execute(statements.UNCLAIM, {"ids": [row.id for row in rows]})
            raise
        rerung = sum(row.rings > 1 for row in sent)
        logger.info("relayed sent=%d rerung=%d refused=%d", len(sent), rerung, len(rows) - len(sent))
        return len(rows)

    def _wait(self, connection: Connection) -> None:
        now = time.monotonic()
        if now - self._looked_for_forgotten > _SEARCH_INTERVAL:
            self._looked_for_forgotten = now
            connection.execute(statements.RING_FORGOTTEN)
        until_next = connection.scalar(statements.SECONDS_UNTIL_NEXT)
        limit = _POLL_INTERVAL if until_next is None else min(_POLL_INTERVAL, float(until_next))
        driver: Any = connection.connection.dbapi_connection
        if not driver.notifies:
            self._pause(limit, driver)
            driver.poll()
        driver.notifies.clear()

    def _pause(self, seconds: float, *further: Any) -> None:
        """Wait until the time is over, ``stop`` is called, or one of the further descriptors is readable."""
        with DefaultSelector() as either:  # select.select() takes no descriptor beyond 1023
            for each in (self._wake_reader, *further):
                either.register(each, EVENT_READ)
            either.select(seconds)


@contextmanager
def relaying(app: Celery[Any], database: Database, *, grace: float = GRACE) -> Iterator[None]:
    """Run a ``Relay``, whose parameters these are, in a thread for the duration of the block."""
    if database.settings.url().get_backend_name() == "sqlite":
        yield  # SQLite keeps no durable tasks: delay_durably() refuses them
        return
    relay = Relay(app, database, grace=grace)
    thread = Thread(target=relay.run, name="celery_ext.relay.watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        relay.stop()
        thread.join()
