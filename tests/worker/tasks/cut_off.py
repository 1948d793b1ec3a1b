"""Tasks that lose the database, or find none, the first time."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

import celery
from celery import shared_task
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from fastapi_chatdify_db import Database, DatabaseSettings, db
from tests.models import Item
from tests.worker.tasks.writing import first_time, insert


def _terminate(backend: int | None) -> None:
    with db.sync_transaction() as session:
        session.execute(text("SELECT pg_terminate_backend(:backend, 5000)"), {"backend": backend})


@shared_task
def cut_off_once(name: str) -> None:
    """Lose the database's connection before the COMMIT, the first time."""
    insert(name)
    if first_time():
        _terminate(db.sync_session.scalar(text("SELECT pg_backend_pid()")))


@shared_task
async def cut_off_once_async(name: str) -> None:
    """The same in a coroutine, when asyncpg has read PostgreSQL's last words but not that the connection is closed."""
    db.session.add(Item(name))
    if await db.session.scalar(text("SELECT nextval('kills')")) == 1:
        _terminate(await db.session.scalar(text("SELECT pg_backend_pid()")))
        await asyncio.sleep(0)
        await asyncio.sleep(0)


@shared_task
def cut_off_once_unnoticed(name: str) -> None:
    """The same, in a task that handles the error and goes on."""
    insert(name)
    if first_time():
        with suppress(SQLAlchemyError):
            db.sync_session.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))


@shared_task
def cut_off_once_renamed(name: str) -> None:
    """The same, in a task that makes an error of its own of it."""
    insert(name)
    if first_time():
        try:
            db.sync_session.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))
        except SQLAlchemyError as error:
            raise ValueError("cannot be looked up") from error


@shared_task
async def cut_off_once_in_a_group(name: str) -> None:
    """The same, in one of several tasks of the event loop."""

    async def branch() -> None:
        async with db.transaction() as session:
            await session.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))

    db.session.add(Item(name))
    if await db.session.scalar(text("SELECT nextval('kills')")) == 1:
        async with asyncio.TaskGroup() as group:
            group.create_task(branch())


@shared_task
def refused_once(name: str) -> None:
    """Find the server out of connections, the first time, as a task that was released and begins again may."""
    insert(name)
    if first_time():
        db.sync_session.execute(text("DO $$ BEGIN RAISE 'too many clients' USING ERRCODE = '53300'; END $$"))


class StartsLater(celery.Task):  # type: ignore[type-arg]  # a base of the user's
    """Finds the server out of connections before its body, the first time."""

    def before_start(self, task_id: str, args: Any, kwargs: Any) -> None:
        if first_time():
            db.sync_session.execute(text("DO $$ BEGIN RAISE 'too many clients' USING ERRCODE = '53300'; END $$"))


@shared_task(base=StartsLater)
def starts_later(name: str) -> None:
    """Insert, once it is let."""
    insert(name)


@shared_task
def without_connection_once(name: str) -> None:
    """Find no connection free, the first time."""
    insert(name)
    if first_time():
        raise PoolTimeout


GONE = Database("gone", settings=DatabaseSettings(database_url="postgresql://nobody@127.0.0.1:1/gone"))


@shared_task
def unreachable_once(name: str) -> None:
    """Find another database unreachable, the first time."""
    insert(name)
    if first_time():
        with GONE.sync_transaction() as session:
            session.execute(text("SELECT 1"))


@shared_task
async def unreachable_once_async(name: str) -> None:
    """The same in a coroutine."""
    db.session.add(Item(name))
    if await db.session.scalar(text("SELECT nextval('kills')")) == 1:
        async with GONE.transaction() as session:
            await session.execute(text("SELECT 1"))
