"""Both drivers understand the one URL, however it is spelled."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import make_url, text
from sqlalchemy.engine import URL

from fastapi_chatdify_db import Database, DatabaseSettings, InvalidSettings
from fastapi_chatdify_db.urls import async_target, session_timeouts, sync_target
from tests.forwarding import Forwarder


def settings(url: str, **values: Any) -> DatabaseSettings:
    return DatabaseSettings(database_url=url, **values)


@pytest.mark.parametrize(
    "scheme", ["postgres", "postgresql", "postgresql+psycopg2", "postgresql+asyncpg", "postgresql+psycopg"]
)
def test_scheme_does_not_matter(scheme: str) -> None:
    """Whatever driver the URL names, each engine gets its own."""
    given = settings(f"{scheme}://user:p%40ss@host:5433/name")
    for target, driver in [(async_target(given), "asyncpg"), (sync_target(given), "psycopg2")]:
        assert target.url.drivername == f"postgresql+{driver}"
        assert target.url.set(drivername="x").render_as_string(hide_password=False) == "x://user:p%40ss@host:5433/name"


@pytest.mark.parametrize(
    ("url", "arguments"),
    [
        ("postgresql://host/name?sslmode=require", {"sslmode": "require"}),
        ("postgresql+asyncpg://host/name?ssl=verify-full", {"sslmode": "verify-full"}),
        ("postgresql://host/name?sslmode=verify-full", {"sslmode": "verify-full"}),
        ("postgresql+asyncpg://host/name?ssl=true", {"sslmode": "require"}),
        ("postgresql+asyncpg://host/name?ssl=false", {"sslmode": "disable"}),
        ("postgresql+asyncpg://host/name?ssl=True", {"sslmode": "require"}),
        ("postgresql://host/name?ssl=false&sslmode=verify-full", {"sslmode": "verify-full"}),
        (
            "postgresql://host/name?sslmode=verify-ca&sslrootcert=/a%20b.pem",
            {"sslmode": "verify-ca", "sslrootcert": "/a b.pem"},
        ),
    ],
)
def test_tls_is_spelled_for_each_driver(url: str, arguments: dict[str, str]) -> None:
    """libpq's parameters reach psycopg2 as they are, and asyncpg in the DSN that it reads them from."""
    sync = sync_target(settings(url)).connect_args
    assert {name: sync[name] for name in arguments} == arguments
    assert dict(make_url(async_target(settings(url)).connect_args["dsn"]).query) == arguments


def test_what_only_one_driver_has_is_kept_from_the_other() -> None:
    """asyncpg's keywords stay with asyncpg, libpq's client-side ones with psycopg2."""
    given = settings("postgresql://host/name?command_timeout=5&keepalives_idle=7&connect_timeout=3&tcp_user_timeout=9")
    assert async_target(given).connect_args == {
        "command_timeout": 5.0,
        "timeout": 3.0,
        "server_settings": {"application_name": "fastapi_chatdify_db"},
    }
    assert sync_target(given).connect_args == {
        "keepalives_idle": "7",
        "keepalives_interval": "10",
        "keepalives_count": "3",
        "connect_timeout": "3",
        "tcp_user_timeout": "9",
        "client_encoding": "utf8",
        "application_name": "fastapi_chatdify_db",
    }


@pytest.mark.parametrize("demand", ["channel_binding=require", "gssencmode=require", "requirepeer=postgres"])
def test_what_asyncpg_cannot_insist_on_is_refused(demand: str) -> None:
    """Leaving it out would be less safe than the URL says; psycopg2 insists on it."""
    given = settings(f"postgresql://host/name?{demand}")
    name, value = demand.split("=")
    with pytest.raises(InvalidSettings, match=f"^DATABASE_URL: .*{name}"):
        async_target(given)
    assert sync_target(given).connect_args[name] == value


def test_what_drivers_are_told_is_in_no_repr() -> None:
    """The key to a client's certificate is among their arguments."""
    given = settings("postgresql://host/name?sslcert=/cert.pem&sslkey=/key.pem&sslpassword=s3cr3t")
    for target in (async_target(given), sync_target(given)):
        assert "s3cr3t" in str(target.connect_args)
        assert "s3cr3t" not in repr(target)


@pytest.mark.parametrize(("pool_timeout", "seconds"), [(30, 30), (4.5, 5), (0.1, 2)])
def test_connects_take_no_longer_than_waiting_for_one(pool_timeout: float, seconds: int) -> None:
    """Of less than two seconds libpq makes two; asyncpg's own ``timeout`` comes first."""
    given = settings("postgresql://host/name", db_pool_timeout=pool_timeout)
    assert async_target(given).connect_args["timeout"] == seconds
    assert sync_target(given).connect_args["connect_timeout"] == str(seconds)
    assert async_target(settings("postgresql://host/name?timeout=7")).connect_args["timeout"] == 7


@pytest.mark.parametrize("seconds", ["0", "-1"])
def test_no_limit_in_libpqs_spelling(seconds: str) -> None:
    """A connect_timeout of zero or less is none, not a time that is over already."""
    assert "timeout" not in async_target(settings(f"postgresql://host/name?connect_timeout={seconds}")).connect_args


@pytest.mark.parametrize(
    "host", ["postgresql://user@%2Frun%2Fpg:5433/name", "postgresql://user@/name?host=/run/pg&port=5433"]
)
def test_unix_socket(host: str) -> None:
    """A directory is a unix socket, in the query or percent-encoded in the host's place."""
    for target in (async_target(settings(host)), sync_target(settings(host))):
        assert target.url.host is None
        assert target.url.query == {"host": "/run/pg", "port": "5433"}


def test_ipv6() -> None:
    """A bracketed address is a host."""
    for target in (async_target, sync_target):
        assert target(settings("postgresql://user@[::1]:5433/name")).url.host == "::1"


def test_shortest_timeout() -> None:
    """Less than a millisecond is one: PostgreSQL takes 0 for none."""
    assert session_timeouts(settings("postgresql://host/name", db_statement_timeout=0.0001)) == {"statement_timeout": 1}


def test_sqlite() -> None:
    """SQLite has an asynchronous driver and the standard library's."""
    given = settings("sqlite+aiosqlite:///file.db")
    assert str(async_target(given).url) == "sqlite+aiosqlite:///file.db"
    assert str(sync_target(given).url) == "sqlite:///file.db"


def test_sqlite_file_with_two_slashes_is_told_the_third() -> None:
    """``sqlite://file.db`` names a host, which SQLite has not."""
    with pytest.raises(InvalidSettings, match=r"^DATABASE_URL: .* sqlite:///file\.db$"):
        async_target(settings("sqlite://file.db"))


def with_query(url: URL, **query: str) -> str:
    return url.update_query_dict(query).render_as_string(hide_password=False)


async def ask_both(database: Database, statement: str) -> set[Any]:
    """What both engines answer."""

    def ask() -> Any:
        with database.sync_transaction() as session:
            return session.scalar(text(statement))

    try:
        async with database.transaction() as session:
            answer = await session.scalar(text(statement))
        return {answer, await asyncio.to_thread(ask)}
    finally:
        await database.dispose()


@pytest.mark.parametrize(
    ("query", "values", "statement", "expected"),
    [
        ({"sslmode": "disable"}, {}, "SELECT 1", 1),
        ({"sslmode": "prefer"}, {}, "SELECT 1", 1),
        ({"ssl": "prefer"}, {}, "SELECT 1", 1),
        ({"connect_timeout": "5", "keepalives": "1", "keepalives_idle": "30"}, {}, "SELECT 1", 1),
        ({"channel_binding": "prefer", "gssencmode": "disable", "sslsni": "0"}, {}, "SELECT 1", 1),
        ({"fallback_application_name": "fallback"}, {}, "SHOW application_name", "fastapi_chatdify_db"),
        ({"target_session_attrs": "read-write"}, {}, "SELECT 1", 1),
        ({"options": "-c search_path=elsewhere"}, {}, "SHOW search_path", "elsewhere"),
        (
            {"options": "-c search_path=elsewhere"},
            {"db_statement_timeout": 1.5},
            "SELECT current_setting('search_path') || ' ' || current_setting('statement_timeout')",
            "elsewhere 1500ms",
        ),
        ({"options": "-c client_encoding=LATIN1"}, {}, "SHOW client_encoding", "UTF8"),
        ({"client_encoding": "LATIN1"}, {}, "SELECT 'é' || length('é')", "é1"),
        ({"application_name": "theirs"}, {}, "SHOW application_name", "theirs"),
        ({"application_name": "theirs"}, {"db_application_name": "ours"}, "SHOW application_name", "ours"),
        ({"async_fallback": "true"}, {}, "SELECT 1", 1),
        ({}, {"db_statement_timeout": 1.5}, "SHOW statement_timeout", "1500ms"),
        ({}, {"db_idle_in_transaction_timeout": 2}, "SHOW idle_in_transaction_session_timeout", "2s"),
        ({}, {"db_statement_timeout": 1.5, "db_pgbouncer": True}, "SHOW statement_timeout", "1500ms"),
        (
            {},
            {"db_idle_in_transaction_timeout": 2, "db_pgbouncer": True},
            "SHOW idle_in_transaction_session_timeout",
            "2s",
        ),
    ],
)
async def test_both_drivers_connect(
    database_url: str, query: dict[str, str], values: dict[str, Any], statement: str, expected: object
) -> None:
    """PostgreSQL sees the same parameters from both."""
    database = Database(settings=settings(with_query(make_url(database_url), **query), **values))
    assert await ask_both(database, statement) == {expected}


@pytest.mark.parametrize(
    "scheme", ["postgres", "postgresql", "postgresql+psycopg2", "postgresql+asyncpg", "postgresql+psycopg"]
)
async def test_both_drivers_connect_whatever_the_scheme(database_url: str, scheme: str) -> None:
    """Every scheme leads both to the same database."""
    url = make_url(database_url)
    given = settings(url.set(drivername=scheme).render_as_string(hide_password=False))
    assert await ask_both(Database(settings=given), "SELECT current_database()") == {url.database}


async def test_both_drivers_connect_over_ipv6(database_url: str) -> None:
    """A bracketed address is where both connect to."""
    forwarder = Forwarder(database_url, host="::1")
    try:
        async with forwarder.opened():
            assert "@[::1]:" in forwarder.url
            assert await ask_both(Database(settings=settings(forwarder.url)), "SELECT 1") == {1}
    except OSError as error:
        pytest.skip(f"this machine has no IPv6: {error}")


async def test_both_drivers_connect_through_a_unix_socket(database_url: str) -> None:
    """The server's own socket directory, in either spelling."""
    plain = Database(settings=settings(database_url))
    [directories] = await ask_both(plain, "SHOW unix_socket_directories")
    [port] = await ask_both(plain, "SHOW port")
    [directory, *_] = [each.strip() for each in directories.split(",")]
    if not Path(directory).is_dir():
        pytest.skip(f"PostgreSQL is on another machine: there is no {directory} here")
    url = make_url(database_url).set(host=None, query={})
    encoded = directory.replace("/", "%2F")
    for spelled in (
        with_query(url, host=directory, port=port),
        url.set(host="HOST", port=int(port)).render_as_string(hide_password=False).replace("HOST", encoded),
    ):
        assert await ask_both(Database(settings=settings(spelled)), "SELECT inet_client_addr()") == {None}
