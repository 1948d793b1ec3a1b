"""The class of a unit's sessions, and what ending one asks of the server."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import suppress
from typing import Final
from weakref import ReferenceType

from sqlalchemy import Connection, event
from sqlalchemy.exc import DBAPIError, IllegalStateChangeError, InvalidRequestError
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.orm.session import _SessionCloseState
from sqlalchemy.orm.state_changes import _StateChangeStates
from sqlalchemy.pool import QueuePool

from fastapi_chatdify_db.connection_state import ConnectionState, has_begun, state_of
from fastapi_chatdify_db.exceptions import OutsideUnitOfWork, SessionInUse
from fastapi_chatdify_db.turns import end_turn

logger: Final = logging.getLogger(__name__)

IN_USE: Final = (
    "the commit came while another task or thread was in the middle of a statement of the same session; wait for it "
    "first, or give it a session of its own: async with db.transaction() as session: ..."
)

_IN_USE_ELSEWHERE: Final = "isce"
"""SQLAlchemy's code of the error: https://docs.sqlalchemy.org/en/20/errors.html#illegalstatechangeerror-and-concurrency-exceptions."""

_OUR_HOOKS: Final = 1
"""How many listeners to ``before_commit``, and to ``after_commit``, are ours, which send nothing to the server."""


class FollowedSession(Session):
    """A session of a unit of work, whose connections are remembered."""

    connections: tuple[Connection, ...] = ()
    """The connections on which its transactions began; some may be closed by now."""
    has_committed: bool = False
    """Whether one of its transactions did more than read and was committed, by the unit or by the application."""
    abandoned: bool = False
    """Whether its unit ended, or is about to by a rollback, while somebody was in the middle of an operation of it."""
    latest_commit: ReferenceType[SessionTransaction] | None = None
    """The transaction that its latest COMMIT was to end, whatever came of it; weak, since it refers to the session."""

    @property
    def is_committing(self) -> bool:
        """Whether the running code was called by its COMMIT, e.g. as a ``before_commit`` handler."""
        transaction = None if self.latest_commit is None else self.latest_commit()
        return (
            transaction is not None
            and self.get_transaction() is transaction
            and transaction._next_state is _StateChangeStates.CHANGE_IN_PROGRESS  # else a handler has refused it
        )

    def commit(self) -> None:
        """SQLAlchemy's.

        Raises:
            SessionInUse: A task or thread is waiting for the session's connection.
        """
        try:
            super().commit()
        except InvalidRequestError as error:
            if error.code != _IN_USE_ELSEWHERE or self.abandoned:
                raise
            raise SessionInUse(IN_USE) from error

    def close(self) -> None:
        """SQLAlchemy's, for the application: the session can be used again. The unit of work ends it by ``end``."""
        if not self._is_clean() or any(state.has_effects for state in states(self)):
            logger.warning(
                "a session was closed, and what was done with it is lost; a unit of work commits and closes its "
                "sessions itself: leave out close(), and the with of db.session"
            )
        super().close()

    def end(self) -> None:
        """Close the session for good: nobody would end a transaction that it began later.

        Whoever is in the middle of an operation of it, e.g. waits for a connection, gets an error.
        """
        self._close_state = _SessionCloseState.ACTIVE  # as close_resets_only=False makes it: close() is final
        try:
            super().close()
        except IllegalStateChangeError:
            logger.error("a session was still in use elsewhere when its unit of work ended")
            self.abandoned = True

    def forget_block(self) -> None:
        """After our commit, let a ``with session.begin():`` that is still open go on in a new transaction."""
        self._trans_context_manager = None


def states(session: FollowedSession) -> Iterator[ConnectionState]:
    """The states of the connections that the session holds."""
    return (state for connection in _open_connections(session) if (state := state_of(connection)) is not None)


def end_may_wait(session: FollowedSession) -> bool:
    """Whether a commit or a rollback of the session may have to wait for the server; True when in doubt."""
    hooks = session.dispatch
    return (
        any(map(_connection_may_wait, session.connections))
        or not session._is_clean()  # as commit() asks; session.new, dirty and deleted are copies
        or not session.is_active
        or session.in_nested_transaction()
        or len(hooks.before_commit) > _OUR_HOOKS  # the application's hooks may write
        or len(hooks.after_commit) > _OUR_HOOKS
    )


def rollback_may_wait(session: FollowedSession) -> bool:
    """Whether the application has hooks that may ask the server when the session is rolled back."""
    return bool(session.dispatch.after_rollback) or bool(session.dispatch.after_soft_rollback)


def in_use(session: FollowedSession) -> bool:
    """Whether a task or thread is in the middle of an operation of the session."""
    transaction = session._transaction
    if transaction is None:
        return False
    return (
        session._flushing
        or transaction._next_state is _StateChangeStates.CHANGE_IN_PROGRESS  # e.g. waits for a connection
        or any(_states_in_flight(session))
    )


def roll_back_or_discard(session: Session) -> None:
    """Roll back; where even that fails the connection is broken, and closing it rolls back as well."""
    assert isinstance(session, FollowedSession)
    for connection in _open_connections(session):
        end_turn(connection)
    for state in _states_in_flight(session):
        state.cut_off()
    was_cut_off = any(state.was_cut_off for state in states(session))
    had_started = any(state.started for state in states(session))
    try:
        session.rollback()
    except Exception as error:
        if was_cut_off:
            logger.warning("a rollback came in the middle of a statement, whose connection is discarded")
        elif getattr(error, "code", None) == _IN_USE_ELSEWHERE:
            pass  # the end of the unit logs it
        elif had_started or not isinstance(error, DBAPIError):  # a handler of the application's may have raised it
            logger.warning("rollback failed; its connection is discarded", exc_info=True)
        with suppress(IllegalStateChangeError):  # in use elsewhere, which the end of the unit deals with
            session.invalidate()


def end_reads(session: Session) -> None:
    """End a transaction in which the server has nothing to commit, at less cost than a commit."""
    transaction = session.get_transaction()
    if transaction is not None:
        transaction.close()


def _connection_may_wait(connection: Connection) -> bool:
    if connection.closed:
        return False
    if has_begun(connection):
        return True
    engine, hooks = connection.engine, connection.dispatch
    pool = engine.pool
    return (
        # A connection beyond the pool's size, or of a pool before dispose(), is closed when it is given back.
        connection.connection._pool is not pool
        or not isinstance(pool, QueuePool)
        or (pool.overflow() > 0 and pool.checkedin() >= pool.size())
        # The application's hooks may ask, too. Looking for them is costly, so as SQLAlchemy does, look at flags first.
        or bool(pool.dispatch.reset)
        or ((connection._has_events or engine._has_events) and bool(hooks.commit or hooks.rollback))
    )


def _open_connections(session: FollowedSession) -> Iterator[Connection]:
    return (each for each in session.connections if not (each.closed or each.invalidated))


def _states_in_flight(session: FollowedSession) -> Iterator[ConnectionState]:
    return (state for state in states(session) if state.in_flight())


def _note_begin(session: FollowedSession, _: SessionTransaction, connection: Connection) -> None:
    if session.abandoned:
        connection.close()
        raise OutsideUnitOfWork(
            "the unit of work of this session has ended meanwhile; wait for whoever uses the session before that, e.g. "
            "by starlette.concurrency.run_in_threadpool in place of asyncio.to_thread, or give them db.transaction()"
        )
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


event.listen(FollowedSession, "after_begin", _note_begin)
event.listen(FollowedSession, "after_commit", _note_commit, insert=True)  # the application's may raise
