"""The durable tasks of one session's transaction, stored when it commits."""

from __future__ import annotations

import json
from typing import Final

from sqlalchemy import TextClause, event
from sqlalchemy.orm import Session, SessionTransaction

from celery_ext.durable import statements
from celery_ext.durable.row import Row
from fastapi_chatdify_db.savepoints import innermost, is_doomed, is_undone, self_and_parents
from fastapi_chatdify_db.session_end import FollowedSession

BATCH: Final = 1000
"""Rows in one INSERT."""


def add(session: Session, row: Row) -> None:
    """Store ``row`` in the session's transaction, at its COMMIT; a rollback, of a savepoint too, forgets it."""
    assert isinstance(session, FollowedSession)
    if session.is_committing and not session._flushing:
        _insert(session, [row])  # by a before_commit handler; the outbox's own has run, or will not in this COMMIT
        return
    outbox = session.info.get(Outbox)
    if outbox is None:
        outbox = session.info[Outbox] = Outbox(session)
    outbox.add(row)


def keys(session: Session) -> set[str]:
    """The ordering keys of rows that are not stored yet, which the COMMIT will lock."""
    outbox = session.info.get(Outbox)
    return set() if outbox is None else outbox.keys()


class Outbox:
    """The rows that were added to one session and are not stored yet.

    Rows are stored at the COMMIT, since ``delay_durably`` is no coroutine. That way the locks of all ordering keys are
    taken at once, in one order, and held only for the COMMIT.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._rows: list[tuple[Row, SessionTransaction | None]] = []
        self._added_in_flush = False
        event.listen(session, "before_commit", self._store)
        event.listen(session, "after_transaction_end", self._store_what_a_flush_added)
        event.listen(session, "after_soft_rollback", self._forget)

    def add(self, row: Row) -> None:
        """Keep the row until the COMMIT, unless its transaction or innermost savepoint is rolled back before."""
        session = self._session
        if not session.in_transaction():
            session.begin()
        if is_doomed(transaction := innermost(session)):
            return
        self._rows.append((row, transaction))
        self._added_in_flush |= session._flushing  # by a handler of the flush, which may be the COMMIT's own

    def keys(self) -> set[str]:
        """The ordering keys of its rows."""
        return {row.ordering_key for row, _ in self._rows if row.ordering_key is not None}

    def _store(self, session: Session) -> None:
        if session.in_nested_transaction():
            return  # a savepoint is released; the transaction around it still decides
        root = session.get_transaction()  # rows of others are dropped: reset() and close() end one without an event
        rows, self._rows = [row for row, began in self._rows if root in self_and_parents(began)], []
        _insert(session, rows)

    def _store_what_a_flush_added(self, session: Session, ended: SessionTransaction) -> None:
        # A flush has a transaction of its own within the session's, which ends after the last of its events.
        if not self._added_in_flush or ended.nested or ended.parent is None:
            return
        self._added_in_flush = False
        if not session.is_active:
            return  # the flush failed, and _forget drops the rows
        flushed = innermost(session)
        rows = [row for row, began in self._rows if began is flushed]
        self._rows = [(row, began) for row, began in self._rows if began is not flushed]
        _insert(session, rows)

    def _forget(self, _: Session, ended: SessionTransaction) -> None:
        self._rows = [(row, began) for row, began in self._rows if not is_undone(began, ended)]


def _insert(session: Session, rows: list[Row]) -> None:
    if not rows:
        return
    first: dict[str, Row] = {}
    for row in rows:
        first.setdefault(row.id, row)  # of several with one idempotency key
    rows = [*first.values()]
    if keys := sorted({row.ordering_key for row in rows if row.ordering_key is not None}):
        session.execute(statements.LOCK_KEYS, {"keys": keys})
    _add(session, statements.ADD_IN_ORDER, [row for row in rows if row.ordering_key is not None])
    _add(session, statements.ADD, [row for row in rows if row.ordering_key is None])
    session.execute(statements.NOTIFY)


def _add(session: Session, statement: TextClause, rows: list[Row]) -> None:
    for start in range(0, len(rows), BATCH):
        numbered = [{**row.columns(), "number": n} for n, row in enumerate(rows[start : start + BATCH])]
        session.execute(statement, {"rows": json.dumps(numbered)})
