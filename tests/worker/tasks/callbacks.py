"""What Celery calls for the end of another task: links, errbacks, a chord's body and the handlers of a class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import celery
from celery import shared_task
from sqlalchemy import func, select

from fastapi_chatdify_db import db, get_sync_session
from tests.models import Item
from tests.worker.tasks.writing import insert


@shared_task
def record(result: str, prefix: str = "linked ") -> None:
    """A callback that leaves a row of the result it was given."""
    with get_sync_session() as session:
        session.add(Item(prefix + result))


@shared_task
def errback(request: Any, error: BaseException, traceback: object, name: str) -> None:
    """A new-style error callback, called inside the failed task's process."""
    insert(f"errback {name}")


@shared_task
def failing_errback(request: Any, error: BaseException, traceback: object, name: str) -> None:
    """An error callback that fails itself."""
    insert(f"errback {name}")
    raise ValueError(name)


@shared_task
def count_items(results: Sequence[object]) -> int:
    """A chord's body."""
    return db.sync_session.scalar(select(func.count()).select_from(Item)) or 0


class WithHandlers(celery.Task):  # type: ignore[type-arg]  # a base of the user's, that knows nothing of ours
    """Writes a row in each of Celery's handlers."""

    def on_failure(self, exc: BaseException, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        insert(f"on_failure {args[0]}")

    def on_success(self, retval: Any, task_id: str, args: Any, kwargs: Any) -> None:
        insert(f"on_success {args[0]}")
        if args[0] == "handler fails":
            db.sync_session.add(Item(f"on_success {args[0]}"))

    def on_retry(self, exc: BaseException, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        insert(f"on_retry {args[0]}")

    def after_return(self, status: str, retval: Any, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        insert(f"after_return {args[0]} {status}")


@shared_task(base=WithHandlers, bind=True, max_retries=1, default_retry_delay=0)
def handled(self: WithHandlers, name: str, outcome: str) -> None:
    """Insert and end as ``outcome`` says; the handlers write as well."""
    insert(f"{name} {self.request.retries}")
    if outcome == "duplicate":
        db.sync_session.add(Item(f"{name} {self.request.retries}"))
    if outcome == "raise":
        raise ValueError(name)
    if outcome == "retry" and self.request.retries == 0:
        raise self.retry()
