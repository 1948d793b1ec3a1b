"""Pooled connections to a server that takes no writes any more, as a primary that was fenced, or is a standby now."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from fastapi import FastAPI
from sqlalchemy import select, text

from fastapi_chatdify_db import Database, DatabaseSettings, DBSessionMiddleware
from tests.conftest import with_parameter
from tests.models import Item
from tests.observing import Observer
from tests.serving import serve

DEMOTE = text("SET SESSION default_transaction_read_only = on")
"""What the server's configuration would say, here of one connection: a new one leads to a better server."""


@pytest.fixture(params=["read-write", "primary"])
async def demoted(request: pytest.FixtureRequest, observer: Observer, database_url: str) -> AsyncIterator[Database]:
    """A database with one connection of each driver, on which nothing can be written."""
    url = with_parameter(database_url, "target_session_attrs", request.param)
    database = Database(settings=DatabaseSettings(database_url=url, db_pool_size=1, db_max_overflow=0))
    async with database.transaction() as session:
        await session.execute(DEMOTE)
    with database.sync_transaction() as sync_session:
        sync_session.execute(DEMOTE)
    yield database
    await database.dispose()


async def test_first_write_goes_to_another_server(demoted: Database, observer: Observer) -> None:
    """Also after plain reads, with either driver: the request succeeds."""
    app = FastAPI()
    app.add_middleware(DBSessionMiddleware)

    @app.post("/")
    async def write() -> None:
        await demoted.session.scalars(select(Item))
        demoted.session.add(Item("async def"))

    @app.post("/def")
    def write_in_a_thread() -> None:
        demoted.sync_session.scalars(select(Item))
        demoted.sync_session.add(Item("def"))

    async with serve(app) as client:
        assert [(await client.post(path)).status_code for path in ("/", "/def")] == [200, 200]
    assert await observer.names() == ["async def", "def"]


async def test_write_in_a_transaction_fails_once(demoted: Database, observer: Observer) -> None:
    """What the transaction has done before is not run again elsewhere, but the next one has another server."""
    app = FastAPI()
    app.add_middleware(DBSessionMiddleware)

    @app.post("/")
    async def write() -> None:
        await demoted.session.execute(text("SELECT pg_advisory_xact_lock(1)"))
        demoted.session.add(Item("async def"))

    @app.post("/def")
    def write_in_a_thread() -> None:
        demoted.sync_session.execute(text("SELECT pg_advisory_xact_lock(1)"))
        demoted.sync_session.add(Item("def"))

    async with serve(app) as client:
        assert [(await client.post(path)).status_code for path in ("/", "/def")] == [500, 500]
        assert [(await client.post(path)).status_code for path in ("/", "/def")] == [200, 200]
    assert await observer.names() == ["async def", "def"]
