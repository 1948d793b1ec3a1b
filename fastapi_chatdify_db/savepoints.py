"""A session's transaction and the savepoints in it: which one is the innermost, and which are undone or committed."""

from __future__ import annotations

from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.orm.session import SessionTransactionState


def innermost(session: Session) -> SessionTransaction | None:
    """The savepoint, or else the transaction, that a statement of the session would belong to."""
    return session.get_nested_transaction() or session.get_transaction()


def self_and_parents(transaction: SessionTransaction | None) -> list[SessionTransaction]:
    """A savepoint with those around it, out to the transaction itself."""
    chain = []
    while transaction is not None:
        chain.append(transaction)
        transaction = transaction.parent
    return chain


def is_undone(transaction: SessionTransaction | None, ended: SessionTransaction) -> bool:
    """Whether a rollback has undone a savepoint or transaction, by itself or with what is around it.

    A flush that fails also undoes the savepoint or transaction around it, but SQLAlchemy calls ``after_soft_rollback``
    only for the flush's own: the one around it is then closed without a rollback.

    Parameters:
        transaction: The savepoint or transaction.
        ended: What ``after_soft_rollback`` was called with.
    """
    while ended.parent is not None and not ended.nested:
        ended = ended.parent
    return ended in self_and_parents(transaction)


def is_doomed(transaction: SessionTransaction | None) -> bool:
    """Whether a flush has failed in a savepoint or transaction: it can only be rolled back, or is so already.

    ``after_soft_rollback`` has been called then, and may not be called again.
    """
    return transaction is not None and transaction._state is SessionTransactionState.DEACTIVE


def is_committed(transaction: SessionTransaction) -> bool:
    """Whether a transaction is committed; a released savepoint is not, since the transaction around it decides."""
    return transaction.parent is None and transaction._state is SessionTransactionState.COMMITTED
