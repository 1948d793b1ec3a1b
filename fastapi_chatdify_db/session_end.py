"""Whether the end of a session's transaction asks the server for anything; after plain reads it does not."""

from __future__ import annotations

from sqlalchemy import Connection, event
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.pool import QueuePool

from fastapi_chatdify_db.first_statements import has_begun


class FollowedSession(Session):
    """What is behind an ``AsyncSession`` of ours, whose connections are remembered."""

    connections: tuple[Connection, ...] = ()
    """Those which its transactions began with; some may be closed by now."""


def asks_at_end(session: Session) -> bool:
    """Whether a commit or a rollback of the session may have to wait for the server; in doubt it may."""
    assert isinstance(session, FollowedSession)
    return (
        any(map(_asks, session.connections))
        or session.identity_map.check_modified()
        or bool(session.new or session.deleted)
        or bool(session.dispatch.before_commit)  # a hook of the application may write
    )


def _asks(connection: Connection) -> bool:
    if connection.closed:
        return False
    pool = connection.engine.pool
    return (
        has_begun(connection)
        # A connection beyond the pool's size is closed when it is given back.
        or not isinstance(pool, QueuePool)
        or pool.checkedin() >= pool.size()
        # Hooks of the application that may ask, too.
        or bool(pool.dispatch.reset)
        or bool(connection.engine.dispatch.commit)
        or bool(connection.engine.dispatch.rollback)
    )


def _remember(session: FollowedSession, _: SessionTransaction, connection: Connection) -> None:
    known = session.connections
    session.connections = (connection, *(each for each in known if not each.closed)) if known else (connection,)


event.listen(FollowedSession, "after_begin", _remember)
