"""Tasks that ask to be run again."""

from __future__ import annotations

from typing import Any

from celery import shared_task
from celery.exceptions import Reject
from sqlalchemy.exc import IntegrityError

from celery_ext import Task
from fastapi_chatdify_db import db
from tests.models import Counter, Item
from tests.worker.tasks.writing import first_time, insert


@shared_task(base=Task, bind=True, autoretry_for=(IntegrityError,), max_retries=2, default_retry_delay=0)
def unique_at_second_try(self: Task, name: str) -> int:
    """Fail at COMMIT the first time."""
    insert(name)
    if self.request.retries == 0:
        insert(name)
    return self.request.retries


@shared_task(base=Task, autoretry_for=(IntegrityError,), max_retries=2, default_retry_delay=0, bind=True)
async def unique_at_second_try_async(self: Task, name: str) -> int:
    """Fail at COMMIT the first time."""
    db.session.add_all([Item(name)] if self.request.retries else [Item(name), Item(name)])
    return self.request.retries


@shared_task(
    base=Task, db_isolation_level="SERIALIZABLE", db_retry=True, max_retries=50, default_retry_delay=0, acks_late=True
)
def increment() -> None:
    """Read, then write what was read plus one."""
    counter = db.sync_session.get_one(Counter, 1)
    counter.value += 1


@shared_task(base=Task, bind=True)
def three_times(self: Task, name: str) -> None:
    """Insert, and ask to be run again without giving up what was done."""
    insert(f"{name} {self.request.retries}")
    if self.request.retries < 2:
        self.retry(countdown=0, throw=False)


@shared_task(base=Task, bind=True)
def committed_and_retried(self: Task, name: str) -> None:
    """Commit a row, and ask to be run again at once."""
    insert(f"{name} {self.request.retries}")
    db.sync_session.commit()
    if self.request.retries < 3:
        raise self.retry(countdown=0)


@shared_task(base=Task, bind=True)
def retried_with(self: Task, name: str, options: dict[str, Any]) -> None:
    """Retry with options, and tell which ones the next attempt has."""
    if self.request.retries == 0:
        raise self.retry(**{"countdown": 0, **options})
    insert(f"{name} {(self.request.timelimit or [None])[0]} {(self.request.headers or {}).get('x')}")


@shared_task(base=Task, acks_late=True)
def rejected_once(name: str) -> None:
    """Give the message back to the broker, the first time."""
    insert(name)
    if first_time():
        raise Reject(name, requeue=True)


class TriesAgain(Task):
    """Runs its body again when it failed."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().__call__(*args, **kwargs)
        except ZeroDivisionError:
            return super().__call__(*args, **kwargs)


@shared_task(base=TriesAgain, bind=True)
def tries_again(self: Task, name: str) -> None:
    """Fail the first time."""
    insert(name)
    if not self.__dict__.setdefault("tried", []):
        self.__dict__["tried"].append(name)
        raise ZeroDivisionError
