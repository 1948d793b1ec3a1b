"""Every test talks to a real PostgreSQL: DATABASE_URL's, else localhost's, else one out of a wheel."""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from pathlib import Path
from uuid import uuid4

import asyncpg
import psycopg2
import pytest
from fastapi import FastAPI
from sqlalchemy import URL, make_url

from fastapi_chatdify_db import Database, DatabaseSettings, DBSessionMiddleware, db
from fastapi_chatdify_db.embedded import embedded_postgres
from tests import models as models
from tests.observing import Observer, Other

_resources = ExitStack()
_server: URL
_origin: str
_database = f"chatdify_test_{os.getpid()}"
# What developers export for their own applications must not change the outcome of the tests.
_OF_THE_SETTINGS = {name.upper() for name in DatabaseSettings.model_fields}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("chaos", "tests/chaos")
    group.addoption(
        "--chaos-seed", type=int, default=secrets.randbelow(1_000_000), help="what decides about the faults"
    )
    group.addoption("--chaos-seconds", type=float, default=0, help="how long to go on at least, in each run")


def pytest_configure(config: pytest.Config) -> None:
    global _server, _origin
    _server, _origin = _find_server()
    for name in set(os.environ) & _OF_THE_SETTINGS:
        del os.environ[name]
    _administer(f"CREATE DATABASE {_database}")
    _resources.callback(_administer, f"DROP DATABASE {_database} WITH (FORCE)")
    os.environ["DATABASE_URL"] = _server.set(database=_database).render_as_string(hide_password=False)


def pytest_unconfigure(config: pytest.Config) -> None:
    _resources.close()


def pytest_report_header(config: pytest.Config) -> list[str]:
    return [f"PostgreSQL: {_origin}, {_server!r}", f"chaos: --chaos-seed {config.getoption('--chaos-seed')}"]


def _find_server() -> tuple[URL, str]:
    if given := os.environ.get("DATABASE_URL"):
        url = make_url(given)
        if url.get_backend_name() not in ("postgresql", "postgres"):
            raise pytest.UsageError("the tests need PostgreSQL: set DATABASE_URL to one, or unset it")
        url = url.set(drivername="postgresql")
        if problem := _problem_with(url):
            raise pytest.UsageError(f"the PostgreSQL at DATABASE_URL cannot be used; unset it or start it: {problem}")
        return url, "at DATABASE_URL"
    local = URL.create("postgresql", "postgres", host="localhost", database="postgres")
    if _problem_with(local):
        directory = _resources.enter_context(tempfile.TemporaryDirectory())
        url = make_url(_resources.enter_context(embedded_postgres(Path(directory) / "data")))
        return url, "embedded, since none on localhost lets the role postgres in"
    return local, "on localhost"


def _problem_with(server: URL) -> str | None:
    try:
        psycopg2.connect(server.render_as_string(hide_password=False), connect_timeout=3).close()
    except psycopg2.OperationalError as error:
        return str(error).strip()
    return None


def _administer(statement: str) -> None:
    connection = psycopg2.connect(_server.render_as_string(hide_password=False))
    try:
        connection.autocommit = True
        connection.cursor().execute(statement)
    finally:
        connection.close()


@pytest.fixture
def database_url() -> str:
    """The URL of the test run's own database."""
    return os.environ["DATABASE_URL"]


def with_parameter(url: str, name: str, value: str) -> str:
    """A database's URL with a further parameter; the embedded server's has one already."""
    return make_url(url).update_query_dict({name: value}).render_as_string(hide_password=False)


@pytest.fixture
def own_database() -> Iterator[str]:
    """The URL of an empty database for one test, all of whose sessions may be terminated."""
    name = f"{_database}_{uuid4().hex}"
    _administer(f"CREATE DATABASE {name}")
    yield _server.set(database=name).render_as_string(hide_password=False)
    _administer(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
async def tables() -> AsyncIterator[None]:
    """The default database with empty tables."""
    await db.create_tables()
    yield
    await db.drop_tables()
    await db.dispose()


@pytest.fixture
async def observer(tables: None, database_url: str) -> AsyncIterator[Observer]:
    """Another connection, which sees what is committed and who holds a transaction."""
    connection = await asyncpg.connect(database_url)
    yield Observer(connection)
    await connection.close()


@pytest.fixture
def other(tables: None, database_url: str) -> Iterator[Other]:
    """Another client, which synchronous work may ask."""
    connection = psycopg2.connect(database_url)
    connection.autocommit = True
    yield Other(connection)
    connection.close()


@pytest.fixture
async def counter(observer: Observer) -> Observer:
    """The observer, of a database with a counter that is at 0."""
    await observer.connection.execute("INSERT INTO counter (id, value) VALUES (1, 0)")
    return observer


@pytest.fixture
async def small_pool(tables: None) -> AsyncIterator[Database]:
    """The same database through a pool of two connections, for which a request waits 0.5 s."""
    database = Database("small", settings=DatabaseSettings(db_pool_size=2, db_max_overflow=0, db_pool_timeout=0.5))
    yield database
    await database.dispose()


@pytest.fixture
def app() -> FastAPI:
    """An application that has units of work, and no routes yet."""
    app = FastAPI()
    app.add_middleware(DBSessionMiddleware)
    return app
