"""Health checks for a load balancer: ``app.include_router(health_router)``. Needs FastAPI."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Final, Literal

from fastapi import APIRouter, Response
from pydantic import BaseModel
from sqlalchemy import text
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.pool import QueuePool

from fastapi_chatdify_db.database import Database, Figures, db
from fastapi_chatdify_db.exceptions import DatabaseUnavailable, NameTaken

logger: Final = logging.getLogger(__name__)

TIME_LIMIT: Final = 2.0
"""Seconds within which a database has to answer to count as ready."""

Reason = Literal["no answer in time", "no free connection", "unavailable"]


class Live(BaseModel):
    """The process answers."""

    status: Literal["ok"] = "ok"


class Pool(BaseModel):
    """A connection pool's figures, in connections: kept open, in use now, and opened beyond ``size`` now."""

    size: int
    in_use: int
    overflow: int


class DatabaseReadiness(BaseModel):
    """Whether one database answers, and if not, why; never an exception's text."""

    status: Literal["ok", "unavailable"]
    reason: Reason | None = None
    pool: Pool | None = None
    figures: Mapping[str, Figures] = {}


class Readiness(BaseModel):
    """Whether every database answers, by name."""

    status: Literal["ok", "unavailable"]
    databases: dict[str, DatabaseReadiness]


def create_health_router(*databases: Database) -> APIRouter:
    """A router with ``GET /health/live`` and ``GET /health/ready`` for these databases.

    ``ready`` answers 503 unless each of them answers within ``TIME_LIMIT`` seconds.

    Raises:
        NameTaken: Two of them have one name, under which only one could be shown.
    """
    names = [database.name for database in databases]
    if taken := {name for name in names if names.count(name) > 1}:
        raise NameTaken(f"several databases are called {', '.join(sorted(taken))}; write e.g. Database('reports')")
    router = APIRouter(prefix="/health", tags=["health"])

    @router.get("/live")
    async def live() -> Live:
        return Live()

    @router.get("/ready", responses={503: {"model": Readiness}})
    async def ready(response: Response) -> Readiness:
        checks = await asyncio.gather(*map(_check, databases))
        ok = all(check.status == "ok" for check in checks)
        response.status_code = 200 if ok else 503
        found = {database.name: check for database, check in zip(databases, checks, strict=True)}
        return Readiness(status="ok" if ok else "unavailable", databases=found)

    return router


async def _check(database: Database) -> DatabaseReadiness:
    reason: Reason | None = None
    figures: Mapping[str, Figures] = {}
    try:
        async with asyncio.timeout(TIME_LIMIT), database.async_engine.connect() as connection:
            await connection.execute(text("SELECT 1"))
            figures = {name: await ask(connection) for name, ask in database.figures.items()}
    except PoolTimeout:
        reason = "no free connection"
    except TimeoutError:
        reason = "no free connection" if _is_exhausted(database) else "no answer in time"
    except DatabaseUnavailable as error:
        logger.warning("database %s is not ready: %s", database.name, error)
        reason = "no answer in time" if isinstance(error.orig, TimeoutError) else "unavailable"
    except Exception:  # whatever failed, the database is not ready
        logger.warning("database %s is not ready", database.name, exc_info=True)
        reason = "unavailable"
    status: Literal["ok", "unavailable"] = "ok" if reason is None else "unavailable"
    return DatabaseReadiness(status=status, reason=reason, pool=_pool_figures(database), figures=figures)


def _is_exhausted(database: Database) -> bool:
    pool, settings = database.async_engine.pool, database.settings
    most = settings.db_pool_size + settings.db_max_overflow
    return isinstance(pool, QueuePool) and settings.db_max_overflow >= 0 and pool.checkedout() >= most


def _pool_figures(database: Database) -> Pool | None:
    pool = database.async_engine.pool
    if not isinstance(pool, QueuePool):
        return None
    return Pool(size=pool.size(), in_use=pool.checkedout(), overflow=max(0, pool.overflow()))


health_router: Final = create_health_router(db)
