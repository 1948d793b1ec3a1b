"""Connections that die under a request: what has only read goes on, what had written is told."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from fastapi import FastAPI
from sqlalchemy import Engine, event, func, insert, make_url, select, text
from sqlalchemy.exc import DBAPIError, DisconnectionError
from sqlalchemy.orm import Session

from fastapi_chatdify_db import Database, DatabaseSettings, DatabaseUnavailable, DBSessionMiddleware
from tests.either_driver import backend_of
from tests.models import Counter, Item
from tests.observing import Observer, Other
from tests.serving import serve

MINUTE = 60.0
KILLS = 40


def app_on(database: Database, served: set[int]) -> FastAPI:
    """Requests that read twice, and note which backend served them to their end."""
    app = FastAPI()
    app.add_middleware(DBSessionMiddleware)

    def read_twice(session: Session) -> int:
        counter = session.get_one(Counter, 1)
        session.scalars(select(Item)).all()
        served.add(backend_of(session))
        return counter.value

    @app.get("/read")
    async def read() -> int:
        return await database.session.run_sync(read_twice)

    @app.get("/read-def")
    def read_def() -> int:
        return read_twice(database.sync_session)

    return app


@pytest.mark.parametrize("path", ["/read", "/read-def"])
@pytest.mark.parametrize("ping_after", [0, MINUTE], ids=["tested", "trusted"])
async def test_reads_survive_backends_that_die_under_load(observer: Observer, path: str, ping_after: float) -> None:
    """Backends are terminated at random, all the time: no request that only reads fails."""
    await observer.connection.execute("INSERT INTO counter (id, value) VALUES (1, 7)")
    database = Database(settings=DatabaseSettings(db_ping_after=ping_after, db_pool_size=4, db_max_overflow=0))
    served: set[int] = set()
    killed = 0

    async def kill_at_random() -> None:
        nonlocal killed
        while killed < KILLS:
            # Not one that has just replaced another: a statement runs again once, not for ever.
            killed += await observer.connection.fetchval(
                """SELECT count(pg_terminate_backend(pid)) FROM (
                     SELECT pid FROM pg_stat_activity WHERE pid = ANY($1) ORDER BY random() LIMIT 1) AS victim""",
                [*served],  # endpoints in threads add to it meanwhile
            )
            await observer.connection.execute("SELECT pg_sleep(0.01)")

    async with serve(app_on(database, served)) as client:

        async def ask() -> set[tuple[int, str]]:
            answers = set()
            while killed < KILLS:
                response = await client.get(path)
                answers.add((response.status_code, response.text))
            return answers

        *answers, _ = await asyncio.gather(*(ask() for _ in range(8)), kill_at_random())
    await database.dispose()
    assert set().union(*filter(None, answers)) == {(200, "7")}


def lose_connection(session: Session, kill: Callable[[int], None]) -> None:
    kill(backend_of(session))


def read_then_read(session: Session, kill: Callable[[int], None]) -> None:
    assert session.get_one(Counter, 1).value == 7
    lose_connection(session, kill)
    assert session.scalars(select(Item.name)).all() == []
    assert session.scalars(select(Counter.value)).all() == [7]


def read_then_write(session: Session, kill: Callable[[int], None]) -> None:
    counter = session.get_one(Counter, 1)
    lose_connection(session, kill)
    counter.value += 1
    session.flush()
    assert session.scalar(select(Counter.value)) == 8


def read_then_text(session: Session, kill: Callable[[int], None]) -> None:
    assert session.get_one(Counter, 1).value == 7
    lose_connection(session, kill)
    session.execute(text("UPDATE counter SET value = value + 1"))


def write_then_read(session: Session, kill: Callable[[int], None]) -> None:
    session.execute(insert(Item).values(name="lost"))
    lose_connection(session, kill)
    session.scalars(select(Counter.value)).all()


def lock_then_write(session: Session, kill: Callable[[int], None]) -> None:
    counter = session.get_one(Counter, 1, with_for_update=True)
    lose_connection(session, kill)
    counter.value += 1
    session.flush()


def read_at_repeatable_read(session: Session, kill: Callable[[int], None]) -> None:
    session.connection(execution_options={"isolation_level": "REPEATABLE READ"})
    session.get_one(Counter, 1)
    lose_connection(session, kill)
    session.scalars(select(Item.name)).all()


def write_on_the_driver_then_read(session: Session, kill: Callable[[int], None]) -> None:
    session.scalars(select(Item.name)).all()
    session.connection().connection.cursor().execute("INSERT INTO item (name) VALUES ('lost')")
    lose_connection(session, kill)
    session.scalars(select(Counter.value)).all()


def write_where_only_reading_is_allowed(session: Session, kill: Callable[[int], None]) -> None:
    session.connection(execution_options={"postgresql_readonly": True})
    counter = session.get_one(Counter, 1)
    lose_connection(session, kill)
    counter.value += 1
    session.flush()


def read_then_write_many(session: Session, kill: Callable[[int], None]) -> None:
    session.scalars(select(Item.name)).all()
    lose_connection(session, kill)
    session.add_all([Item("lost"), Item("too")])
    session.flush()


Work = Callable[[Session, Callable[[int], None]], None]


async def run(observer: Observer, driver: str, work: Work, prepare: Callable[[Engine], object] = bool) -> int:
    """Run the work in a unit whose connection it may kill; returns the counter's value afterwards."""
    await observer.connection.execute("INSERT INTO counter (id, value) VALUES (1, 7)")
    database = Database(settings=DatabaseSettings(db_ping_after=MINUTE))
    loop = asyncio.get_running_loop()

    async def terminate(pid: int) -> None:
        await observer.connection.fetch("SELECT pg_terminate_backend($1, 5000)", pid)

    def kill(pid: int) -> None:
        asyncio.run_coroutine_threadsafe(terminate(pid), loop).result(timeout=10)

    def in_thread() -> None:
        if driver == "psycopg2":
            prepare(database.sync_engine)
            with database.sync_transaction() as session:
                work(session, kill)
        else:
            asyncio.run(on_a_loop_of_its_own())

    async def on_a_loop_of_its_own() -> None:
        prepare(database.async_engine.sync_engine)
        async with database.transaction() as session:
            await session.run_sync(work, kill)
        await database.dispose()

    try:
        await asyncio.to_thread(in_thread)
    finally:
        await database.dispose()
    return int(await observer.connection.fetchval("SELECT value FROM counter"))


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg2"])
@pytest.mark.parametrize(("work", "value"), [(read_then_read, 7), (read_then_write, 8), (read_then_text, 8)])
async def test_unit_that_only_read_goes_on(observer: Observer, driver: str, work: Work, value: int) -> None:
    """Its next statement, be it the first write, runs on another connection; the session and its objects stay."""
    assert await run(observer, driver, work) == value


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg2"])
@pytest.mark.parametrize(
    "work",
    [
        *(write_then_read, lock_then_write, read_at_repeatable_read),
        *(write_on_the_driver_then_read, write_where_only_reading_is_allowed, read_then_write_many),
    ],
)
async def test_unit_that_had_begun_is_told(observer: Observer, driver: str, work: Work) -> None:
    """What was written, locked or seen went with the connection, so the error is raised."""
    with pytest.raises(DBAPIError):
        await run(observer, driver, work)
    assert await observer.connection.fetchval("SELECT value FROM counter") == 7
    assert await observer.names() == []


def test_level_that_the_server_would_not_give(other: Other, database_url: str) -> None:
    """A transaction at READ COMMITTED is not begun anew at the server's own, stricter level."""
    url = make_url(database_url).update_query_dict({"options": "-c default_transaction_isolation=serializable"})
    database = Database(settings=DatabaseSettings(database_url=url.render_as_string(hide_password=False)))
    engine = database.sync_engine.execution_options(isolation_level="READ COMMITTED")
    with Session(engine) as session:
        other.ask(f"SELECT pg_terminate_backend({backend_of(session)}, 5000)")
        with pytest.raises(DBAPIError):
            session.scalar(text("SHOW transaction_isolation"))
    database.engines.dispose_sync()


def keep_tenants_apart(engine: Engine, fails: int = 0, failure: type[Exception] = ZeroDivisionError) -> None:
    """What an application does at a checkout; the given one, from 1 on, fails."""
    checkouts = 0

    @event.listens_for(engine, "checkout")
    def prepare(connection: Any, *_: object) -> None:
        nonlocal checkouts
        checkouts += 1
        if checkouts == fails:
            raise failure
        connection.cursor().execute("SET app.tenant = 'acme'")
        connection.commit()


def tenant(session: Session) -> str | None:
    return session.scalar(select(func.current_setting("app.tenant", True)))


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg2"])
async def test_new_connection_is_prepared_as_any(observer: Observer, driver: str) -> None:
    """What the application's handler of ``checkout`` sets, the statement that runs again finds set."""

    def read_then_ask(session: Session, kill: Callable[[int], None]) -> None:
        session.get_one(Counter, 1)
        lose_connection(session, kill)
        assert tenant(session) == "acme"

    await run(observer, driver, read_then_ask, keep_tenants_apart)


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg2"])
async def test_new_connection_that_cannot_be_prepared_is_not_used(observer: Observer, driver: str) -> None:
    """Whoever handles the handler's error goes on with yet another connection, or with none."""

    def read_then_ask(session: Session, kill: Callable[[int], None]) -> None:
        session.get_one(Counter, 1)
        lose_connection(session, kill)
        with pytest.raises(ZeroDivisionError):
            tenant(session)
        with suppress(DBAPIError):
            assert tenant(session) == "acme"
        session.rollback()

    await run(observer, driver, read_then_ask, lambda engine: keep_tenants_apart(engine, fails=2))


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg2"])
@pytest.mark.parametrize("work", [read_then_read, read_then_write, read_then_text])
async def test_server_that_gives_no_new_connection(
    observer: Observer, driver: str, work: Work, caplog: pytest.LogCaptureFixture
) -> None:
    """It is what the unit is told of, rather than of the connection that was lost, and all that is."""
    connects = []

    def refuse_the_second(engine: Engine) -> None:
        @event.listens_for(engine, "do_connect")
        def connect(dialect: object, record: object, arguments: object, parameters: dict[str, Any]) -> None:
            connects.append(engine)
            if len(connects) == 2:
                parameters.update(host="127.0.0.1", port=1)

    with pytest.raises(DatabaseUnavailable, match=r"Connect call failed|Connection refused"):
        await run(observer, driver, work, refuse_the_second)
    assert len(connects) == 2
    assert caplog.messages == []


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg2"])
async def test_new_connection_that_is_dead_as_well(observer: Observer, driver: str) -> None:
    """The handler's word for it is the pool's; the unit is told what its statement met."""
    with pytest.raises(DBAPIError):
        await run(observer, driver, read_then_read, lambda engine: keep_tenants_apart(engine, 2, DisconnectionError))
