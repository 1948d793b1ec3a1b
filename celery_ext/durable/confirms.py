"""RabbitMQ's publisher confirms for a whole batch; one by one, each would wait for the broker's disk.

https://www.rabbitmq.com/docs/confirms#publisher-confirms
"""

from __future__ import annotations

from typing import Any

from kombu import Connection


class Confirms:
    """The messages of one channel that the broker has not confirmed yet; always none where it has no confirms.

    Parameters:
        connection: The connection, whose default channel publishes.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._unconfirmed: set[int] = set()
        self._refused: set[int] = set()
        self.published: int = 0
        """How many messages were published, which is also the number of the last one."""
        channel: Any = connection.default_channel
        if hasattr(channel, "confirm_select"):
            channel.events["basic_ack"].add(self._acknowledged)
            channel.events["basic_nack"].add(self._not_acknowledged)
            channel.confirm_select()
            # The broker counts every message of the channel; with task_send_sent_event, Celery adds one to each task's.
            self._publish, channel.basic_publish = channel.basic_publish, self._publish_counted

    def wait(self, timeout: float) -> set[int]:
        """Return when the broker has said of every message whether it took it; the numbers of those it refused.

        Parameters:
            timeout: Seconds in which the broker has to say something.

        Raises:
            OSError: It said nothing in time.
        """
        while self._unconfirmed:
            self._connection.drain_events(timeout=timeout)
        refused, self._refused = self._refused, set()
        return refused

    def _publish_counted(self, *args: Any, **kwargs: Any) -> None:
        self._publish(*args, **kwargs)
        self.published += 1
        self._unconfirmed.add(self.published)

    def _acknowledged(self, delivery_tag: int, multiple: bool) -> None:
        self._unconfirmed -= self._confirmed(delivery_tag, multiple)

    def _not_acknowledged(self, delivery_tag: int, multiple: bool) -> None:
        self._refused |= self._confirmed(delivery_tag, multiple)
        self._acknowledged(delivery_tag, multiple)

    def _confirmed(self, delivery_tag: int, multiple: bool) -> set[int]:
        return {tag for tag in self._unconfirmed if tag <= delivery_tag} if multiple else {delivery_tag}
