"""What a body does while it is sent is in a transaction of its own, which ends with the response."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Callable, Iterator
from threading import Event

import anyio
import httpx
import pytest
from fastapi import BackgroundTasks, FastAPI
from fastapi.responses import StreamingResponse
from sqlalchemy import select
from starlette.concurrency import iterate_in_threadpool
from starlette.types import Message

from fastapi_chatdify_db import db
from tests.asking_directly import request
from tests.models import Item
from tests.observing import Observer
from tests.serving import serve


async def test_rows_of_a_stream_commit_at_its_end(app: FastAPI, observer: Observer) -> None:
    """The first chunk arrives with nothing in transaction; the last one, once the stream's rows are committed."""
    go_on, written = asyncio.Event(), asyncio.Event()

    @app.get("/")
    async def stream() -> StreamingResponse:
        await db.session.execute(select(Item))

        async def body() -> AsyncIterator[bytes]:
            yield b"first"
            await go_on.wait()
            db.session.add(Item("streamed"))
            await db.session.flush()
            written.set()
            yield b"last"

        return StreamingResponse(body())

    async with serve(app) as client, client.stream("GET", "/") as response:
        chunks = response.aiter_raw()
        assert await anext(chunks) == b"first"
        assert await observer.in_transaction() == 0
        go_on.set()
        await written.wait()
        assert [chunk async for chunk in chunks] == [b"last"]
        assert await observer.names() == ["streamed"]
        assert await observer.in_transaction() == 0


async def test_stream_whose_commit_fails_is_cut_short(app: FastAPI, observer: Observer) -> None:
    """The client of a stream that could not be committed gets an incomplete body, never a whole one."""

    @app.get("/")
    async def stream() -> StreamingResponse:
        async def body() -> AsyncIterator[bytes]:
            db.session.add(Item("same"))
            yield b"first"
            db.session.add(Item("same"))
            yield b"last"

        return StreamingResponse(body())

    async with serve(app) as client:
        with pytest.raises(httpx.RemoteProtocolError, match="incomplete"):
            await client.get("/")
    assert await observer.names() == []


async def test_stream_that_fails_rolls_back(app: FastAPI, observer: Observer) -> None:
    """An exception in the body keeps the handler's rows, which the client was told of, and none of the stream's."""

    @app.get("/")
    async def stream() -> StreamingResponse:
        db.session.add(Item("handler"))

        async def body() -> AsyncIterator[bytes]:
            db.session.add(Item("stream"))
            await db.session.flush()
            yield b"first"
            raise ZeroDivisionError

        return StreamingResponse(body())

    async with serve(app) as client:
        with pytest.raises(httpx.RemoteProtocolError):
            await client.get("/")
    assert await observer.names() == ["handler"]
    assert await observer.in_transaction() == 0


async def test_stream_left_by_its_client_rolls_back(
    app: FastAPI, observer: Observer, caplog: pytest.LogCaptureFixture
) -> None:
    """Rows of a body that was not sent to its end are not kept, and nor are its background tasks': the log says so."""
    ended = asyncio.Event()

    @app.get("/{name}")
    async def stream(background: BackgroundTasks) -> StreamingResponse:
        async def body() -> AsyncIterator[bytes]:
            db.session.add(Item("half"))
            await db.session.flush()
            try:
                while True:
                    yield b"x" * 1000
                    await asyncio.sleep(0)
            finally:
                background.add_task(ended.set)

        background.add_task(lambda: db.sync_session.add(Item("task")))
        return StreamingResponse(body())

    async with serve(app) as client:
        async with client.stream("GET", "/a%0Ab") as response:
            await anext(response.aiter_raw())
        await ended.wait()
    assert await observer.names() == []
    [told] = [message for message in caplog.messages if "a response was not completed" in message]
    assert told.endswith(r"path '/a\nb'")
    assert await observer.in_transaction() == 0


async def test_def_stream_left_by_its_client_holds_nothing(app: FastAPI, observer: Observer) -> None:
    """A block of its own ends with the request; Starlette leaves the generator to the garbage collector."""
    go_on = Event()

    @app.get("/")
    def stream() -> StreamingResponse:
        def body() -> Iterator[bytes]:
            with db.sync_transaction() as session:
                session.add(Item("lost"))
                session.flush()
                yield b"first"
                go_on.wait(60)
                while True:
                    yield b"x" * 100_000

        return StreamingResponse(body())

    gc.disable()
    try:
        async with serve(app) as client:
            async with client.stream("GET", "/") as response:
                assert await anext(response.aiter_raw()) == b"first"
                assert await observer.in_transaction() == 1
            go_on.set()
            await observer.until_no_transactions()
    finally:
        gc.enable()
    assert await observer.names() == []


async def body() -> AsyncIterator[bytes]:
    async with db.transaction() as outer, db.transaction() as inner:
        for session in (outer, inner):
            session.add(Item("lost"))
            await session.flush()
        yield b"first"
        yield b"last"


def def_body() -> Iterator[bytes]:
    with db.sync_transaction() as outer, db.sync_transaction() as inner:
        for session in (outer, inner):
            session.add(Item("lost"))
            session.flush()
        yield b"first"
        yield b"last"


async def body_begun_in_another_block() -> AsyncIterator[bytes]:
    async with db.transaction():
        chunks = body()
        first = await anext(chunks)
    yield first
    async for chunk in chunks:
        yield chunk


async def def_body_in_a_block() -> AsyncIterator[bytes]:
    async with db.transaction():
        async for chunk in iterate_in_threadpool(def_body()):
            yield chunk


@pytest.mark.parametrize("body", [body, body_begun_in_another_block, def_body, def_body_in_a_block])
@pytest.mark.parametrize("version", ["2.3", "2.4"])
async def test_stream_whose_time_is_up_holds_nothing(
    observer: Observer,
    caplog: pytest.LogCaptureFixture,
    body: Callable[[], AsyncIterator[bytes] | Iterator[bytes]],
    version: str,
) -> None:
    """Its block ends with the request, although anyio cancels again whatever waits for that, and the log tells."""
    app = FastAPI()

    @app.get("/")
    async def stream() -> StreamingResponse:
        return StreamingResponse(body())

    async def send(message: Message) -> None:
        if message["type"] == "http.response.body":
            limit.cancel()
            await asyncio.Event().wait()  # for a client that does not read

    gc.disable()
    try:
        with anyio.CancelScope() as limit:
            await request(app, send, asgi={"spec_version": version})
        assert await observer.in_transaction() == 0
        assert "a response was not completed" in caplog.text
    finally:
        gc.enable()
    assert await observer.names() == []


async def test_body_of_a_slow_client_holds_no_connection(app: FastAPI, observer: Observer) -> None:
    """While a large body waits for its reader, the pool has every connection."""
    body = b"x" * 20_000_000

    @app.get("/")
    async def large() -> StreamingResponse:
        await db.session.execute(select(Item))

        async def chunks() -> AsyncIterator[bytes]:
            yield body

        return StreamingResponse(chunks())

    async with serve(app) as client, client.stream("GET", "/") as response:
        assert response.status_code == 200
        assert db.async_engine.pool.status().startswith("Pool size: 10  Connections in pool: 1")
        assert await observer.in_transaction() == 0
