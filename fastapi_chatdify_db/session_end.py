"""Whether the end of a session's transaction asks the server for anything; after plain reads it does not."""

from __future__ import annotations

from typing import Final

from sqlalchemy import Connection, event
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.pool import QueuePool

from fastapi_chatdify_db.first_statements import has_begun

_CONNECTIONS: Final = "fastapi_chatdify_db.connections"


class FollowedSession(Session):
    """What is behind an ``AsyncSession`` of ours, whose connections are remembered."""


def asks_at_end(session: Session) -> bool:
    """Whether a commit or a rollback of the session may have to wait for the server; in doubt it may."""
    return bool(
        any(map(_asks, session.info.get(_CONNECTIONS, ())))
        or session.new
        or session.dirty
        or session.deleted
        or session.dispatch.before_commit  # a hook of the application may write
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


def _remember(session: Session, _: SessionTransaction, connection: Connection) -> None:
    known: tuple[Connection, ...] = session.info.get(_CONNECTIONS, ())
    session.info[_CONNECTIONS] = (connection, *(each for each in known if not each.closed))


event.listen(FollowedSession, "after_begin", _remember)
