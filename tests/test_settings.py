"""The environment's settings: defaults, clear errors, no secrets."""

from __future__ import annotations

import asyncio
import logging
import re
import traceback
from pathlib import Path
from typing import Any, Self

import pytest
from pydantic import ValidationError, model_validator
from sqlalchemy import make_url, text

from fastapi_chatdify_db import Database, DatabaseSettings, DatabaseUnavailable, InvalidSettings
from tests.serving import free_socket

SECRET = "s3cr3t"
PAGE = Path(__file__).parents[1] / "docs" / "settings.md"


@pytest.fixture(autouse=True)
def empty_environment(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DATABASE_URL")


def test_defaults() -> None:
    """Without any variable each setting has its documented value."""
    documented = dict(re.findall(r"^\| `(DB_\w+)` \| `?(\{\}|\w+)", PAGE.read_text(), re.MULTILINE))
    defaults = {
        name.upper(): str(field.default).lower().removesuffix(".0")
        for name, field in DatabaseSettings.model_fields.items()
        if name.startswith("db_")
    }
    assert documented == defaults
    assert DatabaseSettings().url().render_as_string() == "postgresql://postgres@localhost:5432/postgres"


def test_engine_options_in_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are JSON; an empty variable, as Compose makes one, has none."""
    monkeypatch.setenv("DB_ENGINE_OPTIONS", '{"query_cache_size": 9}')
    assert DatabaseSettings().db_engine_options == {"query_cache_size": 9}
    monkeypatch.setenv("DB_ENGINE_OPTIONS", "")
    assert DatabaseSettings().db_engine_options == {}
    assert hash(DatabaseSettings()) == hash(DatabaseSettings())


def test_variables_reach_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """The DB_POOL_* variables are the pools', in both engines."""
    values = {"DB_POOL_SIZE": "3", "DB_MAX_OVERFLOW": "4", "DB_POOL_TIMEOUT": "1.5", "DB_POOL_RECYCLE": "60"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("DB_POOL_PRE_PING", "false")
    database = Database()
    for pool in (database.async_engine.pool, database.sync_engine.pool):
        assert pool.size() == 3  # type: ignore[attr-defined]  # QueuePool's
        assert pool._max_overflow == 4  # type: ignore[attr-defined]
        assert pool._timeout == 1.5  # type: ignore[attr-defined]
        assert (pool._recycle, pool._pre_ping) == (60, False)


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("DB_ECHO", "1", True),
        ("DB_STATEMENT_TIMEOUT", "1.5", 1.5),
        ("DB_IDLE_IN_TRANSACTION_TIMEOUT", "60", 60.0),
        ("DB_APPLICATION_NAME", "chat", "chat"),
        ("DB_PGBOUNCER", "true", True),
        ("DB_STARTUP_TIMEOUT", "5", 5.0),
        ("db_startup_timeout", "5", 5.0),
    ],
)
def test_variable_is_its_field(monkeypatch: pytest.MonkeyPatch, variable: str, value: str, expected: object) -> None:
    """Each field is the environment variable of its name, in upper or lower case."""
    monkeypatch.setenv(variable, value)
    assert getattr(DatabaseSettings(), variable.lower()) == expected


def test_url_from_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """POSTGRES_* make the URL, whatever characters the password has."""
    parts = {"HOST": "db.example", "PORT": "6432", "USER": "ann", "PASSWORD": "p@:/?#%", "DB": "app"}
    for name, value in parts.items():
        monkeypatch.setenv(f"POSTGRES_{name}", value)
    url = DatabaseSettings().url()
    assert (url.host, url.port, url.username, url.password, url.database) == (
        "db.example",
        6432,
        "ann",
        "p@:/?#%",
        "app",
    )


def test_empty_password_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compose file's ``${PASSWORD:-}`` leaves the drivers their other places for one: PGPASSWORD, ``~/.pgpass``."""
    monkeypatch.setenv("POSTGRES_PASSWORD", "")
    assert DatabaseSettings().url().password is None


def test_empty_url_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that ``${DATABASE_URL:-}`` leaves the database to its parts."""
    monkeypatch.setenv("DATABASE_URL", "")
    monkeypatch.setenv("POSTGRES_DB", "app")
    assert DatabaseSettings().database_url is None
    assert DatabaseSettings().url().database == "app"


def test_last_password_in_the_query_counts() -> None:
    """As it does for libpq."""
    assert DatabaseSettings(database_url="postgresql://host/name?password=a&password=b").url().password == "b"


def test_database_url_comes_before_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole URL is not mixed with parts."""
    monkeypatch.setenv("DATABASE_URL", "postgres://one/first")
    monkeypatch.setenv("POSTGRES_DB", "second")
    assert DatabaseSettings().url().database == "first"


@pytest.mark.parametrize(("given", "port"), [("tcp://10.43.0.7:5433", 5433), ("", 5432)], ids=["kubernetes", "empty"])
def test_port_that_nobody_chose(monkeypatch: pytest.MonkeyPatch, given: str, port: int) -> None:
    """In Kubernetes, a Service named ``postgres`` puts its address into POSTGRES_PORT of every pod."""
    monkeypatch.setenv("POSTGRES_PORT", given)
    assert DatabaseSettings().url().port == port
    monkeypatch.setenv("POSTGRES_PORT", "5432,5433")  # libpq's way to say several
    assert DatabaseSettings(database_url="postgres://one:6432/first").url().port == 6432


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("POSTGRES_PORT", "tcp://10.43.0.7"),
        ("DB_ENGINE_OPTIONS", "query_cache_size=9"),
        ("DB_ENGINE_OPTIONS", "[1]"),
        ("DB_ENGINE_OPTIONS", '{"pool_pre_ping": true}'),
        ("DB_ENGINE_OPTIONS", '{"isolation_level": "AUTOCOMMIT"}'),
        ("DB_ENGINE_OPTIONS", '{"execution_options": {"isolation_level": "AUTOCOMMIT"}}'),
        ("DB_POOL_SIZE", "ten"),
        ("DB_POOL_SIZE", "0"),
        ("DB_POOL_TIMEOUT", "-1"),
        ("DB_POOL_TIMEOUT", "nan"),
        ("DB_STATEMENT_TIMEOUT", "inf"),
        ("DB_STATEMENT_TIMEOUT", "2147484"),  # in milliseconds, more than PostgreSQL takes
        ("DB_POOL_PRE_PING", "perhaps"),
        ("DB_MAX_OVERFLOW", "-2"),
        ("DB_POOL_RECYCLE", "-2"),
        ("POSTGRES_PORT", "99999"),
        ("POSTGRES_PORT", "0"),
        ("DATABASE_URL", "garbage"),
        ("DATABASE_URL", " "),
        ("DATABASE_URL", f"user:{SECRET}"),
        ("DATABASE_URL", f"postgresql://user:{SECRET}@host:port/name"),
        ("DATABASE_URL", f"postgresql://user:{SECRET}@host:99999/name"),
        ("DATABASE_URL", f"postgresql://user:{SECRET}@host:0/name"),
        ("DATABASE_URL", f"postgresql://user:half@{SECRET}@host/name"),
        ("DATABASE_URL", f"postgresql://user:third@{SECRET}/third@host/name"),
        ("DATABASE_URL", f"postgresql://user:third@{SECRET}?third@host/name"),
        ("DATABASE_URL", f"postgresql://user:third@{SECRET}?third=@host/name"),
        ("DATABASE_URL", f"postgresql://domain/user:{SECRET}@host/name"),
        ("DATABASE_URL", f"postgresql://user:{SECRET}@one:5432,two:5432/name"),
        ("DATABASE_URL", f"postgresql://user:{SECRET}@one,two/name"),
        ("DATABASE_URL", f"mysql://user:{SECRET}@host/name"),
        ("DATABASE_URL", f"postgresql://user:{SECRET}@host/name?channel_binding=require"),
        ("DATABASE_URL", f"postgresql://user:{SECRET}@host/name?connect_timeout={SECRET}"),
    ],
)
def test_wrong_value_is_one_line_that_names_the_variable(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    """The error is named, one line, and says which variable; the whole traceback shows no secret."""
    monkeypatch.setenv("POSTGRES_PASSWORD", SECRET)
    monkeypatch.setenv(variable, value)
    with pytest.raises(InvalidSettings) as caught:
        Database().async_engine.pool  # noqa: B018
    message = str(caught.value)
    assert message.startswith(f"{variable}: ")
    assert "\n" not in message
    assert SECRET not in "".join(traceback.format_exception(caught.value))
    assert caught.value.__context__ is None


@pytest.mark.parametrize(
    "url",
    ["postgresql://a%40b:c%40d@host/e%40f", "postgresql:///name?host=@socket", "sqlite:////a@b/c@d.db"],
    ids=["as the error says", "of one kind only", "of a file"],
)
def test_url_with_an_at_sign(url: str) -> None:
    """It is taken wherever it is no part of a password that was cut."""
    assert DatabaseSettings(database_url=url).url() == make_url(url)


@pytest.mark.parametrize("hosts", ["one:5432,two:5432", "one,two", "one,two:5432"])
def test_several_hosts_are_told_the_form_that_works(hosts: str) -> None:
    """libpq's own is none that asyncpg's or psycopg2's dialect reads alike."""
    with pytest.raises(InvalidSettings, match=r"\?host=one:5432&host=two:5432"):
        Database(settings=DatabaseSettings(database_url=f"postgresql://{hosts}/name")).async_engine  # noqa: B018


def test_name_that_is_no_setting_is_an_error() -> None:
    """A misspelt one would leave the default in force, and that may be another database."""
    with pytest.raises(InvalidSettings, match=r"^URL: "):
        DatabaseSettings(url=f"postgresql://user:{SECRET}@reports/name")  # type: ignore[call-arg]


def test_setting_without_its_name_is_an_error() -> None:
    """A URL as a positional argument is not taken for something else, and left out."""
    with pytest.raises(InvalidSettings, match=r"^settings have names; write: DatabaseSettings\(database_url=\.\.\.\)$"):
        DatabaseSettings("postgresql://host/name")  # type: ignore[call-arg]


def test_applications_own_check_shows_no_secret() -> None:
    """What a validator of a subclass refuses, it refuses without showing the values around it."""

    class After(DatabaseSettings):
        @model_validator(mode="after")
        def refuse(self) -> Self:
            raise ValueError("not like this")

    class Before(DatabaseSettings):
        @model_validator(mode="before")
        @classmethod
        def refuse(cls, data: object) -> object:
            raise ValueError("not like this")

    for kind in (After, Before):
        with pytest.raises((ValidationError, InvalidSettings), match="not like this") as caught:
            kind(database_url=f"postgresql://user:{SECRET}@host/name", postgres_password=SECRET)
        assert SECRET not in "".join(traceback.format_exception(caught.value))


def test_settings_do_not_change() -> None:
    """Another value would not reach the engines, so it is an error and not a silence."""
    settings = DatabaseSettings()
    with pytest.raises(InvalidSettings, match=r"DatabaseSettings\(database_url=...\)") as caught:
        settings.database_url = f"postgresql://user:{SECRET}@host/name"
    assert SECRET not in str(caught.value)
    assert settings.database_url is None


def test_several_wrong_values_are_reported_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """One start tells everything that is wrong."""
    monkeypatch.setenv("DB_POOL_SIZE", "ten")
    monkeypatch.setenv("DB_ECHO", "loud")
    with pytest.raises(InvalidSettings, match=r"DB_POOL_SIZE: .*; DB_ECHO: "):
        DatabaseSettings()


def test_password_is_in_no_repr() -> None:
    """Neither settings nor database nor engines show it."""
    settings = DatabaseSettings(
        database_url=f"postgresql://user:{SECRET}@host/name", postgres_password=SECRET, db_pool_size=1
    )
    database = Database(settings=settings)
    shown = [settings, database, database.async_engine, database.sync_engine, database.async_engine.url]
    assert SECRET not in "".join(f"{each!r} {each}" for each in shown)


async def test_password_is_in_no_log_of_what_works(database_url: str, caplog: pytest.LogCaptureFixture) -> None:
    """Not even with every statement and every library's debugging logged, in either engine."""
    caplog.set_level(logging.DEBUG)
    url = make_url(database_url)
    secretive = url if url.password else url.set(password=SECRET)
    given = DatabaseSettings(database_url=secretive.render_as_string(hide_password=False), db_echo=True)
    database = Database(settings=given, create_tables=False)

    def ask() -> None:
        with database.sync_transaction() as session:
            session.execute(text("SELECT 'sync'"))

    async with database.lifespan(None), database.transaction() as session:
        await session.execute(text("SELECT 'async'"))
        await asyncio.to_thread(ask)
    assert "SELECT 'async'" in caplog.text
    assert "SELECT 'sync'" in caplog.text
    assert str(secretive.password) not in caplog.text


async def test_password_is_in_no_trace_of_what_fails(caplog: pytest.LogCaptureFixture) -> None:
    """Neither the lifespan's log and error nor either driver's traceback show it when nobody answers."""
    caplog.set_level(logging.DEBUG)
    with free_socket() as listener:
        port = listener.getsockname()[1]
    url = f"postgresql://user:{SECRET}@127.0.0.1:{port}/name"
    database = Database(settings=DatabaseSettings(database_url=url, db_startup_timeout=0.2, db_echo=True))
    with pytest.raises(DatabaseUnavailable) as unavailable:
        async with database.lifespan(None):
            pass
    with pytest.raises(DatabaseUnavailable, match=str(port)) as refused_async:
        await database.async_engine.connect()
    with pytest.raises(DatabaseUnavailable, match=str(port)) as refused_sync:
        database.sync_engine.connect()
    assert "not ready" in caplog.text
    for caught in (unavailable, refused_async, refused_sync):
        assert SECRET not in "".join(traceback.format_exception(caught.value))
    assert SECRET not in caplog.text


def test_settings_in_code_come_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """``db.settings`` may be assigned before the first use."""
    monkeypatch.setenv("DATABASE_URL", "postgresql://environment/name")
    database = Database()
    database.settings = DatabaseSettings(database_url="postgresql://code/name")
    assert database.sync_engine.url.host == "code"


def test_settings_may_come_from_a_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is called at the first use, and once; what it returns is checked then."""
    called: list[str] = []

    def read() -> DatabaseSettings:
        called.append("read")
        return DatabaseSettings(db_pool_size=3)

    given, assigned = Database(settings=read), Database()
    assigned.settings = read
    assert called == []
    monkeypatch.setenv("DATABASE_URL", "postgresql://environment/name")
    for database in (given, assigned):
        assert database.sync_engine.url.host == "environment"
        assert database.settings.db_pool_size == 3
    assert called == ["read"] * 2
    nothing: Any = dict
    with pytest.raises(InvalidSettings, match="a dict is no DatabaseSettings"):
        assert Database(settings=nothing).settings


def test_settings_are_not_assigned_too_late() -> None:
    """Other settings than those of the engines are refused; what an application adds to them may change."""

    class Settings(DatabaseSettings):
        greeting: str = "hello"
        postgres_host: str = "elsewhere"  # says nothing beside a URL

    database = Database("reports")
    database.settings = DatabaseSettings(database_url="postgresql://first/name")
    assert database.sync_engine.url.host == "first"
    database.settings = Settings(database_url="postgresql://first/name", greeting="goodbye")
    with pytest.raises(InvalidSettings, match=r"reports\.settings is assigned too late"):
        database.settings = DatabaseSettings(database_url=f"postgresql://user:{SECRET}@second/name")
    assert database.async_engine.url.host == database.settings.url().host == "first"
