"""The Celery application under chaos: transfers between accounts, and steps that have an order."""

from __future__ import annotations

import os
import time
from typing import Final

from celery import Celery
from sqlalchemy import text, update
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

import celery_ext
from fastapi_chatdify_db import Database
from tests.chaos import sabotage


class Tables(DeclarativeBase):
    """The test's own tables."""


class Account(Tables):
    """An account; the sum of all balances never changes."""

    __tablename__ = "account"

    id: Mapped[int] = mapped_column(primary_key=True)
    balance: Mapped[int]


class Transfer(Tables):
    """What a client asked for, by its idempotency key."""

    __tablename__ = "transfer"

    key: Mapped[str] = mapped_column(primary_key=True)
    source: Mapped[int]
    target: Mapped[int]
    amount: Mapped[int]


class Applied(Tables):
    """That a transfer was applied; nothing makes the key unique, so that what is applied twice is seen."""

    __tablename__ = "applied"

    id: Mapped[int] = mapped_column(primary_key=True)
    key: Mapped[str]


class Step(Tables):
    """A step that was taken; the ids show in which order."""

    __tablename__ = "step"

    id: Mapped[int] = mapped_column(primary_key=True)
    key: Mapped[str]
    number: Mapped[int]


class Overlap(Tables):
    """That a task ran while another of the same key did."""

    __tablename__ = "overlap"

    id: Mapped[int] = mapped_column(primary_key=True)
    key: Mapped[str]


BODY_SECONDS: Final = float(os.environ.get("CHAOS_BODY_SECONDS", "0"))
"""How long a transfer takes at least."""

# Held until the body's transaction ends, like the lock on its row. PostgreSQL frees the locks of a backend that dies
# one after the other, hence the second try.
_ALONE: Final = text(
    """
    SELECT pg_try_advisory_xact_lock(hashtextextended(:key, 0))
        OR (SELECT pg_sleep(0.2)) IS NULL OR pg_try_advisory_xact_lock(hashtextextended(:key, 0))
    """
)

database: Final = Database("chaos", base=Tables)
celery: Final = Celery("chaos", broker=os.environ["CHAOS_BROKER"], task_cls=celery_ext.Task)
celery.conf.update(
    task_ignore_result=True,
    broker_connection_retry_on_startup=True,
    broker_connection_max_retries=None,
    worker_hijack_root_logger=False,
)
celery_ext.init_app(celery, db=database)
sabotage.switch_off(os.environ.get("CHAOS_SWITCHED_OFF"), database)


@celery.task
def apply_transfer(key: str) -> None:
    """Move the money, in a ``def`` task; two that cross may deadlock."""
    session = database.sync_session
    if not session.scalar(_ALONE, {"key": key}):
        with database.sync_transaction() as independent:
            independent.add(Overlap(key=key))
    transfer = session.get_one(Transfer, key)
    for account, amount in ((transfer.source, -transfer.amount), (transfer.target, transfer.amount)):
        session.execute(update(Account).where(Account.id == account).values(balance=Account.balance + amount))
    session.add(Applied(key=key))
    session.flush()
    time.sleep(BODY_SECONDS)


@celery.task
async def take_step(key: str, number: int) -> None:
    """Take a step, in an ``async def`` task; the steps of one key have an order."""
    session = database.session
    if not await session.scalar(_ALONE, {"key": key}):
        async with database.transaction() as independent:
            independent.add(Overlap(key=key))
    session.add(Step(key=key, number=number))
