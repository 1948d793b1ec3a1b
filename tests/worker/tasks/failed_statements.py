"""Statements that fail, and whose errors quote what no log should have."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from celery import shared_task
from sqlalchemy import select, text
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from celery_ext import Task
from fastapi_chatdify_db import Database, DatabaseSettings, db
from tests.models import Item


@shared_task
def bad_statement(secret: str) -> None:
    """Fail in a statement whose error message quotes its parameter."""
    db.sync_session.execute(text("SELECT CAST(:secret AS integer)"), {"secret": secret})


@shared_task(base=Task, bind=True, max_retries=1, default_retry_delay=0, autoretry_for=(SQLAlchemyError,))
def bad_statement_retried(self: Task, secret: str) -> None:
    """The same, retried."""
    db.sync_session.execute(text("SELECT CAST(:secret AS integer)"), {"secret": secret})


@shared_task
async def bad_statement_in_group(secret: str) -> None:
    """The same in a branch of a task group."""

    async def branch() -> None:
        async with db.transaction() as session:
            await session.execute(text("SELECT CAST(CAST(:secret AS text) AS integer)"), {"secret": secret})

    async with asyncio.TaskGroup() as group:
        group.create_task(branch())


@shared_task
def one_of_none(secret: str) -> None:
    """Ask for the one row that is not there, after an error whose message quotes a parameter."""
    try:
        with db.sync_session.begin_nested():
            db.sync_session.execute(text("SELECT CAST(:secret AS integer)"), {"secret": secret})
    except SQLAlchemyError:
        db.sync_session.scalars(select(Item).where(Item.name == "nobody")).one()


@shared_task
def handled_flush_error(secret: str) -> None:
    """Go on after a flush that failed."""
    db.sync_session.add(Item(secret))
    db.sync_session.flush()
    with suppress(IntegrityError):
        db.sync_session.execute(text("SET CONSTRAINTS ALL IMMEDIATE"))
        db.sync_session.add(Item(secret))
        db.sync_session.flush()


@shared_task
def elsewhere() -> None:
    """Ask a database that is not there."""
    gone = Database("gone", settings=DatabaseSettings(database_url="postgresql://127.0.0.1:1/gone"))
    gone.sync_session.execute(text("SELECT 1"))
