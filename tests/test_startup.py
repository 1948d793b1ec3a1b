"""The application comes up when its database does, together with its siblings."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any

import asyncpg
import pytest
from celery import Celery
from fastapi import FastAPI
from sqlalchemy import event, make_url, text
from sqlalchemy.exc import DBAPIError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

import celery_ext
from fastapi_chatdify_db import Database, DatabaseSettings, DatabaseUnavailable, DBSessionMiddleware, db
from tests.models import Item
from tests.observing import Observer
from tests.serving import free_socket, serve

CREATE_IN_A_PROCESS = """
import asyncio, os
from fastapi_chatdify_db import db
import tests.models

async def main():
    async with db.lifespan(None):
        async with db.transaction() as session:
            session.add(tests.models.Item(str(os.getpid())))

asyncio.run(main())
"""


@pytest.mark.parametrize("turn", range(3))
async def test_eight_processes_create_the_tables_at_once(own_database: str, turn: int) -> None:
    """On an empty database all of them come up."""
    environment = {**os.environ, "DATABASE_URL": own_database, "DB_STATEMENT_TIMEOUT": "5"}
    processes = [
        await asyncio.create_subprocess_exec(sys.executable, "-c", CREATE_IN_A_PROCESS, env=environment)
        for _ in range(8)
    ]
    assert [await process.wait() for process in processes] == [0] * 8
    connection = await asyncpg.connect(own_database)
    assert await connection.fetchval("SELECT count(*) FROM item") == 8
    await connection.close()


class Forwarder:
    """A port that leads to the real database, once it is opened."""

    def __init__(self, database_url: str, host: str = "127.0.0.1") -> None:
        self._target = make_url(database_url)
        self._host = host
        with free_socket() as listener:
            self.port: int = listener.getsockname()[1]
        url = self._target.difference_update_query(["host", "port"]).set(host=host, port=self.port)
        self.url = url.render_as_string(hide_password=False)
        self._forwarded: list[asyncio.Task[None]] = []

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[None]:
        async with await asyncio.start_server(self._accept, self._host, self.port):
            yield
            await asyncio.gather(*self._forwarded)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._forwarded.append(asyncio.create_task(self._forward(reader, writer)))

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if directory := self._target.query.get("host"):
            socket = f"{directory}/.s.PGSQL.{self._target.port or 5432}"
            upstream, downstream = await asyncio.open_unix_connection(socket)
        else:
            host = self._target.host or "localhost"
            upstream, downstream = await asyncio.open_connection(host, self._target.port or 5432)
        await asyncio.gather(self._copy(reader, downstream), self._copy(upstream, writer))

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(65536):
                writer.write(data)
            writer.close()
            await writer.wait_closed()


class OpensAtTheThirdTry(logging.Handler):
    """Notes what is logged, and opens the database's door when the third try has failed."""

    def __init__(self, door: asyncio.Event) -> None:
        super().__init__()
        self.lines: list[str] = []
        self._door = door

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())
        if len(self.lines) == 3:
            self._door.set()


async def test_database_may_come_up_after_the_app(observer: Observer, database_url: str) -> None:
    """The lifespan waits, with one log line a try, and then serves."""
    forwarder, door = Forwarder(database_url), asyncio.Event()
    late = Database("late", settings=DatabaseSettings(database_url=forwarder.url))
    handler = OpensAtTheThirdTry(door)
    logger = logging.getLogger("fastapi_chatdify_db.startup")
    logger.addHandler(handler)

    async def use() -> object:
        async with late.lifespan(None), late.transaction() as session:
            return await session.scalar(text("SELECT 1"))

    try:
        used = asyncio.create_task(use())
        opening = asyncio.create_task(door.wait())
        await asyncio.wait([used, opening], return_when=asyncio.FIRST_COMPLETED)
        opening.cancel()
        async with forwarder.opened():
            assert await used == 1
    finally:
        logger.removeHandler(handler)
    for number, line in enumerate(handler.lines, start=1):
        assert f"(try {number})" in line
        assert "\n" not in line


async def test_waiting_ends_with_a_clear_error() -> None:
    """After DB_STARTUP_TIMEOUT the error says which database, and which variables to look at, without the password."""
    with free_socket() as listener:
        port = listener.getsockname()[1]
    url = f"postgresql://user:secret@127.0.0.1:{port}/gone"
    gone = Database(settings=DatabaseSettings(database_url=url, db_startup_timeout=0.3))
    with pytest.raises(DatabaseUnavailable, match=rf"127\.0\.0\.1:{port}/gone .*0\.3 s.*DB_STARTUP_TIMEOUT") as caught:
        async with gone.lifespan(None):
            pass
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


async def test_refusal_for_good_is_not_waited_for(database_url: str) -> None:
    """A role that is not there will not come; asyncpg's error for it says which."""
    url = make_url(database_url).set(username="no_such_role")
    settings = DatabaseSettings(database_url=url.render_as_string(hide_password=False), db_startup_timeout=60)
    async with asyncio.timeout(10):
        with pytest.raises(DatabaseUnavailable, match=r"\(Invalid\w+Error: .*no_such_role"):
            async with Database(settings=settings).lifespan(None):
                pass


async def test_no_waiting_is_one_try(database_url: str) -> None:
    """With DB_STARTUP_TIMEOUT=0 a database that is there is served from, and one that is not fails at once."""
    there = Database(settings=DatabaseSettings(db_startup_timeout=0), create_tables=False)
    async with there.lifespan(None):
        pass
    with free_socket() as listener:
        url = f"postgresql://user@127.0.0.1:{listener.getsockname()[1]}/gone"
    gone = Database(settings=DatabaseSettings(database_url=url, db_startup_timeout=0))
    with pytest.raises(DatabaseUnavailable, match="within 0 s"):
        async with gone.lifespan(None):
            pass


async def test_mute_server_is_not_waited_for_longer() -> None:
    """A port that accepts the connection and then says nothing counts against DB_STARTUP_TIMEOUT too."""
    with free_socket() as listener:
        port = listener.getsockname()[1]
        url = f"postgresql://user:secret@127.0.0.1:{port}/mute"
        mute = Database(settings=DatabaseSettings(database_url=url, db_startup_timeout=0.5))
        async with asyncio.timeout(10):  # the driver's own limit is a minute
            with pytest.raises(DatabaseUnavailable, match=rf"127\.0\.0\.1:{port}/mute .*TimeoutError"):
                async with mute.lifespan(None):
                    pass


async def test_database_that_is_still_to_be_created(database_url: str, caplog: pytest.LogCaptureFixture) -> None:
    """It is waited for like a server; what the driver says about it stays one line, in the log and in the error."""
    url = make_url(database_url).set(database="no_such_database")
    settings = DatabaseSettings(database_url=url.render_as_string(hide_password=False), db_startup_timeout=0.3)
    with pytest.raises(DatabaseUnavailable, match='"no_such_database" does not exist') as caught:
        async with Database(settings=settings).lifespan(None):
            pass
    lines = [record.getMessage() for record in caplog.records if record.name == "fastapi_chatdify_db.startup"]
    assert [f"(try {number})" in line for number, line in enumerate(lines, start=1)] == [True] * len(lines)
    assert len(lines) >= 1
    assert all("\n" not in line for line in (*lines, str(caught.value)))


@pytest.mark.parametrize("code", ["53300", "57P03", "08P01"])
async def test_server_that_takes_no_connections_yet(code: str) -> None:
    """One that starts, has too many connections, or is a PgBouncer whose own server is away, is waited for."""

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(8)  # whether it speaks TLS
        writer.write(b"N")
        await reader.read(1024)
        reason = f"SFATAL\0VFATAL\0C{code}\0Mnot now\0\0".encode()
        writer.write(b"E" + (len(reason) + 4).to_bytes(4) + reason)
        writer.close()

    async with await asyncio.start_server(refuse, "127.0.0.1") as server:
        port = server.sockets[0].getsockname()[1]
        url = f"postgresql://user@127.0.0.1:{port}/name"
        busy = Database(settings=DatabaseSettings(database_url=url, db_startup_timeout=0.3))
        with pytest.raises(DatabaseUnavailable, match="not now"):
            async with busy.lifespan(None):
                pass


async def test_connection_that_is_lost_at_once(database_url: str) -> None:
    """asyncpg's word for it has no code of PostgreSQL's; a server that goes down again is waited for as well."""
    database = Database(settings=DatabaseSettings(db_pool_pre_ping=False), create_tables=False)
    made: list[Any] = []

    @event.listens_for(database.async_engine.sync_engine, "connect")
    def lose_the_first(connection: Any, record: object) -> None:
        if not made:
            connection.driver_connection.terminate()
        made.append(connection)

    async with database.lifespan(None):
        assert len(made) == 2


async def test_tables_that_another_process_is_creating(tables: None, observer: Observer) -> None:
    """They are waited for, whatever DB_STATEMENT_TIMEOUT is."""
    await db.drop_tables()
    hurried = Database(settings=DatabaseSettings(db_statement_timeout=0.2))
    async with observer.connection.transaction():
        await observer.connection.execute("CREATE TABLE item ()")
        creating = asyncio.create_task(hurried.create_tables())
        await observer.until_somebody_waits_for_a_lock()
        await observer.connection.execute("SELECT pg_sleep(0.4)")
        await observer.connection.execute("DROP TABLE item")
    await creating
    await hurried.dispose()


async def test_tables_are_dropped_by_one_at_a_time(own_database: str) -> None:
    """Whoever comes second finds nothing left, rather than to fail."""
    own = Database("own", settings=DatabaseSettings(database_url=own_database))
    for _ in range(3):
        await own.create_tables()
        await asyncio.gather(*(own.drop_tables() for _ in range(8)))
    await own.dispose()


async def test_refusal_is_not_waited_for(
    observer: Observer, database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A role that does not exist will not come up; the first try tells."""
    url = make_url(database_url).set(username="nobody_of_that_name", password="secret")
    refused = Database(settings=DatabaseSettings(database_url=url.render_as_string(hide_password=False)))
    with pytest.raises((DBAPIError, asyncpg.PostgresError)) as caught:
        async with refused.lifespan(None):
            pass
    assert "secret" not in f"{caught.value}{caplog.text}"
    assert caplog.records == []


@pytest.mark.parametrize("framework", [Starlette, FastAPI])
async def test_init_app_is_enough_and_keeps_the_apps_lifespan(
    tables: None, observer: Observer, framework: type[Starlette]
) -> None:
    """The database is there before the app's own start-up and after its shutdown, and its state reaches requests."""
    await db.drop_tables()
    names: list[object] = []

    async def rows() -> int:
        async with db.transaction() as session:
            return len((await session.execute(text("SELECT name FROM item"))).all())

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[Mapping[str, Any]]:
        names.append(await rows())
        yield {"greeting": "hello"}
        names.append(await rows())

    async def handler(request: Request) -> Response:
        db.session.add(Item("a"))
        return JSONResponse(request.state.greeting)

    app = framework(lifespan=lifespan, routes=[Route("/", handler)])
    db.init_app(app)
    async with serve(app) as client:
        assert (await client.get("/")).json() == "hello"
    assert names == [0, 1]


async def test_two_databases_on_one_app(tables: None, observer: Observer) -> None:
    """Each ``init_app`` goes around the ones before: connected before the app's start-up, disposed after its end."""
    databases = [Database(name, settings=DatabaseSettings(db_application_name=name)) for name in ("one", "two")]
    seen: list[list[int]] = []

    async def note() -> None:
        seen.append([await observer.connections(database.name) for database in databases])

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        await note()
        yield
        await note()

    async def handler(request: Request) -> Response:
        names = [await database.session.scalar(text("SHOW application_name")) for database in databases]
        return JSONResponse(names)

    app = Starlette(lifespan=lifespan, routes=[Route("/", handler)])
    for database in databases:
        database.init_app(app)
    async with serve(app) as client:
        assert (await client.get("/")).json() == ["one", "two"]
    assert seen == [[1, 1], [1, 1]]
    async with asyncio.timeout(10):
        for database in databases:
            await observer.until_connections(database.name, 0)


async def test_lifespan_argument(tables: None) -> None:
    """``FastAPI(lifespan=db.lifespan)`` creates the tables."""
    await db.drop_tables()
    app = FastAPI(lifespan=db.lifespan)
    app.add_middleware(DBSessionMiddleware)

    @app.post("/")
    async def handler() -> None:
        db.session.add(Item("a"))

    async with serve(app) as client:
        assert (await client.post("/")).status_code == 200


async def test_tables_are_created_only_when_wanted(tables: None, observer: Observer) -> None:
    """``create_tables=False`` leaves them to a migration."""
    await db.drop_tables()
    migrated = Database(create_tables=False)
    async with migrated.lifespan(None):
        assert await observer.connection.fetchval("SELECT to_regclass('item')") is None


def test_init_app_adds_the_middleware_once() -> None:
    """Several databases on one app share the middleware; ``middleware=False`` leaves it to the caller."""
    app = FastAPI()
    db.init_app(app)
    Database("second").init_app(app)
    added: list[object] = [entry.cls for entry in app.user_middleware]
    assert added == [DBSessionMiddleware]
    bare = FastAPI()
    db.init_app(bare, middleware=False)
    assert bare.user_middleware == []


def test_init_app_refuses_the_other_application() -> None:
    """The web's and the worker's ``init_app`` name each other."""
    celery = Celery("worker", set_as_current=False)
    with pytest.raises(TypeError, match=r"celery_ext\.init_app\(app, db=reports\)"):
        Database("reports").init_app(celery)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"db\.init_app\(app\)"):
        celery_ext.init_app(FastAPI())  # type: ignore[arg-type]
