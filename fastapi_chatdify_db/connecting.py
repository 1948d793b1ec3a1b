"""Opening a connection: where the server gives none, both drivers raise ``DatabaseUnavailable``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from sqlalchemy import URL, Dialect, Engine, event
from sqlalchemy.engine import ExceptionContext

from fastapi_chatdify_db.exceptions import DatabaseUnavailable
from fastapi_chatdify_db.liveness import driver_errors
from fastapi_chatdify_db.sqlstates import sqlstate


def translate_connect_errors(engine: Engine) -> None:
    """Let every connect that fails raise ``DatabaseUnavailable``.

    SQLAlchemy wraps only psycopg2's errors in its own; asyncpg's and the operating system's it passes on as they are.
    """
    # Not by a do_connect listener, which would keep the application's own from being called.
    dialect: Any = engine.dialect
    dialect.connect = partial(_connect, engine.url, dialect, dialect.connect)
    # SQLAlchemy's own questions to a new connection (hstore's types, the version) come after the connect.
    event.listen(engine, "handle_error", partial(_translate_unprepared, engine.url))


def place(url: URL) -> str:
    """A database's host, port and name, for messages: without user and password."""
    if isinstance(hosts := url.query.get("host"), tuple):  # each with its port
        return f"{', '.join(hosts)}/{url.database}"
    host = url.host or url.query.get("host", "local socket")
    return f"{host}:{url.port or url.query.get('port', 5432)}/{url.database}"


def reason(error: BaseException) -> str:
    """An error's class and text in one line, for messages."""
    # SQLAlchemy's adapter of asyncpg raises a mere Error, whose cause is asyncpg's own
    named = error.__cause__ if error.__cause__ is not None and sqlstate(error) else error
    # SQLAlchemy appends a line with a link
    return f"{type(named).__name__}: {error}".partition("\n")[0].removesuffix(": ")


@contextmanager
def connect_errors_translated(url: URL, dialect: Dialect) -> Iterator[None]:
    """Let a connect in the block, or a first statement on a new connection, raise ``DatabaseUnavailable``."""
    try:
        yield
    except Exception as error:
        if isinstance(error, driver_errors(dialect)) or sqlstate(error) is not None:
            raise unavailable(url, error) from error
        raise


def unavailable(url: URL, error: Exception) -> DatabaseUnavailable:
    """What to raise for an error of the driver's that means that there is no connection to be had."""
    return DatabaseUnavailable(f"database {place(url)} gives no connection ({reason(error)})", error)


def _translate_unprepared(url: URL, context: ExceptionContext) -> None:
    if context.connection is None and context.is_disconnect and isinstance(context.original_exception, Exception):
        raise unavailable(url, context.original_exception) from context.original_exception


def _connect(url: URL, dialect: Dialect, connect: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    with connect_errors_translated(url, dialect):
        return connect(*arguments, **options)
