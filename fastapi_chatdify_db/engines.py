"""The engines of one database: made on first use, one pool per event loop, safe to fork."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from typing import Any, Final, TypeVar
from weakref import WeakSet

import sqlalchemy
from sqlalchemy import Connection, Engine, event
from sqlalchemy.ext import asyncio as sqlalchemy_asyncio
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.pool import AsyncAdaptedQueuePool, ConnectionPoolEntry, Pool

from fastapi_chatdify_db.closing import within_one_limit
from fastapi_chatdify_db.connecting import translate_connect_errors
from fastapi_chatdify_db.connection_state import follow
from fastapi_chatdify_db.first_statements import FirstStatements
from fastapi_chatdify_db.forks import forget_connections, in_forked_child
from fastapi_chatdify_db.liveness import leave_read_only_servers, ping_when_idle
from fastapi_chatdify_db.nesting import note_retryable_error
from fastapi_chatdify_db.per_loop_engine import PerLoopAsyncEngine
from fastapi_chatdify_db.refused_commits import note_failures
from fastapi_chatdify_db.session_end import FollowedSession
from fastapi_chatdify_db.settings import DatabaseSettings
from fastapi_chatdify_db.thread_pool import ThreadLendingPool
from fastapi_chatdify_db.turns import keep_threads_off
from fastapi_chatdify_db.urls import DriverTarget, async_target, insists_on_writes, session_timeouts, sync_target

T = TypeVar("T")

_all: Final[WeakSet[Engines]] = WeakSet()


class Engines:
    """Both engines of one database and the sessions bound to them.

    Parameters:
        settings: Called once, at the first use of an engine.
    """

    def __init__(self, settings: Callable[[], DatabaseSettings]) -> None:
        self._settings = settings
        _all.add(self)

    @cached_property
    def async_engine(self) -> PerLoopAsyncEngine:
        """The asyncpg (or aiosqlite) engine."""
        settings = self._settings()
        target = async_target(settings)
        if target.url.get_backend_name() == "postgresql":
            from fastapi_chatdify_db.watched_asyncpg import WatchedConnection  # no driver before it is used

            target.connect_args["connection_class"] = WatchedConnection
        # Looked up only now, like create_engine: tracing tools (OpenTelemetry) replace it, perhaps after our import.
        engine = sqlalchemy_asyncio.create_async_engine(
            target.url, **_engine_options(settings, target, AsyncAdaptedQueuePool)
        )
        self._listen(engine.sync_engine)
        return self._keep_first("async_engine", PerLoopAsyncEngine(engine))

    @cached_property
    def sync_engine(self) -> Engine:
        """The psycopg2 (or sqlite3) engine."""
        settings = self._settings()
        target = sync_target(settings)
        engine = sqlalchemy.create_engine(target.url, **_engine_options(settings, target, ThreadLendingPool))
        self._listen(engine)
        return self._keep_first("sync_engine", engine)

    @property
    def are_made(self) -> bool:
        """Whether there is an engine already, so that other settings would come too late."""
        return not self.__dict__.keys().isdisjoint(("async_engine", "sync_engine"))

    def new_async_session(self, isolation_level: str | None) -> AsyncSession:
        """An ``AsyncSession``; nothing is connected before its first statement."""
        bind: AsyncEngine = self.async_engine
        if isolation_level is not None:
            bind = bind.execution_options(isolation_level=isolation_level)
        # Objects stay readable after the commit, since responses and background tasks read them then.
        return AsyncSession(bind, sync_session_class=FollowedSession, expire_on_commit=False)

    def new_sync_session(self, isolation_level: str | None) -> FollowedSession:
        """A ``Session``; nothing is connected before its first statement."""
        bind = self.sync_engine
        if isolation_level is not None:
            bind = bind.execution_options(isolation_level=isolation_level)
        return FollowedSession(bind, expire_on_commit=False)

    async def dispose(self) -> None:
        """Close the idle connections of the running loop's pool and of the sync engine's, in bounded time."""
        if "async_engine" in self.__dict__:
            with within_one_limit():
                await self.async_engine.dispose()
        self.dispose_sync()

    def dispose_sync(self) -> None:
        """Close the idle connections of the sync engine's pool."""
        if "sync_engine" in self.__dict__:
            self.sync_engine.dispose()

    def forget_connections(self) -> None:
        """Start over with empty pools, in a forked child whose parent goes on using the connections."""
        if "async_engine" in self.__dict__:
            self.async_engine.forget_connections()
        if "sync_engine" in self.__dict__:
            forget_connections(self.sync_engine)

    def _keep_first(self, name: str, made: T) -> T:
        """Threads that make an engine at the same time all get the first one; the others have never connected."""
        first: T = self.__dict__.setdefault(name, made)
        return first

    def _listen(self, engine: Engine) -> None:
        settings = self._settings()
        event.listen(engine, "handle_error", note_retryable_error)
        if engine.dialect.name == "sqlite":
            event.listen(engine, "connect", _leave_transactions_to_sqlalchemy)
            event.listen(engine, "begin", _begin_explicitly)
            return
        translate_connect_errors(engine)
        if not engine.dialect.is_async:
            keep_threads_off(engine)
        follow(engine)
        is_for_writes = insists_on_writes(settings)
        FirstStatements(
            engine,
            begin_lazily=settings.db_lazy_begin,
            replace_dead=settings.db_pool_pre_ping,
            is_for_writes=is_for_writes,
        )
        if is_for_writes:
            leave_read_only_servers(engine)
        note_failures(engine)
        if settings.db_pool_pre_ping:
            ping_when_idle(engine, settings.db_ping_after, settings.db_pool_timeout)
        if settings.db_pgbouncer and (timeouts := session_timeouts(settings)):
            event.listen(engine, "begin", partial(_set_locally, timeouts))


def _engine_options(settings: DatabaseSettings, target: DriverTarget, poolclass: type[Pool]) -> dict[str, Any]:
    options: dict[str, Any] = {
        **settings.db_engine_options,
        "connect_args": target.connect_args,
        "echo": settings.db_echo,
        # Parameters hold what users typed; they belong in no traceback unless the developer asks for all statements.
        "hide_parameters": not settings.db_echo,
    }
    if target.url.get_backend_name() == "sqlite" and target.url.database in (None, "", ":memory:"):
        return options  # SQLAlchemy keeps a database in memory on a pool of one connection, which takes no options
    return options | {
        "poolclass": poolclass,  # for mode=memory, SQLite's dialect would choose another
        "pool_size": settings.db_pool_size,
        "max_overflow": settings.db_max_overflow,
        "pool_timeout": settings.db_pool_timeout,
        "pool_recycle": settings.db_pool_recycle,
    }


# The driver's own BEGIN comes late and ends savepoints:
# https://docs.sqlalchemy.org/en/20/dialects/sqlite.html#serializable-isolation-savepoints-transactional-ddl
def _leave_transactions_to_sqlalchemy(connection: Any, _: ConnectionPoolEntry) -> None:
    connection.isolation_level = None


def _begin_explicitly(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN")


def _set_locally(parameters: dict[str, int], connection: Connection) -> None:
    for name, value in parameters.items():
        connection.exec_driver_sql(f"SET LOCAL {name} = {value}")


@in_forked_child
def _forget_parents_connections() -> None:
    for engines in list(_all):
        engines.forget_connections()
