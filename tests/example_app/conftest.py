"""Chatdify in this process, or as processes, between a fake Chatwoot and a fake Dify."""

from __future__ import annotations

import itertools
import os
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass

import httpx
import pytest
from kombu import Connection, Queue

from example_app.api.security import sign
from example_app.clients import close_clients
from example_app.fakes.chatwoot import FakeChatwoot
from example_app.fakes.dify import FakeDify
from example_app.fakes.serving import served
from example_app.main import create_app
from example_app.settings import get_settings
from example_app.worker import app as celery_app
from fastapi_chatdify_db import DatabaseSettings, db
from fastapi_chatdify_db.engines import Engines
from tests.serving import serve

API_TOKEN = "api-token"
WEBHOOK_SECRET = "webhook-secret"
RABBITMQ = "amqp://guest:guest@localhost:5672//"

_numbers = itertools.count()

Configure = Callable[..., None]


def pytest_collection_finish() -> None:
    """Take back the settings that the application gave the one database when it was imported."""
    db._settings = DatabaseSettings


@pytest.fixture
def configure(monkeypatch: pytest.MonkeyPatch, database_url: str) -> Iterator[Configure]:
    """Set environment variables and let the application read them anew."""

    def configure(**variables: str | None) -> None:
        for name, value in variables.items():
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, value)
        get_settings.cache_clear()

    configure(
        ENVIRONMENT="test",
        CHATDIFY_API_TOKEN=API_TOKEN,
        CHATWOOT_WEBHOOK_SECRET=WEBHOOK_SECRET,
        CHATWOOT_API_KEY="chatwoot-key",
        CHATWOOT_ADMIN_API_KEY="chatwoot-admin-key",
        DIFY_API_KEY="dify-key",
        HTTPX_READ_TIMEOUT="1",
        CELERY_BROKER_URL="memory://localhost",
        CELERY_RESULT_BACKEND="cache+memory://",
        CELERY_RETRY_COUNTDOWN="0",
    )
    # What the application tells the one database is not for the tests that follow, nor theirs for it.
    monkeypatch.setattr(db, "_settings", get_settings)
    monkeypatch.setattr(db, "engines", Engines(lambda: db.settings))
    monkeypatch.setattr(db, "services", {})
    monkeypatch.setattr(db, "creates_tables", False)
    assert celery_app.conf.broker_url == "memory://localhost"
    yield configure
    get_settings.cache_clear()


@dataclass
class Outside:
    """The fake APIs, as the application's settings name them."""

    chatwoot: FakeChatwoot
    dify: FakeDify


@pytest.fixture
async def outside(configure: Configure, tables: None) -> AsyncIterator[Outside]:
    """Both fakes on sockets, and the application's tables."""
    chatwoot = FakeChatwoot(
        "chatwoot-key", "http://127.0.0.1:9/nobody-listens", WEBHOOK_SECRET, admin_key="chatwoot-admin-key"
    )
    dify = FakeDify("dify-key")
    async with served(chatwoot.app) as chatwoot_url, served(dify.app) as dify_url:
        configure(CHATWOOT_API_URL=f"{chatwoot_url}/api/v1", DIFY_API_URL=f"{dify_url}/v1")
        yield Outside(chatwoot, dify)
        await close_clients()
        await chatwoot.close()


@pytest.fixture
async def client(configure: Configure, tables: None) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the application on a socket, with its token."""
    async with serve(create_app()) as client:
        client.headers["Authorization"] = f"Bearer {API_TOKEN}"
        yield client


def signed(body: bytes, timestamp: str, delivery: str | None = None) -> dict[str, str]:
    """The headers with which Chatwoot sends a webhook."""
    headers = {"X-Chatwoot-Timestamp": timestamp, "X-Chatwoot-Signature": sign(WEBHOOK_SECRET, timestamp, body)}
    return headers | ({"X-Chatwoot-Delivery": delivery} if delivery else {})


async def rows(query: str) -> list[tuple[object, ...]]:
    """What a query finds in the run's database."""
    async with db.async_engine.connect() as connection:
        return [tuple(row) for row in await connection.exec_driver_sql(query)]


async def write(statement: str) -> None:
    """Change something in the run's database."""
    async with db.async_engine.begin() as connection:
        await connection.exec_driver_sql(statement)


@pytest.fixture(params=["postgresql", "rabbitmq"])
def broker(request: pytest.FixtureRequest) -> Iterator[tuple[str | None, str]]:
    """A broker's URL (None: tables of the database) and the name of a queue of our own."""
    queue = f"chatdify-{os.getpid()}-{next(_numbers)}"
    if request.param == "postgresql":
        yield None, queue
        return
    try:
        socket.create_connection(("localhost", 5672), 1).close()
    except OSError:
        pytest.skip("no RabbitMQ at localhost:5672")
    yield RABBITMQ, queue
    with Connection(RABBITMQ) as connection:
        Queue(queue, channel=connection.channel()).delete()
