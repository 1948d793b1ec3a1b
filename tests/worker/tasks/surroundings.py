"""Tasks that tell what they find around them: a process, an event loop, a request, a session."""

from __future__ import annotations

import asyncio
import logging
import os

from celery import shared_task
from opentelemetry.trace import get_current_span
from sqlalchemy import text

from celery_ext import Task
from fastapi_chatdify_db import UnitOfWorkFilter, db
from fastapi_chatdify_db.request_id import current_request_id
from tests.worker.tasks.writing import insert


@shared_task
def seen_context() -> dict[str, object]:
    """What the task inherited, and what its log records carry."""
    record = logging.makeLogRecord({})
    UnitOfWorkFilter().filter(record)
    return {
        "request_id": current_request_id(),
        "logged": {name: getattr(record, name) for name in ("request_id", "task_id", "unit_id")},
        "trace": f"{get_current_span().get_span_context().trace_id:032x}",
    }


@shared_task(base=Task, db_session=False)
def without_session() -> str:
    """What a task that wants no unit gets."""
    try:
        db.sync_session.execute(text("SELECT 1"))
    except Exception as error:
        return type(error).__name__
    return "a session"


@shared_task
def pid_after_insert(name: str) -> int:
    """Insert and tell the process."""
    insert(name)
    return os.getpid()


_met: set[int] = set()


@shared_task
async def loop_id(number: int, together: int) -> int:
    """Which loop runs this; waits until ``together`` such tasks are running in this process."""
    _met.add(number)
    while len(_met) < together:
        await asyncio.sleep(0.01)
    await db.session.execute(text("SELECT 1"))
    return id(asyncio.get_running_loop())


@shared_task(base=Task, bind=True)
async def own_id(self: Task, number: int, together: int) -> list[str | None]:
    """The id of its request, alone, beside ``together`` such tasks, in a thread and in SQLAlchemy's greenlet."""
    first = self.request.id
    _met.add(number)
    while len(_met) < together:
        await asyncio.sleep(0.01)
    in_thread = await asyncio.to_thread(lambda: self.request.id)
    return [first, self.request.id, in_thread, await db.session.run_sync(lambda _: self.request.id)]
