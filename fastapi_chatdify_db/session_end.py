"""Whether the end of a session's transaction asks the server for anything; after plain reads it does not."""

from __future__ import annotations

from sqlalchemy import Connection, event
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.pool import QueuePool

from fastapi_chatdify_db.connection_state import has_begun


class FollowedSession(Session):
    """What is behind an ``AsyncSession`` of ours, whose connections are remembered."""

    connections: tuple[Connection, ...] = ()
    """Those which its transactions began with; some may be closed by now."""


def asks_at_end(session: Session) -> bool:
    """Whether a commit or a rollback of the session may have to wait for the server; in doubt it may."""
    assert isinstance(session, FollowedSession)
    return (
        any(map(_asks, session.connections))
        or not session._is_clean()  # as the commit asks; its public parts are properties that copy
        or not session.is_active
        or session.in_nested_transaction()
        or bool(session.dispatch.before_commit or session.dispatch.after_commit)  # the application's may write
    )


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


def _remember(session: FollowedSession, _: SessionTransaction, connection: Connection) -> None:
    known = session.connections
    session.connections = (connection, *(each for each in known if not each.closed)) if known else (connection,)


event.listen(FollowedSession, "after_begin", _remember)
