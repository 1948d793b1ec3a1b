"""A pool that is exhausted, one whose database is not there, and one whose connections all died."""

from __future__ import annotations

import asyncio
import pickle
from concurrent.futures import ThreadPoolExecutor
from socket import AF_INET, SHUT_RDWR, SOCK_STREAM, fromfd
from typing import Any

import psycopg2
import pytest
from anyio import to_thread
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from sqlalchemy import event, make_url, text, update
from sqlalchemy.exc import OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.pool import ConnectionPoolEntry

from fastapi_chatdify_db import Database, DatabaseSettings, DatabaseUnavailable, DBSessionMiddleware, db
from tests.models import Counter, Item
from tests.observing import Observer
from tests.serving import free_socket, serve


def app_on(database: Database) -> FastAPI:
    app = FastAPI()
    app.add_middleware(DBSessionMiddleware)

    @app.get("/slow")
    async def slow() -> None:
        await database.session.execute(text("SELECT pg_sleep(0.2)"))

    @app.get("/slow-def")
    def slow_def() -> None:
        database.sync_session.execute(text("SELECT pg_sleep(0.2)"))

    @app.post("/add")
    async def add() -> None:
        database.session.add(Item("at commit"))

    async def branch() -> None:
        async with database.transaction() as session:
            await session.execute(text("SELECT 1"))

    async def fails() -> None:
        raise ZeroDivisionError

    @app.get("/branches")
    async def branches(one_fails: bool) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(branch())
            group.create_task(fails() if one_fails else branch())

    return app


@pytest.mark.parametrize("path", ["/slow", "/slow-def"])
async def test_connection_that_ends_while_it_is_prepared_is_a_503(path: str) -> None:
    """As when the server goes down right after it has let somebody in, whom nothing was asked for yet."""
    database = Database()

    def cut(connection: Any, _: ConnectionPoolEntry) -> None:
        if hasattr(connection, "driver_connection"):
            connected = connection.driver_connection._transport.get_extra_info("socket")
        else:
            connected = connection
        with fromfd(connected.fileno(), AF_INET, SOCK_STREAM) as own:
            own.shutdown(SHUT_RDWR)

    async with serve(app_on(database)) as client:
        assert (await client.get(path)).status_code == 200
        await database.dispose()
        for engine in (database.async_engine.sync_engine, database.sync_engine):
            event.listen(engine, "connect", cut, insert=True)
        response = await client.get(path)
    assert (response.status_code, response.headers.get("retry-after")) == (503, "1")
    await database.dispose()


@pytest.mark.parametrize("path", ["/slow", "/slow-def"])
async def test_requests_wait_for_a_free_connection(observer: Observer, path: str) -> None:
    """50 requests of 0.2 s share two connections, and all succeed."""
    patient = Database(settings=DatabaseSettings(db_pool_size=2, db_max_overflow=0))
    async with serve(app_on(patient)) as client:
        responses = await asyncio.gather(*(client.get(path) for _ in range(50)))
    assert [response.status_code for response in responses] == [200] * 50
    await patient.dispose()


@pytest.fixture(params=["refused", "no such database", "no standby"])
def unavailable(request: pytest.FixtureRequest, database_url: str) -> Database:
    """One that gives no connection, by a refusal of the operating system's or of PostgreSQL's."""
    url = make_url(database_url).set(database="no_such_database")
    if request.param == "refused":
        with free_socket() as listener:
            url = url.set(host="127.0.0.1", port=listener.getsockname()[1])
    if request.param == "no standby":
        url = make_url(database_url).update_query_dict({"target_session_attrs": "standby"})
    return Database(settings=DatabaseSettings(database_url=url.render_as_string(hide_password=False)))


@pytest.mark.parametrize("path", ["/slow", "/slow-def"])
async def test_database_that_gives_no_connection_is_a_503(
    unavailable: Database, caplog: pytest.LogCaptureFixture, path: str
) -> None:
    """Both drivers raise the same, which an application may handle as SQLAlchemy's error; the log has the reason."""
    app = app_on(unavailable)
    async with serve(app) as client:
        response = await client.get(path)
        assert (response.status_code, response.headers.get("retry-after")) == (503, "1")
    assert "answered 503: DatabaseUnavailable(" in caplog.text
    assert " gives no connection (" in caplog.text

    @app.exception_handler(OperationalError)
    async def handler(request: Request, error: OperationalError) -> JSONResponse:
        return JSONResponse(type(error).__name__, status_code=418)

    app.middleware_stack = None
    async with serve(app) as client:
        assert (await client.get(path)).json() == "DatabaseUnavailable"


async def test_request_that_has_committed_is_not_to_be_repeated(
    app: FastAPI, unavailable: Database, observer: Observer
) -> None:
    """A 503 would ask the client to try again, and so to do twice what stays."""

    @app.post("/")
    async def handler() -> None:
        db.session.add(Item("kept"))
        await db.release()
        await unavailable.session.execute(text("SELECT 1"))

    async with serve(app) as client:
        assert (await client.post("/")).status_code == 500
    assert await observer.names() == ["kept"]


def test_unavailable_database_in_another_process(unavailable: Database) -> None:
    """The error goes through pickle, as out of a pool of processes, and its text is one line."""
    with pytest.raises(DatabaseUnavailable) as caught, unavailable.sync_engine.connect():
        pass
    copied = pickle.loads(pickle.dumps(caught.value))
    assert str(copied) == str(caught.value)
    assert "\n" not in str(copied)
    assert isinstance(caught.value.orig, psycopg2.OperationalError)


@pytest.mark.parametrize("path", ["/slow", "/slow-def"])
async def test_exhausted_pool_answers_503(small_pool: Database, observer: Observer, path: str) -> None:
    """Who waits longer than DB_POOL_TIMEOUT is told when to come back; then there is service at once."""
    async with serve(app_on(small_pool)) as client:
        responses = await asyncio.gather(*(client.get(path) for _ in range(50)))
        refused = [response for response in responses if response.status_code == 503]
        assert {response.status_code for response in responses} == {200, 503}
        assert {response.headers["retry-after"] for response in refused} == {"1"}
        assert refused[0].json() == {"detail": "The database gives no connection, try again."}
        again = await asyncio.gather(*(client.get(path) for _ in range(2)))
        assert [response.status_code for response in again] == [200, 200]
    assert await observer.in_transaction() == 0


async def test_pool_exhausted_at_the_commit_is_503_too(small_pool: Database, observer: Observer) -> None:
    """A handler may need its first connection only to commit."""
    async with serve(app_on(small_pool)) as client, small_pool.transaction() as one, small_pool.transaction() as two:
        await one.execute(text("SELECT 1"))
        await two.execute(text("SELECT 1"))
        response = await client.post("/add")
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")
    assert await observer.names() == []


@pytest.mark.parametrize(("one_fails", "status"), [(False, 503), (True, 500)])
async def test_pool_exhausted_for_the_branches_of_a_task_group(
    small_pool: Database, observer: Observer, one_fails: bool, status: int
) -> None:
    """A group in which nothing else failed is 503 as well; the error of a branch is an error."""
    async with serve(app_on(small_pool)) as client, small_pool.transaction() as one, small_pool.transaction() as two:
        await one.execute(text("SELECT 1"))
        await two.execute(text("SELECT 1"))
        response = await client.get("/branches", params={"one_fails": one_fails})
    assert response.status_code == status


async def test_apps_own_handler_for_an_exhausted_pool_comes_first(small_pool: Database, observer: Observer) -> None:
    """503 is the default, not a rule."""
    app = app_on(small_pool)

    @app.exception_handler(PoolTimeout)
    async def busy(request: Request, error: PoolTimeout) -> JSONResponse:
        return JSONResponse("busy", status_code=429)

    async with serve(app) as client, small_pool.transaction() as one, small_pool.transaction() as two:
        await one.execute(text("SELECT 1"))
        await two.execute(text("SELECT 1"))
        assert (await client.get("/slow")).status_code == 429
        assert (await client.post("/add")).status_code == 429


async def test_many_def_endpoints_on_a_small_pool_do_not_block_each_other(app: FastAPI, observer: Observer) -> None:
    """Threads that wait for a connection do not keep the threads that would free one from running."""
    patient = Database(settings=DatabaseSettings(db_pool_size=2, db_max_overflow=0, db_pool_timeout=300))

    @app.get("/")
    def read_and_return() -> int:
        return int(patient.sync_session.execute(text("SELECT 1")).scalar_one())

    places = to_thread.current_default_thread_limiter().total_tokens
    async with serve(app) as client:
        responses = await asyncio.gather(*(client.get("/") for _ in range(100)))
    assert [response.status_code for response in responses] == [200] * 100
    assert to_thread.current_default_thread_limiter().total_tokens == places
    await patient.dispose()


def test_other_threads_wait_for_a_connection_too(database_url: str) -> None:
    """Those of a script, or of a worker's pool, have no place to lend."""
    database = Database(settings=DatabaseSettings(db_pool_size=1, db_max_overflow=0))

    def read(number: int) -> int:
        with database.sync_transaction() as session:
            return int(session.execute(text(f"SELECT {number} FROM pg_sleep(0.01)")).scalar_one())

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(read, range(8))) == list(range(8))
    database.engines.dispose_sync()


@pytest.mark.parametrize("path", ["/slow", "/slow-def"])
async def test_restarted_database_is_not_noticed(observer: Observer, path: str) -> None:
    """After every connection of an idle pool died, the next 100 requests succeed."""
    async with serve(app_on(db)) as client:
        await asyncio.gather(*(client.get(path) for _ in range(30)))
        await observer.terminate_others()
        responses = await asyncio.gather(*(client.get(path) for _ in range(100)))
    assert [response.status_code for response in responses] == [200] * 100


@pytest.mark.parametrize("path", ["/slow", "/slow-def"])
async def test_without_pre_ping_a_restart_is_noticed(observer: Observer, path: str) -> None:
    """``DB_POOL_PRE_PING=false`` is what it says: the first request on a dead connection fails."""
    trusting = Database(settings=DatabaseSettings(db_pool_pre_ping=False))
    async with serve(app_on(trusting)) as client:
        assert (await client.get(path)).status_code == 200
        await observer.terminate_others()
        assert [(await client.get(path)).status_code for _ in range(2)] == [500, 200]
    await trusting.dispose()


async def test_connection_that_dies_in_a_request_is_an_error_and_is_replaced(observer: Observer) -> None:
    """The request that lost its connection is told; the next one gets a new one."""
    app = app_on(db)

    @app.post("/dies")
    async def dies() -> None:
        db.session.add(Item("dead"))
        await db.session.flush()
        await observer.terminate_others()

    async with serve(app) as client:
        assert (await client.post("/dies")).status_code == 500
        assert (await client.post("/add")).status_code == 200
    assert await observer.names() == ["at commit"]


async def test_pools_are_quiet(tables: None, caplog: pytest.LogCaptureFixture) -> None:
    """An application that logs at INFO has no line for each pool that is made or closed, as with SQLAlchemy's own."""
    caplog.set_level("INFO")
    db.sync_engine.connect().close()
    db.engines.dispose_sync()
    assert caplog.messages == []


async def test_threads_that_wait_for_a_row(counter: Observer) -> None:
    """However many they are, they do not keep who has locked it from its COMMIT, which is in a thread too."""

    def increment() -> None:
        with db.sync_transaction():
            db.sync_session.execute(update(Counter).values(value=Counter.value + 1))

    limiter = to_thread.current_default_thread_limiter()
    limiter.total_tokens = 1
    last_resort = asyncio.get_running_loop().call_later(10, setattr, limiter, "total_tokens", 2)
    async with db.transaction():
        await to_thread.run_sync(lambda: db.sync_session.execute(update(Counter).values(value=Counter.value + 1)))
        waiting = asyncio.create_task(to_thread.run_sync(increment))
        await counter.until_somebody_waits_for_a_lock()
    await waiting
    last_resort.cancel()
    assert limiter.total_tokens == 1
    assert await counter.connection.fetchval("SELECT value FROM counter") == 2
