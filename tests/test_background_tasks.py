"""A background task works in a transaction of its own, after the response's."""

from __future__ import annotations

from collections.abc import AsyncIterator

from fastapi import BackgroundTasks, FastAPI
from fastapi.responses import StreamingResponse
from sqlalchemy import select
from starlette.background import BackgroundTask

from fastapi_chatdify_db import db
from tests.models import Item
from tests.observing import Observer
from tests.serving import serve


async def test_background_tasks_commit(app: FastAPI, observer: Observer) -> None:
    """A background task sees the request's row, and its own is committed when it ends."""

    @app.get("/")
    async def handler(tasks: BackgroundTasks) -> None:
        db.session.add(Item("request"))

        async def background() -> None:
            assert (await db.session.scalars(select(Item.name))).all() == ["request"]
            db.session.add(Item("background"))

        tasks.add_task(background)

    async with serve(app) as client:
        assert (await client.get("/")).status_code == 200
    assert await observer.names() == ["background", "request"]


async def test_def_background_task_commits(app: FastAPI, observer: Observer) -> None:
    """A plain function runs in a thread, with the synchronous session."""

    @app.get("/")
    async def handler(tasks: BackgroundTasks) -> None:
        tasks.add_task(lambda: db.sync_session.add(Item("thread")))

    async with serve(app) as client:
        assert (await client.get("/")).status_code == 200
    assert await observer.names() == ["thread"]


async def test_background_task_that_fails_rolls_back_only_itself(app: FastAPI, observer: Observer) -> None:
    """The request was committed before the client was told; a later failure does not touch it."""

    @app.get("/")
    async def handler(tasks: BackgroundTasks) -> None:
        db.session.add(Item("request"))

        async def background() -> None:
            db.session.add(Item("background"))
            await db.session.flush()
            raise ZeroDivisionError

        tasks.add_task(background)

    async with serve(app) as client:
        assert (await client.get("/")).status_code == 200
    assert await observer.names() == ["request"]
    assert await observer.in_transaction() == 0


async def test_background_task_after_a_stream_that_wrote_commits(app: FastAPI, observer: Observer) -> None:
    """The stream's rows are committed at its end, and the background task's when that ends."""

    @app.get("/")
    async def handler(tasks: BackgroundTasks) -> StreamingResponse:
        async def body() -> AsyncIterator[bytes]:
            db.session.add(Item("stream"))
            yield b"all"

        async def background() -> None:
            assert await observer.names() == ["stream"]
            db.session.add(Item("background"))

        tasks.add_task(background)
        return StreamingResponse(body())

    async with serve(app) as client:
        assert (await client.get("/")).status_code == 200
    assert await observer.names() == ["background", "stream"]


async def test_callback_of_a_background_task_that_does_nothing_else(app: FastAPI, observer: Observer) -> None:
    """A unit with nothing but a callback is not at rest."""
    ran: list[str] = []

    @app.get("/")
    async def handler(tasks: BackgroundTasks) -> None:
        tasks.add_task(lambda: db.on_commit(lambda: ran.append("callback")))

    async with serve(app) as client:
        assert (await client.get("/")).status_code == 200
    assert ran == ["callback"]


async def test_stream_marked_for_rollback_that_wrote_nothing(app: FastAPI, observer: Observer) -> None:
    """The background task after it has a transaction of its own, which commits."""

    def add() -> None:
        db.sync_session.add(Item("a"))

    @app.get("/")
    async def stream() -> StreamingResponse:
        async def body() -> AsyncIterator[bytes]:
            yield b"first"
            db.rollback_only()

        return StreamingResponse(body(), background=BackgroundTask(add))

    async with serve(app) as client:
        await client.get("/")
    assert await observer.names() == ["a"]
