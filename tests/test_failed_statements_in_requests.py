"""A request one of whose statements failed, unseen or handled, is told no success."""

from __future__ import annotations

import io
from contextlib import suppress

import asyncpg
import psycopg2
import pytest
from fastapi import FastAPI, WebSocket
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, IntegrityError

from fastapi_chatdify_db import DBSessionMiddleware, TransactionAborted, db
from tests.failing import DUPLICATE, NOT_A_NUMBER
from tests.models import Item
from tests.observing import Observer
from tests.serving import connected, serve


@pytest.fixture
def ran() -> list[str]:
    """The callbacks that ran."""
    return []


@pytest.fixture
def app(ran: list[str]) -> FastAPI:
    app = FastAPI()
    app.add_middleware(DBSessionMiddleware)

    @app.post("/async")
    async def handler() -> None:
        db.session.add(Item("a"))
        await db.session.flush()
        db.on_commit(lambda: ran.append("callback"))
        with suppress(IntegrityError):
            await db.session.execute(DUPLICATE)

    @app.post("/def")
    def plain_def() -> None:
        db.sync_session.add(Item("a"))
        db.sync_session.flush()
        db.on_commit(lambda: ran.append("callback"))
        with suppress(IntegrityError):
            db.sync_session.execute(DUPLICATE)

    @app.post("/read")
    async def read() -> None:
        db.session.add(Item("a"))
        await db.session.flush()
        with suppress(DBAPIError):
            await db.session.scalar(NOT_A_NUMBER)

    @app.post("/release")
    async def release() -> None:
        db.session.add(Item("a"))
        await db.session.flush()
        with suppress(IntegrityError):
            await db.session.execute(DUPLICATE)
        await db.release()

    @app.post("/first")
    async def first() -> None:
        with suppress(IntegrityError):
            await db.session.execute(DUPLICATE)
        with suppress(DBAPIError):
            await db.session.execute(text("INSERT INTO item (name) VALUES ('a')"))

    return app


@pytest.mark.parametrize("path", ["/async", "/def", "/read", "/release", "/first"])
async def test_client_is_told_that_nothing_was_stored(
    app: FastAPI, observer: Observer, ran: list[str], path: str
) -> None:
    """A 500, no row and no callback; and an error that names what had failed, and what to write instead."""
    errors: list[BaseException] = []

    async def noting(scope: object, receive: object, send: object) -> None:
        try:
            await app(scope, receive, send)  # type: ignore[arg-type]  # as they came
        except TransactionAborted as error:
            errors.append(error)

    async with serve(noting) as client:
        assert (await client.post(path)).status_code == 500
        assert await observer.in_transaction() == 0
    assert (await observer.names(), ran) == ([], [])
    assert "begin_nested()" in str(errors[0])
    assert "SQLSTATE 2" in str(errors[0])


@pytest.mark.parametrize("path", ["/copy", "/copy-def"])
async def test_failure_of_the_drivers_own_connection_counts(app: FastAPI, observer: Observer, path: str) -> None:
    """Also one that SQLAlchemy does not see makes the COMMIT none, which only PostgreSQL's answer to it tells."""

    @app.post("/copy")
    async def copy() -> None:
        db.session.add(Item("a"))
        await db.session.flush()
        driver = (await (await db.session.connection()).get_raw_connection()).driver_connection
        assert driver is not None
        with suppress(asyncpg.UniqueViolationError):
            await driver.copy_records_to_table("counter", records=[(1, 1), (1, 1)])

    @app.post("/copy-def")
    def copy_def() -> None:
        db.sync_session.add(Item("a"))
        db.sync_session.flush()
        cursor = db.sync_session.connection().connection.cursor()
        with suppress(psycopg2.IntegrityError):
            cursor.copy_expert("COPY counter FROM STDIN", io.StringIO("1\t1\n1\t1\n"))

    async with serve(app) as client:
        assert (await client.post(path)).status_code == 500
        assert await observer.in_transaction() == 0
    assert await observer.names() == []


async def test_websocket_is_not_told_either(app: FastAPI, observer: Observer) -> None:
    """The commit before an answer fails where the handler sends it."""

    @app.websocket("/")
    async def handler(socket: WebSocket) -> None:
        await socket.accept()
        db.session.add(Item(await socket.receive_text()))
        await db.session.flush()
        with suppress(IntegrityError):
            await db.session.execute(DUPLICATE)
        try:
            await socket.send_text("stored")
        except TransactionAborted:
            await socket.send_text("not stored")

    async with connected(app) as socket:
        await socket.send("a")
        assert await socket.recv() == "not stored"
    assert await observer.names() == []
