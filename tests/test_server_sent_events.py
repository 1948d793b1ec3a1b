"""Server-sent events, whose generator FastAPI runs in a task beside the response."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Iterable
from threading import Event
from typing import Annotated

import httpx
import pytest
from fastapi import APIRouter, Depends, FastAPI
from fastapi.sse import EventSourceResponse
from sqlalchemy import select, text
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastapi_chatdify_db import DBSessionMiddleware, db
from tests.models import Item
from tests.observing import Observer
from tests.serving import serve


async def write() -> None:
    db.session.add(Item("a"))
    await db.session.flush()


async def fail_at_once() -> AsyncIterable[str]:
    yield "begin"
    await write()
    raise ZeroDivisionError


async def fail_later() -> AsyncIterable[str]:
    yield "begin"
    await write()
    await asyncio.sleep(0.01)
    raise ZeroDivisionError


def fail_in_a_thread() -> Iterable[str]:
    yield "begin"
    db.sync_session.add(Item("a"))
    db.sync_session.flush()
    raise ZeroDivisionError


async def fail_in_a_block() -> AsyncIterable[str]:
    async with db.transaction() as session:
        session.add(Item("a"))
        yield "begin"
        raise ZeroDivisionError


async def fail_before_anything() -> AsyncIterable[str]:
    async with db.transaction() as session:
        session.add(Item("a"))
        raise ZeroDivisionError
    yield


FAILING = (fail_at_once, fail_later, fail_in_a_thread, fail_in_a_block, fail_before_anything)


async def query_again_and_again() -> AsyncIterable[str]:
    for _ in range(50):
        await db.session.execute(text("SELECT 1"))
    yield "end"


async def block() -> AsyncIterator[AsyncSession]:
    async with db.transaction() as session:
        session.add(Item("a"))
        await session.flush()
        yield session


async def query_the_block(session: Annotated[AsyncSession, Depends(block)]) -> AsyncIterable[str]:
    for _ in range(50):
        await session.execute(text("SELECT 1"))
    yield "end"


@pytest.fixture
async def client(app: FastAPI, observer: Observer) -> AsyncIterator[httpx.AsyncClient]:
    for endpoint in FAILING:
        app.add_api_route(f"/{endpoint.__name__}", endpoint, response_class=EventSourceResponse)
    router = APIRouter()
    router.add_api_route("/included", query_again_and_again, dependencies=[Depends(write)])
    router.add_api_route("/block", query_the_block)
    app.include_router(router, default_response_class=EventSourceResponse)
    async with serve(app) as client:
        yield client


@pytest.mark.parametrize("path", [f"/{endpoint.__name__}" for endpoint in FAILING])
async def test_events_that_fail_keep_nothing(client: httpx.AsyncClient, observer: Observer, path: str) -> None:
    """The client gets an incomplete body, and what was written is rolled back."""
    with pytest.raises(httpx.RemoteProtocolError, match="incomplete"):
        await client.get(path)
    assert await observer.in_transaction() == 0
    assert await observer.names() == []


@pytest.mark.parametrize("path", ["/included", "/block"])
async def test_router_whose_default_is_events(client: httpx.AsyncClient, observer: Observer, path: str) -> None:
    """Its endpoints produce beside the response too, and are not committed in the middle of a statement."""
    response = await client.get(path)
    assert (response.status_code, response.text) == (200, 'data: "end"\n\n')
    assert await observer.names() == ["a"]


async def test_block_around_events_that_are_left_by_their_client_keeps_nothing(
    app: FastAPI, observer: Observer, caplog: pytest.LogCaptureFixture
) -> None:
    """What it wrote before the response began was not committed then, and the client has not got what goes with it."""

    @app.get("/", response_class=EventSourceResponse)
    async def endless(session: Annotated[AsyncSession, Depends(block)]) -> AsyncIterable[str]:
        yield "begin"
        await asyncio.Event().wait()

    async with serve(app) as client:
        async with client.stream("GET", "/") as response:
            chunks = response.aiter_raw()
            await anext(chunks)
            assert await observer.in_transaction() == 1
        await observer.until_no_transactions()
    assert await observer.names() == []
    assert "a response was cut short" in caplog.text


@pytest.mark.parametrize("writes_first", [True, False])
async def test_block_of_the_producer(observer: Observer, writes_first: bool) -> None:
    """It ends where the producer ends it, and is kept whole, though it was open before the response began."""
    opened = Event()

    class Hesitating:
        def __init__(self, app: ASGIApp) -> None:
            self.app = app

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            async def send_late(message: Message) -> None:
                if message["type"] == "http.response.start":
                    await asyncio.to_thread(opened.wait, 10)
                await send(message)

            await self.app(scope, receive, send_late)

    app = FastAPI()
    app.add_middleware(Hesitating)
    app.add_middleware(DBSessionMiddleware)

    @app.get("/", response_class=EventSourceResponse)
    def produce() -> Iterable[str]:
        with db.sync_transaction() as session:
            if writes_first:
                session.add(Item("a"))
                session.flush()
            else:
                session.scalars(select(Item)).all()
            opened.set()
            yield "begin"
            session.add(Item("b"))

    async with serve(app) as client:
        assert (await client.get("/")).text == 'data: "begin"\n\n'
    assert await observer.names() == (["a", "b"] if writes_first else ["b"])
