"""The ways a task may end, and what it returns or leaves."""

from __future__ import annotations

import asyncio
from functools import wraps
from typing import Any

import celery
from celery import shared_task
from celery.exceptions import Ignore, Reject
from sqlalchemy import text

from celery_ext import Task
from fastapi_chatdify_db import db
from tests.models import Item
from tests.worker.tasks.writing import insert


@shared_task(base=Task)
def add_item(name: str, outcome: str = "succeed") -> str:
    """Insert, and then end as ``outcome`` says; a ``duplicate`` fails only at COMMIT."""
    insert(name)
    if outcome == "duplicate":
        db.sync_session.add(Item(name))
    if outcome == "raise":
        raise ValueError(name)
    if outcome == "ignore":
        raise Ignore
    if outcome == "reject":
        raise Reject(name, requeue=False)
    return name


@shared_task(base=Task, bind=True)
async def add_item_async(self: Task, name: str, outcome: str = "succeed") -> str | None:
    """``add_item`` on the event loop; returns the id that its request has."""
    db.session.add(Item(name))
    await db.session.flush()
    if outcome == "duplicate":
        db.session.add(Item(name))
    if outcome == "raise":
        raise ValueError(name)
    if outcome == "retry" and self.request.retries == 0:
        raise self.retry(countdown=0)
    if outcome == "sleep":
        await asyncio.sleep(60)
    if outcome == "cancel":
        raise asyncio.CancelledError
    return self.request.id


@shared_task
def both_sessions(name: str) -> None:
    """A function call joins the unit around it: ``add_item`` is rolled back with its caller."""
    add_item(f"{name} called")
    raise ValueError(name)


@shared_task
async def apply_in_thread(name: str) -> str:
    """Run another task eagerly without blocking the loop; returns how it ended."""
    return str((await asyncio.to_thread(add_item.apply, (name,))).state)


@shared_task
def commit_halfway(name: str, outcome: str = "succeed") -> None:
    """Write, commit, and then end as ``outcome`` says."""
    insert(f"{name} begun")
    db.sync_session.commit()
    insert(f"{name} ended")
    if outcome == "raise":
        raise ValueError(name)


@shared_task
async def commit_halfway_async(name: str, outcome: str = "succeed") -> None:
    """The same in a coroutine."""
    db.session.add(Item(f"{name} begun"))
    await db.release()
    db.session.add(Item(f"{name} ended"))
    if outcome == "raise":
        raise ValueError(name)


@shared_task
def rolled_back_by_itself(name: str) -> None:
    """Succeed, and leave nothing."""
    insert(name)
    db.rollback_only()


@shared_task
async def rolled_back_by_itself_async(name: str) -> None:
    """Likewise."""
    db.session.add(Item(name))
    db.rollback_only()


@shared_task
def raise_text(utf_16: str) -> None:
    """Fail with a text that may be none PostgreSQL stores."""
    raise ValueError(bytes.fromhex(utf_16).decode("utf-16", "surrogatepass"))


@shared_task
def unserializable(name: str) -> object:
    """Succeed with what JSON does not carry."""
    insert(name)
    return object()


@shared_task
async def unserializable_async(name: str) -> object:
    """The same in a coroutine."""
    db.session.add(Item(name))
    return object()


class NeverStarts(celery.Task):  # type: ignore[type-arg]  # a base of the user's
    """Fails before its body."""

    def before_start(self, task_id: str, args: Any, kwargs: Any) -> None:
        raise ValueError("not today")


@shared_task(base=NeverStarts)
def never_starts() -> None:
    """What nobody gets to see."""


def with_a_plain_wrapper(function: Any) -> Any:
    """A decorator that was written for ``def``."""

    @wraps(function)
    def wrapper(*args: Any) -> Any:
        return function(*args)

    return wrapper


@shared_task(ignore_result=True)
@with_a_plain_wrapper
async def decorated(name: str) -> None:
    """Insert, if it is ever awaited."""
    db.session.add(Item(name))


@shared_task
def count_run(name: str) -> None:
    """Insert, and count in a sequence, which no rollback takes back."""
    insert(name)
    db.sync_session.execute(text("SELECT nextval('kills')"))
