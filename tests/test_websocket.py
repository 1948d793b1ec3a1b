"""A websocket commits when it answers and when it waits for its client."""

from __future__ import annotations

import asyncio
from typing import Annotated

import pytest
import websockets
from fastapi import Depends, FastAPI, Response, WebSocket
from sqlalchemy.exc import IntegrityError

from fastapi_chatdify_db import DBSessionMiddleware, db
from tests.models import Item
from tests.observing import Observer
from tests.serving import connected
from tests.websocket_app import websocket_app


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


async def test_message_without_an_answer_commits_when_the_handler_waits(observer: Observer) -> None:
    """Two messages with one answer: the first is committed while the handler waits for the second."""

    async def handler(socket: WebSocket) -> None:
        await socket.accept()
        db.session.add(Item(await socket.receive_text()))
        db.session.add(Item(await socket.receive_text()))
        await db.session.flush()
        raise ZeroDivisionError

    async with connected(websocket_app(handler)) as socket:
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


async def test_denied_handshake_leaves_no_row(observer: Observer) -> None:
    """A websocket that is answered with a response instead follows the rule of responses."""

    async def handler(socket: WebSocket) -> None:
        db.session.add(Item("denied"))
        await db.session.flush()
        await socket.send_denial_response(Response(status_code=403))

    with pytest.raises(websockets.InvalidStatus):
        async with connected(websocket_app(handler)):
            pass
    assert await observer.names() == []


async def test_refused_handshake_leaves_no_row(observer: Observer) -> None:
    """Closing before the handshake is accepted is an HTTP 403, whatever the code."""

    async def handler(socket: WebSocket) -> None:
        db.session.add(Item("refused"))
        await db.session.flush()
        await socket.close()

    with pytest.raises(websockets.InvalidStatus, match="403"):
        async with connected(websocket_app(handler)):
            pass
    assert await observer.names() == []


@pytest.mark.parametrize("code", [1000, 1001])
async def test_normal_closure_commits(observer: Observer, code: int) -> None:
    """Whichever task has accepted the handshake."""

    async def handler(socket: WebSocket) -> None:
        await asyncio.create_task(socket.accept())
        db.session.add(Item("a"))
        await socket.close(code)

    async with connected(websocket_app(handler)) as socket:
        with pytest.raises(websockets.ConnectionClosedOK):
            await socket.recv()
    assert await observer.names() == ["a"]


def add(name: str) -> None:
    db.session.add(Item(name))


async def test_session_of_a_dependency_in_a_thread(observer: Observer) -> None:
    """A ``def`` dependency asks for ``db.session`` in a thread, where there is no task."""

    async def handler(socket: WebSocket, added: Annotated[None, Depends(add)]) -> None:
        await socket.accept()
        await socket.send_text("stored")

    async with connected(websocket_app(handler, "/{name}"), "/a") as socket:
        assert await socket.recv() == "stored"
        assert await observer.names() == ["a"]
