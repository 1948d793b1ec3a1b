"""A relay whose broker or database was away goes on when it is back."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import pytest
from celery import Celery

import celery_ext
from celery_ext.durable import broker
from celery_ext.durable.relay import relaying
from fastapi_chatdify_db import db
from tests.observing import PATIENCE, Observer
from tests.serving import free_socket
from tests.worker.application import create_app
from tests.worker.running import Worker, needs_a_broker, task, until_logged


@asynccontextmanager
async def forwarding(door: socket.socket, port: int | None) -> AsyncIterator[None]:
    """Pass on what comes in at a socket to a port of this machine, and what comes back; then end every connection."""
    ends: list[asyncio.StreamWriter] = []

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        back, onward = await asyncio.open_connection("127.0.0.1", port)
        ends.extend((writer, onward))
        await asyncio.gather(pump(reader, onward), pump(back, writer))

    async with await asyncio.start_server(serve, sock=door):
        try:
            yield
        finally:  # or a relay that is stopped would wait for an answer, and keep this loop from passing it on
            for end in ends:
                end.close()
                await end.wait_closed()


def app_behind(door: socket.socket, prefork: Worker) -> tuple[Celery[celery_ext.Task], int | None]:
    """An application that looks for the worker's broker at a socket, and the broker's own port."""
    there = urlsplit(prefork.environment["TEST_BROKER"])
    door.bind(("127.0.0.1", 0))
    elsewhere = there._replace(netloc=there.netloc.replace(f":{there.port}", f":{door.getsockname()[1]}"))
    app = create_app(elsewhere.geturl(), prefork.environment["TEST_BACKEND"], prefork.environment["TEST_QUEUE"])
    app.finalize()
    return app, there.port


@needs_a_broker
async def test_broker_that_comes_back(prefork: Worker, rows: Observer, caplog: pytest.LogCaptureFixture) -> None:
    """What a relay claimed for a broker that is down is due at once, not after the time of grace."""
    with socket.socket() as door:
        app, port = app_behind(door, prefork)
        with relaying(app, db, grace=3600):
            async with db.transaction():
                task_id = task(app, "add_item").delay_durably("x")
            await until_logged(caplog, "relay pauses")
            async with forwarding(door, port):
                await rows.until_status(task_id, "done")
        app.close()


@needs_a_broker
async def test_broker_that_goes_away(prefork: Worker, rows: Observer, caplog: pytest.LogCaptureFixture) -> None:
    """Likewise what it claimed before it found its connection broken."""
    with socket.socket() as door:
        app, port = app_behind(door, prefork)
        add_item = task(app, "add_item")
        with relaying(app, db, grace=3600):
            async with forwarding(door, port):
                async with db.transaction():
                    first = add_item.delay_durably("x")
                await rows.until_status(first, "done")
            async with db.transaction():
                second = add_item.delay_durably("y")
            await until_logged(caplog, "relay pauses (2)")
        assert await rows.connection.fetchval("SELECT rings FROM durable_task WHERE id = $1", second) == 0
        app.close()


@pytest.mark.parametrize("scheme", ["amqp", "redis"])
async def test_broker_that_is_mute(
    rows: Observer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    """One that accepts a connection and says nothing is waited for ten seconds (here a half), and then tried again."""
    monkeypatch.setattr(broker, "_TIME_LIMIT", 0.5)
    with free_socket() as listener:
        app = create_app(f"{scheme}://127.0.0.1:{listener.getsockname()[1]}//", "cache+memory://", "nowhere")
        app.finalize()
        async with db.transaction():
            task(app, "record").delay_durably("x")
        with relaying(app, db):
            try:
                await until_logged(caplog, "relay pauses (2)")
            finally:
                listener.close()  # which ends a relay that waits
    app.close()


async def test_pauses_begin_anew(unheard: Celery[Any], rows: Observer, caplog: pytest.LogCaptureFixture) -> None:
    """A relay that lost its connection twice within a week is not one that has lost it twice on end."""
    with relaying(unheard, db):
        for times in (1, 2):
            async with db.transaction():
                task_id = task(unheard, "record").delay_durably("x")
            await rows.until_sent(task_id)
            await rows.terminate_others()
            async with asyncio.timeout(PATIENCE):
                while caplog.text.count("relay pauses (1)") < times:
                    assert "relay pauses (2)" not in caplog.text
                    await asyncio.sleep(0.01)
