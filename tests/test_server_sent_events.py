"""Server-sent events, whose generator FastAPI runs in a task beside the response."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Iterable
from threading import Event
from typing import Annotated

import asyncpg
import httpx
import pytest
from fastapi import APIRouter, Depends, FastAPI, params
from fastapi.sse import EventSourceResponse
from sqlalchemy import select, text
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastapi_chatdify_db import DBSessionMiddleware, db, get_session
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


async def empty_block() -> AsyncIterator[None]:
    async with db.transaction():
        yield


async def query_the_block(session: Annotated[AsyncSession, Depends(block)]) -> AsyncIterable[str]:
    for _ in range(50):
        await session.execute(text("SELECT 1"))
    yield "end"


async def store(name: str) -> AsyncIterable[str]:
    db.session.add(Item(name))
    await db.session.flush()
    yield "stored"


async def store_by_dependency(name: str, session: Annotated[AsyncSession, Depends(get_session)]) -> AsyncIterable[str]:
    session.add(Item(name))
    await session.execute(text("SELECT pg_sleep(0.1)"))
    yield "stored"


async def read() -> AsyncIterable[str]:
    for name in await db.session.scalars(select(Item.name)):
        yield name


@pytest.fixture
async def client(app: FastAPI, observer: Observer) -> AsyncIterator[httpx.AsyncClient]:
    for endpoint in (store, store_by_dependency, read, *FAILING):
        app.add_api_route(f"/{endpoint.__name__}", endpoint, response_class=EventSourceResponse)
    app.add_api_route("/refused", store_by_dependency, response_class=EventSourceResponse, status_code=409)
    router = APIRouter()
    router.add_api_route("/included", query_again_and_again, dependencies=[Depends(write)])
    router.add_api_route("/block", query_the_block)
    app.include_router(router, default_response_class=EventSourceResponse)
    async with serve(app) as client:
        yield client


@pytest.mark.parametrize("path", ["/store", "/store_by_dependency"])
async def test_server_sent_events_may_write(client: httpx.AsyncClient, observer: Observer, path: str) -> None:
    """FastAPI starts their generator before the status line; its rows are there before the body ends."""
    for name in ("a", "b"):
        async with client.stream("GET", path, params={"name": name}) as response:
            assert "".join([chunk async for chunk in response.aiter_text()]) == 'data: "stored"\n\n'
        assert name in await observer.names()
        assert await observer.in_transaction() == 0


async def test_server_sent_events_whose_commit_fails_are_cut_short(
    client: httpx.AsyncClient, observer: Observer
) -> None:
    """As any stream is."""
    await observer.connection.execute("INSERT INTO item (name) VALUES ('a')")
    with pytest.raises(httpx.RemoteProtocolError, match="incomplete"):
        await client.get("/store", params={"name": "a"})
    assert await observer.names() == ["a"]


async def test_status_of_server_sent_events_is_that_of_rows_that_go_with_them(
    client: httpx.AsyncClient, observer: Observer
) -> None:
    """What came before an error status is rolled back, at the end of the stream too."""
    response = await client.get("/refused", params={"name": "a"})
    assert (response.status_code, response.text) == (409, 'data: "stored"\n\n')
    assert await observer.names() == []
    assert await observer.in_transaction() == 0


async def test_server_sent_events_that_ask_during_the_commit(
    app: FastAPI, observer: Observer, database_url: str
) -> None:
    """Whenever their task begins a statement: what a dependency wrote is not committed beside it, but at the end."""
    may_ask, asked = asyncio.Event(), asyncio.Event()

    @app.get("/", response_class=EventSourceResponse, dependencies=[Depends(write)])
    async def events() -> AsyncIterable[int]:
        yield 1
        await may_ask.wait()
        try:
            yield len((await db.session.scalars(select(Item))).all())
        finally:
            asked.set()

    rival = await asyncpg.connect(database_url)
    async with serve(app) as client:
        await rival.execute("BEGIN; INSERT INTO item (name) VALUES ('a')")  # our COMMIT would wait for it
        opened = asyncio.create_task(client.send(client.build_request("GET", "/"), stream=True))
        held_up = asyncio.create_task(observer.until_somebody_waits_for_a_lock())
        await asyncio.wait([opened, held_up], return_when=asyncio.FIRST_COMPLETED)
        may_ask.set()
        await asked.wait()
        await held_up  # if not before, then at the end of the stream
        await rival.close()
        response = await opened
        assert (response.status_code, await response.aread()) == (200, b"data: 1\n\ndata: 1\n\n")
    assert await observer.names() == ["a"]


async def test_server_sent_events_may_read(client: httpx.AsyncClient, observer: Observer) -> None:
    """Also on a connection that was used before."""
    await observer.connection.execute("INSERT INTO item (name) VALUES ('a')")
    for _ in range(3):
        assert (await client.get("/read")).text == 'data: "a"\n\n'


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


@pytest.mark.parametrize("dependencies", [[], [Depends(empty_block)]], ids=["alone", "in a dependency's"])
@pytest.mark.parametrize("writes_first", [True, False])
async def test_block_of_the_producer(
    observer: Observer, writes_first: bool, dependencies: list[params.Depends]
) -> None:
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

    @app.get("/", response_class=EventSourceResponse, dependencies=dependencies)
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
