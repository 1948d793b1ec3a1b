"""A relay whose database falls silent, behind something that goes on accepting bytes, ends or goes on."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from typing import Any

import pytest
from celery import Celery
from sqlalchemy import event, text
from sqlalchemy.exc import DBAPIError

import celery_ext
from celery_ext.durable import relay
from celery_ext.durable.silence import Silence
from fastapi_chatdify_db import Database, DatabaseSettings, closing, db
from tests.forwarding import Forwarder
from tests.observing import PATIENCE, Observer
from tests.worker.running import task, until_logged


@pytest.fixture
async def forwarder(rows: Observer, database_url: str) -> AsyncIterator[Forwarder]:
    """A way to the database that is open."""
    forwarder = Forwarder(database_url)
    async with forwarder.opened():
        yield forwarder


@pytest.fixture
async def application(unheard: Celery[Any], forwarder: Forwarder) -> AsyncIterator[Database]:
    """The database at the end of that way, with a relay in its lifespan."""
    database = Database("forwarded", settings=DatabaseSettings(database_url=forwarder.url))
    celery_ext.init_app(unheard, db=database, relay=True)
    yield database
    await database.dispose()


async def store(app: Celery[Any], database: Database) -> str:
    async with database.transaction():
        return task(app, "record").delay_durably("x")


@pytest.mark.parametrize("asks_for", ["rows", "a connection"])
async def test_application_stops(
    unheard: Celery[Any],
    application: Database,
    forwarder: Forwarder,
    rows: Observer,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    asks_for: str,
) -> None:
    """Its end waits for an answer for ten seconds (here one), and then for the end of the other connections."""
    monkeypatch.setattr(relay, "_SILENT_AT_STOP", 1.0)
    monkeypatch.setattr(closing, "LIMIT", 1.0)
    async with asyncio.timeout(PATIENCE), application.lifespan(None):
        await rows.until_sent(await store(unheard, application))
        forwarder.fall_silent()
        if asks_for == "a connection":
            monkeypatch.setattr(relay, "_SILENT", 1.0)
            await until_logged(caplog, "relay pauses (1)")
            forwarder.swallowed.clear()
        await forwarder.swallowed.wait()
    assert caplog.text.count("its connection is cut") == 1
    assert "Traceback" not in caplog.text


async def test_command_stops(forwarder: Forwarder, rows: Observer, unheard: Celery[Any]) -> None:
    """SIGTERM reaches it, although it waits for an answer."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "celery_ext.relay", "-A", "tests.worker.application", "run"),
        env=os.environ
        | {"TEST_BROKER": "memory://", "TEST_BACKEND": "cache+memory://", "TEST_QUEUE": "nowhere"}
        | {"DATABASE_URL": forwarder.url},
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        await rows.until_sent(await store(unheard, db))
        forwarder.fall_silent()
        await forwarder.swallowed.wait()
        process.terminate()
        _, log = await asyncio.wait_for(process.communicate(), PATIENCE)
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()
    assert process.returncode == 0
    assert b"its connection is cut" in log
    assert b"Traceback" not in log


@pytest.mark.parametrize("silent_from", ["a statement", "the login"])
async def test_relay_connects_again(
    unheard: Celery[Any],
    application: Database,
    forwarder: Forwarder,
    rows: Observer,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    silent_from: str,
) -> None:
    """An answer is not waited for longer than 35 seconds (here one).

    Neither is one that SQLAlchemy, the library or the application asks of a new connection.
    """
    monkeypatch.setattr(relay, "_SILENT", 1.0)
    if silent_from == "the login":
        engine = application.sync_engine
        event.listen(engine, "connect", lambda *_: forwarder.fall_silent(), insert=True, once=True)
    async with application.lifespan(None):
        if silent_from == "a statement":
            await rows.until_sent(await store(unheard, application))
            forwarder.fall_silent()
        await until_logged(caplog, "its connection is cut")
        await until_logged(caplog, "relay pauses (1)")
        forwarder.speak_again()
        await rows.until_sent(await store(unheard, application))


async def test_statement_that_is_only_slow(
    unheard: Celery[Any],
    application: Database,
    rows: Observer,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The database gives it up, after 30 seconds (here one), so that it does not wait there for a lock any more."""
    monkeypatch.setattr(relay, "_STATEMENT_LIMIT", 1)
    async with rows.connection.transaction(), application.lifespan(None):
        await rows.connection.execute("LOCK TABLE durable_task")
        await until_logged(caplog, "QueryCanceled")


async def test_time_that_is_no_silence(rows: Observer, caplog: pytest.LogCaptureFixture) -> None:
    """Between its statements, and after the last one, it is not the database that is waited for, nor is it cut off."""
    silence = Silence()
    with silence.connection(db.sync_engine) as connection:
        assert silence.seconds == 0
        connection.execute(text("SELECT 1"))
        assert silence.seconds == 0
    with pytest.raises(DBAPIError), silence.connection(db.sync_engine) as connection:
        connection.execute(text("SELECT 1 / 0"))
    assert silence.seconds == 0
    silence.end()
    assert caplog.text == ""


async def test_connection_that_is_gone_is_cut(rows: Observer) -> None:
    """It is cut again and again until whoever waits notices, and may have ended by itself meanwhile."""
    silence, database = Silence(), Database(settings=DatabaseSettings(db_application_name="cut"))
    with silence.connection(database.sync_engine):
        silence.end()
        await rows.until_connections("cut", 0)
        silence.end()
