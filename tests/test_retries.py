"""``retries=`` runs a request again when PostgreSQL asks for it."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from starlette.types import ASGIApp, Receive, Scope, Send

from fastapi_chatdify_db import DBSessionMiddleware, db
from tests.failing import ASKS_TO_RETRY, raising
from tests.models import Counter
from tests.observing import Observer
from tests.serving import serve

CLIENTS, INCREMENTS = 20, 20


def counting_app(retries: int) -> FastAPI:
    app = FastAPI()
    app.add_middleware(DBSessionMiddleware, retries=retries)

    @app.post("/increment")
    async def increment(request: Request) -> int:
        await db.session.connection(execution_options={"isolation_level": "SERIALIZABLE"})
        counter = await db.session.get_one(Counter, 1)
        counter.value += (await request.json())["by"]
        await db.session.flush()
        return counter.value

    @app.post("/increment-def")
    def increment_def(body: dict[str, int]) -> int:
        db.sync_session.connection(execution_options={"isolation_level": "SERIALIZABLE"})
        counter = db.sync_session.get_one(Counter, 1)
        counter.value += body["by"]
        return counter.value

    return app


@pytest.mark.parametrize("path", ["/increment", "/increment-def"])
@pytest.mark.parametrize("handled", [False, True], ids=["unhandled", "with a handler"])
async def test_contended_increments_all_succeed(counter: Observer, path: str, handled: bool) -> None:
    """20 clients increment one row 20 times each at SERIALIZABLE: with one retry all get 200, and the sum is exact."""
    app = counting_app(retries=1)
    if handled:

        @app.exception_handler(DBAPIError)
        async def handler(request: Request, error: DBAPIError) -> JSONResponse:
            return JSONResponse("database error", status_code=500)

    async with serve(app) as client:

        async def increment() -> list[int]:
            return [(await client.post(path, json={"by": 1})).status_code for _ in range(INCREMENTS)]

        statuses = await asyncio.gather(*(increment() for _ in range(CLIENTS)))
    assert {status for each in statuses for status in each} == {200}
    assert await counter.connection.fetchval("SELECT value FROM counter") == CLIENTS * INCREMENTS


async def test_without_retries_a_serialization_failure_is_an_error(counter: Observer) -> None:
    """Running a request again is opt-in, for its other effects happen again too."""
    async with serve(counting_app(retries=0)) as client:
        responses = await asyncio.gather(*(client.post("/increment", json={"by": 1}) for _ in range(CLIENTS)))
    succeeded = [response.status_code for response in responses].count(200)
    assert succeeded < CLIENTS
    assert await counter.connection.fetchval("SELECT value FROM counter") == succeeded


async def test_deadlock_is_retried(counter: Observer) -> None:
    """Two requests that lock two rows in opposite order both succeed."""
    await counter.connection.execute("INSERT INTO counter (id, value) VALUES (2, 0)")
    app = FastAPI()
    app.add_middleware(DBSessionMiddleware, retries=3)
    both_hold_one = asyncio.Barrier(2)
    runs = 0

    @app.post("/{first}/{second}")
    async def lock(first: int, second: int) -> None:
        nonlocal runs
        runs += 1
        (await db.session.get_one(Counter, first, with_for_update=True)).value += 1
        if runs <= 2:
            await both_hold_one.wait()
        (await db.session.get_one(Counter, second, with_for_update=True)).value += 1

    async with serve(app) as client:
        responses = await asyncio.gather(client.post("/1/2"), client.post("/2/1"))
    assert [response.status_code for response in responses] == [200, 200]
    assert runs == 3
    assert await counter.connection.fetchval("SELECT sum(value) FROM counter") == 4


@pytest.mark.parametrize(
    ("statement", "expected"),
    [(ASKS_TO_RETRY, 3), ("SELECT 1 / 0", 1)],
    ids=["asked to retry", "another failure"],
)
async def test_request_that_never_succeeds_is_an_error_after_its_retries(
    counter: Observer, statement: str, expected: int
) -> None:
    """``retries=2`` is three runs, of what PostgreSQL asks for; then the failure goes the way of any exception."""
    app = FastAPI()
    app.add_middleware(DBSessionMiddleware, retries=2)
    runs = 0

    @app.post("/")
    async def fail() -> None:
        nonlocal runs
        runs += 1
        await db.session.execute(text(statement))

    async with serve(app) as client:
        assert (await client.post("/")).status_code == 500
    assert runs == expected


async def test_request_run_again_waits_for_no_one_for_long(counter: Observer) -> None:
    """Neither for one before it that waits for something slow, nor do others wait for its answer's last byte."""
    app = FastAPI()
    app.add_middleware(DBSessionMiddleware, retries=1)
    slow_began, nobody_waits = asyncio.Event(), asyncio.Event()
    runs: list[str] = []

    @app.post("/")
    async def handle(who: str) -> StreamingResponse:
        runs.append(who)
        if who == "slow":
            slow_began.set()
            await nobody_waits.wait()
        elif runs.count("again") == 1:
            await db.session.execute(text(ASKS_TO_RETRY))
        return StreamingResponse(body(who))

    async def body(who: str) -> AsyncIterator[str]:
        yield who
        if who == "again":
            await nobody_waits.wait()

    async with serve(app) as client, asyncio.TaskGroup() as others:
        slow = others.create_task(client.post("/?who=slow"))
        await slow_began.wait()
        async with client.stream("POST", "/?who=again") as again:
            assert again.status_code == 200
            assert (await client.post("/?who=newcomer")).text == "newcomer"
            nobody_waits.set()
            assert await again.aread() == b"again"
    assert slow.result().text == "slow"
    assert runs == ["slow", "again", "again", "newcomer"]


async def test_body_is_received_again_in_full(counter: Observer) -> None:
    """A body that came in pieces, half read by the first run, is whole for the second."""
    app = FastAPI()
    app.add_middleware(DBSessionMiddleware, retries=1)
    bodies: list[bytes] = []

    @app.post("/")
    async def count(request: Request) -> int:
        if not bodies:
            async for piece in request.stream():
                bodies.append(piece)
                await db.session.execute(text(raising("40P01")))
        return len(await request.body())

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(10):
            yield b"x" * 100_000

    async with serve(app) as client:
        response = await client.post("/", content=pieces())
    assert (response.status_code, response.json()) == (200, 1_000_000)
    assert len(bodies) == 1


class Visit:
    """Middleware that tells what is inside of it, and keeps what that leaves behind, as a cookie would."""

    def __init__(self, app: ASGIApp, kept: list[object]) -> None:
        self.app = app
        self.kept = kept

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope.setdefault("state", {})["tenant"] = "a"
        scope["session"] = {"basket": ["apple"]}
        await self.app(scope, receive, send)
        if scope["type"] == "http":
            self.kept.append((scope["state"]["tenant"], scope["session"], scope["mark"], "route" in scope))


async def test_body_is_not_kept(counter: Observer) -> None:
    """Nothing keeps a request's body, not even the connections made for it, whose contexts live as long as they do."""
    async with serve(counting_app(retries=1)) as client:
        assert (await client.post("/increment", json={"by": 1})).status_code == 200
        gc.collect()
        assert [kept for kept in gc.get_objects() if type(kept).__name__ == "_RecordedRequest"] == []


async def test_scope_is_new_for_each_run(counter: Observer) -> None:
    """What a run has written into it, ``request.state`` or ``request.session``, the next one does not find."""
    app = FastAPI()
    kept: list[object] = []
    app.add_middleware(DBSessionMiddleware, retries=2)
    app.add_middleware(Visit, kept=kept)
    found: list[object] = []

    @app.post("/")
    async def write(request: Request) -> None:
        found.append((request.scope.get("mark"), getattr(request.state, "mark", None), request.state.tenant))
        request.scope["mark"] = request.state.mark = request.state.tenant = "written"
        request.session["basket"].append("pear")
        request.session["runs"] = request.session.get("runs", 0) + 1
        if len(found) < 3:
            await db.session.execute(text(ASKS_TO_RETRY))

    async with serve(app) as client:
        assert (await client.post("/")).status_code == 200
    assert found == [(None, None, "a")] * 3
    assert kept == [("written", {"basket": ["apple", "pear"], "runs": 1}, "written", True)]


class Session(dict[str, object]):
    """As Starlette's: what writes into it makes ``SessionMiddleware`` set the cookie."""

    modified = False

    def clear(self) -> None:
        self.modified = True
        super().clear()


async def test_session_that_nobody_changed(counter: Observer) -> None:
    """Its cookie, which another request may have replaced meanwhile, is not set again."""
    app = FastAPI()
    app.add_middleware(DBSessionMiddleware, retries=1)
    session = Session(basket=["apple"])
    runs = []

    async def with_session(scope: Scope, receive: Receive, send: Send) -> None:
        await app({**scope, "session": session}, receive, send)

    @app.post("/")
    async def write() -> None:
        runs.append(1)
        if len(runs) == 1:
            await db.session.execute(text(ASKS_TO_RETRY))

    async with serve(with_session) as client:
        assert (await client.post("/")).status_code == 200
    assert (len(runs), session.modified) == (2, False)


async def test_stream_is_not_run_again(counter: Observer) -> None:
    """The client has a part of it already; it gets an incomplete body."""
    app = FastAPI()
    app.add_middleware(DBSessionMiddleware, retries=2)
    runs = 0

    @app.get("/")
    async def stream() -> StreamingResponse:
        nonlocal runs
        runs += 1

        async def body() -> AsyncIterator[bytes]:
            yield b"first"
            await db.session.execute(text(ASKS_TO_RETRY))

        return StreamingResponse(body())

    async with serve(app) as client:
        with pytest.raises(httpx.RemoteProtocolError):
            await client.get("/")
    assert runs == 1


@pytest.mark.parametrize("retries", [0, 1])
async def test_last_failure_is_the_applications(counter: Observer, retries: int) -> None:
    """Without retries, and after the last one, the application's own handler is asked."""
    app = FastAPI()
    app.add_middleware(DBSessionMiddleware, retries=retries)

    @app.exception_handler(DBAPIError)
    async def busy(request: Request, error: DBAPIError) -> JSONResponse:
        return JSONResponse("try again later", status_code=409)

    @app.post("/")
    async def fail() -> None:
        await db.session.execute(text(ASKS_TO_RETRY))

    async with serve(app) as client:
        assert (await client.post("/")).status_code == 409
