"""What the end of a session's transaction meets: whether it asks the server for anything, whether others are at it."""

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
"""How many listeners to a session's ``before_commit`` and ``after_commit`` are ours; they ask nothing."""


class FollowedSession(Session):
    """A session of a unit of work, whose connections are remembered."""

    connections: tuple[Connection, ...] = ()
    """Those which its transactions began with; some may be closed by now."""
    has_committed = False
    """Whether a transaction of it that asked the server for more than plain reads was committed, by whomever."""
    committing: ReferenceType[SessionTransaction] | None = None
    """Which one its latest COMMIT is ending, or has ended; weak, for it has the session."""


def states(session: FollowedSession) -> Iterator[ConnectionState]:
    """Those of the connections that the session holds."""
    for connection in session.connections:
        if not (connection.closed or connection.invalidated) and (state := state_of(connection)) is not None:
            yield state


def asks_at_end(session: Session) -> bool:
    """Whether a commit or a rollback of the session may have to wait for the server; in doubt it may."""
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
    """Whether a transaction of the session was committed, be it by the application's own ``commit()``."""
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
    """Commit the transaction of a session that asks the server nothing, with less ado than a commit that might."""
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
        # Hooks of the application that may ask, too. To look for one costs; SQLAlchemy itself looks at this first.
        or bool(pool.dispatch.reset)
        or ((connection._has_events or engine._has_events) and bool(hooks.commit or hooks.rollback))
    )


def _in_flight(session: FollowedSession) -> Iterator[ConnectionState]:
    return (state for state in states(session) if state.in_flight())


def _remember(session: FollowedSession, _: SessionTransaction, connection: Connection) -> None:
    known = session.connections
    session.connections = (connection, *(each for each in known if not each.closed)) if known else (connection,)


def _note_commit(session: FollowedSession) -> None:
    # The connections are given back only after this, and their states tell until then what the transaction did.
    if not session.in_nested_transaction():
        session.has_committed |= any(map(_has_effects, session.connections))


def _has_effects(connection: Connection) -> bool:
    if connection.closed:
        return False
    state = None if connection.invalidated else state_of(connection)
    return state is None or state.has_effects


event.listen(FollowedSession, "after_begin", _remember)
event.listen(FollowedSession, "after_commit", _note_commit)
