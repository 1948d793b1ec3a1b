"""What durable dispatch rests on, switched off in turn, so that the chaos test can be seen to notice."""

from __future__ import annotations

import time
from typing import Final

from sqlalchemy import event, text
from sqlalchemy.orm import Session

from celery_ext.durable import statements
from celery_ext.durable.delivery import Delivery
from fastapi_chatdify_db import Database

_PATIENCE: Final = 20.0
"""Seconds for which a mark waits to be overtaken."""
# A row that is locked is skipped: another body has begun.
_NOBODY_ELSE: Final = text("SELECT 1 FROM durable_task WHERE id = :id AND status = 'pending' FOR UPDATE SKIP LOCKED")


def switch_off(what: str | None, database: Database) -> None:
    """Break ``celery_ext`` in this process.

    Parameters:
        what: ``"lock"``: a body begins without the lock on its row.
            ``"mark after"``: the row is marked done in a transaction of its own, after the effects are committed
            and, within some seconds, another body has begun.
            ``"mark before"``: likewise, before the body begins.
            None: nothing.
        database: Where the rows are.
    """
    if what is not None:
        {"lock": _lock, "mark after": _mark_after, "mark before": _mark_before}[what](database)


def _lock(database: Database) -> None:
    unlocked = str(statements.BEGIN).replace("FOR UPDATE SKIP LOCKED", "")
    assert unlocked != str(statements.BEGIN)
    statements.BEGIN = text(unlocked)  # type: ignore[misc]  # Final


def _mark_after(database: Database) -> None:
    finish = Delivery.finish

    def mark_later(self: Delivery, session: Session) -> None:
        def mark(_: Session) -> None:
            deadline = time.monotonic() + _PATIENCE
            while _nobody_else(database, self.task_id) and time.monotonic() < deadline:
                time.sleep(0.05)
            with database.sync_transaction() as independent:
                finish(self, independent)

        self._finishing = True
        event.listen(session, "after_commit", mark, once=True)

    Delivery.finish = mark_later  # type: ignore[method-assign]


def _nobody_else(database: Database, task_id: str) -> bool:
    with database.sync_transaction() as independent:
        return independent.scalar(_NOBODY_ELSE, {"id": task_id}) is not None


def _mark_before(database: Database) -> None:
    begin, finish = Delivery.begin, Delivery.finish

    def mark_early(self: Delivery, session: Session) -> None:
        with database.sync_transaction() as independent:
            begin(self, independent)
            finish(self, independent)

    Delivery.begin = mark_early  # type: ignore[method-assign]
    Delivery.finish = lambda self, session: None  # type: ignore[method-assign]
