"""An insert that dispatches a task: durably, or with plain ``delay`` after the commit."""

from __future__ import annotations

import os
import time

from celery import Celery
from fastapi import FastAPI
from model import Base, Entry
from sqlalchemy.orm import Mapped, mapped_column

import celery_ext
from fastapi_chatdify_db import db

celery_app = Celery("benchmark", broker=os.environ["BENCHMARK_BROKER"], task_cls=celery_ext.Task)
celery_app.conf.update(task_default_queue="benchmark-dispatch", task_ignore_result=True)
celery_ext.init_app(celery_app)
app = FastAPI()
db.init_app(app)


class Started(Base):
    """When a task began, by this machine's clock."""

    __tablename__ = "benchmark_started"

    number: Mapped[int] = mapped_column(primary_key=True)
    at: Mapped[float]


@celery_app.task
def start(number: int) -> None:
    """Note the time."""
    db.sync_session.add(Started(number=number, at=time.time()))


@app.get("/durable")
async def durable() -> None:
    db.session.add(Entry(name="benchmark"))
    start.delay_durably(1)


@app.get("/delay")
async def delay() -> None:
    db.session.add(Entry(name="benchmark"))
    await db.session.commit()
    start.delay(1)


@app.get("/on-commit")
async def on_commit() -> None:
    db.session.add(Entry(name="benchmark"))
    start.delay_on_commit(1)
