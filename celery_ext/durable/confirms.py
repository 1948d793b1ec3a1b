"""RabbitMQ's publisher confirms for a whole batch; one by one, each would wait for the broker's disk.

https://www.rabbitmq.com/docs/confirms#publisher-confirms
"""

from __future__ import annotations

from typing import Any

from kombu import Connection
from kombu.exceptions import OperationalError


class Confirms:
    """The messages of one channel that the broker has not confirmed yet; always none where it has no confirms.

    Parameters:
        connection: The connection, whose default channel publishes.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._unconfirmed: set[int] = set()
        self._published = 0
        self._refused = False
        channel: Any = connection.default_channel
        self._confirming = hasattr(channel, "confirm_select")
        if self._confirming:
            channel.events["basic_ack"].add(self._acknowledged)
            channel.events["basic_nack"].add(self._not_acknowledged)
            channel.confirm_select()

    def published(self) -> None:
        """Count one more message, as the broker does."""
        if self._confirming:
            self._published += 1
            self._unconfirmed.add(self._published)

    def wait(self, timeout: float) -> None:
        """Return when every message is confirmed.

        Parameters:
            timeout: Seconds in which the broker has to say something.

        Raises:
            OperationalError: The broker refused a message.
            OSError: It said nothing in time.
        """
        while self._unconfirmed:
            self._connection.drain_events(timeout=timeout)
        if self._refused:
            raise OperationalError("the broker did not take every message")

    def _acknowledged(self, delivery_tag: int, multiple: bool) -> None:
        if multiple:
            self._unconfirmed = {tag for tag in self._unconfirmed if tag > delivery_tag}
        else:
            self._unconfirmed.discard(delivery_tag)

    def _not_acknowledged(self, delivery_tag: int, multiple: bool) -> None:
        self._refused = True
        self._acknowledged(delivery_tag, multiple)
