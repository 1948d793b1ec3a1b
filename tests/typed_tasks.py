"""Tasks as a user writes them; checked with ``mypy --strict``, not run."""

from __future__ import annotations

from typing import assert_type

from celery import Celery, shared_task
from sqlalchemy.orm import Session

import celery_ext
from fastapi_chatdify_db import db

app = Celery("typed", task_cls=celery_ext.Task)
celery_ext.init_app(app)


@app.task
def plain(number: int) -> int:
    assert_type(db.sync_session, Session)
    return number


@app.task(bind=True, max_retries=3, db_retry=True, db_isolation_level="SERIALIZABLE")
async def bound(self: celery_ext.Task, number: int) -> int:
    return number + self.request.retries


@shared_task(base=celery_ext.Task)
def shared(number: int) -> int:
    return number


assert_type(plain.delay_on_commit(1), str)
assert_type(bound.delay_on_commit(1), str)
assert_type(shared.apply_async_on_commit((1,), countdown=3, on_error="raise"), str)
