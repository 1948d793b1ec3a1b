"""Commits fail where PostgreSQL would answer COMMIT with ROLLBACK, which drivers take for a success."""

from __future__ import annotations

from weakref import ref

from sqlalchemy import Engine, event, text
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from fastapi_chatdify_db.connection_state import ConnectionState, state_of
from fastapi_chatdify_db.exceptions import OutsideUnitOfWork, SessionInUse, TransactionAborted
from fastapi_chatdify_db.session_end import IN_USE, FollowedSession, in_use, states
from fastapi_chatdify_db.sqlstates import sqlstate, was_given_up


def note_failures(engine: Engine) -> None:
    """Remember what statements failed with, for the commit.

    A statement that fails makes PostgreSQL give up its transaction, unless there is a savepoint to return to, and then
    it answers COMMIT with ROLLBACK, which drivers take for a success:
    https://www.postgresql.org/docs/current/sql-commit.html

    Parameters:
        engine: One that ``follow`` follows.
    """
    event.listen(engine, "handle_error", _note_failure)


def _note_failure(context: ExceptionContext) -> None:
    connection = context.connection
    if connection is None or connection.closed or connection.invalidated:
        return
    state = state_of(connection)
    if state is None:
        return
    is_refused = was_given_up(context.original_exception)
    if is_refused and state.failure is not None:
        return
    # A transaction that has done nothing yet loses nothing, until a later statement is refused.
    state.failed_without_loss |= not state.has_effects
    if state.has_effects or is_refused:
        kind = type(context.sqlalchemy_exception or context.original_exception).__name__
        code = sqlstate(context.original_exception)
        state.failure = f"{kind}, SQLSTATE {code}" if code else kind


def prepare_commit(session: Session) -> None:
    """Flush a session before its commit, and raise whatever but the COMMIT itself would fail that.

    Raises:
        SessionInUse: A task or thread is in the middle of an operation of it.
        TransactionAborted: A statement has failed.
        sqlalchemy.exc.SQLAlchemyError: The flush failed, now or before.
    """
    assert isinstance(session, FollowedSession)
    if in_use(session):
        raise SessionInUse(IN_USE)
    session.flush()
    if not session.is_active:
        session.connection()  # raises what the commit would
    for state in states(session):
        _refuse_if_doomed(state)
        if state.failure is not None:  # perhaps only in a savepoint, which asyncpg cannot tell without asking
            try:
                session.execute(text("SELECT 1"))
            except DBAPIError as error:
                raise (refusal(state) if was_given_up(error.orig) else error) from None


def _refuse_doomed_commit(session: FollowedSession) -> None:
    if session.in_nested_transaction():
        return  # a savepoint's release, which PostgreSQL refuses itself
    if session.abandoned:
        raise OutsideUnitOfWork("the unit of work of this thread was cancelled, and is rolled back")
    if (transaction := session.get_transaction()) is not None:
        session.latest_commit = ref(transaction)
    for state in states(session):
        _refuse_if_doomed(state)


def _refuse_if_doomed(state: ConnectionState) -> None:
    if state.in_flight():
        # The driver does not know yet that the other statement began a transaction, and would not send the COMMIT.
        raise SessionInUse(IN_USE)
    if state.adapter_began_none and state.in_transaction():
        raise TransactionAborted(
            "nothing was committed, because the driver's own connection began a transaction and did not end it; let it "
            "end there: async with connection.transaction(): ..."
        )
    state.note_drivers_work()
    if state.given_up() and state.lost_something:  # for asyncpg, WatchedConnection finds out
        raise refusal(state)


def refusal(state: ConnectionState) -> TransactionAborted:
    """The error for a transaction that PostgreSQL has rolled back instead of committing it."""
    failure = state.failure or "by the driver's own connection"
    return TransactionAborted(
        f"nothing was committed, because an earlier statement of the transaction had failed ({failure}); "
        "put a statement whose failure you handle in a savepoint: async with db.session.begin_nested(): ..."
    )


# Not the engine's "commit" event: an engine with any such listener is slower in every statement.
event.listen(FollowedSession, "before_commit", _refuse_doomed_commit)
