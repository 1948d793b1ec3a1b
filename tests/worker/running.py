"""Brokers that are there, and worker processes on them."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Condition, Thread
from typing import Any
from uuid import uuid4

import pytest
from celery import Celery
from celery.app.trace import trace_task
from celery.signals import before_task_publish
from kombu import Queue
from sqlalchemy import make_url

import celery_ext
from tests.observing import PATIENCE
from tests.worker.application import create_app

ROOT = Path(__file__).parents[2]


def brokers() -> list[str]:
    """The brokers on this machine, of those that applications use; PostgreSQL itself where there is neither."""
    ports = {"rabbitmq": 5672, "redis": 6379}
    return [name for name, port in ports.items() if _listens(port)] or ["postgresql"]


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


needs_a_broker = pytest.mark.skipif(brokers() == ["postgresql"], reason="needs Redis or RabbitMQ")
"""For what PostgreSQL as a queue does not do: to deliver again what a worker that died had, or to be away itself."""


def urls(broker: str) -> tuple[str, str]:
    """The URLs of a broker and of the result backend beside it."""
    database = make_url(os.environ["DATABASE_URL"]).set(drivername="postgresql+psycopg2")
    postgresql = database.render_as_string(hide_password=False)
    results = "redis://127.0.0.1:6379/9" if _listens(6379) else f"db+{postgresql}"
    return {
        "rabbitmq": "amqp://guest:guest@127.0.0.1:5672//",
        "redis": "redis://127.0.0.1:6379/8",
        "postgresql": f"sqla+{postgresql}",
    }[broker], results


def task(app: Celery[Any], name: str) -> celery_ext.Task:
    """One of the tests' tasks, of an application, by its function's name."""
    [path] = [path for path in app.tasks if path.startswith("tests.worker.tasks.") and path.endswith(f".{name}")]
    return app.tasks[path]  # type: ignore[return-value]  # task_cls is ours


def deliver(task: celery_ext.Task, task_id: str) -> None:
    """Do with a durable task's message what a worker does, in this process."""
    trace_task(task, task_id, (), {}, {"id": task_id, "durable": task_id}, app=task.app)


@contextmanager
def publishing(handler: Callable[..., None]) -> Iterator[None]:
    """Call a handler, with Celery's arguments, before each message that is sent in the block."""
    before_task_publish.connect(handler)
    try:
        yield
    finally:
        before_task_publish.disconnect(handler)


async def until_logged(caplog: pytest.LogCaptureFixture, text: str) -> None:
    """Return when a thread of this process, such as a relay, has logged it."""
    async with asyncio.timeout(PATIENCE):
        while text not in caplog.text:
            await asyncio.sleep(0.01)


class Worker:
    """A worker process and what it logs."""

    def __init__(
        self, app: Celery[celery_ext.Task], process: subprocess.Popen[str], environment: dict[str, str]
    ) -> None:
        self.app = app
        self.environment = environment
        self.process = process
        self.lines: list[str] = []
        self._changed = Condition()
        self._reader = Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def log(self) -> str:
        """Everything that was logged so far."""
        return "".join(self.lines)

    def until_logged(self, text: str) -> None:
        """Return when a line with ``text`` was logged.

        Raises:
            AssertionError: It was not, within ``PATIENCE`` seconds.
        """
        with self._changed:
            found = self._changed.wait_for(lambda: text in self.log or self.process.poll() is not None, PATIENCE)
        assert found, f"{text!r} was not logged in {PATIENCE:g} s:\n{self.log}"
        assert text in self.log, f"the worker ended:\n{self.log}"

    def task(self, name: str) -> celery_ext.Task:
        """One of the tests' tasks, to be sent to this worker."""
        return task(self.app, name)

    async def result(self, task_id: str) -> object:
        """What a task returned, or the exception that it failed with."""
        return await asyncio.to_thread(self.app.AsyncResult(task_id).get, timeout=20, propagate=False)

    def close(self) -> None:
        """Read the log to its end; the process has ended."""
        self._reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._changed:
                self.lines.append(line)
                self._changed.notify_all()


@contextmanager
def worker(
    broker: str, *options: str, pool: str = "prefork", environment: dict[str, str] | None = None
) -> Iterator[Worker]:
    """Run a worker on a queue of its own for the time of the block."""
    queue = f"chatdify-test-{uuid4().hex}"
    broker_url, backend_url = urls(broker)
    app = create_app(broker_url, backend_url, queue)
    variables = {"TEST_BROKER": broker_url, "TEST_BACKEND": backend_url, "TEST_QUEUE": queue}
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "celery", "-A", "tests.worker.application", "worker"),
            *("--pool", pool, "-n", f"{queue}@test", "-l", "INFO"),
            *("--without-gossip", "--without-mingle", "--without-heartbeat"),
            *options,
        ],
        cwd=ROOT,
        env=os.environ | variables | (environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    running = Worker(app, process, variables)
    try:
        running.until_logged(" ready.")
        yield running
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        running.close()
        with app.connection_for_write() as connection:
            Queue(queue).bind(connection.default_channel).delete()
        app.close()
