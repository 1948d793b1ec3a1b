"""What the server is sent: one response, begun once and ended once, whatever fails."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from sqlalchemy.exc import IntegrityError
from starlette.background import BackgroundTask
from starlette.types import Receive, Scope, Send

from fastapi_chatdify_db import DatabaseUnavailable, db
from tests.asking_directly import ask_directly
from tests.models import Item
from tests.observing import Observer


async def test_response_is_started_once(observer: Observer) -> None:
    """A commit that fails at a stream's end is raised to the server, not answered."""
    app = FastAPI()

    @app.exception_handler(IntegrityError)
    async def conflict(request: Request, error: IntegrityError) -> JSONResponse:
        return JSONResponse("taken", status_code=409)

    @app.get("/")
    async def stream() -> StreamingResponse:
        async def body() -> AsyncIterator[bytes]:
            db.session.add_all([Item("same"), Item("same")])
            yield b"first"

        return StreamingResponse(body())

    sent: list[str] = []
    with pytest.raises(IntegrityError):
        await ask_directly(app, sent)
    assert sent == ["http.response.start", "http.response.body"]


async def test_failed_commit_that_the_application_answers_itself(observer: Observer) -> None:
    """Whatever caught the error where the response was sent, the server hears of none."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        db.session.add_all([Item("a"), Item("a")])
        try:
            await JSONResponse("fine")(scope, receive, send)
        except IntegrityError:
            await JSONResponse("taken", status_code=409)(scope, receive, send)

    sent: list[str] = []
    await ask_directly(app, sent)
    assert sent == ["http.response.start", "http.response.body"]


async def test_answer_that_finds_no_connection_halfway(observer: Observer) -> None:
    """A handler's own stream that breaks off is incomplete, and not answered by a 503 on top."""
    app = FastAPI()

    @app.exception_handler(IntegrityError)
    async def conflict(request: Request, error: IntegrityError) -> StreamingResponse:
        async def chunks() -> AsyncIterator[bytes]:
            yield b"first"
            raise DatabaseUnavailable("away")

        return StreamingResponse(chunks(), status_code=409)

    @app.get("/")
    async def add() -> None:
        db.session.add_all([Item("a"), Item("a")])

    sent: list[str] = []
    with pytest.raises(DatabaseUnavailable):
        await ask_directly(app, sent)
    assert sent == ["http.response.start", "http.response.body"]


async def test_background_task_after_a_file_that_the_server_sends(observer: Observer, tmp_path: Path) -> None:
    """Where the server takes a path in place of the body, that ends the response too."""
    file = tmp_path / "file"
    file.write_text("content")
    app = FastAPI()

    @app.get("/")
    async def handler() -> FileResponse:
        return FileResponse(file, background=BackgroundTask(lambda: db.sync_session.add(Item("background"))))

    sent: list[str] = []
    await ask_directly(app, sent, extensions={"http.response.pathsend": {}})
    assert sent == ["http.response.start", "http.response.pathsend"]
    assert await observer.names() == ["background"]
