"""Tasks whose class has a ``__call__`` of its own."""

from __future__ import annotations

from typing import Any

import celery
from celery import shared_task
from sqlalchemy.exc import IntegrityError

from fastapi_chatdify_db import db
from tests.models import Item
from tests.worker.tasks.writing import insert


class InContext(celery.Task):  # type: ignore[type-arg]  # a base of the user's, that knows nothing of ours
    """Calls the body itself, as in https://flask.palletsprojects.com/en/stable/patterns/celery/."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs)


@shared_task(base=InContext)
def in_context(name: str, copies: int = 1) -> str:
    """Insert; more than one fails only at COMMIT."""
    db.sync_session.add_all(Item(name) for _ in range(copies))
    return name


@shared_task(base=InContext)
async def in_context_async(name: str, copies: int = 1) -> str:
    """``in_context`` on the event loop."""
    db.session.add_all(Item(name) for _ in range(copies))
    return name


@shared_task(base=InContext, bind=True, autoretry_for=(IntegrityError,), default_retry_delay=0)
def in_context_at_second_try(self: InContext, name: str) -> int:
    """Fail at COMMIT the first time."""
    insert(name)
    if self.request.retries == 0:
        insert(name)
    return self.request.retries
