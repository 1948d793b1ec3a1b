"""A unit of work that is cancelled, or loses its connection, at any of its awaits says what became of it."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Iterator
from itertools import count
from typing import Any, Final

import asyncpg
import psycopg2
import pytest
from sqlalchemy import select, text
from sqlalchemy.exc import DBAPIError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Message

from fastapi_chatdify_db import Database, DatabaseSettings, DBSessionMiddleware
from tests.models import Item
from tests.observing import Observer

Interrupt = Callable[["Interruption"], None]
Scenario = Callable[[Database], Coroutine[Any, Any, None]]

NAME: Final = "interrupted"
UNTIL_NOTICED: Final = 5  # turns of the event loop, in which it reads the end of a connection and tells asyncpg


class Interruption:
    """Something that happens to the task at its n-th await, counted over all tasks that it starts."""

    def __init__(self, at: int, happen: Interrupt, *, noticed: bool) -> None:
        self.happened = False
        self.task: asyncio.Task[object] | None = None
        self._until = at
        self._happen = happen
        self._turns = UNTIL_NOTICED if noticed else 0

    def create_task(self, loop: asyncio.AbstractEventLoop, work: Any, **options: Any) -> asyncio.Task[Any]:
        """The loop's task factory: every task is counted."""
        return asyncio.Task(self._step_through(work), loop=loop, **options)

    async def _step_through(self, work: Coroutine[Any, Any, object]) -> object:
        return await _Steps(self, work)

    def before_await(self) -> Generator[None]:
        """Called before each await, and itself awaited."""
        self._until -= 1
        if self._until == 0:
            self.happened = True
            self._happen(self)
            for _ in range(self._turns):
                yield


class _Steps:
    """A coroutine, with what comes before each of its awaits."""

    def __init__(self, interruption: Interruption, work: Coroutine[Any, Any, object]) -> None:
        self._interruption = interruption
        self._work = work

    def __await__(self) -> Generator[Any, Any, object]:
        error: BaseException | None = None
        while True:
            try:
                awaited = self._work.send(None) if error is None else self._work.throw(error)
            except StopIteration as end:
                return end.value
            try:
                yield from self._interruption.before_await()
                yield awaited
            except BaseException as raised:  # goes to who awaits
                error = raised
            else:
                error = None


def cancel(interruption: Interruption) -> None:
    """As a time limit or a server does whose client has left."""
    assert interruption.task is not None
    interruption.task.cancel()


@pytest.fixture
def kill(database_url: str) -> Iterator[Interrupt]:
    """As a restart of the server does: the connections under test are gone, which their process may not know yet."""
    connection = psycopg2.connect(database_url)
    connection.autocommit = True

    def terminate(_: Interruption) -> None:
        query = "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE application_name = %s"
        connection.cursor().execute(query, [NAME])

    yield terminate
    connection.close()


@pytest.fixture
async def database(tables: None) -> AsyncIterator[Database]:
    """One with a single connection, so that a lost one is missed."""
    settings = DatabaseSettings(db_application_name=NAME, db_pool_size=1, db_max_overflow=0, db_pool_timeout=2)
    made = Database(settings=settings)
    yield made
    await made.dispose()


async def something_else() -> None:
    await asyncio.sleep(0)


async def read(database: Database) -> None:
    async with database.transaction() as session:
        await session.scalars(select(Item))
        await something_else()
        await session.scalars(select(Item))


async def write(database: Database) -> None:
    async with database.transaction() as session:
        await session.scalars(select(Item))
        session.add(Item("a"))
        await session.flush()
        await something_else()


async def savepoint(database: Database) -> None:
    async with database.transaction() as session:
        async with session.begin_nested():
            session.add(Item("a"))
        await session.execute(text("INSERT INTO item (name) VALUES ('b')"))


async def in_two_parts(database: Database) -> None:
    async with database.transaction() as session:
        session.add(Item("a"))
        await database.release()
        await something_else()
        session.add(Item("b"))


async def in_a_thread(database: Database) -> None:
    def work() -> None:
        database.sync_session.add(Item("a"))
        database.sync_session.flush()

    async with database.transaction():
        await run_in_threadpool(work)  # unlike asyncio.to_thread, a cancellation waits for the thread


async def callback(database: Database) -> None:
    async def look() -> None:
        await database.session.scalars(select(Item))

    async with database.transaction() as session:
        session.add(Item("a"))
        database.on_commit(look)


async def request(database: Database) -> None:
    """Raises unless the client was told 200."""
    told: list[int] = []

    async def handler(request: Request) -> Response:
        database.session.add(Item("a"))
        await database.session.flush()
        await something_else()
        return JSONResponse("fine")

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            told.append(message["status"])

    app = DBSessionMiddleware(Starlette(routes=[Route("/", handler)]))
    scope = {"type": "http", "method": "GET", "path": "/", "headers": [], "query_string": b""}
    try:
        await app(scope, receive, send)
    except asyncio.CancelledError:
        if told != [200]:
            raise
    assert told == [200]


PARTS: dict[Scenario, list[list[str]]] = {
    read: [[]],
    write: [[], ["a"]],
    savepoint: [[], ["a", "b"]],
    in_two_parts: [[], ["a"], ["a", "b"]],
    in_a_thread: [[], ["a"]],
    callback: [[], ["a"]],
    request: [[], ["a"]],
}
"""What may be committed, part by part; who is told of no error finds the last."""


async def succeeds(scenario: Scenario, database: Database, interruption: Interruption) -> bool:
    """Whether it ends without an error; one that it raises has to be the interruption's."""
    loop = asyncio.get_running_loop()
    loop.set_task_factory(interruption.create_task)
    interruption.task = loop.create_task(scenario(database))
    try:
        await interruption.task
    except (DBAPIError, asyncpg.PostgresError, asyncpg.InterfaceError, OSError, asyncio.CancelledError):
        return False
    finally:
        loop.set_task_factory(None)
    return True


SCENARIOS = [*((scenario, "open") for scenario in PARTS), (write, "new")]


@pytest.mark.parametrize(("scenario", "connection"), SCENARIOS, ids=lambda value: getattr(value, "__name__", value))
@pytest.mark.parametrize("kind", ["cancelled", "killed", "killed and noticed"])
async def test_interrupted_at_every_await(
    database: Database,
    observer: Observer,
    kill: Interrupt,
    scenario: Scenario,
    connection: str,
    kind: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Its rows are there part by part, all of them if it succeeded, and its connection is free again."""
    happen = cancel if kind == "cancelled" else kill
    for at in count(1):
        await (read(database) if connection == "open" else database.dispose())
        interruption = Interruption(at, happen, noticed=kind == "killed and noticed")
        succeeded = await succeeds(scenario, database, interruption)
        names = await observer.names()
        assert names in PARTS[scenario], at
        assert names == PARTS[scenario][-1] or not succeeded, at
        assert await observer.in_transaction() == 0, at
        assert database.async_engine.pool.status().endswith("Current Checked out connections: 0"), at
        await observer.connection.execute("DELETE FROM item")
        if not interruption.happened:
            break
    assert succeeded
    assert at > 3
    gc.collect()
    assert "non-checked-in" not in caplog.text
