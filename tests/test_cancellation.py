"""Clients that leave, time-outs and cancelled tasks hold no connection and no transaction."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import AsyncIterator

import pytest
from fastapi import FastAPI
from sqlalchemy import text
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastapi_chatdify_db import Database, db
from tests.models import Item
from tests.observing import Observer
from tests.serving import serve

CLIENTS = 200


class CancelledByDisconnect:
    """Cancels a request whose client has left, as some servers and middlewares do."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = asyncio.ensure_future(self.app(scope, receive_nothing, send))
        watcher = asyncio.create_task(until_disconnect(receive))
        await asyncio.wait([request, watcher], return_when=asyncio.FIRST_COMPLETED)
        request.cancel()
        watcher.cancel()
        await asyncio.gather(request, watcher, return_exceptions=True)


async def receive_nothing() -> Message:
    return {"type": "http.request", "body": b"", "more_body": False}


async def until_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def leave_early(host: str, port: int, started: asyncio.Event) -> None:
    _, writer = await asyncio.open_connection(host, port)
    writer.write(b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n")
    await writer.drain()
    await started.wait()
    writer.close()
    await writer.wait_closed()


@pytest.mark.parametrize("cancelling", [False, True], ids=["server goes on", "server cancels"])
async def test_clients_that_disconnect_leave_nothing_behind(
    app: FastAPI, observer: Observer, caplog: pytest.LogCaptureFixture, cancelling: bool
) -> None:
    """200 clients leave in the middle of a statement; the next 200 requests find a whole pool and a quiet log."""
    started = asyncio.Event()
    running = 0
    all_ended = asyncio.Event()

    @app.get("/slow")
    async def slow() -> None:
        nonlocal running
        running += 1
        try:
            await db.session.execute(text("SELECT 1"))
            started.set()
            await db.session.execute(text("SELECT pg_sleep(0.2)"))
        finally:
            running -= 1
            if running == 0:
                all_ended.set()

    @app.get("/fast")
    async def fast() -> int:
        return int((await db.session.execute(text("SELECT 1"))).scalar_one())

    with caplog.at_level(logging.WARNING):
        async with serve(CancelledByDisconnect(app) if cancelling else app) as client:
            host, port = client.base_url.host, client.base_url.port
            assert port is not None
            await asyncio.gather(*(leave_early(host, port, started) for _ in range(CLIENTS)))
            await all_ended.wait()
            responses = await asyncio.gather(*(client.get("/fast") for _ in range(CLIENTS)))
            assert [response.status_code for response in responses] == [200] * CLIENTS
            assert await observer.in_transaction() == 0
        gc.collect()
    assert "non-checked-in connection" not in caplog.text
    assert [record for record in caplog.records if record.exc_info] == []


async def test_timeout_in_the_middle_of_a_statement_rolls_back(observer: Observer) -> None:
    """What was flushed before is gone, and nothing idles in a transaction."""

    async def sleep() -> None:
        async with db.transaction() as session:
            session.add(Item("half"))
            await session.flush()
            await session.execute(text("SELECT pg_sleep(10)"))

    with pytest.raises(TimeoutError):
        await asyncio.wait_for(sleep(), 0.1)
    assert await observer.in_transaction() == 0
    assert await observer.names() == []


async def test_cancelled_while_waiting_for_a_connection(small_pool: Database, observer: Observer) -> None:
    """A request that gives up in the queue of the pool takes no place in it."""
    async with small_pool.transaction() as first, small_pool.transaction() as second:
        await first.execute(text("SELECT 1"))
        await second.execute(text("SELECT 1"))
        third = small_pool.async_engine.connect()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(third.start(), 0.05)
    async with small_pool.transaction() as first, small_pool.transaction() as second:
        await first.execute(text("SELECT 1"))
        await second.execute(text("SELECT 1"))


async def test_generator_closed_half_way_rolls_back(observer: Observer) -> None:
    """An async generator that is closed before its end gives its connection back."""

    async def rows() -> AsyncIterator[int]:
        async with db.transaction() as session:
            session.add(Item("half"))
            await session.flush()
            yield 1

    generator = rows()
    assert await anext(generator) == 1
    await generator.aclose()  # type: ignore[attr-defined]
    assert await observer.names() == []
    assert await observer.in_transaction() == 0
