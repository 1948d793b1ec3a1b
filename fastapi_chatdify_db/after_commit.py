"""Which ``on_commit`` callbacks are due: those whose transaction, and every savepoint around them, was kept."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final

from sqlalchemy import event
from sqlalchemy.orm import Session, SessionTransaction

from fastapi_chatdify_db.savepoints import innermost, is_committed, is_doomed, is_undone, self_and_parents

logger: Final = logging.getLogger(__name__)

AfterCommit = Callable[[], Awaitable[object] | object]


class CallbackQueue:
    """The callbacks of one unit of work, from registration until they are due or dropped."""

    __slots__ = ("_due", "_pending")

    def __init__(self) -> None:
        self._pending: list[tuple[AfterCommit, SessionTransaction | None]] = []
        self._due: deque[AfterCommit] = deque()

    def add(self, callback: AfterCommit, session: Session | None) -> None:
        """Register a callback, bound to the innermost transaction or savepoint of ``session`` if there is one."""
        transaction = None if session is None else innermost(session)
        if transaction is not None:
            if is_doomed(transaction):
                return
            if is_committed(transaction):
                self._due.append(callback)  # registered by an after_commit handler
                return
            # SQLAlchemy ignores a listener that it already has.
            event.listen(transaction.session, "after_commit", self._after_commit)
            event.listen(transaction.session, "after_soft_rollback", self._after_rollback)
        self._pending.append((callback, transaction))

    def settle(self, *, committed: bool) -> None:
        """Decide about callbacks that were registered outside any transaction, by the outcome of the unit."""
        settled = [callback for callback, began in self._pending if began is None]
        self._pending = [(callback, began) for callback, began in self._pending if began is not None]
        if committed:
            self._due.extend(settled)

    def pop_due(self) -> AfterCommit | None:
        """The next callback to run, or None.

        They come in the order of registration; those from before a transaction began come last.
        """
        return self._due.popleft() if self._due else None

    def _after_commit(self, session: Session) -> None:
        if session.in_nested_transaction():
            return  # a savepoint was released; the transaction around it still decides
        root = session.get_transaction()
        pending, self._pending = self._pending, []
        for callback, began in pending:
            if root in self_and_parents(began):
                self._due.append(callback)
            else:
                self._pending.append((callback, began))

    def _after_rollback(self, _: Session, ended: SessionTransaction) -> None:
        self._pending = [(callback, began) for callback, began in self._pending if not is_undone(began, ended)]


def log_failed_callback(callback: AfterCommit, error: BaseException) -> None:
    """Report what a callback raised: the transaction is committed, so nobody else can be told any more."""
    named: object = callback
    while isinstance(named, partial):
        named = named.func  # without the arguments, which may be private
    logger.error("on_commit callback %s failed", getattr(named, "__qualname__", type(named)), exc_info=error)
