"""Blocks of ``db.transaction()`` that are still open when the response begins."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import aclosing
from threading import Event
from typing import Annotated

import httpx
import pytest
from fastapi import Depends, FastAPI, HTTPException
from fastapi.responses import StreamingResponse
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from fastapi_chatdify_db import db
from tests.models import Item
from tests.observing import Observer
from tests.serving import serve


async def transaction() -> AsyncIterator[AsyncSession]:
    async with db.transaction() as session:
        yield session


async def sync_transaction() -> AsyncIterator[Session]:
    with db.sync_transaction() as session:
        yield session


def def_transaction() -> Iterator[Session]:
    with db.sync_transaction() as session:
        yield session


def nested_def_transactions() -> Iterator[Session]:
    with db.sync_transaction(), db.sync_transaction() as session:
        yield session


async def numbers() -> AsyncGenerator[int]:
    async with db.transaction() as session:
        for number in range(3):
            session.add(Item(f"number {number}"))
            await session.flush()
            yield number


@pytest.fixture
async def client(app: FastAPI, observer: Observer) -> AsyncIterator[httpx.AsyncClient]:

    @app.post("/given")
    async def given(session: Annotated[AsyncSession, Depends(transaction)], name: str, status: int = 200) -> None:
        session.add(Item(name))
        if status != 200:
            raise HTTPException(status)

    @app.post("/current", dependencies=[Depends(transaction)])
    async def current(name: str) -> None:
        db.session.add(Item(name))

    @app.post("/sync")
    async def sync(session: Annotated[Session, Depends(sync_transaction)], name: str) -> None:
        session.add(Item(name))

    @app.post("/def")
    def plain_def(session: Annotated[Session, Depends(def_transaction)], name: str, status: int = 200) -> None:
        session.add(Item(name))
        session.flush()
        if status != 200:
            raise HTTPException(status)

    @app.post("/behind", dependencies=[Depends(transaction, scope="function")])
    def behind_one_that_ends_first(
        session: Annotated[Session, Depends(def_transaction)], name: str, status: int = 200
    ) -> None:
        plain_def(session, name, status)

    @app.post("/nested-def")
    def nested_def(session: Annotated[Session, Depends(nested_def_transactions)], name: str) -> None:
        session.add(Item(name))

    @app.post("/beside")
    async def beside(session: Annotated[AsyncSession, Depends(transaction)], name: str) -> None:
        def write() -> None:
            with db.sync_transaction() as session_of_thread:
                session_of_thread.add(Item(name))
                session_of_thread.flush()
                app.state.written.set()
                app.state.may_go_on.wait(60)
                raise ZeroDivisionError

        app.state.beside = asyncio.create_task(asyncio.to_thread(write))
        await asyncio.to_thread(app.state.written.wait, 60)

    @app.post("/endless")
    async def endless(session: Annotated[AsyncSession, Depends(transaction)], name: str) -> StreamingResponse:
        async def body() -> AsyncIterator[bytes]:
            session.add(Item(name))
            await session.flush()
            while True:
                yield b"x" * 1000
                await asyncio.sleep(0)

        session.add(Item("before"))
        return StreamingResponse(body())

    @app.post("/def-endless")
    def def_endless(session: Annotated[Session, Depends(def_transaction)], name: str) -> StreamingResponse:
        def body() -> Iterator[bytes]:
            session.add(Item(name))
            session.flush()
            while True:
                yield b"x" * 1000

        session.add(Item("before"))
        return StreamingResponse(body())

    @app.post("/stream", dependencies=[Depends(transaction)])
    async def stream(name: str) -> StreamingResponse:
        async def body() -> AsyncIterator[bytes]:
            yield b"begin"
            db.session.add(Item(name))

        return StreamingResponse(body())

    @app.post("/left")
    async def left(name: str) -> None:
        async for _ in numbers():
            break
        db.session.add(Item(name))

    @app.post("/refused")
    async def refused() -> None:
        async for _ in numbers():
            raise HTTPException(404)

    @app.post("/closed")
    async def closed(name: str) -> None:
        first, second = numbers(), numbers()
        async with aclosing(second):
            async with aclosing(first):  # in another order than they were opened
                await anext(first)
                await anext(second)
            db.session.add(Item("second's"))
        db.session.add(Item(name))

    async with serve(app) as client:
        yield client


@pytest.mark.parametrize("path", ["/given", "/current", "/sync", "/def", "/behind", "/nested-def"])
async def test_commits_before_the_response(client: httpx.AsyncClient, observer: Observer, path: str) -> None:
    """A dependency that yields within a block ends after the response; its COMMIT does not, nor its failure."""
    statuses = [(await client.post(path, params={"name": name})).status_code for name in ("a", "a", "b")]
    assert statuses == [200, 500, 200]
    assert await observer.names() == ["a", "b"]
    assert await observer.in_transaction() == 0


@pytest.mark.parametrize("path", ["/given", "/def", "/behind"])
async def test_error_keeps_nothing(client: httpx.AsyncClient, observer: Observer, path: str) -> None:
    """By the same rule as the request itself."""
    assert (await client.post(path, params={"name": "a", "status": 404})).status_code == 404
    assert await observer.names() == []
    assert await observer.in_transaction() == 0


async def test_thread_that_goes_on_after_the_response(
    app: FastAPI, client: httpx.AsyncClient, observer: Observer
) -> None:
    """Its block is its own: the response leaves it alone."""
    app.state.written, app.state.may_go_on = Event(), Event()
    assert (await client.post("/beside", params={"name": "a"})).status_code == 200
    assert await observer.in_transaction() == 1
    app.state.may_go_on.set()
    with pytest.raises(ZeroDivisionError):
        await app.state.beside
    assert await observer.names() == []


@pytest.mark.parametrize("path", ["/endless", "/def-endless"])
async def test_stream_left_by_its_client_rolls_back(
    client: httpx.AsyncClient, observer: Observer, caplog: pytest.LogCaptureFixture, path: str
) -> None:
    """What was written before the response stays; of a body that was not sent to its end nothing does."""
    async with client.stream("POST", path, params={"name": "a"}) as response:
        await anext(response.aiter_raw())
        assert await observer.names() == ["before"]
    await observer.until_no_transactions()
    assert await observer.names() == ["before"]
    assert "a response was cut short" in caplog.text


async def test_callback_of_the_request(app: FastAPI, client: httpx.AsyncClient, observer: Observer) -> None:
    """It writes with the request's session, not with that of a dependency's block, which may still be rolled back."""

    async def add_audit() -> None:
        db.session.add(Item("audit"))

    async def audit() -> None:
        db.on_commit(add_audit)

    @app.post("/audited", dependencies=[Depends(audit), Depends(transaction)])
    async def audited() -> StreamingResponse:
        async def body() -> AsyncIterator[bytes]:
            yield b"begin"
            raise ZeroDivisionError

        return StreamingResponse(body())

    with pytest.raises(httpx.RemoteProtocolError):
        await client.post("/audited")
    assert await observer.names() == ["audit"]


async def test_stream_commits_at_its_end(client: httpx.AsyncClient, observer: Observer) -> None:
    """What is written with the body is committed before the last chunk, or the body is incomplete."""
    assert (await client.post("/stream", params={"name": "a"})).text == "begin"
    with pytest.raises(httpx.RemoteProtocolError):
        await client.post("/stream", params={"name": "a"})
    assert await observer.names() == ["a"]


async def test_generator_that_was_left(client: httpx.AsyncClient, observer: Observer) -> None:
    """``break`` leaves its block open for a while, and what is written after it is not lost without an error."""
    response = await client.post("/left", params={"name": "a"})
    assert (response.status_code == 200) == ("a" in await observer.names())
    assert await observer.in_transaction() == 0


async def test_generator_that_an_error_has_left(
    client: httpx.AsyncClient, observer: Observer, caplog: pytest.LogCaptureFixture
) -> None:
    """The response and the event loop both end its block, one after the other."""
    for _ in range(5):
        assert (await client.post("/refused")).status_code == 404
    assert await observer.in_transaction() == 0
    assert "ERROR" not in caplog.text


async def list_of_numbers() -> None:
    closed = asyncio.Event()

    async def in_block() -> AsyncGenerator[int]:
        try:
            async with db.transaction() as session:
                session.add(Item("number"))
                yield 1
        finally:
            closed.set()

    async for _ in in_block():
        break
    db.session.add(Item("a"))
    await closed.wait()  # the event loop closes the generator


def def_list_of_numbers() -> None:
    generator = def_transaction()
    next(generator)
    db.sync_session.add(Item("a"))
    del generator


def def_callback() -> None:
    generator = def_transaction()
    next(generator)
    db.on_commit(print)
    del generator


@pytest.mark.parametrize("endpoint", [list_of_numbers, def_list_of_numbers, def_callback])
async def test_generator_that_was_left_and_ended(
    app: FastAPI, observer: Observer, caplog: pytest.LogCaptureFixture, endpoint: Callable[[], object]
) -> None:
    """What was done after it is rolled back with its block, and the log says so."""
    app.post("/")(endpoint)
    async with serve(app) as client:
        await client.post("/")
    assert await observer.names() == []
    assert "close the generator" in caplog.text


async def test_generators_that_end_in_any_order(client: httpx.AsyncClient, observer: Observer) -> None:
    """The code after them is in the unit that is still open."""
    assert (await client.post("/closed", params={"name": "a"})).status_code == 200
    assert await observer.names() == ["a"]
