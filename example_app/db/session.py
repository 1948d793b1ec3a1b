"""Where the application takes its sessions and engines from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from example_app.db import db
from fastapi_chatdify_db import get_async_session, get_session, get_sync_session

if TYPE_CHECKING:
    from sqlalchemy import Engine
    from sqlalchemy.ext.asyncio import AsyncEngine

    async_engine: AsyncEngine
    sync_engine: Engine


def __getattr__(name: str) -> object:
    # Made when they are asked for, so that importing this module reads no setting.
    if name in ("async_engine", "sync_engine"):
        return getattr(db, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["async_engine", "get_async_session", "get_session", "get_sync_session", "sync_engine"]
