"""The Celery application of the tests; a worker process reads its broker from the environment."""

from __future__ import annotations

import os

from celery import Celery

import celery_ext
from example_app.demo import table_queue
from tests.worker import tasks as tasks


def create_app(broker: str, backend: str, queue: str) -> Celery[celery_ext.Task]:
    """An application whose shared tasks go through one queue of a broker."""
    app = Celery("tests", broker=broker, backend=backend, task_cls=celery_ext.Task)
    app.conf.update(
        task_default_queue=queue,
        broker_connection_retry_on_startup=True,
        worker_hijack_root_logger=False,
        result_expires=300,
        task_track_started=False,
        broker_connection_timeout=2.0,
    )
    table_queue.prepare(app)
    celery_ext.init_app(app)
    return app


if "TEST_BROKER" in os.environ:
    app = create_app(os.environ["TEST_BROKER"], os.environ["TEST_BACKEND"], os.environ["TEST_QUEUE"])
    if "TEST_USE_BEFORE_FORK" in os.environ:
        tasks.dispatching.read_item.apply(("x",)).get()
