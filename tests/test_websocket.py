"""A websocket commits when it answers and when it waits for its client."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Annotated

import pytest
import websockets
from fastapi import Depends, FastAPI, Response, WebSocket, WebSocketDisconnect
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError
from starlette.concurrency import run_in_threadpool

from fastapi_chatdify_db import DBSessionMiddleware, db
from tests.models import Item
from tests.observing import Observer
from tests.serving import connected


@pytest.fixture
def app() -> FastAPI:
    app = FastAPI()
    app.add_middleware(DBSessionMiddleware)

    @app.websocket("/")
    async def handler(socket: WebSocket) -> None:
        await socket.accept()
        async for name in socket.iter_text():
            db.session.add(Item(name))
            if name == "dry run":
                db.rollback_only()
            if name == "bad":
                await db.session.flush()
                raise ZeroDivisionError
            if name == "refused":
                await socket.close(code=1008)
                return
            try:
                await socket.send_text(f"stored {name}")
            except IntegrityError:
                await socket.send_text("taken")

    return app


async def test_answer_follows_the_commit(app: FastAPI, observer: Observer) -> None:
    """The client that reads the answer sees the row; nothing is in transaction while it thinks."""
    async with connected(app) as socket:
        for name in ("a", "b"):
            await socket.send(name)
            assert await socket.recv() == f"stored {name}"
            assert name in await observer.names()
            assert await observer.in_transaction() == 0


async def test_failed_commit_is_raised_where_the_handler_answers(app: FastAPI, observer: Observer) -> None:
    """The handler can still say no, and go on."""
    async with connected(app) as socket:
        for name, answer in [("a", "stored a"), ("a", "taken"), ("b", "stored b")]:
            await socket.send(name)
            assert await socket.recv() == answer
    assert await observer.names() == ["a", "b"]


async def test_message_without_an_answer_commits_when_the_handler_waits(app: FastAPI, observer: Observer) -> None:
    """Two messages with one answer: the first is committed while the handler waits for the second."""

    async def handler(socket: WebSocket) -> None:
        await socket.accept()
        db.session.add(Item(await socket.receive_text()))
        db.session.add(Item(await socket.receive_text()))
        await db.session.flush()
        raise ZeroDivisionError

    app.router.routes.clear()
    app.add_api_websocket_route("/", handler)
    async with connected(app) as socket:
        await socket.send("first")
        await socket.send("second")
        with pytest.raises(websockets.ConnectionClosed):
            await socket.recv()
    assert await observer.names() == ["first"]


@pytest.mark.parametrize("name", ["bad", "refused"])
async def test_message_that_fails_leaves_no_row(app: FastAPI, observer: Observer, name: str) -> None:
    """An exception, or closing with an error code, rolls back that message and none before it."""
    async with connected(app) as socket:
        await socket.send("good")
        await socket.recv()
        await socket.send(name)
        with pytest.raises(websockets.ConnectionClosed):
            await socket.recv()
    assert await observer.names() == ["good"]
    assert await observer.in_transaction() == 0


async def test_rollback_only_is_for_one_message(app: FastAPI, observer: Observer) -> None:
    """The next message commits again."""
    async with connected(app) as socket:
        for name in ("dry run", "real"):
            await socket.send(name)
            await socket.recv()
    assert await observer.names() == ["real"]


async def test_pushing_task_leaves_the_transaction_alone(app: FastAPI, observer: Observer) -> None:
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

    app.router.routes.clear()
    app.add_api_websocket_route("/", handler)
    async with connected(app) as socket:
        await socket.send("a")
        assert await socket.recv() == "news"
        with pytest.raises(websockets.ConnectionClosed):
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
    app: FastAPI, observer: Observer, receive: Callable[[WebSocket], Awaitable[str]], pushing: bool
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

    app.router.routes.clear()
    app.add_api_websocket_route("/", handler)
    async with connected(app) as socket:
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


def receive_and_work(app: FastAPI, work: Callable[[str], Awaitable[None]]) -> None:
    """Let one task of the websocket receive, and another one work and answer."""

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

    app.router.routes.clear()
    app.add_api_websocket_route("/", handler)


async def test_task_that_works_is_answering(app: FastAPI, observer: Observer) -> None:
    """One task receives, another one works on the session and answers: each answer follows its commit."""

    async def work(name: str) -> None:
        db.session.add(Item(name))
        await db.session.flush()
        await db.session.execute(text("SELECT pg_sleep(0.3)"))

    receive_and_work(app, work)
    async with connected(app) as socket:
        for name in "abc":
            await socket.send(name)
            await observer.until_active()  # and so in the middle of a statement when the next one is received
        for name in "abc":
            assert await socket.recv() == "stored"
            assert name in await observer.names()
    assert await observer.in_transaction() == 0


async def test_denied_handshake_leaves_no_row(app: FastAPI, observer: Observer) -> None:
    """A websocket that is answered with a response instead follows the rule of responses."""

    async def handler(socket: WebSocket) -> None:
        db.session.add(Item("denied"))
        await db.session.flush()
        await socket.send_denial_response(Response(status_code=403))

    app.router.routes.clear()
    app.add_api_websocket_route("/", handler)
    with pytest.raises(websockets.InvalidStatus):
        async with connected(app):
            pass
    assert await observer.names() == []


async def test_refused_handshake_leaves_no_row(app: FastAPI, observer: Observer) -> None:
    """Closing before the handshake is accepted is an HTTP 403, whatever the code."""

    async def handler(socket: WebSocket) -> None:
        db.session.add(Item("refused"))
        await db.session.flush()
        await socket.close()

    app.router.routes.clear()
    app.add_api_websocket_route("/", handler)
    with pytest.raises(websockets.InvalidStatus, match="403"):
        async with connected(app):
            pass
    assert await observer.names() == []


async def test_normal_closure_commits(app: FastAPI, observer: Observer) -> None:
    """Whichever task has accepted the handshake."""

    async def handler(socket: WebSocket) -> None:
        await asyncio.create_task(socket.accept())
        db.session.add(Item("a"))
        await socket.close()

    app.router.routes.clear()
    app.add_api_websocket_route("/", handler)
    async with connected(app) as socket:
        with pytest.raises(websockets.ConnectionClosedOK):
            await socket.recv()
    assert await observer.names() == ["a"]


def add(name: str) -> None:
    db.session.add(Item(name))


async def test_session_of_a_dependency_in_a_thread(app: FastAPI, observer: Observer) -> None:
    """A ``def`` dependency asks for ``db.session`` in a thread, where there is no task."""

    async def handler(socket: WebSocket, added: Annotated[None, Depends(add)]) -> None:
        await socket.accept()
        await socket.send_text("stored")

    app.router.routes.clear()
    app.add_api_websocket_route("/{name}", handler)
    async with connected(app, "/a") as socket:
        assert await socket.recv() == "stored"
        assert await observer.names() == ["a"]


def receive_and_start(
    app: FastAPI, work: Callable[[WebSocket, str], Awaitable[None]], *, handled: bool = False
) -> list[asyncio.Future[None]]:
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

    app.router.routes.clear()
    app.add_api_websocket_route("/", handler)
    return tasks


@pytest.mark.parametrize("last", ["ping", "close"])
@pytest.mark.parametrize("handled", [False, True])
async def test_task_that_fails(app: FastAPI, observer: Observer, last: str, handled: bool) -> None:
    """What it did is not kept by whatever comes next, unless somebody has dealt with its exception."""

    failing = asyncio.Event()

    async def fail(socket: WebSocket, name: str) -> None:
        db.session.add(Item(name))
        await db.session.flush()
        failing.set()
        raise ZeroDivisionError

    tasks = receive_and_start(app, fail, handled=handled)
    async with connected(app) as socket:
        await socket.send("a")
        if handled:
            assert await socket.recv() == "handled"
        else:
            await failing.wait()
        if last == "ping":
            await socket.send("ping")
    assert await observer.names() == (["a"] if handled else [])
    assert isinstance(tasks[0].exception(), ZeroDivisionError)


async def test_heartbeat_is_no_answer(app: FastAPI, observer: Observer) -> None:
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

    app.router.routes.clear()
    app.add_api_websocket_route("/", handler)
    async with connected(app) as socket:
        await socket.send("a")
        with suppress(websockets.ConnectionClosed):
            while True:
                await socket.recv()
    assert await observer.names() == []


async def test_failure_that_is_handled_later(app: FastAPI, observer: Observer) -> None:
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

    app.router.routes.clear()
    app.add_api_websocket_route("/", handler)
    async with connected(app) as socket:
        await socket.send("a")
        assert [await socket.recv(), await socket.recv()] == ["saved a", "saved a again"]
    assert await observer.names() == ["a", "a again"]


async def test_answer_that_another_task_gives(app: FastAPI, observer: Observer) -> None:
    """As a library's writer does with what handlers, in tasks of their own, return: it follows their commit."""
    answers: asyncio.Queue[str] = asyncio.Queue()

    async def work(socket: WebSocket, name: str) -> None:
        db.session.add(Item(name))
        await db.session.flush()
        answers.put_nowait(name)

    receive_and_start(app, work)
    [route] = app.router.routes
    handler = route.endpoint  # type: ignore[attr-defined]

    async def with_writer(socket: WebSocket) -> None:
        async def write() -> None:
            while True:
                await socket.send_text(await answers.get())

        writer = asyncio.create_task(write())
        await handler(socket)
        writer.cancel()

    app.router.routes.clear()
    app.add_api_websocket_route("/", with_writer)
    async with connected(app) as socket:
        await socket.send("a")
        assert await socket.recv() == "a"
        assert await observer.names() == ["a"]
        assert await observer.in_transaction() == 0


async def test_task_that_works_in_threads_is_answering(app: FastAPI, observer: Observer) -> None:
    """Whose a thread's work is nobody knows: whoever sends next commits it first."""

    def insert(name: str) -> None:
        db.sync_session.add(Item(name))
        db.sync_session.flush()

    async def work(name: str) -> None:
        await run_in_threadpool(insert, name)

    receive_and_work(app, work)
    async with connected(app) as socket:
        for name, answer in [("a", "stored"), ("a", "taken"), ("b", "stored")]:
            await socket.send(name)
            assert await socket.recv() == answer
    assert await observer.names() == ["a", "b"]


async def test_dry_run_beside_a_reader(app: FastAPI, observer: Observer) -> None:
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

    app.router.routes.clear()
    app.add_api_websocket_route("/", handler)
    async with connected(app) as socket:
        await socket.send("go on")
        assert await socket.recv() == "done"
    assert await observer.names() == []
