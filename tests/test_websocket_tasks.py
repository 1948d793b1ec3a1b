"""Of the tasks of a websocket, the one that works on a message is the one whose answer follows the commit."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

import pytest
import websockets
from fastapi import WebSocket, WebSocketDisconnect
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError
from starlette.concurrency import run_in_threadpool

from fastapi_chatdify_db import db
from tests.models import Item
from tests.observing import PATIENCE, Observer
from tests.serving import connected
from tests.websocket_app import websocket_app


async def test_message_that_comes_during_a_rollback(observer: Observer) -> None:
    """A handler that gives up waiting for it, as for any other, gets it next time."""
    failed = asyncio.Event()

    async def handler(socket: WebSocket) -> None:
        await socket.accept()
        sleep = text("SELECT pg_sleep(1)")  # the rollback waits for it
        sleeping = asyncio.create_task(asyncio.to_thread(lambda: db.sync_session.execute(sleep)))
        await observer.until("EXISTS (SELECT FROM pg_stat_activity WHERE query = 'SELECT pg_sleep(1)')")
        limit = asyncio.timeout(None)

        async def fail() -> None:
            assert db.session
            await asyncio.sleep(0)
            limit.reschedule(asyncio.get_running_loop().time() + 0.2)
            failed.set()
            raise ZeroDivisionError

        failing = asyncio.create_task(fail())
        with suppress(TimeoutError):
            async with limit:
                await socket.receive_text()
        message = await socket.receive_text()
        await asyncio.wait([sleeping, failing])
        await socket.send_text(f"got {message}")

    async with asyncio.timeout(PATIENCE), connected(websocket_app(handler)) as socket:
        await failed.wait()
        await socket.send("a")
        assert await socket.recv() == "got a"


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


async def wait_for(socket: WebSocket) -> str:
    return await asyncio.wait_for(socket.receive_text(), 30)


async def select(socket: WebSocket) -> str:
    done, _ = await asyncio.wait([asyncio.create_task(socket.receive_text())])
    return done.pop().result()


@pytest.mark.parametrize("receive", [wait_for, select])
@pytest.mark.parametrize("pushing", [False, True])
async def test_task_that_receives_a_single_message(
    observer: Observer, receive: Callable[[WebSocket], Awaitable[str]], pushing: bool
) -> None:
    """The handler is answering, although another task received for it."""
    go_on = asyncio.Event()

    async def handler(socket: WebSocket) -> None:
        await socket.accept()
        while True:
            db.session.add(Item(await receive(socket)))
            if pushing:
                await asyncio.create_task(socket.send_text("news"))
                await go_on.wait()
            try:
                await socket.send_text("stored")
            except IntegrityError:
                await socket.send_text("taken")

    async with connected(websocket_app(handler)) as socket:
        for name, answer in [("a", "stored"), ("a", "taken"), ("b", "stored")]:
            go_on.clear()
            await socket.send(name)
            if pushing:
                assert await socket.recv() == "news"
                assert (name in await observer.names()) == (answer == "taken")
                go_on.set()
            assert await socket.recv() == answer
            assert await observer.in_transaction() == 0
    assert await observer.names() == ["a", "b"]


def receive_and_work(work: Callable[[str], Awaitable[None]]) -> Callable[[WebSocket], Awaitable[None]]:
    """Have one task of the websocket receive, and another one work and answer."""

    async def handler(socket: WebSocket) -> None:
        await socket.accept()
        names: asyncio.Queue[str] = asyncio.Queue()

        async def answer() -> None:
            while True:
                await work(await names.get())
                try:
                    await socket.send_text("stored")
                except IntegrityError:
                    await socket.send_text("taken")

        answering = asyncio.create_task(answer())
        try:
            async for name in socket.iter_text():
                names.put_nowait(name)
        finally:
            answering.cancel()

    return handler


async def test_task_that_works_is_answering(observer: Observer) -> None:
    """One task receives, another one works on the session and answers: each answer follows its commit."""

    async def work(name: str) -> None:
        db.session.add(Item(name))
        await db.session.flush()
        await db.session.execute(text("SELECT pg_sleep(0.3)"))

    async with connected(websocket_app(receive_and_work(work))) as socket:
        for name in "abc":
            await socket.send(name)
            await observer.until_active()  # and so in the middle of a statement when the next one is received
        for name in "abc":
            assert await socket.recv() == "stored"
            assert name in await observer.names()
    assert await observer.in_transaction() == 0


async def test_task_that_works_in_threads_is_answering(observer: Observer) -> None:
    """Whose a thread's work is nobody knows: whoever sends next commits it first."""

    def insert(name: str) -> None:
        db.sync_session.add(Item(name))
        db.sync_session.flush()

    async def work(name: str) -> None:
        await run_in_threadpool(insert, name)

    async with connected(websocket_app(receive_and_work(work))) as socket:
        for name, answer in [("a", "stored"), ("a", "taken"), ("b", "stored")]:
            await socket.send(name)
            assert await socket.recv() == answer
    assert await observer.names() == ["a", "b"]


async def test_dry_run_beside_a_reader(observer: Observer) -> None:
    """What one task rolls back is not committed because another one receives the next message meanwhile."""
    received = asyncio.Event()

    async def handler(socket: WebSocket) -> None:
        await socket.accept()

        async def dry_run() -> None:
            db.rollback_only()
            await received.wait()
            db.session.add(Item("dry run"))
            await db.session.flush()
            await socket.send_text("done")

        running = asyncio.create_task(dry_run())
        await asyncio.sleep(0)
        with suppress(WebSocketDisconnect):
            await socket.receive_text()
            received.set()
            await socket.receive_text()
        await running

    async with connected(websocket_app(handler)) as socket:
        await socket.send("go on")
        assert await socket.recv() == "done"
    assert await observer.names() == []


async def roll_back(name: str) -> None:
    db.rollback_only()
    db.session.add(Item(name))


def roll_back_in_a_thread(name: str) -> None:
    db.rollback_only()
    db.sync_session.add(Item(name))


@pytest.mark.parametrize("threaded", [False, True])
async def test_dry_run_without_an_answer(observer: Observer, threaded: bool) -> None:
    """It is over when the handler waits for the next message, which is kept."""

    async def handler(socket: WebSocket) -> None:
        await socket.accept()
        name = await socket.receive_text()
        await (run_in_threadpool(roll_back_in_a_thread, name) if threaded else roll_back(name))
        db.session.add(Item(await socket.receive_text()))
        await socket.send_text("stored")

    async with connected(websocket_app(handler)) as socket:
        await socket.send("dry run")
        await socket.send("a")
        assert await socket.recv() == "stored"
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
