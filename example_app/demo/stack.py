"""Chatdify as it runs: a web and a worker process, between a fake Chatwoot and a fake Dify on sockets."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import socket
import sys
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import httpx
from kombu import Connection
from sqlalchemy import NullPool, make_url

from example_app.fakes.chatwoot import FakeChatwoot
from example_app.fakes.dify import FakeDify
from example_app.fakes.serving import served

STOP_TIME: Final = 20.0
"""Seconds that a process has to end by itself."""


@dataclass(frozen=True)
class Secrets:
    """The secrets of one run, made anew each time."""

    api_token: str = field(default_factory=secrets.token_urlsafe)
    webhook: str = field(default_factory=secrets.token_urlsafe)
    chatwoot_key: str = field(default_factory=secrets.token_urlsafe)
    dify_key: str = field(default_factory=secrets.token_urlsafe)


@dataclass(frozen=True)
class Stack:
    """What runs, and where.

    Parameters:
        url: Of the web process.
        environment: Of both processes.
        directory: Where their logs are.
    """

    url: str
    chatwoot_url: str
    dify_url: str
    chatwoot: FakeChatwoot
    dify: FakeDify
    secrets: Secrets
    environment: Mapping[str, str]
    directory: Path

    @asynccontextmanager
    async def web(self) -> AsyncIterator[Process]:
        """The web process, once it is ready."""
        port = httpx.URL(self.url).port
        arguments = ("-m", "uvicorn", "--factory", "example_app.main:create_app", "--port", str(port))
        async with self._process("web", *arguments, "--log-level", "warning") as process:
            await self._until_ready(process)
            yield process

    @asynccontextmanager
    async def worker(self, name: str = "worker") -> AsyncIterator[Process]:
        """A worker process with its children, which may not have connected yet."""
        arguments = ("-m", "celery", "-A", "example_app.demo.worker", "worker")
        options = ("--without-gossip", "--without-mingle", "-n", f"{name}-{os.getpid()}@%h")
        async with self._process(name, *arguments, *options) as process:
            yield process

    def log(self, name: str) -> str:
        """What a process has logged."""
        return (self.directory / f"{name}.log").read_text()

    @asynccontextmanager
    async def _process(self, name: str, *arguments: str) -> AsyncIterator[Process]:
        with (self.directory / f"{name}.log").open("a") as log:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                *arguments,
                env=os.environ | self.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,  # a Ctrl-C is ours to pass on
            )
        try:
            yield process
        finally:
            await _stop(process)

    async def _until_ready(self, process: Process) -> None:
        async with httpx.AsyncClient() as client:
            while process.returncode is None:
                with suppress(httpx.TransportError):
                    if (await client.get(f"{self.url}/health/ready")).is_success:
                        return
                await asyncio.sleep(0.05)
        raise RuntimeError(f"the web process ended:\n{self.log('web')}")


@asynccontextmanager
async def chatdify(
    directory: Path,
    database_url: str,
    broker_url: str | None = None,
    port: int | None = None,
    settings: Mapping[str, str] | None = None,
) -> AsyncIterator[Stack]:
    """The fakes, and all that is needed to run Chatdify's processes between them.

    Parameters:
        directory: For logs.
        database_url: PostgreSQL's.
        broker_url: Celery's; None makes tables of that PostgreSQL its queues.
        port: Of the web process; None takes a free one.
        settings: Further environment variables.
    """
    known = Secrets()
    dify = FakeDify(known.dify_key)
    async with AsyncExitStack() as resources:
        with socket.create_server(("127.0.0.1", 0)) as reserved:  # or a fake might be given the same port
            url = f"http://127.0.0.1:{port or reserved.getsockname()[1]}"
            chatwoot = FakeChatwoot(known.chatwoot_key, f"{url}/api/v1/chatwoot-webhook", known.webhook)
            chatwoot_url = await resources.enter_async_context(served(chatwoot.app))
            dify_url = await resources.enter_async_context(served(dify.app))
        resources.push_async_callback(chatwoot.close)
        environment = {
            "ENVIRONMENT": "development",
            "LOG_LEVEL": "WARNING",
            "API_BASE_URL": f"{url}/api/v1",
            "CHATDIFY_API_TOKEN": known.api_token,
            "CHATWOOT_WEBHOOK_SECRET": known.webhook,
            "CHATWOOT_API_URL": f"{chatwoot_url}/api/v1",
            "CHATWOOT_API_KEY": known.chatwoot_key,
            "DIFY_API_URL": f"{dify_url}/v1",
            "DIFY_API_KEY": known.dify_key,
            "DATABASE_URL": database_url,
            "CELERY_BROKER_URL": broker_url or f"sqla+{_with_driver(database_url)}",
            "CELERY_RESULT_BACKEND": f"db+{_with_driver(database_url)}",
            "CELERY_TASK_DEFAULT_QUEUE": "chatdify",
            "CELERY_WORKER_CONCURRENCY": "2",
        } | dict(settings or {})
        if broker_url is None:
            queue = environment["CELERY_TASK_DEFAULT_QUEUE"]
            await asyncio.to_thread(_make_queue, environment["CELERY_BROKER_URL"], queue)
        yield Stack(url, chatwoot_url, dify_url, chatwoot, dify, known, environment, directory)


def _with_driver(database_url: str) -> str:
    # SQLAlchemy 2.1 takes a bare postgresql:// for psycopg 3.
    return make_url(database_url).set(drivername="postgresql+psycopg2").render_as_string(hide_password=False)


def _make_queue(broker_url: str, queue: str) -> None:
    # Before the processes, which would fail if both made the tables, or the queue, at once.
    with Connection(broker_url, transport_options={"poolclass": NullPool}) as connection:
        channel: Any = connection.channel()  # the stubs know none of its methods
        channel.queue_declare(queue)
        channel.session.close()


async def _stop(process: Process) -> None:
    if process.returncode is not None:
        return
    process.send_signal(signal.SIGTERM)
    try:
        await asyncio.wait_for(process.wait(), STOP_TIME)
    except TimeoutError:
        os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
