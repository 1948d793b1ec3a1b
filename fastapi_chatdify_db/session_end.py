"""Questions at the end of a session's transaction: has the server anything to do, is anybody else using the session?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final
from weakref import ReferenceType

from sqlalchemy import Connection, event
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.orm.state_changes import _StateChangeStates
from sqlalchemy.pool import QueuePool

from fastapi_chatdify_db.connection_state import ConnectionState, has_begun, state_of

_OURS: Final = 1
"""How many listeners to a session's ``before_commit``, and to its ``after_commit``, are ours; they ask nothing."""


class FollowedSession(Session):
    """A session of a unit of work, whose connections are remembered."""

    connections: tuple[Connection, ...] = ()
    """Those on which its transactions began; some may be closed by now."""
    has_committed = False
    """Whether one of its transactions did more than read and was committed, by the unit or by the application."""
    committing: ReferenceType[SessionTransaction] | None = None
    """The transaction that its latest COMMIT is ending, or has ended; weak, since it refers to the session."""


def states(session: FollowedSession) -> Iterator[ConnectionState]:
    """The states of the connections that the session holds."""
    for connection in session.connections:
        if not (connection.closed or connection.invalidated) and (state := state_of(connection)) is not None:
            yield state


def asks_at_end(session: Session) -> bool:
    """Whether a commit or a rollback of the session may have to wait for the server; True when in doubt."""
    assert isinstance(session, FollowedSession)
    return (
        any(map(_asks, session.connections))
        or not session._is_clean()  # as the commit asks; its public parts are properties that copy
        or not session.is_active
        or session.in_nested_transaction()
        or len(session.dispatch.before_commit) > _OURS  # the application's may write
        or len(session.dispatch.after_commit) > _OURS
    )


def has_committed(session: Session) -> bool:
    """Whether a transaction that did more than read was committed, be it by the application's own ``commit()``."""
    assert isinstance(session, FollowedSession)
    return session.has_committed


def in_use(session: Session) -> bool:
    """Whether a task or thread is in the middle of an operation of the session."""
    assert isinstance(session, FollowedSession)
    transaction = session._transaction
    if transaction is None:
        return False
    return (
        session._flushing
        or transaction._next_state is _StateChangeStates.CHANGE_IN_PROGRESS  # e.g. waits for a connection
        or any(_in_flight(session))
    )


def cut_off(session: Session) -> None:
    """End the connections on which a task is in the middle of a statement of the session."""
    assert isinstance(session, FollowedSession)
    for state in _in_flight(session):
        state.cut_off()


def end_reads(session: Session) -> None:
    """End a transaction in which the server has nothing to commit, at less cost than a commit."""
    transaction = session.get_transaction()
    if transaction is not None:
        transaction.close()


def _asks(connection: Connection) -> bool:
    if connection.closed:
        return False
    engine = connection.engine
    pool, hooks = engine.pool, connection.dispatch
    return (
        has_begun(connection)
        # A connection beyond the pool's size is closed when it is given back.
        or not isinstance(pool, QueuePool)
        or (pool.overflow() > 0 and pool.checkedin() >= pool.size())
        # The application's hooks may ask, too. Looking for them is costly, so as SQLAlchemy does, look at flags first.
        or bool(pool.dispatch.reset)
        or ((connection._has_events or engine._has_events) and bool(hooks.commit or hooks.rollback))
    )


def _in_flight(session: FollowedSession) -> Iterator[ConnectionState]:
    return (state for state in states(session) if state.in_flight())


def _remember(session: FollowedSession, _: SessionTransaction, connection: Connection) -> None:
    known = session.connections
    session.connections = (connection, *(each for each in known if not each.closed)) if known else (connection,)


def _note_commit(session: FollowedSession) -> None:
    # The connections are given back only after this; until then their states tell what the transaction did.
    if not session.in_nested_transaction():
        session.has_committed |= any(map(_has_effects, session.connections))


def _has_effects(connection: Connection) -> bool:
    if connection.closed:
        return False
    state = None if connection.invalidated else state_of(connection)
    return state is None or state.has_effects


event.listen(FollowedSession, "after_begin", _remember)
event.listen(FollowedSession, "after_commit", _note_commit)
