"""Whether a pooled connection is alive, tested only after it was idle; a dead one is replaced."""

from __future__ import annotations

import select
import time
from typing import Any, Final

from sqlalchemy import Dialect, Engine, event
from sqlalchemy.dialects.postgresql.asyncpg import AsyncAdapt_asyncpg_dbapi
from sqlalchemy.engine import ExceptionContext, ExecutionContext
from sqlalchemy.exc import DisconnectionError, InvalidatePoolError
from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection

from fastapi_chatdify_db.connection_state import state_in
from fastapi_chatdify_db.sqlstates import is_read_only, sqlstate

_INTERNAL: Final = "XX000"  # internal_error: https://www.postgresql.org/docs/current/errcodes-appendix.html
_PING_LIMIT: Final = 5.0
"""Seconds, as HikariCP's validationTimeout: https://github.com/brettwooldridge/HikariCP#infrequently-used."""
_LEAST_PING_LIMIT: Final = 1.0
"""Seconds; a server that is merely busy may take as long."""


def ping_when_idle(engine: Engine, seconds: float, patience: float) -> None:
    """Test a connection at its checkout, in one round trip, when it was idle for longer than ``seconds``.

    Takes the place of ``pool_pre_ping``, which asks at every checkout, in three round trips with asyncpg. A connection
    that is known to have ended is noticed without asking.

    Parameters:
        engine: One of PostgreSQL, with asyncpg or psycopg2.
        seconds: For how long a connection is trusted.
        patience: Seconds that its user is ready to wait; with asyncpg, the test takes no longer, nor than five.
    """
    is_async = engine.dialect.is_async
    limit = min(_PING_LIMIT, max(_LEAST_PING_LIMIT, patience))

    def test(dbapi_connection: Any, record: ConnectionPoolEntry, proxy: PoolProxiedConnection) -> None:
        if is_async and dbapi_connection.driver_connection.is_closed():
            raise DisconnectionError("the server has closed the connection")
        idle = time.monotonic() - state_in(record).idle_since
        if idle > seconds or (not is_async and _has_something_to_read(dbapi_connection)):
            try:
                _ping(engine, dbapi_connection, limit)
            except Exception as error:  # asyncpg's own kinds too, which the dialect translates only for its cursors
                # The pool replaces this connection, and at their checkout all others that are as old.
                raise InvalidatePoolError from error

    # Before the listeners of tracing tools (OpenTelemetry): SQLAlchemy calls all of them again for the next connection.
    event.listen(engine, "checkout", test, insert=True)


def leave_read_only_servers(engine: Engine) -> None:
    """Replace a connection, at its next checkout, whose server has refused a write: it was fenced, or is a standby now.

    Parameters:
        engine: One of PostgreSQL whose new connections lead to a server that takes writes.
    """
    event.listen(engine, "handle_error", _note_read_only)


def _note_read_only(context: ExceptionContext) -> None:
    if context.connection is not None and is_read_only(context.original_exception):
        context.connection.connection.invalidate(soft=True)


def driver_errors(dialect: Dialect) -> tuple[type[Exception], ...]:
    """The error classes that a statement or a connect may raise for want of a living connection, among other causes."""
    asyncpg = _asyncpg(dialect)
    # SQLAlchemy 2.0 passes on as it is what asyncpg raises itself, such as for a root certificate that is missing.
    own = () if asyncpg is None else (asyncpg.InterfaceError, asyncpg.InternalClientError)
    return (dialect.loaded_dbapi.Error, OSError, *own)


def wants_another_connection(context: ExecutionContext, error: Exception) -> bool:
    """Whether a statement failed because its connection died, or had prepared it before its table was altered."""
    return has_died(context, error) or is_outdated_statement(error)


def has_died(context: ExecutionContext, error: Exception) -> bool:
    """Whether a statement failed because its connection died."""
    asyncpg = _asyncpg(context.dialect)
    internal = () if asyncpg is None else asyncpg.InternalClientError
    return (
        # 57P01 to 57P05 are the server's last words on a connection, and may be read before its end is. When asyncpg
        # reads them while nothing was asked, it raises InternalClientError, which SQLAlchemy 2.0 leaves as it is.
        (sqlstate(error) or "").startswith("57P0")
        or isinstance(error, internal)
        or isinstance(error.__cause__, internal)
        or context.dialect.is_disconnect(
            error,  # type: ignore[arg-type]  # asyncpg's adapter may raise an OSError too
            context.root_connection.connection.dbapi_connection,
            context.cursor,
        )
    )


def is_outdated_statement(error: BaseException | None) -> bool:
    """Whether a statement failed that asyncpg had prepared before a migration; the next transaction does so anew."""
    if isinstance(error, AsyncAdapt_asyncpg_dbapi.InvalidCachedStatementError):
        return True
    # PostgreSQL's words for a parameter's type, e.g. an enumeration, that was dropped and made anew.
    return sqlstate(error) == _INTERNAL and "cache lookup failed for type" in str(error)


def replace_connection(context: ExecutionContext, error: Exception) -> None:
    """Put a new connection, and a new cursor, under a statement that wants another one.

    SQLAlchemy does the same when a checkout finds one dead (``_ConnectionFairy._checkout``), but nothing public does:
    invalidating a ``Connection`` makes its transaction unusable, and with it the session and the objects that were
    read.

    Raises:
        DatabaseUnavailable: There is no new connection to be had.
        Exception: ``error``, when the new one is dead as well; else what the application's preparation of it raised.
    """
    # If an outdated statement failed, this lets asyncpg's dialect prepare anew on all connections.
    context.handle_dbapi_exception(error)
    proxy: Any = context.root_connection.connection
    record = proxy._connection_record
    record.invalidate(error)
    proxy.dbapi_connection = record.get_connection()
    try:
        # Tools that count the connections in use are told that the dead one ended, as of any that is invalidated.
        proxy._pool.dispatch.checkin(None, record)
        # What the application prepares (a tenant, a search_path), it prepares at the checkout.
        proxy._pool.dispatch.checkout(proxy.dbapi_connection, record, proxy)
    except BaseException as unprepared:
        record.invalidate(unprepared)  # or the session would go on with one that is half prepared
        if isinstance(unprepared, DisconnectionError):  # dead as well
            raise error from None
        raise
    context.cursor = context.create_cursor()


def _asyncpg(dialect: Dialect) -> Any:
    """The driver's module; None of another driver."""
    return getattr(dialect.loaded_dbapi, "asyncpg", None)


def _has_something_to_read(psycopg2_connection: Any) -> bool:
    """Whether an idle connection is readable, as only one that has ended is."""
    descriptor = psycopg2_connection.fileno()
    if hasattr(select, "poll"):  # not on Windows
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        return bool(poll.poll(0))
    return bool(select.select([descriptor], [], [], 0)[0])


def _ping(engine: Engine, dbapi_connection: Any, limit: float) -> None:
    if not engine.dialect.is_async:
        engine.dialect.do_ping(dbapi_connection)
        return
    try:
        # The dialect's own ping opens a transaction around its statement. This is the simple protocol, which
        # PgBouncer passes on as one piece.
        dbapi_connection.run_async(lambda driver: driver.execute("SELECT 1", timeout=limit))
    except TimeoutError:
        dbapi_connection.driver_connection.terminate()  # or closing it, too, would be waited for
        raise
