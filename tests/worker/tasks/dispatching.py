"""Tasks that send others, and the ones that tests send to see when they arrive, and in which order."""

from __future__ import annotations

import asyncio

from celery import shared_task
from sqlalchemy import select

from celery_ext import DispatchFailed, Task
from fastapi_chatdify_db import db
from tests.models import Item
from tests.worker.tasks.callbacks import record
from tests.worker.tasks.outcomes import add_item
from tests.worker.tasks.writing import insert


@shared_task(base=Task)
def read_item(name: str) -> bool:
    """Whether a row is visible."""
    return db.sync_session.scalar(select(Item.id).where(Item.name == name)) is not None


@shared_task
def append(key: str, number: int) -> None:
    """One row, whose id tells the order."""
    insert(f"{key} {number}")


@shared_task(expires=3600)
def expiring(name: str) -> None:
    """Expire by its own option."""
    insert(name)


@shared_task(base=Task)
def insert_and_send(name: str, outcome: str = "succeed") -> str:
    """A task that sends another one, of the row that it inserts."""
    insert(name)
    task_id = read_item.delay_on_commit(name)
    if outcome == "raise":
        raise ValueError(name)
    return str(task_id)


@shared_task
def start_others(name: str, count: int, fail: bool = False) -> None:
    """Store further tasks."""
    for number in range(count):
        add_item.delay_durably(f"{name} {number}")
    if fail:
        raise ValueError(name)


@shared_task
def start_under_key(name: str, key: str) -> None:
    """Store a further task, which has its order."""
    add_item.apply_durably((name,), ordering_key=key)


@shared_task
async def start_under_key_in_a_thread(name: str, key: str) -> None:
    """The same on the session of threads, beside that of the event loop."""
    db.session.add(Item(f"before {name}"))
    await asyncio.to_thread(start_under_key, name, key)


@shared_task(bind=True, base=Task)
def pass_on_headers(self: Task, name: str) -> None:
    """Send another task with the headers of this one."""
    add_item.apply_async((f"passed on {name}",), headers=self.request.headers)


@shared_task(base=Task, bind=True)
def replaced(self: Task, name: str) -> None:
    """Hand over to another task."""
    insert(name)
    self.replace(record.s(name))


def _fail_to_send() -> None:
    raise DispatchFailed("not sent")


@shared_task(autoretry_for=(Exception,), default_retry_delay=0)
def fails_to_send(name: str) -> None:
    """Insert, and then not send what was to be sent on commit."""
    insert(name)
    db.on_commit(_fail_to_send)


@shared_task(autoretry_for=(Exception,), default_retry_delay=0)
async def fails_to_send_async(name: str) -> None:
    """The same in a coroutine."""
    db.session.add(Item(name))
    db.on_commit(_fail_to_send)
