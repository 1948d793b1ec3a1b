"""The tables of the default database."""

from __future__ import annotations

from fastapi_chatdify_db.database import db


async def create_db_tables() -> None:
    """Create the tables of ``Base`` and of extensions that do not exist; safe in any number of processes at once."""
    await db.create_tables()


async def drop_db_tables() -> None:
    """Drop the tables of ``Base`` and of extensions, e.g. the durable tasks, with their rows."""
    await db.drop_tables()
