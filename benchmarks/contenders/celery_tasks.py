"""The Celery applications: ours, one with sessions by hand, a bare one; which one says BENCHMARK_CONTENDER."""

from __future__ import annotations

import os
import time

from celery import Celery
from model import POOL, Entry
from sqlalchemy import create_engine, text
from sqlalchemy.orm import sessionmaker

CONTENDER = os.environ["BENCHMARK_CONTENDER"]
URL = os.environ["BENCHMARK_URL"].replace("+asyncpg", "+psycopg2")

app = Celery("benchmark", broker=os.environ["BENCHMARK_BROKER"], backend=os.environ["BENCHMARK_BACKEND"])
app.conf.update(task_default_queue=os.environ["BENCHMARK_QUEUE"], worker_prefetch_multiplier=64)

if CONTENDER == "ours":
    import celery_ext
    from fastapi_chatdify_db import db

    celery_ext.init_app(app)

    @app.task(ignore_result=True)
    def insert() -> None:
        db.sync_session.add(Entry(name="benchmark"))
else:
    engine = create_engine(URL, pool_timeout=30, pool_recycle=1800, pool_pre_ping=True, **POOL)
    SessionLocal = sessionmaker(engine, expire_on_commit=False)

    @app.task(ignore_result=True)
    def insert() -> None:
        with SessionLocal() as session, session.begin():
            session.add(Entry(name="benchmark"))


@app.task(ignore_result=True)
def nothing() -> None:
    """A task that touches no database."""


@app.task
def mark() -> float:
    """When the tasks before this one were done."""
    return time.time()


@app.task(ignore_result=True)
def clear() -> None:
    """Every round inserts into an empty table."""
    with create_engine(URL).begin() as connection:
        connection.execute(text("TRUNCATE benchmark_entry"))
