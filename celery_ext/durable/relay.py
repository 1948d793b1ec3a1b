"""The relay: rows that are due become messages. Any number may run side by side."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from selectors import EVENT_READ, DefaultSelector
from socket import socketpair
from threading import Thread
from typing import Any, Final

from celery import Celery
from kombu import Connection as BrokerConnection
from kombu import Producer
from kombu.exceptions import OperationalError
from sqlalchemy import Connection, Row
from sqlalchemy.exc import SQLAlchemyError

from celery_ext.context import senders_trace
from celery_ext.durable import statements
from celery_ext.durable.confirms import Confirms
from celery_ext.durable.row import deserialize
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
_BROKER_LIMIT: Final = 10.0  # seconds for the broker to answer
_STATEMENT_LIMIT: Final = 30  # seconds for the database to answer
_SILENT: Final = _STATEMENT_LIMIT + 5.0  # seconds after which it will not answer: it would have cancelled the statement
_SILENT_AT_STOP: Final = 10.0  # seconds that a stopped relay waits for an answer
_LIMITS: Final = {  # kombu's transport options for _BROKER_LIMIT
    "amqp": ("read_timeout", "write_timeout"),
    "redis": ("socket_timeout", "socket_connect_timeout"),
}


@dataclass(frozen=True, slots=True)
class _Line:
    """A connection to the broker, and its publisher."""

    connection: BrokerConnection
    driver: Any
    """The transport's own; kombu's property for it would connect again."""
    producer: Producer
    confirms: Confirms


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
        app.loader.import_default_modules()  # they have the tasks' own options (queue, time limits, ...)
        self._app = app
        self._database = database
        self._grace = grace
        broker = app.connection_for_write()
        self._broker_errors: tuple[type[BaseException], ...] = (
            OperationalError,
            *broker.connection_errors,
            *broker.channel_errors,
        )
        self._stopping = False
        self._wake_reader, self._wake_writer = socketpair()
        self._silence = Silence()
        self._line: _Line | None = None
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
                    foreseen = isinstance(error, (SQLAlchemyError, OSError, *self._broker_errors))
                    why = MISSING if is_missing(error) else reason(error)
                    logger.warning("relay pauses (%d): %s", self._failures, why, exc_info=not foreseen)
                    self._pause(min(_LONGEST_PAUSE, 0.1 * 2 ** min(self._failures, 10)))
        finally:
            self._disconnect()
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
            sent = self._send_all(rows)
        except self._broker_errors:
            self._drop_line()
            connection.execute(statements.UNCLAIM, {"ids": [row.id for row in rows]})
            raise
        rerung = sum(row.rings > 1 for row in sent)
        logger.info("relayed sent=%d rerung=%d refused=%d", len(sent), rerung, len(rows) - len(sent))
        return len(rows)

    def _send_all(self, rows: Sequence[Row[Any]]) -> list[Row[Any]]:
        try:
            return self._send_together(rows)
        except self._broker_errors as error:
            if not self._concerns_one_message(error):
                raise
        return self._send_one_by_one(rows)

    def _send_together(self, rows: Sequence[Row[Any]]) -> list[Row[Any]]:
        line = self._line or self._connect()
        sent: list[tuple[int, Row[Any]]] = []
        for row in rows:
            number = line.confirms.published + 1  # the task's; its event (task_send_sent_event) has the next
            if self._send(line, row):
                sent.append((number, row))
        refused = line.confirms.wait(_BROKER_LIMIT)
        for row in (row for number, row in sent if number in refused):
            logger.error("task %s[%s] can not be sent: the broker refused it; is its queue full?", row.name, row.id)
        return [row for number, row in sent if number not in refused]

    def _send_one_by_one(self, rows: Sequence[Row[Any]]) -> list[Row[Any]]:
        """Leave out what the broker refuses: a queue or an exchange that is missing or declared otherwise."""
        sent: list[Row[Any]] = []
        self._disconnect()
        for row in rows:
            try:
                sent += self._send_together([row])
            except self._broker_errors as error:
                if not self._concerns_one_message(error):
                    raise
                logger.error("task %s[%s] can not be sent: %s", row.name, row.id, reason(error))
                self._disconnect()
        return sent

    def _concerns_one_message(self, error: BaseException) -> bool:
        return isinstance(error, self._line.connection.channel_errors if self._line is not None else ())

    def _send(self, line: _Line, row: Row[Any]) -> bool:
        send = getattr(self._app.tasks.get(row.name), "apply_async", None)
        try:
            args, kwargs = deserialize(row.arguments)
            options = deserialize(row.options)
            options |= {"task_id": row.id, "retries": row.retries, "producer": line.producer, "retry": False}
            options["expires"] = None  # the row has it; the task's own option would count from now
            # OpenTelemetry's own instrumentation writes the span of the sending over the trace that is stored.
            with senders_trace(options.get("headers") or {}):
                if send is None:
                    self._app.send_task(row.name, args, kwargs, **options)
                else:
                    send(args, kwargs, **options)
        except self._broker_errors:
            raise
        except Exception:  # a row that cannot be sent must not keep the others back
            logger.exception("task %s[%s] can not be sent", row.name, row.id)
            return False
        return True

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

    def _connect(self) -> _Line:
        broker = self._app.connection_for_write()
        limits = _LIMITS.get(str(broker.transport.driver_type), ())
        options = {**(broker.transport_options or {}), **dict.fromkeys(limits, _BROKER_LIMIT)}
        options.pop("confirm_publish", None)  # it waits after each message; Confirms does so once a batch
        connection = broker.clone(transport_options=options)
        producer = self._app.amqp.Producer(connection.default_channel)
        _expect_no_results(self._app)
        self._line = _Line(connection, connection.connection, producer, Confirms(connection))
        return self._line

    def _drop_line(self) -> None:
        """Disconnect without asking: AMQP's two handshakes would each wait for a broker that may be silent."""
        if self._line is not None and hasattr(self._line.driver, "collect"):
            self._line.driver.collect()
        self._disconnect()

    def _disconnect(self) -> None:
        if self._line is not None:
            self._line.connection.release()
            self._line = None


def _expect_no_results(app: Celery[Any]) -> None:
    """Send without asking the result backend to tell of results: nobody here waits for them.

    A backend would remember every task, and while it is away, nothing could be sent. One that is shared by threads
    (``result_backend_thread_safe``) is left alone: the others may wait for results.
    """
    backend: Any = app.backend
    if not backend.thread_safe:  # then it is this thread's own
        backend.on_task_call = lambda *_: None


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
