"""The table of durable tasks, in a metadata of its own."""

from __future__ import annotations

from typing import Final

from sqlalchemy import BigInteger, Column, DateTime, Identity, Index, Integer, MetaData, Table, Text, text
from sqlalchemy.exc import ProgrammingError

from fastapi_chatdify_db.sqlstates import sqlstate

metadata: Final = MetaData(info={"dialect": "postgresql"})
"""For Alembic's ``target_metadata``, and for ``create_db_tables``, which has it from ``celery_ext.init_app``."""

MISSING: Final = (
    "there is no table durable_task here; create the tables, or run the migration of celery_ext.durable.table.metadata"
)
_UNDEFINED_TABLE: Final = "42P01"  # https://www.postgresql.org/docs/current/errcodes-appendix.html
_PENDING: Final = text("status = 'pending'")

durable_task: Final = Table(
    "durable_task",
    metadata,
    Column("id", Text, primary_key=True, comment="Celery's task id"),
    Column("seq", BigInteger, Identity(), nullable=False, comment="the order of rows with one ordering_key"),
    Column("name", Text, nullable=False, comment="the task's registered name"),
    Column("arguments", Text, nullable=False, comment="args and kwargs, in kombu's JSON"),
    Column("options", Text, nullable=False, comment="of apply_async, likewise"),
    Column("status", Text, nullable=False, server_default="pending", comment="pending, done, failed or cancelled"),
    Column("ordering_key", Text, comment="rows of one key run in order, one at a time"),
    Column("retries", Integer, nullable=False, server_default=text("0"), comment="Celery's count of retries"),
    Column("due_at", DateTime(timezone=True), nullable=False, comment="not to start before"),
    Column("ring_at", DateTime(timezone=True), nullable=False, comment="when a relay is to send a message, next"),
    Column("rings", Integer, nullable=False, server_default=text("0"), comment="messages sent since it became due"),
    Column("expires_at", DateTime(timezone=True), comment="not to start after"),
    Column("created_at", DateTime(timezone=True), nullable=False, server_default=text("now()")),
    Column("finished_at", DateTime(timezone=True)),
    Column("error", Text, comment="of the last attempt"),
    # Sending and running tasks searches only pending rows, so that rows that are done cost nothing.
    Index("ix_durable_task_ring_at", "ring_at", postgresql_where=_PENDING),
    Index(
        "ix_durable_task_ordering_key",
        "ordering_key",
        "seq",
        postgresql_where=text("status = 'pending' AND ordering_key IS NOT NULL"),
    ),
    Index("ix_durable_task_failed", "finished_at", postgresql_where=text("status = 'failed'")),
    Index("ix_durable_task_finished_at", "finished_at", postgresql_where=text("status IN ('done', 'cancelled')")),
)


def is_missing(error: BaseException) -> bool:
    """Whether one of our statements failed because the table was not made."""
    return isinstance(error, ProgrammingError) and sqlstate(error.orig) == _UNDEFINED_TABLE
