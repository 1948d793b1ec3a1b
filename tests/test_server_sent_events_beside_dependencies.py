"""Server-sent events and their dependencies, which work on the same session before the stream begins."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable
from typing import Any

import pytest
from fastapi import Depends, FastAPI
from fastapi.sse import EventSourceResponse
from sqlalchemy import select

from fastapi_chatdify_db import db
from tests.models import Item
from tests.observing import Observer
from tests.serving import serve


async def nothing() -> None:
    pass


async def rollback_only() -> None:
    db.rollback_only()


async def read() -> None:
    await db.session.scalars(select(Item))


def read_in_a_thread() -> None:
    db.sync_session.scalars(select(Item))


async def read_in_a_block() -> AsyncIterator[None]:
    async with db.transaction() as session:
        await session.scalars(select(Item))
        yield


async def empty_block() -> AsyncIterator[None]:
    async with db.transaction():
        yield


async def store() -> AsyncIterable[str]:
    yield "begin"
    db.session.add(Item("a"))
    await db.session.flush()
    yield "end"


def store_in_a_thread() -> Iterable[str]:
    db.sync_session.add(Item("a"))
    db.sync_session.flush()
    yield "end"


@pytest.mark.parametrize(
    ("dependency", "producer"),
    [(empty_block, store), (read_in_a_block, store), (read, store), (read_in_a_thread, store_in_a_thread)],
)
async def test_stream_keeps_what_it_writes(
    app: FastAPI, observer: Observer, dependency: Callable[[], Any], producer: Callable[[], Any]
) -> None:
    """Whenever its producer begins a statement: no commit is under way beside it."""
    app.get("/", response_class=EventSourceResponse, dependencies=[Depends(dependency)])(producer)
    async with serve(app) as client:
        for _ in range(10):
            assert (await client.get("/")).text.endswith('data: "end"\n\n')
            assert await observer.names() == ["a"]
            await observer.connection.execute("DELETE FROM item")
    assert await observer.in_transaction() == 0


@pytest.mark.parametrize(("status", "dependency"), [(409, nothing), (200, rollback_only)])
async def test_late_writes_are_kept_if_the_request_is(
    app: FastAPI, observer: Observer, status: int, dependency: Callable[[], Any]
) -> None:
    """An error status, or a dependency's ``rollback_only()``, counts also where the stream first writes after it."""
    has_begun = asyncio.Event()

    @app.get("/", response_class=EventSourceResponse, status_code=status, dependencies=[Depends(dependency)])
    async def store_late() -> AsyncIterable[str]:
        await has_begun.wait()
        db.session.add(Item("a"))
        await db.session.flush()
        yield "end"

    async with serve(app) as client, client.stream("GET", "/") as response:
        assert response.status_code == status
        has_begun.set()
        assert await response.aread() == b'data: "end"\n\n'
    assert await observer.names() == []


@pytest.mark.parametrize("dependency", [read, read_in_a_thread, read_in_a_block])
async def test_stream_holds_no_connection_of_its_dependencies(
    app: FastAPI, observer: Observer, dependency: Callable[[], Any]
) -> None:
    """Those that only read give it back when the stream begins."""
    may_end = asyncio.Event()

    @app.get("/", response_class=EventSourceResponse, dependencies=[Depends(dependency)])
    async def wait() -> AsyncIterable[str]:
        await may_end.wait()
        yield "end"

    async with serve(app) as client, client.stream("GET", "/") as response:
        pools = [db.async_engine.pool, db.sync_engine.pool]
        assert [pool.checkedout() for pool in pools] == [0, 0]  # type: ignore[attr-defined]  # as a QueuePool has it
        may_end.set()
        await response.aread()
