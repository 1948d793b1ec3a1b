"""Where a unit of work begins and ends, and what is said outside of one."""

from __future__ import annotations

import asyncio
from typing import Annotated

import pytest
from fastapi import Depends, FastAPI
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastapi_chatdify_db import DBSessionMiddleware, NotInSyncUnit, OutsideUnitOfWork, db, get_session
from fastapi_chatdify_db.async_unit_of_work import AsyncUnitOfWork
from tests.models import Item
from tests.observing import Observer
from tests.serving import serve


@pytest.mark.parametrize(
    ("what", "instead"),
    [
        ("session", r"async with db\.transaction\(\) as session"),
        ("sync_session", r"with db\.sync_transaction\(\) as session"),
    ],
)
def test_outside_a_unit_the_error_says_what_to_write(what: str, instead: str) -> None:
    """No unit of work: the error names the middleware and the block to write instead."""
    with pytest.raises(OutsideUnitOfWork, match=instead):
        getattr(db, what)
    with pytest.raises(OutsideUnitOfWork, match="DBSessionMiddleware"):
        db.on_commit(print)


async def test_handler_for_every_exception_is_told_that_it_is_outside(app: FastAPI) -> None:
    """The request has the middleware; but Starlette calls such a handler outside of it."""
    told: list[str] = []

    @app.exception_handler(Exception)
    async def page(request: Request, error: Exception) -> PlainTextResponse:
        with pytest.raises(OutsideUnitOfWork) as caught:
            db.session  # noqa: B018
        told.append(str(caught.value))
        return PlainTextResponse("page", 500)

    @app.get("/")
    async def fail() -> None:
        raise ZeroDivisionError

    async with serve(app) as client:
        assert (await client.get("/")).text == "page"
    [line] = told
    assert "Elsewhere, as in a handler for Exception or 500: async with db.transaction() as session" in line


async def test_unused_unit_touches_no_pool(app: FastAPI, observer: Observer) -> None:
    """A route without the database checks out no connection; asking for the session alone does not either."""

    @app.get("/")
    async def handler() -> str:
        return repr(db.session.in_transaction())

    await db.dispose()
    async with serve(app) as client:
        assert (await client.get("/")).json() == "False"
    assert "Connections in pool: 0" in db.async_engine.pool.status()


async def test_mounted_app_joins_the_unit_around_it(observer: Observer) -> None:
    """An inner app with the middleware of its own shares the outer one's session and its outcome."""
    sessions: list[AsyncSession] = []

    async def inner(request: Request) -> Response:
        sessions.append(db.session)
        db.session.add(Item("inner"))
        return PlainTextResponse("", status_code=int(request.query_params["status"]))

    class Outer:
        def __init__(self, app: ASGIApp) -> None:
            self.app = app

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "http":
                sessions.append(db.session)
            await self.app(scope, receive, send)

    mounted = Starlette(routes=[Route("/", inner, methods=["POST"])], middleware=[Middleware(DBSessionMiddleware)])
    app = Starlette(routes=[Mount("/inner", mounted)], middleware=[Middleware(DBSessionMiddleware), Middleware(Outer)])
    async with serve(app) as client:
        assert (await client.post("/inner/?status=404")).status_code == 404
        assert await observer.names() == []
        assert (await client.post("/inner/?status=200")).status_code == 200
    assert await observer.names() == ["inner"]
    assert sessions[0] is sessions[1]
    assert sessions[2] is sessions[3]


async def test_scope_that_comes_a_second_time(observer: Observer) -> None:
    """A dispatcher that asks one application after the other, with one scope, gets a unit from each."""

    async def write(session: Annotated[AsyncSession, Depends(get_session)], name: str) -> None:
        session.add(Item(name))

    first, second = FastAPI(), FastAPI()
    for application in (first, second):
        application.add_middleware(DBSessionMiddleware)
    second.add_api_route("/", write, methods=["POST"])

    async def ask_both(scope: Scope, receive: Receive, send: Send) -> None:
        async def ignore(message: Message) -> None: ...

        if scope["type"] == "http":
            await first(scope, receive, ignore)
            await second(scope, receive, send)

    async with serve(ask_both) as client:
        assert [(await client.post("/?name=a")).status_code for _ in range(2)] == [200, 500]
    assert await observer.names() == ["a"]


async def test_any_asgi_app_is_served(observer: Observer) -> None:
    """The middleware needs no framework inside: a failed commit is then the server's 500."""

    async def plain(scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http"
        db.session.add(Item("plain"))
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    async def without_lifespan(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await DBSessionMiddleware(plain)(scope, receive, send)

    async with serve(without_lifespan) as client:
        assert (await client.get("/")).text == "ok"
        assert (await client.get("/")).status_code == 500
    assert await observer.names() == ["plain"]


async def test_requests_do_not_share_a_session(app: FastAPI, observer: Observer) -> None:
    """Concurrent requests each have a transaction of their own."""
    together = asyncio.Barrier(5)

    @app.get("/")
    async def handler() -> int:
        await together.wait()
        return int((await db.session.execute(text("SELECT pg_current_xact_id()::text"))).scalar_one())

    async with serve(app) as client:
        responses = await asyncio.gather(*(client.get("/") for _ in range(5)))
    assert len({response.json() for response in responses}) == 5


async def test_block_inside_a_request_is_independent(app: FastAPI, observer: Observer) -> None:
    """``db.transaction()`` commits at its end, whatever becomes of the request around it."""

    @app.post("/")
    async def handler() -> None:
        outer = db.session
        outer.add(Item("request"))
        async with db.transaction() as session:
            assert db.session is session
            session.add(Item("block"))
        assert db.session is outer
        raise ZeroDivisionError

    async with serve(app) as client:
        assert (await client.post("/")).status_code == 500
    assert await observer.names() == ["block"]


async def test_branches_of_gather_have_units_of_their_own(observer: Observer) -> None:
    """Concurrent branches use ``db.transaction()``; one that fails takes only its own rows with it."""

    async def branch(name: str) -> None:
        async with db.transaction() as session:
            session.add(Item(name))
            await session.flush()
            if name == "b":
                raise ZeroDivisionError

    results = await asyncio.gather(*(branch(name) for name in "abc"), return_exceptions=True)
    assert [type(result) for result in results] == [type(None), ZeroDivisionError, type(None)]
    assert await observer.names() == ["a", "c"]


async def test_release_holds_no_connection_while_waiting(app: FastAPI, observer: Observer) -> None:
    """A handler that released its connection waits for something slow with the pool untouched, and goes on."""
    waiting, answered = asyncio.Event(), asyncio.Event()

    @app.post("/")
    async def handler() -> None:
        item = Item("question")
        db.session.add(item)
        await db.release()
        waiting.set()
        await answered.wait()
        item.name = "answer"

    async with serve(app) as client:
        response = asyncio.create_task(client.post("/"))
        await waiting.wait()
        assert await observer.names() == ["question"]
        assert "Current Checked out connections: 0" in db.async_engine.pool.status()
        answered.set()
        assert (await response).status_code == 200
    assert await observer.names() == ["answer"]


async def test_sync_unit_has_no_async_session(observer: Observer) -> None:
    """The error in a synchronous unit names the session that is there."""

    def work() -> None:
        with db.sync_transaction() as session:
            assert db.sync_session is session
            with pytest.raises(OutsideUnitOfWork, match=r"db\.sync_session"):
                db.session  # noqa: B018
            session.add(Item("a"))

    await asyncio.to_thread(work)
    assert await observer.names() == ["a"]


async def test_unit_knows_how_it_ended_last(observer: Observer) -> None:
    """A commit that fails after one that succeeded is no commit."""
    async with AsyncUnitOfWork() as unit:
        db.session.add(Item("a"))
        await db.release()
        assert unit.ended_in_commit
        db.session.add(Item("a"))
        with pytest.raises(IntegrityError):
            await db.release()
        assert not unit.ended_in_commit


async def test_release_of_a_synchronous_unit(tables: None) -> None:
    """There it is a commit of the session, which the error says."""
    with db.sync_transaction(), pytest.raises(NotInSyncUnit, match=r"db\.sync_session\.commit\(\)"):
        await db.release()
