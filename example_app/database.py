"""The import paths of old; each name warns with its new spelling."""

from __future__ import annotations

from example_app.db.utils import create_db_tables
from fastapi_chatdify_db.legacy import SessionLocal, get_db, get_session

__all__ = ["SessionLocal", "create_db_tables", "get_db", "get_session"]
