"""A task that cannot be sent fails by name and in bounded time, and keeps back no other."""

from __future__ import annotations

import asyncio
import logging
import re
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from starlette.requests import Request

import celery_ext
from celery_ext import DispatchFailed
from fastapi_chatdify_db import DBSessionMiddleware, db
from tests.models import Item
from tests.observing import Observer
from tests.serving import free_socket, serve
from tests.worker.application import create_app
from tests.worker.running import publishing, task, urls


@pytest.fixture(params=["refused", "mute"])
def broken(request: pytest.FixtureRequest) -> Iterator[Celery[celery_ext.Task]]:
    """An application whose broker is down, or accepts the connection and then says nothing."""
    listener = free_socket() if request.param == "mute" else socket.socket()
    if request.param == "refused":
        listener.bind(("127.0.0.1", 0))
    app = create_app(f"amqp://guest:secret@127.0.0.1:{listener.getsockname()[1]}//", urls("rabbitmq")[1], "nowhere")
    app.conf.broker_connection_timeout = 0.5
    app.finalize()
    yield app
    listener.close()


def failing(app: FastAPI, task: celery_ext.Task) -> None:
    """Routes that send a task under either policy."""
    app.add_middleware(DBSessionMiddleware)

    @app.exception_handler(DispatchFailed)
    async def not_sent(request: Request, error: DispatchFailed) -> JSONResponse:
        return JSONResponse({"detail": "stored, not sent"}, status_code=503)

    @app.post("/log")
    async def log() -> None:
        db.session.add(Item("log"))
        task.delay_on_commit("log")

    @app.post("/raise")
    async def raise_() -> None:
        db.session.add(Item("raise"))
        task.apply_async_on_commit(("raise",), on_error="raise")


async def test_broker_that_is_down(
    broken: Celery[Any], empty_tables: Observer, caplog: pytest.LogCaptureFixture
) -> None:
    """The request is answered in bounded time, as its caller chose; the rows are committed, the log names the task."""
    app = FastAPI()
    failing(app, task(broken, "read_item"))
    with caplog.at_level(logging.ERROR, "celery_ext"):
        async with serve(app) as client:
            assert (await client.post("/log", timeout=10)).status_code == 200
            assert "task tests.worker.tasks.dispatching.read_item[" in caplog.text
            assert (await client.post("/raise", timeout=10)).status_code == 503
    assert await empty_tables.names() == ["log", "raise"]
    assert "secret" not in caplog.text


async def test_broker_that_is_down_fails_a_unit_once(broken: Celery[Any], caplog: pytest.LogCaptureFixture) -> None:
    """A unit that sends many tasks does not wait for the broker with each of them, and the log names them all."""
    tried: list[object] = []

    def note(headers: dict[str, object], **_: object) -> None:
        tried.append(headers["id"])

    with publishing(note):
        async with db.transaction():
            ids = [task(broken, "read_item").delay_on_commit("x") for _ in range(3)]
    assert tried in ([], ids[:1])  # the thread that sends may not have come to it within its time
    assert caplog.text.count("not tried") == 2
    assert re.findall(r"read_item\[(\S+)\] was not sent", caplog.text) == ids


async def test_broker_is_tried_again_later(broken: Celery[Any], caplog: pytest.LogCaptureFixture) -> None:
    """A unit that goes on, as a websocket's does, does not take it for down for ever."""
    async with db.transaction():
        task(broken, "read_item").delay_on_commit("x")
        await db.release()
        await asyncio.sleep(broken.conf.broker_connection_timeout)
        task(broken, "read_item").delay_on_commit("x")
    assert caplog.text.count("was not sent") == 2
    assert "not tried" not in caplog.text


async def test_failed_dispatch_is_raised_outside_a_unit_too(broken: Celery[Any]) -> None:
    """Where there is nothing to commit, the call itself raises."""
    with pytest.raises(DispatchFailed, match="was not sent"):
        task(broken, "read_item").apply_async_on_commit(("x",), on_error="raise")


def test_broker_that_hangs() -> None:
    """What goes on waiting for it is bounded; the next messages are refused at once, until it answers or is gone."""

    def senders() -> int:
        return sum(thread.name == "celery_ext.sender" for thread in threading.enumerate())

    listener = free_socket()
    app = create_app(f"redis://127.0.0.1:{listener.getsockname()[1]}/0", "cache+memory://", "nowhere")
    app.conf.update(broker_connection_timeout=0.001, task_publish_retry=False)
    read = task(app, "read_item")
    before = senders()
    for _ in range(150):
        with pytest.raises(DispatchFailed) as failed:
            read.apply_async_on_commit(("x",), on_error="raise")
    assert "100 messages wait for the broker already" in str(failed.value)
    assert senders() <= before + 100
    listener.close()
    patience = time.monotonic() + 30
    while senders() > 10:  # what is kept while idle
        assert time.monotonic() < patience
        time.sleep(0.01)
    with pytest.raises(DispatchFailed) as failed:
        read.apply_async_on_commit(("x",), on_error="raise")
    assert "already" not in str(failed.value)
    app.close()


def test_what_exits_while_it_sends(unheard: Celery[celery_ext.Task]) -> None:
    """It fails its message, at once and by name, and not the thread that is kept for the next one."""

    def leave(**_: object) -> None:
        raise SystemExit("meant for command lines")

    with publishing(leave), pytest.raises(DispatchFailed, match="SystemExit: meant for command lines"):
        task(unheard, "read_item").apply_async_on_commit(("x",), on_error="raise")
    task(unheard, "read_item").apply_async_on_commit(("x",), on_error="raise")


async def test_failure_that_is_not_the_brokers(
    unheard: Celery[celery_ext.Task], rows: Observer, caplog: pytest.LogCaptureFixture
) -> None:
    """What is wrong with one message keeps back no other of the same unit."""
    ids: list[str] = []

    def leave(headers: dict[str, object], **_: object) -> None:
        if headers["id"] == ids[0]:
            raise SystemExit("meant for command lines")

    with publishing(leave):
        async with db.transaction():
            ids += [task(unheard, "read_item").delay_on_commit("x") for _ in range(2)]
    assert re.findall(r"read_item\[(\S+)\] was not sent", caplog.text) == ids[:1]
