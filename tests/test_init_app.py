"""One line gives an application its database: its lifespan, together with its siblings', and the middleware."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import pytest
from celery import Celery
from fastapi import FastAPI
from sqlalchemy import text
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

import celery_ext
from fastapi_chatdify_db import Database, DatabaseSettings, DBSessionMiddleware, db
from tests.models import Item
from tests.observing import Observer
from tests.serving import serve


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


def test_init_app_adds_the_middleware_once() -> None:
    """Several databases on one app share the middleware; ``middleware=False`` leaves it to the caller."""
    app = FastAPI()
    db.init_app(app)
    Database("second").init_app(app)
    added: list[object] = [entry.cls for entry in app.user_middleware]
    assert added == [DBSessionMiddleware]
    beside = FastAPI()
    beside.add_middleware(lambda app: app)
    db.init_app(beside)
    assert len(beside.user_middleware) == 2
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


async def test_middleware_derived_from_ours_is_left_alone(observer: Observer) -> None:
    """One of ours around it would decide what is committed, in place of its own ``commit_on``."""

    class KeepsNothing(DBSessionMiddleware):
        def __init__(self, app: ASGIApp) -> None:
            super().__init__(app, commit_on=lambda status: False)

    own = FastAPI()
    own.add_middleware(KeepsNothing)
    db.init_app(own)

    @own.post("/")
    async def handler() -> None:
        db.session.add(Item("a"))

    async with serve(own) as client:
        assert (await client.post("/")).status_code == 200
    assert await observer.names() == []
