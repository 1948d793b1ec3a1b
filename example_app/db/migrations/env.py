"""Alembic's environment: the async engine of the application's own settings."""

from __future__ import annotations

import asyncio

from alembic import context
from sqlalchemy import Connection

from celery_ext.durable.table import metadata as durable_tasks
from example_app.db import Base, db

_METADATA = [Base.metadata, durable_tasks]
_TABLES = frozenset(name for metadata in _METADATA for name in metadata.tables)


def _is_ours(name: str | None, kind: str, _: object) -> bool:
    # Celery's queues and results may be in the same database.
    return kind != "table" or name in _TABLES


def _migrate(connection: Connection) -> None:
    context.configure(connection=connection, target_metadata=_METADATA, include_name=_is_ours, compare_type=True)
    with context.begin_transaction():
        context.run_migrations()


async def _run() -> None:
    async with db.async_engine.connect() as connection:
        await connection.run_sync(_migrate)
        await connection.commit()
    await db.dispose()


asyncio.run(_run())
