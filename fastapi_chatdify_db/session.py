"""The sessions of the default database: a FastAPI dependency and two context managers.

``async_engine`` and ``sync_engine`` are importable from here as well; each is made when it is asked for.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from fastapi_chatdify_db.async_unit_of_work import AsyncUnitOfWork
from fastapi_chatdify_db.database import db
from fastapi_chatdify_db.nesting import current_unit
from fastapi_chatdify_db.unit_of_work import UnitOfWork

if TYPE_CHECKING:
    from sqlalchemy import Engine
    from sqlalchemy.ext.asyncio import AsyncEngine

    async_engine: AsyncEngine
    sync_engine: Engine


async def get_session() -> AsyncGenerator[AsyncSession]:
    """FastAPI dependency: the request's session.

    With ``DBSessionMiddleware`` it is ``db.session``, committed before the response is sent. Without the middleware it
    has a unit of its own, committed when FastAPI ends the dependency. FastAPI does so before the response only with
    ``Depends(get_session, scope="function")`` (0.121 and later), so that no failed commit is announced as a success.

    Raises:
        sqlalchemy.exc.SQLAlchemyError: The commit failed, without the middleware.
    """
    if (joined := _joined_session()) is not None:
        yield joined
    else:
        async with _GeneratorUnit(db.engines) as unit:
            yield unit.async_session(db.engines)


@asynccontextmanager
async def get_async_session() -> AsyncIterator[AsyncSession]:
    """The session of the unit of work around the block, or of a new one that ends with it.

    Raises:
        sqlalchemy.exc.SQLAlchemyError: The commit of the new unit failed.
    """
    if (joined := _joined_session()) is not None:
        yield joined
    else:
        async with db.transaction() as session:
            yield session


@contextmanager
def get_sync_session() -> Iterator[Session]:
    """``get_async_session`` for synchronous code, e.g. Celery tasks.

    Raises:
        sqlalchemy.exc.SQLAlchemyError: The commit of the new unit failed.
    """
    if (unit := _unit_to_join()) is not None:
        yield unit.sync_session(db.engines)
    else:
        with db.sync_transaction() as session:
            yield session


class _GeneratorUnit(AsyncUnitOfWork):
    """The unit of a ``get_session()`` that has none around it; nobody joins it.

    Whoever leaves ``async for session in get_session()`` by ``break`` goes on at once, and the event loop rolls the
    unit back some time later. Until then it looks open, but what is written to it is lost.
    """


def _unit_to_join() -> UnitOfWork | None:
    unit = current_unit(db.engines)
    return None if isinstance(unit, _GeneratorUnit) else unit


def _joined_session() -> AsyncSession | None:
    unit = _unit_to_join()
    return unit.async_session(db.engines) if isinstance(unit, AsyncUnitOfWork) else None


def __getattr__(name: str) -> object:
    if name in ("async_engine", "sync_engine"):
        return getattr(db, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["async_engine", "get_async_session", "get_session", "get_sync_session", "sync_engine"]
