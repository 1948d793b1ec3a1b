"""Messages that another task of a websocket pushes: they neither commit nor disturb what is under way."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from threading import Event

import pytest
import websockets
from fastapi import WebSocket, WebSocketDisconnect
from sqlalchemy import text
from starlette.concurrency import run_in_threadpool

from fastapi_chatdify_db import db
from tests.models import Item
from tests.observing import PATIENCE, Observer
from tests.serving import connected
from tests.websocket_app import websocket_app


async def test_pushing_task_leaves_the_transaction_alone(observer: Observer) -> None:
    """A task that only pushes neither commits nor disturbs what the reading task is in the middle of."""
    pushed = asyncio.Event()

    async def handler(socket: WebSocket) -> None:
        await socket.accept()
        name = await socket.receive_text()
        db.session.add(Item(name))
        await db.session.flush()

        async def push() -> None:
            await socket.send_text("news")
            pushed.set()

        await asyncio.create_task(push())
        await pushed.wait()
        raise ZeroDivisionError

    async with connected(websocket_app(handler)) as socket:
        await socket.send("a")
        assert await socket.recv() == "news"
        with pytest.raises(websockets.ConnectionClosed):
            await socket.recv()
    assert await observer.names() == []


async def test_heartbeat_is_no_answer(observer: Observer) -> None:
    """What another task sends while the handler works on a message commits nothing of it."""

    async def handler(socket: WebSocket) -> None:
        async def beat() -> None:
            while True:
                await socket.send_text("beat")
                await asyncio.sleep(0.01)

        async def save(name: str) -> None:
            db.session.add(Item(name))
            await db.session.flush()

        await socket.accept()
        beating = asyncio.create_task(beat())
        await asyncio.create_task(save(await socket.receive_text()))
        await asyncio.sleep(0.1)
        beating.cancel()
        await socket.close(1008)

    async with connected(websocket_app(handler)) as socket:
        await socket.send("a")
        with suppress(websockets.ConnectionClosed):
            while True:
                await socket.recv()
    assert await observer.names() == []


async def test_heartbeat_beside_a_callback(observer: Observer) -> None:
    """What a task registers before its first use of the session waits for its own commit."""
    ran: list[str] = []

    async def handler(socket: WebSocket) -> None:
        await socket.accept()
        beaten = asyncio.Event()

        async def work() -> None:
            db.on_commit(lambda: ran.append("callback"))
            await beaten.wait()
            assert ran == []
            db.session.add(Item("a"))
            await socket.send_text("stored")

        async def beat() -> None:
            await socket.send_text("beat")
            beaten.set()

        tasks = [asyncio.create_task(work()), asyncio.create_task(beat())]
        with suppress(WebSocketDisconnect):
            await socket.receive_text()
        await asyncio.gather(*tasks)

    async with asyncio.timeout(PATIENCE), connected(websocket_app(handler)) as socket:
        assert [await socket.recv(), await socket.recv()] == ["beat", "stored"]
    assert ran == ["callback"]


async def test_heartbeat_beside_a_callback_in_a_thread(observer: Observer) -> None:
    """It neither commits what the callback has written so far, nor meets its statements."""
    beaten = Event()

    async def handler(socket: WebSocket) -> None:
        loop, may_beat = asyncio.get_running_loop(), asyncio.Event()

        def fail_after_a_beat() -> None:
            db.sync_session.add(Item("of the callback"))
            loop.call_soon_threadsafe(may_beat.set)
            assert beaten.wait(PATIENCE)
            raise ZeroDivisionError

        async def beat() -> None:
            await may_beat.wait()
            await socket.send_text("beat")
            beaten.set()

        await socket.accept()
        beating = asyncio.create_task(beat())
        db.session.add(Item(await socket.receive_text()))
        db.on_commit(fail_after_a_beat)
        await socket.send_text("stored")
        await beating

    async with asyncio.timeout(PATIENCE), connected(websocket_app(handler)) as socket:
        await socket.send("a")
        assert [await socket.recv(), await socket.recv()] == ["beat", "stored"]
    assert await observer.names() == ["a"]


async def test_heartbeat_beside_a_thread(observer: Observer) -> None:
    """While a thread is in the middle of a statement, what another task sends is no answer."""

    def insert(name: str) -> None:
        db.sync_session.add(Item(name))
        db.sync_session.flush()
        db.sync_session.execute(text("SELECT pg_sleep(0.3)"))

    async def handler(socket: WebSocket) -> None:
        await socket.accept()
        inserting = asyncio.create_task(run_in_threadpool(insert, await socket.receive_text()))
        await observer.until_active()
        await asyncio.create_task(socket.send_text("beat"))
        await inserting
        await socket.send_text("stored")

    async with connected(websocket_app(handler)) as socket:
        await socket.send("a")
        assert [await socket.recv(), await socket.recv()] == ["beat", "stored"]
    assert await observer.names() == ["a"]
