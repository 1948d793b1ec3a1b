"""What the lifespan does: wait for the database, create the tables, run services beside the application."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager
from typing import Final
from zlib import crc32

from anyio import to_thread
from sqlalchemy import Connection, MetaData, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_after_delay, wait_random_exponential

from fastapi_chatdify_db.connecting import place, reason
from fastapi_chatdify_db.exceptions import DatabaseUnavailable
from fastapi_chatdify_db.sqlstates import sqlstate

logger: Final = logging.getLogger(__name__)

# Any number serves as long as all processes use the same one and nobody else does.
_TABLES_LOCK: Final = crc32(b"fastapi_chatdify_db.create_tables")

# Only those that the server knows: transaction_timeout came with PostgreSQL 17.
_NO_TIME_LIMITS: Final = text(
    """
    SELECT set_config(name, '0', true) FROM pg_settings
    WHERE name IN ('statement_timeout', 'lock_timeout', 'transaction_timeout')
    """
)

# connection_exception, too_many_connections, cannot_connect_now, invalid_catalog_name (a server that is being set up):
# https://www.postgresql.org/docs/current/errcodes-appendix.html
_TRANSIENT: Final = ("08", "53300", "57P", "3D000")

_SHORTEST_TRY: Final = 1.0  # second; with less time, the last try would fail for the time limit and hide the cause


async def wait_for_database(
    engine: AsyncEngine, timeout: float, prepare: Callable[[], Awaitable[None]] | None = None
) -> None:
    """Connect, trying again with growing pauses while the server is not there or not ready.

    Parameters:
        engine: Which database to wait for.
        timeout: Seconds after which no further try is made; 0 is one try. A server may accept the connection and then
            say nothing: each try may last for the seconds that are left, at least for ``_SHORTEST_TRY``.
        prepare: Called once it is there, outside of the limit, and again if the server goes away meanwhile.

    Raises:
        DatabaseUnavailable: No try succeeded, or the server refused for good, e.g. because of a wrong password.
    """
    retrying = AsyncRetrying(
        retry=retry_if_exception(_is_transient),
        stop=stop_after_delay(timeout),
        wait=wait_random_exponential(multiplier=0.1, max=2.0),
        before_sleep=lambda state: _log_try(engine, state),
        retry_error_callback=lambda state: _give_up(engine, timeout, state),
    )
    await retrying(_connect, engine, time.monotonic() + timeout, prepare)


async def create_tables(engine: AsyncEngine, metadatas: Iterable[MetaData]) -> None:
    """Create the tables that do not exist; safe in any number of processes at once."""
    async with engine.begin() as connection:
        await connection.run_sync(_take_lock)
        for metadata in _of_dialect(engine, metadatas):
            await connection.run_sync(metadata.create_all)


async def drop_tables(engine: AsyncEngine, metadatas: Iterable[MetaData]) -> None:
    """Drop the tables that exist; safe beside processes that create them."""
    async with engine.begin() as connection:
        await connection.run_sync(_take_lock)
        for metadata in _of_dialect(engine, metadatas):
            await connection.run_sync(metadata.drop_all)


@asynccontextmanager
async def services(factories: Iterable[Callable[[], AbstractContextManager[object]]]) -> AsyncIterator[None]:
    """Run services for the duration of the block; they are entered and left in threads, since they may wait."""
    with ExitStack() as running:
        try:
            for make_service in factories:
                await to_thread.run_sync(running.enter_context, make_service())
            yield
        finally:
            await to_thread.run_sync(running.close)


def _of_dialect(engine: AsyncEngine, metadatas: Iterable[MetaData]) -> list[MetaData]:
    return [each for each in metadatas if each.info.get("dialect") in (None, engine.dialect.name)]


def _take_lock(connection: Connection) -> None:
    # CREATE TABLE IF NOT EXISTS is not enough: of two at once, one fails on the catalog's unique indexes.
    if connection.dialect.name == "postgresql":
        connection.execute(_NO_TIME_LIMITS)
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _TABLES_LOCK})


async def _connect(engine: AsyncEngine, deadline: float, prepare: Callable[[], Awaitable[None]] | None) -> None:
    limit = max(_SHORTEST_TRY, deadline - time.monotonic())
    async with asyncio.timeout(limit), engine.connect() as connection:
        await connection.execute(text("SELECT 1"))
    if prepare is not None:
        await prepare()


def _is_transient(error: BaseException) -> bool:
    original = getattr(error, "orig", error)
    state = sqlstate(original)
    if state is not None:
        return state.startswith(_TRANSIENT)
    lost = isinstance(error, DBAPIError) and error.connection_invalidated
    return lost or isinstance(error, (OSError, DatabaseUnavailable))


def _log_try(engine: AsyncEngine, state: RetryCallState) -> None:
    number, error = state.attempt_number, _error(state)
    logger.warning("database %s not ready (try %d): %s", place(engine.url), number, reason(error))


def _give_up(engine: AsyncEngine, timeout: float, state: RetryCallState) -> None:
    error = _error(state)
    raise DatabaseUnavailable(
        f"database {place(engine.url)} did not answer within {timeout:g} s ({reason(error)}); "
        "start it, correct DATABASE_URL or raise DB_STARTUP_TIMEOUT, or the URL's connect_timeout for a slow one",
        error,
    )


def _error(state: RetryCallState) -> BaseException:
    error = None if state.outcome is None else state.outcome.exception()
    assert error is not None  # tenacity asks only after a try that failed
    return error.orig or error if isinstance(error, DatabaseUnavailable) else error
