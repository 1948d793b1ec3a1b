"""One database of an application, as the application sees it: ``db.session`` and its relatives."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import Engine, MetaData
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession
from sqlalchemy.orm import DeclarativeBase, Session

from fastapi_chatdify_db import startup
from fastapi_chatdify_db.after_commit import AfterCommit
from fastapi_chatdify_db.async_unit_of_work import AsyncUnitOfWork
from fastapi_chatdify_db.base import Base
from fastapi_chatdify_db.engines import Engines
from fastapi_chatdify_db.exceptions import InvalidSettings, NotInSyncUnit, OutsideUnitOfWork
from fastapi_chatdify_db.nesting import current_unit, outlives_its_unit
from fastapi_chatdify_db.settings import DatabaseSettings
from fastapi_chatdify_db.unit_of_work import UnitOfWork

if TYPE_CHECKING:
    from starlette.applications import Starlette


Figures = Mapping[str, float | None]
SettingsSource = DatabaseSettings | Callable[[], DatabaseSettings]

_EXAMPLE: Final = "settings=DatabaseSettings(database_url=...)"


class Database:
    """Engines, sessions and units of work of one database. Nothing is read or connected before its first use.

    Parameters:
        name: What error messages and the health check call it.
        settings: Where it is, and how its connections are kept; or a function that says so, called at the first use.
            None reads the environment then.
        base: The declarative base whose tables it holds.
        create_tables: Whether the lifespan creates the tables that do not exist.

    Raises:
        InvalidSettings: ``name`` is a URL, or ``settings`` are no ``DatabaseSettings``, nor a function.
    """

    def __init__(
        self,
        name: str = "db",
        *,
        settings: SettingsSource | None = None,
        base: type[DeclarativeBase] = Base,
        create_tables: bool = True,
    ) -> None:
        if "://" in name:  # would be ignored as a URL, and show its password in messages as a name
            raise InvalidSettings(f"a database's first argument is its name; write: Database('reports', {_EXAMPLE})")
        self.name = name
        self._settings: SettingsSource = DatabaseSettings if settings is None else _checked(settings)
        self.creates_tables = create_tables
        self.metadatas: list[MetaData] = [base.metadata]
        """What tables are created from; extensions add their own. ``info["dialect"]`` limits one to a dialect."""
        self.services: dict[object, Callable[[], AbstractContextManager[object]]] = {}
        """By owner, what makes a context manager that is open during the lifespan; entered and left in threads."""
        self.figures: dict[str, Callable[[AsyncConnection], Awaitable[Figures]]] = {}
        """By name, what asks the database for figures that the health check shows besides the pool."""
        self.engines: Final = Engines(lambda: self.settings)

    def __repr__(self) -> str:
        return f"<Database {self.name}>"

    @property
    def settings(self) -> DatabaseSettings:
        """The settings in force; they, or a function, may be assigned before the first use of an engine.

        Raises:
            InvalidSettings: An environment variable cannot be used; the message names it. Or what is assigned are no
                ``DatabaseSettings``, or differ from the settings that an engine was made from.
        """
        self._settings = settings = _read(self._settings)
        return settings

    @settings.setter
    def settings(self, settings: SettingsSource) -> None:
        _checked(settings)
        if self.engines.are_made and not _read(settings).make_same_engines_as(self.settings):
            raise InvalidSettings(
                f"{self.name}.settings is assigned too late: an engine has been made from other settings. Assign it "
                f"where the application is made, or make another database: Database('reports', settings=...)"
            )
        self._settings = settings

    @property
    def async_engine(self) -> AsyncEngine:
        """The engine of ``session``; each event loop has connections of its own."""
        return self.engines.async_engine

    @property
    def sync_engine(self) -> Engine:
        """The engine of ``sync_session``."""
        return self.engines.sync_engine

    @property
    def session(self) -> AsyncSession:
        """The current unit's session; connected at its first statement, committed and closed by the unit.

        Raises:
            OutsideUnitOfWork: No unit is open here.
            NotInSyncUnit: The unit that is open is a synchronous one.
        """
        unit = self._require_unit("session", "async with {0}.transaction() as session: ...")
        if not isinstance(unit, AsyncUnitOfWork):
            raise NotInSyncUnit(f"{self.name}.session is for async code. Here: {self.name}.sync_session")
        return unit.async_session(self.engines)

    @property
    def sync_session(self) -> Session:
        """The current unit's synchronous session, for ``def`` endpoints and Celery tasks.

        Raises:
            OutsideUnitOfWork: No unit is open here.
        """
        unit = self._require_unit("sync_session", "with {0}.sync_transaction() as session: ...")
        return unit.sync_session(self.engines)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[AsyncSession]:
        """A unit of work of its own, anywhere: committed at the end of the block, rolled back on an exception.

        Raises:
            sqlalchemy.exc.SQLAlchemyError: The commit failed.
        """
        async with AsyncUnitOfWork(self.engines) as unit:
            yield unit.async_session(self.engines)

    @contextmanager
    def sync_transaction(self) -> Iterator[Session]:
        """``transaction`` for synchronous code.

        Raises:
            sqlalchemy.exc.SQLAlchemyError: The commit failed.
        """
        with UnitOfWork(self.engines) as unit:
            yield unit.sync_session(self.engines)

    def on_commit(self, callback: AfterCommit) -> None:
        """Call ``callback`` once what the unit did so far on this database is committed; never after a rollback.

        Callbacks run before the response leaves: coroutine functions on the event loop, others in a thread. What a
        callback writes through ``session`` is committed after it. An exception is logged and stops nothing else; an
        ``AfterCommitError`` goes on to whoever ended the unit, once the others are done.

        Parameters:
            callback: Takes no arguments; a coroutine function needs an async unit.

        Raises:
            OutsideUnitOfWork: No unit is open here.
            NotInSyncUnit: A coroutine function, and the unit that is open is a synchronous one.
            TypeError: ``callback`` cannot be called; perhaps it is what a function returned.
        """
        if not callable(callback):  # now, while the unit can roll back: after the commit it could only be logged
            if inspect.iscoroutine(callback):
                callback.close()  # Python would warn that nobody awaited it
            raise TypeError(
                f"{self.name}.on_commit() takes a function to call later, and was given a {type(callback).__name__}, "
                f"as a call returns it; write: {self.name}.on_commit(lambda: notify(...))"
            )
        self._require_unit("on_commit()", "async with {0}.transaction(): ...").on_commit(self.engines, callback)

    def rollback_only(self) -> None:
        """Let the current unit roll back at its end, whatever the response says.

        Raises:
            OutsideUnitOfWork: No unit is open here.
        """
        self._require_unit("rollback_only()", "async with {0}.transaction(): ...").roll_back_only()

    async def release(self) -> None:
        """Commit what there is and give the connection back, before waiting for something slow.

        The session stays usable: its next statement begins a new transaction. What was committed here stays, also
        when the request fails later.

        Raises:
            OutsideUnitOfWork: No unit is open here.
            NotInSyncUnit: The unit that is open is a synchronous one.
            sqlalchemy.exc.SQLAlchemyError: The commit failed.
        """
        unit = self._require_unit("release()", "async with {0}.transaction(): ...")
        if not isinstance(unit, AsyncUnitOfWork):
            raise NotInSyncUnit(f"{self.name}.release() is for async code. Here: {self.name}.sync_session.commit()")
        await unit.finish_async(commit=True)

    async def create_tables(self) -> None:
        """Create the tables of ``metadatas`` that do not exist; safe in any number of processes at once."""
        await startup.create_tables(self.async_engine, self.metadatas)

    async def drop_tables(self) -> None:
        """Drop the tables of ``metadatas`` with their rows, also those of extensions, e.g. the durable tasks."""
        await startup.drop_tables(self.async_engine, self.metadatas)

    async def dispose(self) -> None:
        """Close the connections that are not in use; a later use opens new ones."""
        await self.engines.dispose()

    @asynccontextmanager
    async def lifespan(self, app: object) -> AsyncIterator[None]:
        """The application's lifespan: ``FastAPI(lifespan=db.lifespan)``.

        Waits for the database, creates the tables, and disposes of the engines at the end.

        Raises:
            DatabaseUnavailable: The database did not answer within ``DB_STARTUP_TIMEOUT`` seconds, or refused for good.
        """
        try:
            prepare = self.create_tables if self.creates_tables else None
            await startup.wait_for_database(self.async_engine, self.settings.db_startup_timeout, prepare)
            async with startup.services(self.services.values()):
                yield
        finally:
            await self.dispose()

    def init_app(self, app: Starlette, *, middleware: bool = True) -> None:
        """Put the lifespan around the one that ``app`` has, and add ``DBSessionMiddleware`` unless it is there.

        Parameters:
            app: A Starlette or FastAPI application that has not started.
            middleware: False leaves the middleware to the caller, e.g. for other arguments.

        Raises:
            TypeError: ``app`` is something else, e.g. a Celery application.
        """
        # A worker that imports this module shall not import Starlette.
        from starlette.applications import Starlette

        from fastapi_chatdify_db.middleware import DBSessionMiddleware

        if not isinstance(app, Starlette):
            raise TypeError(
                f"{self.name}.init_app() takes the FastAPI or Starlette application, not {app!r}. "
                f"For Celery: celery_ext.init_app(app, db={self.name})"
            )

        inner = app.router.lifespan_context

        @asynccontextmanager
        async def composed(app: Starlette) -> AsyncIterator[Mapping[str, Any] | None]:
            async with self.lifespan(app), inner(app) as state:
                yield state

        app.router.lifespan_context = composed  # type: ignore[assignment]  # Mapping or None, as inner yields it
        added: list[object] = [entry.cls for entry in app.user_middleware]  # classes, or functions that make one
        is_there = any(isinstance(each, type) and issubclass(each, DBSessionMiddleware) for each in added)
        if middleware and not is_there:
            app.add_middleware(DBSessionMiddleware)

    def _require_unit(self, what: str, instead: str) -> UnitOfWork:
        unit = current_unit(self.engines)
        if unit is None:
            where = (
                "until the request or block ends in which this was started. Here"
                if outlives_its_unit()
                else "inside a request (app.add_middleware(DBSessionMiddleware)) or a task. "
                "Elsewhere, as in a handler for Exception or 500"
            )
            raise OutsideUnitOfWork(f"{self.name}.{what} is only there {where}: {instead.format(self.name)}")
        return unit


def _checked(settings: SettingsSource) -> SettingsSource:
    """Refuse a URL or a dictionary where it is given: the first use of an engine may be far away."""
    if not isinstance(settings, DatabaseSettings) and not callable(settings):
        raise _no_settings(settings)
    return settings


def _read(settings: SettingsSource) -> DatabaseSettings:
    read = settings if isinstance(settings, DatabaseSettings) else settings()
    if not isinstance(read, DatabaseSettings):
        raise _no_settings(read)
    return read


def _no_settings(given: object) -> InvalidSettings:
    return InvalidSettings(f"a {type(given).__name__} is no DatabaseSettings; write: {_EXAMPLE}")


db: Final = Database()
