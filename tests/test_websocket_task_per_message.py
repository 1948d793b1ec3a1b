"""A websocket whose messages each have a task: what one did is kept when it is answered, not when it failed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

import pytest
from fastapi import WebSocket, WebSocketDisconnect
from sqlalchemy import text

from fastapi_chatdify_db import TransactionAborted, db
from tests.models import Item
from tests.observing import Observer
from tests.serving import connected
from tests.websocket_app import websocket_app


def receive_and_start(
    work: Callable[[WebSocket, str], Awaitable[None]], *, handled: bool = False
) -> tuple[Callable[[WebSocket], Awaitable[None]], list[asyncio.Future[None]]]:
    """Have each message worked on by a task of its own, which are returned; what it raises may be handled at once."""
    tasks: list[asyncio.Future[None]] = []

    async def handler(socket: WebSocket) -> None:
        await socket.accept()
        async for name in socket.iter_text():
            if name != "ping":
                tasks.append(asyncio.ensure_future(work(socket, name)))
            if handled:
                with suppress(ZeroDivisionError):
                    await tasks[-1]
                await socket.send_text("handled")

    return handler, tasks


@pytest.mark.parametrize("last", ["ping", "close"])
@pytest.mark.parametrize("handled", [False, True])
async def test_task_that_fails(observer: Observer, last: str, handled: bool) -> None:
    """What it did is not kept by whatever comes next, unless somebody has dealt with its exception."""

    failing = asyncio.Event()

    async def fail(socket: WebSocket, name: str) -> None:
        db.session.add(Item(name))
        await db.session.flush()
        failing.set()
        raise ZeroDivisionError

    handler, tasks = receive_and_start(fail, handled=handled)
    async with connected(websocket_app(handler)) as socket:
        await socket.send("a")
        if handled:
            assert await socket.recv() == "handled"
        else:
            await failing.wait()
        if last == "ping":
            await socket.send("ping")
    assert await observer.names() == (["a"] if handled else [])
    assert isinstance(tasks[0].exception(), ZeroDivisionError)


async def test_task_after_one_that_failed(observer: Observer) -> None:
    """Its answer is about its own work, which is kept."""
    failing = asyncio.Event()

    async def work(socket: WebSocket, name: str) -> None:
        db.session.add(Item(name))
        await db.session.flush()
        if name == "bad":
            failing.set()
            raise ZeroDivisionError
        await socket.send_text(f"saved {name}")

    handler, _ = receive_and_start(work)
    async with connected(websocket_app(handler)) as socket:
        await socket.send("bad")
        await failing.wait()
        await socket.send("good")
        assert await socket.recv() == "saved good"
        assert await observer.names() == ["good"]


@pytest.mark.parametrize("answers", [False, True])
async def test_task_beside_one_that_fails(observer: Observer, answers: bool) -> None:
    """It is told that its work is lost, where it goes on or where it would tell the client that it is done."""
    told: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()
    failed, go_on = asyncio.Event(), asyncio.Event()

    async def work(socket: WebSocket, name: str) -> None:
        async def fail() -> None:
            await db.session.flush()
            raise ZeroDivisionError

        db.session.add(Item(name))
        await asyncio.wait([asyncio.create_task(fail())])
        failed.set()
        await go_on.wait()
        try:
            if answers:
                await socket.send_text("saved")
            db.session.add(Item("second half"))
        except TransactionAborted as error:
            told.set_result(error)
        await socket.send_text("lost")

    handler, _ = receive_and_start(work)
    async with connected(websocket_app(handler)) as socket:
        await socket.send("a")
        await failed.wait()
        if not answers:
            await socket.send("ping")
            await observer.until_no_transactions()
        go_on.set()
        assert await socket.recv() == "lost"
        assert "db.transaction()" in str(await told)
    assert await observer.names() == []


async def test_failure_that_is_handled_later(observer: Observer) -> None:
    """What the client is told meanwhile stays true."""

    async def handler(socket: WebSocket) -> None:
        async def fail() -> None:
            await db.session.execute(text("SELECT 1"))
            raise ZeroDivisionError

        async def save(name: str) -> None:
            db.session.add(Item(name))
            await db.session.flush()
            await socket.send_text(f"saved {name}")

        await socket.accept()
        async for name in socket.iter_text():
            await asyncio.gather(fail(), return_exceptions=True)
            await asyncio.gather(save(name), return_exceptions=True)
            failing = asyncio.create_task(fail())
            await asyncio.wait([failing])
            await save(f"{name} again")
            with suppress(ZeroDivisionError):
                await failing

    async with connected(websocket_app(handler)) as socket:
        await socket.send("a")
        assert [await socket.recv(), await socket.recv()] == ["saved a", "saved a again"]
    assert await observer.names() == ["a", "a again"]


async def test_answer_that_another_task_gives(observer: Observer) -> None:
    """As a library's writer does with what handlers, in tasks of their own, return: it follows their commit."""
    answers: asyncio.Queue[str] = asyncio.Queue()

    async def work(socket: WebSocket, name: str) -> None:
        db.session.add(Item(name))
        await db.session.flush()
        answers.put_nowait(name)

    handler, _ = receive_and_start(work)

    async def with_writer(socket: WebSocket) -> None:
        async def write() -> None:
            while True:
                await socket.send_text(await answers.get())

        writer = asyncio.create_task(write())
        await handler(socket)
        writer.cancel()

    async with connected(websocket_app(with_writer)) as socket:
        await socket.send("a")
        assert await socket.recv() == "a"
        assert await observer.names() == ["a"]
        assert await observer.in_transaction() == 0


async def test_answer_after_a_failure(observer: Observer) -> None:
    """What a task did is not kept because another one tells the client that it failed."""
    answers: asyncio.Queue[str] = asyncio.Queue()

    async def fail(socket: WebSocket, name: str) -> None:
        db.session.add(Item(name))
        await db.session.flush()
        answers.put_nowait("failed")
        raise ZeroDivisionError

    handler, tasks = receive_and_start(fail)

    async def with_writer(socket: WebSocket) -> None:
        async def write() -> None:
            await socket.send_text(await answers.get())

        writer = asyncio.create_task(write())
        await handler(socket)
        await writer

    async with connected(websocket_app(with_writer)) as socket:
        await socket.send("a")
        assert await socket.recv() == "failed"
        assert await observer.names() == []
    assert await observer.names() == []
    assert isinstance(tasks[0].exception(), ZeroDivisionError)


async def test_message_after_a_task_that_failed(observer: Observer) -> None:
    """It has a transaction of its own."""

    async def handler(socket: WebSocket) -> None:
        async def fail() -> None:
            db.session.add(Item("lost"))
            await db.session.flush()
            raise ZeroDivisionError

        await socket.accept()
        failing = asyncio.create_task(fail())
        await asyncio.wait([failing])
        db.session.add(Item(await socket.receive_text()))
        await socket.send_text("stored")
        failing.exception()

    async with connected(websocket_app(handler)) as socket:
        await socket.send("a")
        assert await socket.recv() == "stored"
    assert await observer.names() == ["a"]


async def test_failure_that_is_handled_in_the_same_turn_of_the_loop(observer: Observer) -> None:
    """It is handled, although the handler waits for the client a moment before that."""

    async def handler(socket: WebSocket) -> None:
        written, go_on = asyncio.Event(), asyncio.Event()

        async def fail() -> None:
            db.session.add(Item("a"))
            await db.session.flush()
            written.set()
            await go_on.wait()
            raise ZeroDivisionError

        async def supervise() -> None:
            with suppress(ZeroDivisionError):
                await failing

        await socket.accept()
        failing = asyncio.create_task(fail())
        supervising = asyncio.create_task(supervise())
        await written.wait()
        asyncio.get_running_loop().call_soon(go_on.set)
        await go_on.wait()  # the second to be woken
        assert failing.done()
        assert not supervising.done()
        await socket.receive_text()

    async with connected(websocket_app(handler)) as socket:
        await socket.send("end")
    assert await observer.names() == ["a"]


async def test_news_beside_a_task_that_works(observer: Observer) -> None:
    """What a task sends while the handler waits for the client commits nothing of what others are still at."""
    written, may_fail = asyncio.Event(), asyncio.Event()
    tasks: list[asyncio.Task[None]] = []

    async def finish() -> None:
        db.session.add(Item("finished"))
        await db.session.flush()

    async def go_on() -> None:
        db.session.add(Item("half"))
        await db.session.flush()
        written.set()
        await may_fail.wait()
        raise ZeroDivisionError

    async def handler(socket: WebSocket) -> None:
        async def work() -> None:
            await finishing
            await go_on()

        async def tell() -> None:
            await written.wait()
            await socket.send_text("news")

        await socket.accept()
        finishing = asyncio.create_task(finish())
        tasks.extend([finishing, asyncio.create_task(work()), asyncio.create_task(tell())])
        with suppress(WebSocketDisconnect):
            await socket.receive_text()
        await asyncio.wait(tasks)

    async with connected(websocket_app(handler)) as socket:
        assert await socket.recv() == "news"
        assert await observer.names() == []
        may_fail.set()
        await socket.send("end")
    assert await observer.names() == []
    assert isinstance(tasks[1].exception(), ZeroDivisionError)
