"""Requests to an application without a server: what it sends, message by message."""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Send

from fastapi_chatdify_db import DBSessionMiddleware


async def ask_directly(app: ASGIApp, sent: list[str], **scope: object) -> None:
    """GET / without a server, for a client that stays; ``sent`` gets the kinds of the messages that a server would."""

    async def send(message: Message) -> None:
        sent.append(message["type"])

    async with asyncio.timeout(30):
        await request(app, send, **scope)


async def request(app: ASGIApp, send: Send, **scope: object) -> None:
    """GET / without a server, for a client that stays."""

    async def receive() -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    get = {"type": "http", "method": "GET", "path": "/", "headers": [], "query_string": b""}
    await DBSessionMiddleware(app)(get | scope, receive, send)
