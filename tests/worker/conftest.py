"""Workers, one for each broker and test file, and a look into the database."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

import asyncpg
import pytest
from celery import Celery

import celery_ext
from celery_ext.durable.relay import relaying
from fastapi_chatdify_db import db
from tests.observing import Observer
from tests.worker.application import create_app
from tests.worker.running import Worker, brokers, worker


@pytest.fixture(scope="module", params=brokers())
def prefork(request: pytest.FixtureRequest) -> Iterator[Worker]:
    """A worker with two processes, on each broker in turn."""
    with worker(request.param, "-c", "2") as running:
        yield running


@pytest.fixture
async def empty_tables(database_url: str) -> AsyncIterator[Observer]:
    """The tests' tables without rows, and a connection that looks into them."""
    await db.create_tables()
    connection = await asyncpg.connect(database_url)
    await connection.execute("TRUNCATE item, counter")
    yield Observer(connection)
    await connection.execute("TRUNCATE item, counter")
    await connection.close()
    await db.dispose()


@pytest.fixture
async def rows(empty_tables: Observer) -> AsyncIterator[Observer]:
    """No rows of items, and none of durable tasks."""
    celery_ext.init_app(Celery("whoever comes first"))
    await db.create_tables()
    await empty_tables.connection.execute("TRUNCATE durable_task RESTART IDENTITY")
    yield empty_tables
    await empty_tables.connection.execute("TRUNCATE durable_task")


@pytest.fixture
async def kills(empty_tables: Observer) -> AsyncIterator[None]:
    """The sequence by which tasks count what no rollback takes back."""
    await empty_tables.connection.execute("DROP SEQUENCE IF EXISTS kills; CREATE SEQUENCE kills")
    yield
    await empty_tables.connection.execute("DROP SEQUENCE kills")


@pytest.fixture
def relayed(prefork: Worker, rows: Observer) -> Iterator[Worker]:
    """A worker, and a relay that rings again after half a second."""
    with relaying(prefork.app, db, grace=0.5):
        yield prefork


@pytest.fixture
def unheard(rows: Observer) -> Iterator[Celery[celery_ext.Task]]:
    """An application that nobody relays for."""
    app = create_app("memory://", "cache+memory://", "nowhere")
    app.finalize()
    yield app
    app.close()


@pytest.fixture
def eager() -> Iterator[dict[str, Any]]:
    """The tasks, run at once where they are sent."""
    app = create_app("memory://", "cache+memory://", "eager")
    app.conf.task_always_eager = True
    yield {name.rpartition(".")[2]: task for name, task in app.tasks.items()}
    app.close()
