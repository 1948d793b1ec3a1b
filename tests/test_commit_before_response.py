"""No success is reported before the commit."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Annotated

import httpx
import pytest
from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from sqlalchemy import event
from sqlalchemy.exc import DBAPIError, IntegrityError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from fastapi_chatdify_db import DBSessionMiddleware, db, get_session
from tests.models import Item
from tests.observing import Observer
from tests.serving import serve

PATHS = ["/json", "/streaming", "/def"]


@pytest.fixture
def app() -> FastAPI:
    app = FastAPI()
    app.add_middleware(DBSessionMiddleware)

    @app.post("/json")
    async def json(name: str) -> str:
        db.session.add(Item(name))
        return name

    @app.post("/streaming")
    async def streaming(name: str) -> StreamingResponse:
        db.session.add(Item(name))

        async def body() -> AsyncIterator[bytes]:
            yield b"first"
            await app.state.may_end.wait()
            yield b"last"

        app.state.may_end = asyncio.Event()
        return StreamingResponse(body())

    @app.post("/def")
    def plain_def(name: str) -> str:
        db.sync_session.add(Item(name))
        return name

    return app


async def post_and_end(app: FastAPI, client: httpx.AsyncClient, path: str) -> httpx.Response:
    async with client.stream("POST", path, params={"name": "a"}) as response:
        if path == "/streaming" and response.is_success:
            app.state.may_end.set()
        await response.aread()
        return response


@pytest.mark.parametrize("path", PATHS)
async def test_row_is_visible_with_the_status_line(app: FastAPI, observer: Observer, path: str) -> None:
    """Another connection sees the row when the client has read the status line."""
    async with serve(app) as client, client.stream("POST", path, params={"name": "a"}) as response:
        assert response.status_code == 200
        assert await observer.names() == ["a"]
        assert await observer.in_transaction() == 0
        if path == "/streaming":
            app.state.may_end.set()
        await response.aread()


@pytest.mark.parametrize("path", PATHS)
async def test_failed_commit_is_the_apps_conflict(app: FastAPI, observer: Observer, path: str) -> None:
    """A constraint checked at COMMIT reaches the same handler as one checked at once."""

    @app.exception_handler(IntegrityError)
    async def conflict(request: Request, error: IntegrityError) -> JSONResponse:
        return JSONResponse({"detail": "taken"}, status_code=409)

    async with serve(app) as client:
        assert (await post_and_end(app, client, path)).status_code == 200
        response = await post_and_end(app, client, path)
    assert (response.status_code, response.json()) == (409, {"detail": "taken"})
    assert await observer.names() == ["a"]
    assert await observer.in_transaction() == 0


@pytest.mark.parametrize("path", PATHS)
async def test_failed_commit_without_a_handler_is_500(app: FastAPI, observer: Observer, path: str) -> None:
    """Without a handler for it, a failed commit is an internal error, never a success."""
    async with serve(app) as client:
        assert (await post_and_end(app, client, path)).status_code == 200
        response = await post_and_end(app, client, path)
    assert (response.status_code, response.text) == (500, "Internal Server Error")
    assert await observer.names() == ["a"]


class Passing(BaseHTTPMiddleware):
    """Middleware of the kind that runs the response in a task of its own."""

    async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        response = await call_next(request)
        response.headers["x-passed"] = "yes"
        return response


@pytest.mark.parametrize("path", PATHS)
async def test_base_http_middleware_outside_changes_nothing(app: FastAPI, observer: Observer, path: str) -> None:
    """With Starlette's BaseHTTPMiddleware added later, rows precede the status line and a failed commit is an error."""
    app.add_middleware(Passing)
    async with serve(app) as client:
        async with client.stream("POST", path, params={"name": "a"}) as response:
            assert (response.status_code, response.headers["x-passed"]) == (200, "yes")
            assert await observer.names() == ["a"]
            if path == "/streaming":
                app.state.may_end.set()
            await response.aread()
        assert (await post_and_end(app, client, path)).status_code == 500
    assert await observer.names() == ["a"]
    assert await observer.in_transaction() == 0


@pytest.mark.parametrize("inside", [True, False])
async def test_base_http_middleware_inside_is_reported(inside: bool, caplog: pytest.LogCaptureFixture) -> None:
    """The log names the middleware whose responses would run beside the commit, be there others between, or none."""
    app = FastAPI()
    if inside:
        app.add_middleware(Passing)
        app.add_middleware(GZipMiddleware)
    db.init_app(app)
    app.add_middleware(Passing)
    async with serve(app):
        pass
    reports = [each.getMessage() for each in caplog.records if each.name == "fastapi_chatdify_db.middleware"]
    assert [each.partition(" ")[0] for each in reports] == [f"{__name__}.Passing.dispatch"] * inside


async def test_base_http_middleware_of_a_part_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    """So is that of a mounted application, or of one route."""

    def answer(request: Request) -> JSONResponse:
        return JSONResponse("")

    mounted = FastAPI()

    mounted.add_middleware(GZipMiddleware)

    @mounted.middleware("http")
    async def of_the_mounted(request: Request, call_next: RequestResponseEndpoint) -> Response:
        return await call_next(request)

    class Private:
        def __init__(self, app: ASGIApp) -> None:
            self._app = app

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            await self._app(scope, receive, send)

    app = FastAPI(routes=[Route("/", answer, middleware=[Middleware(Private), Middleware(Passing)])])
    app.mount("/mounted", mounted)
    db.init_app(app)
    async with serve(app):
        pass
    reports = [each.getMessage() for each in caplog.records if each.name == "fastapi_chatdify_db.middleware"]
    assert sorted(each.partition(" ")[0].rpartition(".")[2] for each in reports) == ["dispatch", "of_the_mounted"]


@pytest.mark.parametrize("by_fastapi", [False, True])
async def test_limit_of_the_body_outside(observer: Observer, by_fastapi: bool) -> None:
    """Starlette puts a 413 in place of the answer of an endpoint that does not read its body."""
    app = FastAPI(max_body_size=10) if by_fastapi else FastAPI()
    app.add_middleware(DBSessionMiddleware)
    if not by_fastapi:
        app.add_middleware(RequestBodyLimitMiddleware, max_body_size=10)
    told: list[str] = []

    @app.post("/")
    async def handler(name: str) -> None:
        db.session.add(Item(name))
        db.on_commit(lambda: told.append(name))

    async def of_unknown_length() -> AsyncIterator[bytes]:
        yield b"x"

    async with serve(app) as client:
        assert (await client.post("/?name=long", content=b"x" * 11)).status_code == 413
        assert (await client.post("/?name=short", content=b"x" * 10)).status_code == 200
        assert (await client.post("/?name=unknown", content=of_unknown_length())).status_code == 200
    assert (await observer.names(), told) == (["short", "unknown"], ["short", "unknown"])


async def test_most_specific_handler_answers(app: FastAPI, observer: Observer) -> None:
    """Of several handlers the one of the nearest class is asked, also when it is a plain function."""

    def answer(status: int) -> Callable[[Request, Exception], JSONResponse]:
        return lambda request, error: JSONResponse(type(error).__name__, status_code=status)

    for error, status in [(SQLAlchemyError, 418), (IntegrityError, 409), (DBAPIError, 421)]:
        app.add_exception_handler(error, answer(status))
    async with serve(app) as client:
        await post_and_end(app, client, "/json")
        response = await post_and_end(app, client, "/json")
    assert (response.status_code, response.json()) == (409, "IntegrityError")


async def test_handler_by_status_code(app: FastAPI, observer: Observer) -> None:
    """What is raised while committing may be an HTTPException; then the handler of its status answers."""

    @app.exception_handler(409)
    async def conflict(request: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse({"by": "status"}, status_code=409)

    @app.exception_handler(IntegrityError)
    async def never(request: Request, error: IntegrityError) -> JSONResponse:
        raise HTTPException(409)

    @app.post("/check")
    async def check() -> str:
        def refuse(session: object) -> None:
            raise HTTPException(409)

        db.session.add(Item("a"))
        event.listen(db.session.sync_session, "before_commit", refuse)
        return "fine"

    async with serve(app) as client:
        response = await client.post("/check")
    assert (response.status_code, response.json()) == (409, {"by": "status"})
    assert await observer.names() == []


async def test_handler_of_500_answers_a_failed_commit(app: FastAPI, observer: Observer) -> None:
    """The application's own error page is also the failed commit's."""

    @app.exception_handler(500)
    async def page(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"page": "ours"}, status_code=500)

    async with serve(app) as client:
        await post_and_end(app, client, "/json")
        response = await post_and_end(app, client, "/json")
    assert (response.status_code, response.json()) == (500, {"page": "ours"})


async def test_handler_that_writes_is_committed_by_its_own_status(app: FastAPI, observer: Observer) -> None:
    """A handler of a failed commit has a fresh transaction, under the same rule as any response."""

    @app.exception_handler(IntegrityError)
    async def rename(request: Request, error: IntegrityError) -> JSONResponse:
        db.session.add(Item("renamed"))
        return JSONResponse("renamed", status_code=201)

    async with serve(app) as client:
        await post_and_end(app, client, "/json")
        assert (await post_and_end(app, client, "/json")).status_code == 201
        assert (await post_and_end(app, client, "/json")).status_code == 500
    assert await observer.names() == ["a", "renamed"]


async def test_dependency_inside_the_middleware_is_the_units_session(app: FastAPI, observer: Observer) -> None:
    """``Depends(get_session)`` is ``db.session``, so a plain ``Depends`` keeps the promise too."""

    @app.post("/depends")
    async def depends(name: str, session: Annotated[AsyncSession, Depends(get_session)]) -> bool:
        session.add(Item(name))
        return session is db.session

    async with serve(app) as client:
        first = await client.post("/depends", params={"name": "a"})
        assert (first.status_code, first.json()) == (200, True)
        assert (await client.post("/depends", params={"name": "a"})).status_code == 500
    assert await observer.names() == ["a"]
