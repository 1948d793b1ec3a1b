"""How often a request waits for PostgreSQL, counted on the wire."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Iterator

import pytest
from fastapi import FastAPI
from sqlalchemy import String, make_url, select

from fastapi_chatdify_db import Database, DatabaseSettings, DBSessionMiddleware
from tests.counting import CountingProxy, counting_proxy
from tests.models import Counter, Item
from tests.observing import Observer
from tests.serving import serve


@pytest.fixture
def proxy(database_url: str) -> Iterator[CountingProxy]:
    with counting_proxy(make_url(database_url)) as serving:
        yield serving


@pytest.fixture
async def database(proxy: CountingProxy, counter: Observer) -> AsyncIterator[Database]:
    url = proxy.url.render_as_string(hide_password=False)
    # However slow the machine that runs the tests is, the pool counts as busy.
    made = Database(settings=DatabaseSettings(database_url=url, db_ping_after=60))
    yield made
    await made.dispose()


def app_on(database: Database) -> FastAPI:
    app = FastAPI()
    app.add_middleware(DBSessionMiddleware)
    names = (f"item {number}" for number in itertools.count())

    @app.get("/plain")
    async def plain() -> None:
        pass

    @app.get("/read")
    async def read() -> None:
        await database.session.get_one(Counter, 1)

    @app.get("/read-def")
    def read_def() -> None:
        database.sync_session.get_one(Counter, 1)

    @app.get("/read-twice")
    async def read_twice() -> None:
        await database.session.get_one(Counter, 1)
        await database.session.scalars(select(Item))

    @app.get("/read-union")
    async def read_union() -> None:
        await database.session.scalars(select(Item.name).union(select(Counter.value.cast(String))))

    @app.get("/insert")
    async def add() -> None:
        database.session.add(Item(next(names)))

    @app.get("/insert-def")
    def add_def() -> None:
        database.sync_session.add(Item(next(names)))

    @app.get("/modify")
    async def modify() -> None:
        (await database.session.get_one(Counter, 1)).value += 1

    @app.get("/modify-def")
    def modify_def() -> None:
        database.sync_session.get_one(Counter, 1).value += 1

    @app.get("/release")
    async def release() -> None:
        counter = await database.session.get_one(Counter, 1)
        await database.release()
        counter.value += 1

    return app


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/plain", 0),
        ("/read", 1),
        ("/read-def", 1),
        ("/read-twice", 2),
        ("/read-union", 1),
        ("/insert", 3),  # BEGIN, INSERT, COMMIT
        ("/insert-def", 3),
        ("/modify", 4),  # SELECT, BEGIN, UPDATE, COMMIT
        ("/modify-def", 4),
        ("/release", 4),
    ],
)
async def test_round_trips_of_a_request(database: Database, proxy: CountingProxy, path: str, expected: int) -> None:
    """No ping, no BEGIN for reads, no COMMIT of nothing: on a pool in use, a request costs what its SQL costs."""
    async with serve(app_on(database)) as client:
        assert (await client.get(path)).status_code == 200  # connects, and prepares the statements
        before = proxy.round_trips
        assert (await client.get(path)).status_code == 200
        assert proxy.round_trips - before == expected


@pytest.mark.parametrize("path", ["/read", "/read-def"])
async def test_idle_connection_is_tested_in_one_round_trip(counter: Observer, proxy: CountingProxy, path: str) -> None:
    """Beyond DB_PING_AFTER, which is here at once, a checkout asks whether the connection is alive."""
    url = proxy.url.render_as_string(hide_password=False)
    database = Database(settings=DatabaseSettings(database_url=url, db_ping_after=0))
    async with serve(app_on(database)) as client:
        assert (await client.get(path)).status_code == 200
        before = proxy.round_trips
        assert (await client.get(path)).status_code == 200
        assert proxy.round_trips - before == 2
    await database.dispose()


async def test_begin_at_once_costs_two_more(counter: Observer, proxy: CountingProxy) -> None:
    """Without DB_LAZY_BEGIN a read is BEGIN, SELECT, COMMIT, and still no ping."""
    url = proxy.url.render_as_string(hide_password=False)
    database = Database(settings=DatabaseSettings(database_url=url, db_lazy_begin=False, db_ping_after=60))
    async with serve(app_on(database)) as client:
        assert (await client.get("/read")).status_code == 200
        before = proxy.round_trips
        assert (await client.get("/read")).status_code == 200
        assert proxy.round_trips - before == 3
    await database.dispose()
