"""What RabbitMQ says afterwards of the messages that a relay has sent."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import pytest
from celery import Celery
from kombu import Queue
from kombu.transport.base import StdChannel

import celery_ext
from celery_ext.durable import broker
from celery_ext.durable.relay import BATCH, relaying
from fastapi_chatdify_db import db
from tests.forwarding import Forwarder
from tests.observing import Observer
from tests.worker.application import create_app
from tests.worker.running import brokers, task, until_logged, urls

pytestmark = pytest.mark.skipif("rabbitmq" not in brokers(), reason="needs RabbitMQ")


@dataclass(frozen=True)
class Queues:
    """An application with a queue that takes no message and one that takes all, and nobody who consumes them."""

    app: Celery[celery_ext.Task]
    full: Queue
    free: Queue
    channel: StdChannel

    def messages(self) -> int:
        """How many messages wait in the queue that takes them."""
        declared: Any = self.free.bind(self.channel).queue_declare(passive=True)
        return int(declared.message_count)


@pytest.fixture
def queues(rows: Observer) -> Iterator[Queues]:
    """Two queues (https://www.rabbitmq.com/docs/maxlength)."""
    name = f"chatdify-test-{uuid4().hex}"
    app = create_app(urls("rabbitmq")[0], "cache+memory://", name)
    app.finalize()
    full = Queue(f"{name}-full", queue_arguments={"x-max-length": 0, "x-overflow": "reject-publish"})
    free = Queue(name)
    app.conf.task_queues = [full, free]
    with app.connection_for_write() as broker:
        yield Queues(app, full, free, broker.default_channel)
        for queue in (full, free):
            queue.bind(broker.default_channel).delete()
    app.close()


async def test_full_queue(queues: Queues, rows: Observer, caplog: pytest.LogCaptureFixture) -> None:
    """What the broker does not take is sent again after the time of grace, and keeps nobody else's tasks waiting."""
    caplog.set_level("INFO", logger="celery_ext.durable.relay")
    add_item = task(queues.app, "add_item")
    async with db.transaction():
        sent = [add_item.delay_durably("before")]
        refused = add_item.apply_durably(("refused",), queue=queues.full.name)
        sent.append(add_item.delay_durably("after"))
    with relaying(queues.app, db, grace=3600):
        await until_logged(caplog, "relayed sent=2 rerung=0 refused=1")
    assert f"task {add_item.name}[{refused}] cannot be sent: the broker refused it" in caplog.text
    assert "relay pauses" not in caplog.text
    assert queues.messages() == len(sent)
    claimed = "SELECT count(*) FROM durable_task WHERE rings = 1 AND ring_at > now() + interval '30 minutes'"
    assert await rows.connection.fetchval(claimed) == 3


async def test_many_at_once(queues: Queues, caplog: pytest.LogCaptureFixture) -> None:
    """The broker confirms many messages in one go."""
    caplog.set_level("INFO", logger="celery_ext.durable.relay")
    add_item = task(queues.app, "add_item")
    async with db.transaction():
        for number in range(BATCH):
            add_item.delay_durably(f"{number}")
    with relaying(queues.app, db, grace=3600):
        await until_logged(caplog, f"relayed sent={BATCH} rerung=0 refused=0")
    assert queues.messages() == BATCH


async def test_events_of_sent_tasks(queues: Queues, caplog: pytest.LogCaptureFixture) -> None:
    """With ``task_send_sent_event``, what the broker says of Celery's events is not taken for what it says of tasks."""
    caplog.set_level("INFO", logger="celery_ext.durable.relay")
    queues.app.conf.task_send_sent_event = True
    add_item = task(queues.app, "add_item")
    with relaying(queues.app, db, grace=3600):
        for batch in range(5):
            caplog.clear()
            async with db.transaction():
                for number in range(20):
                    add_item.delay_durably(f"{batch} {number}")
                add_item.apply_durably(("refused",), queue=queues.full.name)
            await until_logged(caplog, "relayed sent=20 rerung=0 refused=1")
            assert "relay pauses" not in caplog.text
    assert queues.messages() == 100


async def test_broker_that_falls_silent(
    queues: Queues, rows: Observer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The confirms are waited for, for ten seconds (here for three); the end of the connection is not."""
    monkeypatch.setattr(broker, "_TIME_LIMIT", 3.0)
    proxy = Forwarder(urls("rabbitmq")[0])
    queues.app.conf.update(broker_write_url=proxy.url)
    record = task(queues.app, "record")
    async with proxy.opened():
        with relaying(queues.app, db):
            async with db.transaction():
                first = record.delay_durably("x")
            await rows.until_sent(first)
            proxy.fall_silent()
            async with db.transaction():
                record.delay_durably("y")
            async with asyncio.timeout(8.0):
                await until_logged(caplog, "relay pauses")
            proxy.speak_again()
