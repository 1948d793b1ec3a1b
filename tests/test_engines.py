"""Engines are made on first use, for each event loop."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from functools import partial
from typing import Any

import asyncpg
import httpx
import pytest
import sqlalchemy.ext.asyncio
from fastapi import Depends, FastAPI
from sqlalchemy import cast, event, literal, select, text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.ext.asyncio import AsyncSession

from fastapi_chatdify_db import Database, DatabaseSettings, db
from tests.forking import PID, in_a_new_process
from tests.observing import PATIENCE, Observer


@pytest.fixture
async def named(tables: None) -> AsyncIterator[Database]:
    """A database whose connections an observer can tell by their name."""
    database = Database("named", settings=DatabaseSettings(db_application_name="named"))
    yield database
    await database.dispose()


def test_import_makes_nothing() -> None:
    """Importing reads no setting, makes no engine and needs no web framework; the first use reads the settings."""
    in_a_new_process(
        """
import sys
import fastapi_chatdify_db
from fastapi_chatdify_db import db, get_sync_session, InvalidSettings, utils, session, legacy
assert not {"starlette", "fastapi", "celery", "psycopg2", "asyncpg"} & set(sys.modules), sys.modules.keys()
try:
    db.sync_engine
except InvalidSettings:
    pass
else:
    raise AssertionError("settings were read before")
""",
        DB_POOL_SIZE="ten",
    )


def test_tracing_tool_may_come_after_the_import(monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenTelemetry's puts functions of its own in the place of those that make engines."""
    made: list[object] = []

    def note(make: Callable[..., object], *arguments: Any, **options: Any) -> object:
        made.append(make)
        return make(*arguments, **options)

    for module, name in ((sqlalchemy, "create_engine"), (sqlalchemy.ext.asyncio, "create_async_engine")):
        monkeypatch.setattr(module, name, partial(note, getattr(module, name)))
    database = Database("traced")
    assert [database.sync_engine, database.async_engine]
    assert len(made) == 2


def test_threads_that_come_at_once_share_an_engine(database_url: str) -> None:
    """Whoever is first: no thread keeps a second engine with a pool of its own."""
    for _ in range(20):
        database = Database(settings=DatabaseSettings())
        together = threading.Barrier(8)

        def first_use(database: Database = database, together: threading.Barrier = together) -> tuple[object, object]:
            together.wait()
            return database.sync_engine, database.async_engine

        with ThreadPoolExecutor(8) as threads:
            made = [each.result() for each in [threads.submit(first_use) for _ in range(8)]]
        assert len(set(made)) == 1


def test_engine_serves_one_loop_after_another(database_url: str) -> None:
    """The same engine works in each ``asyncio.run``."""

    async def ask() -> int:
        async with db.async_engine.connect() as connection:
            return int(await connection.scalar(text("SELECT 1")))

    async def ask_and_dispose() -> int:
        try:
            return await ask() + (await through_transaction())
        finally:
            await db.async_engine.dispose()

    async def through_transaction() -> int:
        async with db.transaction() as session:
            return int((await session.execute(text("SELECT 1"))).scalar_one())

    assert [asyncio.run(ask_and_dispose()) for _ in range(3)] == [2, 2, 2]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # asyncpg's, that nobody closed them
def test_connections_of_ended_loops_do_not_pile_up(database_url: str) -> None:
    """Each ``asyncio.run`` ends those of the one before, which nobody has disposed of, without garbage collection."""
    database = Database(settings=DatabaseSettings(db_application_name="run"))
    number = text("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'run'")

    async def use() -> None:
        async with database.transaction() as session:
            await session.execute(text("SELECT 1"))

    async def until_two() -> None:
        async with asyncio.timeout(PATIENCE), database.transaction() as session:
            while await session.scalar(number) > 2:
                await asyncio.sleep(0)
        await database.dispose()

    gc.disable()
    try:
        for _ in range(20):
            asyncio.run(use())
        asyncio.run(until_two())
    finally:
        gc.enable()
        gc.collect()


def test_loops_side_by_side_have_pools_of_their_own(database_url: str) -> None:
    """Two loops in two threads use one engine at the same time, beyond the size of a pool."""
    database = Database(settings=DatabaseSettings(db_pool_size=2, db_max_overflow=0))
    together = threading.Barrier(2)

    async def work() -> set[int]:
        async def ask() -> int:
            async with database.transaction() as session:
                await session.execute(text("SELECT pg_sleep(0.01)"))
                return int((await session.execute(PID)).scalar_one())

        together.wait()
        pids = set(await asyncio.gather(*(ask() for _ in range(20))))
        await database.dispose()
        return pids

    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(asyncio.run, [work(), work()])
    assert len(first) == len(second) == 2
    assert not first & second


def test_session_that_a_thread_asks_for_is_its_loops(app: FastAPI, database_url: str) -> None:
    """A ``def`` dependency may return ``db.session``: FastAPI calls it in a thread, without a loop."""
    database = Database()

    def session() -> AsyncSession:
        return database.session

    @app.get("/")
    async def handler(session: AsyncSession = Depends(session)) -> bool:  # noqa: B008
        return bool(await session.scalar(text("SELECT 1")))

    async def ask() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            assert (await client.get("/")).json() is True

    async def ask_alone() -> None:
        await ask()
        await database.dispose()

    async def side_by_side() -> None:
        await ask()
        await asyncio.to_thread(asyncio.run, ask_alone())
        await ask_alone()

    asyncio.run(side_by_side())


async def test_application_may_prepare_each_connect(database_url: str) -> None:
    """A listener to SQLAlchemy's ``do_connect``, e.g. for passwords that change, is called for either driver."""
    database = Database()

    def rename(dialect: object, record: object, arguments: object, parameters: dict[str, Any]) -> None:
        name = {"application_name": "theirs"}
        parameters.update({"server_settings": name} if "server_settings" in parameters else name)

    for engine in (database.async_engine.sync_engine, database.sync_engine):
        event.listen(engine, "do_connect", rename)
    async with database.transaction() as session:
        assert await session.scalar(text("SHOW application_name")) == "theirs"
        assert await asyncio.to_thread(database.sync_session.scalar, text("SHOW application_name")) == "theirs"
    await database.dispose()


async def test_arguments_of_create_engine(database_url: str) -> None:
    """Both engines get those in ``db_engine_options``, such as the JSON that an application writes."""
    options = {"json_serializer": partial(json.dumps, default=str), "execution_options": {"theirs": 1}}
    database = Database("optioned", settings=DatabaseSettings(db_engine_options=options))
    dated = select(cast({"on": date(2026, 1, 2)}, JSONB))
    async with database.transaction() as session:
        assert await session.scalar(dated) == {"on": "2026-01-02"}
        assert await asyncio.to_thread(database.sync_session.scalar, dated) == {"on": "2026-01-02"}
        assert (await session.connection()).sync_engine.get_execution_options()["theirs"] == 1
    await database.dispose()


async def test_application_hears_of_each_statement(observer: Observer) -> None:
    """A listener to SQLAlchemy's ``do_execute`` is called for plain reads and others, with either driver."""
    database = Database()
    heard: list[str] = []

    def hear(cursor: object, statement: str, parameters: object, context: object) -> None:
        heard.append(statement)

    for engine in (database.async_engine.sync_engine, database.sync_engine):
        event.listen(engine, "do_execute", hear)
    statements = (select(literal(1)), text("SELECT 2"), select(literal(3)))
    async with database.transaction() as session:
        for statement in statements:
            await session.execute(statement)
    with database.sync_transaction() as sync_session:
        for statement in statements:
            sync_session.execute(statement)
    assert len([each for each in heard if each.startswith("SELECT")]) >= 6
    await database.dispose()


def test_listeners_hear_of_every_loop(database_url: str) -> None:
    """Who listened to the engine at import, is told of the connections of each loop, one after or beside another."""
    database = Database(settings=DatabaseSettings())
    connected: list[object] = []
    executed: list[str] = []
    event.listen(database.async_engine.sync_engine, "connect", lambda *made: connected.append(made))

    @event.listens_for(database.async_engine.sync_engine, "before_cursor_execute")
    def note(connection: object, cursor: object, statement: str, *_: object) -> None:
        executed.append(statement)

    async def ask(isolation_level: str) -> None:
        engine = database.async_engine.execution_options(isolation_level=isolation_level)
        async with engine.connect() as connection:
            assert await connection.scalar(text("SHOW transaction_isolation")) == isolation_level.lower()
        await database.dispose()

    async def beside_another_loop() -> None:
        await ask("SERIALIZABLE")
        await asyncio.to_thread(asyncio.run, ask("REPEATABLE READ"))

    asyncio.run(ask("READ COMMITTED"))
    assert (len(connected), len(executed)) == (1, 1)
    asyncio.run(beside_another_loop())
    assert (len(connected), len(executed)) == (3, 3)


def test_engine_derived_at_import_shares_the_pool(database_url: str) -> None:
    """In one loop after another; and the end of the lifespan closes what it has connected."""
    database = Database(settings=DatabaseSettings(db_application_name="derived", db_pool_size=1, db_max_overflow=0))
    derived = database.async_engine.execution_options(isolation_level="SERIALIZABLE")

    async def ask() -> None:
        async with database.lifespan(None):
            async with database.transaction() as session:
                pid = await session.scalar(PID)
            async with derived.connect() as connection:
                assert await connection.scalar(PID) == pid
        observer = Observer(await asyncpg.connect(database_url))
        async with asyncio.timeout(10):
            await observer.until_connections("derived", 0)
        await observer.connection.close()

    asyncio.run(ask())
    asyncio.run(ask())


async def test_dispose_closes_the_connections(named: Database, observer: Observer) -> None:
    """At the end of the lifespan the server has no connection of the application's left; a later use opens one."""

    def use() -> None:
        with named.sync_transaction() as session:
            session.execute(text("SELECT 1"))

    async with named.lifespan(None):
        async with named.transaction() as session:
            await session.execute(text("SELECT 1"))
        await asyncio.to_thread(use)
        assert await observer.connections("named") == 2
    async with asyncio.timeout(10):
        await observer.until_connections("named", 0)
    await asyncio.to_thread(use)
    assert await observer.connections("named") == 1
