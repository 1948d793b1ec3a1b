"""Whatever a request does, what its client is told and what is kept are what the documentation says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from starlette.types import ASGIApp, Receive, Scope, Send

from tests.observing import PATIENCE, Observer
from tests.random_requests.foretelling import Foretelling, Outcome
from tests.random_requests.programs import PROGRAMS, TAKEN, Program
from tests.random_requests.running import Run
from tests.serving import serve


@dataclass
class Server:
    """Serves one program after the other."""

    app: ASGIApp | None = None
    client: httpx.AsyncClient = field(init=False)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    """Whether the request's background task and its dependencies have ended, too."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert self.app is not None
        try:
            await self.app(scope, receive, send)
        finally:
            self.ended.set()

    async def outcome(self, program: Program, observer: Observer) -> Outcome:
        """What becomes of a program."""
        await observer.connection.execute("DELETE FROM item WHERE name NOT LIKE 'taken %'")
        run = Run(program)
        self.app = run.application()
        self.ended.clear()
        status, is_complete = 0, False
        try:
            async with self.client.stream("GET", "/") as response:
                status = response.status_code
                await response.aread()
                is_complete = True
        except httpx.RemoteProtocolError:
            pass  # the body is cut short
        async with asyncio.timeout(PATIENCE):
            await self.ended.wait()
        assert await observer.in_transaction() == 0
        rows = [name for name in await observer.names() if not name.startswith("taken")]
        return Outcome(status, is_complete, sorted(rows + run.called))


@pytest.fixture
async def server(observer: Observer) -> AsyncIterator[Server]:
    await observer.connection.executemany(
        "INSERT INTO item (name) VALUES ($1)", [(f"taken {number:02}",) for number in range(TAKEN)]
    )
    server = Server()
    async with serve(server) as server.client:
        yield server


@given(program=PROGRAMS)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_promise_is_kept(server: Server, observer: Observer, program: Program) -> None:
    """The status, the body, the rows and the callbacks; and no transaction is left open."""
    assert await server.outcome(program, observer) == Foretelling(program).outcome()
