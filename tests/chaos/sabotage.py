"""What durable dispatch rests on, switched off in turn, so that the chaos test can be seen to notice."""

from __future__ import annotations

import time

from sqlalchemy import event, text
from sqlalchemy.orm import Session

from celery_ext.durable import statements
from celery_ext.durable.delivery import Delivery
from fastapi_chatdify_db import Database


def switch_off(what: str | None, database: Database, window: float) -> None:
    """Break ``celery_ext`` in this process.

    Parameters:
        what: ``"lock"``: a body begins without the lock on its row.
            ``"mark after"``: the row is marked done in a transaction of its own, after the effects are committed.
            ``"mark before"``: likewise, before the body begins.
            None: nothing.
        database: Where the rows are.
        window: Seconds between the effects and the mark.
    """
    if what is not None:
        {"lock": _lock, "mark after": _mark_after, "mark before": _mark_before}[what](database, window)


def _lock(database: Database, window: float) -> None:
    unlocked = str(statements.BEGIN).replace("FOR UPDATE SKIP LOCKED", "")
    assert unlocked != str(statements.BEGIN)
    statements.BEGIN = text(unlocked)  # type: ignore[misc]  # Final


def _mark_after(database: Database, window: float) -> None:
    finish = Delivery.finish

    def mark_later(self: Delivery, session: Session) -> None:
        def mark(_: Session) -> None:
            time.sleep(window)
            with database.sync_transaction() as independent:
                finish(self, independent)

        self._finishing = True
        event.listen(session, "after_commit", mark, once=True)

    Delivery.finish = mark_later  # type: ignore[method-assign]


def _mark_before(database: Database, window: float) -> None:
    begin, finish = Delivery.begin, Delivery.finish

    def mark_early(self: Delivery, session: Session) -> None:
        with database.sync_transaction() as independent:
            begin(self, independent)
            finish(self, independent)

    Delivery.begin = mark_early  # type: ignore[method-assign]
    Delivery.finish = lambda self, session: None  # type: ignore[method-assign]
