"""The relay's line to the broker: a batch of rows becomes messages, and the broker confirms them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from celery import Celery
from kombu import Connection, Producer
from kombu.exceptions import OperationalError
from sqlalchemy import Row

from celery_ext.context import senders_trace
from celery_ext.durable.confirms import Confirms
from celery_ext.durable.row import deserialize
from fastapi_chatdify_db.connecting import reason

logger: Final = logging.getLogger(__name__)

_TIME_LIMIT: Final = 10.0  # seconds for the broker to answer
_LIMITS: Final = {  # kombu's transport options for _TIME_LIMIT
    "amqp": ("read_timeout", "write_timeout"),
    "redis": ("socket_timeout", "socket_connect_timeout"),
}


@dataclass(frozen=True, slots=True)
class _Line:
    """A connection to the broker, and its publisher."""

    connection: Connection
    driver: Any
    """The transport's own; kombu's property for it would connect again."""
    producer: Producer
    confirms: Confirms


class Broker:
    """Sends rows over one connection, which is opened when it is needed.

    Parameters:
        app: The Celery application whose tasks are sent.

    Raises:
        Exception: kombu has no transport for ``broker_url``, or that one's library is not installed.
    """

    def __init__(self, app: Celery[Any]) -> None:
        app.loader.import_default_modules()  # they have the tasks' own options (queue, time limits, ...)
        self._app = app
        broker = app.connection_for_write()
        self.errors: Final[tuple[type[BaseException], ...]] = (
            OperationalError,
            *broker.connection_errors,
            *broker.channel_errors,
        )
        self._line: _Line | None = None

    def send(self, rows: Sequence[Row[Any]]) -> list[Row[Any]]:
        """Send rows as messages; returns those that the broker took.

        Raises:
            Exception: One of ``errors``: the broker is not there, or does not answer.
        """
        try:
            return self._send_together(rows)
        except self.errors as error:
            if not self._concerns_one_message(error):
                raise
        return self._send_one_by_one(rows)

    def drop(self) -> None:
        """Disconnect without asking: AMQP's two handshakes would each wait for a broker that may be silent."""
        if self._line is not None and hasattr(self._line.driver, "collect"):
            self._line.driver.collect()
        self.disconnect()

    def disconnect(self) -> None:
        """Close the connection; the next ``send`` opens another."""
        if self._line is not None:
            self._line.connection.release()
            self._line = None

    def _send_together(self, rows: Sequence[Row[Any]]) -> list[Row[Any]]:
        line = self._line or self._connect()
        sent: list[tuple[int, Row[Any]]] = []
        for row in rows:
            number = line.confirms.published + 1  # the task's; its event (task_send_sent_event) has the next
            if self._publish(line, row):
                sent.append((number, row))
        refused = line.confirms.wait(_TIME_LIMIT)
        for row in (row for number, row in sent if number in refused):
            logger.error("task %s[%s] cannot be sent: the broker refused it; is its queue full?", row.name, row.id)
        return [row for number, row in sent if number not in refused]

    def _send_one_by_one(self, rows: Sequence[Row[Any]]) -> list[Row[Any]]:
        """Leave out what the broker refuses: a queue or an exchange that is missing or declared otherwise."""
        sent: list[Row[Any]] = []
        self.disconnect()
        for row in rows:
            try:
                sent += self._send_together([row])
            except self.errors as error:
                if not self._concerns_one_message(error):
                    raise
                logger.error("task %s[%s] cannot be sent: %s", row.name, row.id, reason(error))
                self.disconnect()
        return sent

    def _concerns_one_message(self, error: BaseException) -> bool:
        return isinstance(error, self._line.connection.channel_errors if self._line is not None else ())

    def _publish(self, line: _Line, row: Row[Any]) -> bool:
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
        except self.errors:
            raise
        except Exception:  # a row that cannot be sent must not keep the others back
            logger.exception("task %s[%s] cannot be sent", row.name, row.id)
            return False
        return True

    def _connect(self) -> _Line:
        broker = self._app.connection_for_write()
        limits = _LIMITS.get(str(broker.transport.driver_type), ())
        options = {**(broker.transport_options or {}), **dict.fromkeys(limits, _TIME_LIMIT)}
        options.pop("confirm_publish", None)  # it waits after each message; Confirms does so once a batch
        connection = broker.clone(transport_options=options)
        producer = self._app.amqp.Producer(connection.default_channel)
        _expect_no_results(self._app)
        self._line = _Line(connection, connection.connection, producer, Confirms(connection))
        return self._line


def _expect_no_results(app: Celery[Any]) -> None:
    """Send without asking the result backend to tell of results: nobody here waits for them.

    A backend would remember every task, and while it is away, nothing could be sent. One that is shared by threads
    (``result_backend_thread_safe``) is left alone: the others may wait for results.
    """
    backend: Any = app.backend
    if not backend.thread_safe:  # then it is this thread's own
        backend.on_task_call = lambda *_: None
