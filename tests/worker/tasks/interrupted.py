"""Tasks that are slow, wait, or are killed in the middle, so that limits and signals find them there."""

from __future__ import annotations

import asyncio
import os
import signal
import time

from celery import shared_task
from sqlalchemy import event, text

from celery_ext import Task
from fastapi_chatdify_db import db
from tests.models import Item
from tests.worker.tasks.writing import first_time, insert


@shared_task
def sleep_after_insert(name: str, seconds: float) -> None:
    """Insert, then be slow, so that a time limit or a signal finds an open transaction."""
    insert(name)
    time.sleep(seconds)


@shared_task
async def sleep_after_insert_async(name: str, seconds: float) -> None:
    """The same in a coroutine."""
    db.session.add(Item(name))
    await db.session.flush()
    await asyncio.sleep(seconds)


@shared_task(soft_time_limit=1)
def slow_commit(name: str) -> str:
    """Have a COMMIT that takes longer than the limit."""
    insert(name)
    return name


@shared_task(soft_time_limit=1)
async def slow_commit_async(name: str) -> str:
    """The same in a coroutine."""
    db.session.add(Item(name))
    return name


@shared_task
async def exit_async() -> None:
    """What a library may do that is meant for command lines."""
    raise SystemExit(1)


@shared_task
def wait_for_lock(key: int) -> None:
    """Wait in PostgreSQL until somebody gives up an advisory lock."""
    db.sync_session.execute(text("SELECT pg_advisory_xact_lock_shared(:key)"), {"key": key})


@shared_task
async def release_and_wait(name: str, key: int) -> None:
    """Write, commit, and wait for something slow without the row's lock."""
    db.session.add_all([Item(f"{name} begun"), Item(f"{os.getpid()}")][: 2 if name == "pid" else 1])
    await db.release()
    async with db.transaction() as waiting:
        await waiting.execute(text("SELECT pg_advisory_xact_lock_shared(:key)"), {"key": key})
    await db.session.execute(text("SELECT 1"))
    await db.release()
    db.session.add(Item(f"{name} ended"))


@shared_task(base=Task, bind=True, acks_late=True, reject_on_worker_lost=True)
def killed_once(self: Task, name: str) -> str:
    """Kill the own process in the middle of the first delivery."""
    insert(name)
    if first_time():
        os.kill(os.getpid(), signal.SIGKILL)
    return name


@shared_task
def killed_once_acked_early(name: str) -> None:
    """The same, when the broker has forgotten the message already."""
    insert(name)
    if first_time():
        os.kill(os.getpid(), signal.SIGKILL)


@shared_task
async def die_between_commits_once(name: str) -> None:
    """Write with both sessions; the first time, the process dies at the COMMIT of the second one."""
    db.session.add(Item(name))
    run = await db.session.scalar(text("SELECT nextval('kills')"))
    await asyncio.to_thread(insert, f"{name} sync {run}")
    if run == 1:
        event.listen(db.session.sync_session, "before_commit", lambda _: os.kill(os.getpid(), signal.SIGKILL))
