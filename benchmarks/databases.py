"""The database of a run, made for it and dropped after it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg2
from sqlalchemy import URL, make_url

DATABASE = f"chatdify_benchmark_{os.getpid()}"
TABLES = (
    "CREATE TABLE benchmark_item (id int PRIMARY KEY, name text NOT NULL, visits int NOT NULL) WITH (fillfactor = 50)",
    "INSERT INTO benchmark_item SELECT n, 'benchmark', 0 FROM generate_series(1, 10000) AS n",
    "CREATE TABLE benchmark_entry (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, name text NOT NULL)",
    "CREATE TABLE benchmark_started (number int PRIMARY KEY, at float8 NOT NULL)",
    "VACUUM ANALYZE",
)


@contextmanager
def scratch_database() -> Iterator[URL]:
    """A database with the benchmark's tables, on the server at DATABASE_URL or localhost."""
    given = os.environ.get("DATABASE_URL") or "postgresql://postgres@127.0.0.1:5432/postgres"
    server = make_url(given).set(drivername="postgresql")
    own = server.set(database=DATABASE)
    execute(server, f"CREATE DATABASE {DATABASE}")
    try:
        execute(own, *TABLES)
        yield own
    finally:
        execute(server, f"DROP DATABASE {DATABASE} WITH (FORCE)")


def execute(url: URL, *statements: str) -> None:
    """Run statements outside any transaction, as CREATE DATABASE wants."""
    connection = psycopg2.connect(url.render_as_string(hide_password=False))
    connection.autocommit = True
    for statement in statements:
        connection.cursor().execute(statement)
    connection.close()


def environment(url: URL, max_overflow: int = 20) -> dict[str, str]:
    """What every contender reads: the database, and a pool of 10."""
    return {
        "BENCHMARK_URL": url.set(drivername="postgresql+asyncpg").render_as_string(hide_password=False),
        "DATABASE_URL": url.render_as_string(hide_password=False),
        "DB_POOL_SIZE": "10",
        "DB_MAX_OVERFLOW": str(max_overflow),
    }
