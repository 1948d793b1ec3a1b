"""Of the tasks of a websocket, the one that works on a message is the one whose answer follows the commit."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

import pytest
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


async def roll_back_in_a_task(name: str) -> None:
    await asyncio.create_task(roll_back(name))


async def roll_back_in_a_thread(name: str) -> None:
    def in_thread() -> None:
        db.rollback_only()
        db.sync_session.add(Item(name))

    await run_in_threadpool(in_thread)


@pytest.mark.parametrize("receive", [WebSocket.receive_text, wait_for, select])
@pytest.mark.parametrize("dry_run", [roll_back, roll_back_in_a_task, roll_back_in_a_thread])
async def test_dry_run_without_an_answer(
    observer: Observer,
    dry_run: Callable[[str], Awaitable[None]],
    receive: Callable[[WebSocket], Awaitable[str]],
) -> None:
    """It is over when the handler waits for the next message, which is kept."""

    async def handler(socket: WebSocket) -> None:
        await socket.accept()
        await dry_run(await receive(socket))
        db.session.add(Item(await receive(socket)))
        await socket.send_text("stored")

    async with connected(websocket_app(handler)) as socket:
        await socket.send("dry run")
        await socket.send("a")
        assert await socket.recv() == "stored"
        assert await observer.names() == ["a"]


async def test_dry_run_beside_a_task_that_reads_ahead(observer: Observer) -> None:
    """The handler is still at work on it, although a task of its own waits for the next message."""

    async def handler(socket: WebSocket) -> None:
        await socket.accept()
        name = await socket.receive_text()
        db.session.add(Item(f"{name} 1"))
        db.rollback_only()
        ahead = asyncio.create_task(socket.receive_text())
        await asyncio.sleep(0)
        db.session.add(Item(f"{name} 2"))
        await db.session.flush()
        await socket.send_text("refused")
        db.session.add(Item(await ahead))
        await socket.send_text("stored")

    async with connected(websocket_app(handler)) as socket:
        await socket.send("dry run")
        assert await socket.recv() == "refused"
        await socket.send("a")
        assert await socket.recv() == "stored"
    assert await observer.names() == ["a"]


async def test_handler_answers_for_a_task_that_is_done(observer: Observer) -> None:
    """Though another task received the message, and another one did the work."""

    async def work(name: str) -> None:
        db.session.add(Item(name))

    async def handler(socket: WebSocket) -> None:
        await socket.accept()
        await asyncio.create_task(work(await select(socket)))
        await socket.send_text("stored")
        await asyncio.Event().wait()

    async with connected(websocket_app(handler)) as socket:
        await socket.send("a")
        assert await socket.recv() == "stored"
        assert await observer.names() == ["a"]


async def test_work_beside_a_task_that_waits(observer: Observer) -> None:
    """Work without an answer is committed when the handler waits for the next message, whatever else is at work."""

    async def handler(socket: WebSocket) -> None:
        await socket.accept()
        used = asyncio.Event()

        async def use_and_wait() -> None:
            await db.session.scalar(text("SELECT 1"))
            used.set()
            await asyncio.Event().wait()

        waiting = asyncio.create_task(use_and_wait())
        await used.wait()
        with suppress(WebSocketDisconnect):
            while True:
                db.session.add(Item(await socket.receive_text()))
        waiting.cancel()

    async with connected(websocket_app(handler)) as socket:
        await socket.send("a")
        await observer.until_names(["a"])
