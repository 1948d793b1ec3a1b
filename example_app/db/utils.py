"""The tables, for demos and tests; production has Alembic's migrations."""

from __future__ import annotations

from fastapi_chatdify_db import create_db_tables, drop_db_tables

__all__ = ["create_db_tables", "drop_db_tables"]
