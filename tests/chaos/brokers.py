"""Brokers of the test's own, which may forget everything: a virtual host of RabbitMQ, a Redis server."""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final
from uuid import uuid4

import pytest
from kombu import Connection, Exchange, Queue
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from tests.chaos.processes import free_port, wait_until

_QUEUE: Final = Queue("celery", Exchange("celery"), "celery")


@dataclass(frozen=True)
class Broker:
    """A broker, and what can happen to it: each fault by its name."""

    url: str
    faults: Mapping[str, Callable[[], object]]


@contextmanager
def own_broker(name: str) -> Iterator[Broker]:
    """RabbitMQ or Redis, for the time of the block; where it is not to be had the test is skipped."""
    with {"rabbitmq": _virtual_host, "redis": _redis_server}[name]() as broker:
        yield broker


@contextmanager
def _virtual_host() -> Iterator[Broker]:
    if shutil.which("rabbitmqctl") is None:
        pytest.skip("rabbitmqctl is not on the PATH: nothing here can close RabbitMQ's connections")
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", 5672)) != 0:
            pytest.skip("no RabbitMQ listens on port 5672")
    name = f"chatdify-chaos-{uuid4().hex}"
    try:
        _rabbitmqctl("add_vhost", name)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"rabbitmqctl may not be used by this user: {error.stdout.strip() or error.stderr.strip()}")
    url = f"amqp://guest:guest@127.0.0.1:5672/{name}"

    def purge() -> None:
        with Connection(url) as connection:
            queue = _QUEUE.bind(connection.default_channel)
            queue.declare()
            queue.purge()

    def close_connections() -> None:
        _rabbitmqctl("close_all_connections", "--vhost", name, "chaos")

    try:
        _rabbitmqctl("set_permissions", "-p", name, "guest", ".*", ".*", ".*")
        yield Broker(url, {"queue purged": purge, "broker connections closed": close_connections})
    finally:
        _rabbitmqctl("delete_vhost", name)


def _rabbitmqctl(*arguments: str) -> None:
    subprocess.run(["rabbitmqctl", "--quiet", *arguments], check=True, capture_output=True, text=True, timeout=60)


@contextmanager
def _redis_server() -> Iterator[Broker]:
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not on the PATH: a Redis to be flushed has to be the test's own")
    port = free_port()
    server = subprocess.Popen(
        ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"],
        stdout=subprocess.DEVNULL,
    )
    try:
        with Redis(port=port) as client:
            wait_until("Redis answers", lambda: _answers(client), 20)
            yield Broker(
                f"redis://127.0.0.1:{port}/0",
                {
                    "FLUSHALL": client.flushall,
                    "broker connections closed": lambda: client.client_kill_filter(_type="normal", skipme=True),
                },
            )
    finally:
        server.kill()
        server.wait()


def _answers(client: Redis) -> bool:
    try:
        return bool(client.ping())
    except RedisConnectionError:
        return False
