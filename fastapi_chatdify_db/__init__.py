"""One unit of work for the web and for the worker: SQLAlchemy 2 for Starlette, FastAPI and Celery."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from fastapi_chatdify_db.base import Base
from fastapi_chatdify_db.database import Database, db
from fastapi_chatdify_db.exceptions import (
    AfterCommitError,
    ChatdifyDBError,
    DatabaseUnavailable,
    InvalidSettings,
    NameTaken,
    NotInSyncUnit,
    OutsideUnitOfWork,
    SessionInUse,
    TransactionAborted,
)
from fastapi_chatdify_db.logs import UnitOfWorkFilter
from fastapi_chatdify_db.session import get_async_session, get_session, get_sync_session
from fastapi_chatdify_db.settings import DatabaseSettings
from fastapi_chatdify_db.utils import create_db_tables, drop_db_tables

if TYPE_CHECKING:
    from fastapi_chatdify_db.health import create_health_router, health_router
    from fastapi_chatdify_db.middleware import DBSessionMiddleware
    from fastapi_chatdify_db.session import async_engine, sync_engine

__all__ = [
    "AfterCommitError",
    "Base",
    "ChatdifyDBError",
    "DBSessionMiddleware",
    "Database",
    "DatabaseSettings",
    "DatabaseUnavailable",
    "InvalidSettings",
    "NameTaken",
    "NotInSyncUnit",
    "OutsideUnitOfWork",
    "SessionInUse",
    "TransactionAborted",
    "UnitOfWorkFilter",
    "async_engine",
    "create_db_tables",
    "create_health_router",
    "db",
    "drop_db_tables",
    "get_async_session",
    "get_session",
    "get_sync_session",
    "health_router",
    "sync_engine",
]

# Imported, or made, at first use: a worker needs no Starlette, and an application without health checks no FastAPI.
_LAZY = {
    "DBSessionMiddleware": "middleware",
    "async_engine": "session",
    "create_health_router": "health",
    "health_router": "health",
    "sync_engine": "session",
}


def __getattr__(name: str) -> object:
    if name in _LAZY:
        return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
