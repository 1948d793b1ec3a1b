"""What happens before a transaction has to begin: plain reads run without one, and a dead connection is replaced."""

from __future__ import annotations

from functools import partial
from typing import Any, Final

from sqlalchemy import CompoundSelect, Engine, Select, event
from sqlalchemy.engine import ExecutionContext
from sqlalchemy.engine.interfaces import ExecuteStyle
from sqlalchemy.pool import ConnectionPoolEntry

from fastapi_chatdify_db.connecting import connect_errors_translated, unavailable
from fastapi_chatdify_db.connection_state import ConnectionState, state_in, state_of
from fastapi_chatdify_db.exceptions import DatabaseUnavailable
from fastapi_chatdify_db.liveness import driver_errors, has_died, replace_connection, wants_another_connection
from fastapi_chatdify_db.plain_reads import is_plain_read
from fastapi_chatdify_db.sqlstates import is_read_only, timed_out

# The isolation level of a connection that has none of its own, or whose level asyncpg's adapter or psycopg2's has reset
# (https://www.psycopg.org/docs/extensions.html#isolation-level-constants).
_ORDINARY_LEVELS: Final = (None, "read_committed")
_PSYCOPG2_READ_COMMITTED: Final = 1


class FirstStatements:
    """Runs the statements from the checkout of a connection to the first one that is not a plain read.

    At READ COMMITTED every statement has a snapshot of its own. So plain reads give the same without BEGIN and COMMIT,
    in one round trip instead of three, and the transaction begins with the first other statement.

    Until then the server has nothing of ours to lose. So a statement that finds its connection dead, or prepared for
    a table as it was before a migration, runs once more, on a new one.

    Parameters:
        engine: One of PostgreSQL, with asyncpg or psycopg2.
        begin_lazily: Whether plain reads run without a transaction.
        replace_dead: Whether a dead connection is replaced.
        is_for_writes: Whether one whose server has become read-only is no better than a dead one.
    """

    def __init__(self, engine: Engine, *, begin_lazily: bool, replace_dead: bool, is_for_writes: bool) -> None:
        self._replaces = replace_dead
        self._is_for_writes = is_for_writes
        self._errors = driver_errors(engine.dialect)
        if begin_lazily:
            event.listen(engine, "connect", partial(_allow_autocommit, engine))
        # Not by a do_execute listener: one that runs the statement keeps the application's own from being called.
        dialect: Any = engine.dialect
        self._do_execute = dialect.do_execute
        dialect.do_execute = self._execute
        event.listen(engine, "do_executemany", _note_start)
        event.listen(engine, "do_execute_no_params", _note_start)

    def _execute(self, cursor: Any, statement: str, parameters: Any, context: ExecutionContext | None = None) -> None:
        """In place of the dialect's ``do_execute``."""
        if context is None or (state := state_of(context.root_connection)) is None or state.has_effects:
            self._do_execute(cursor, statement, parameters, context)
            return
        ordinary = not state.started and _begins_ordinarily(state)
        if not ordinary:
            state.note_drivers_work()
        try:
            self._run(state, statement, parameters, context, ordinary=ordinary)
        except self._errors as error:
            # An INSERT of many rows goes on with the cursor that it began with.
            replaceable = ordinary and context.execute_style is not ExecuteStyle.INSERTMANYVALUES
            if state.was_cut_off or not (self._replaces and replaceable and self._wants_another(context, error)):
                raise
            self._run_again(error, statement, parameters, context)

    def _wants_another(self, context: ExecutionContext, error: Exception) -> bool:
        return wants_another_connection(context, error) or (self._is_for_writes and is_read_only(error))

    def _run_again(self, error: Exception, statement: str, parameters: Any, context: ExecutionContext) -> None:
        try:
            replace_connection(context, error)
            state = state_of(context.root_connection)
            assert state is not None
            # A checkout handler of the application's may have begun a transaction.
            self._run(state, statement, parameters, context, ordinary=_begins_ordinarily(state))
        except self._errors as again:
            if has_died(context, again):  # so do all, behind a PgBouncer whose server is down
                context.root_connection.invalidate(again)
                raise unavailable(context.engine.url, again) from again
            raise
        except DatabaseUnavailable as none:
            context.root_connection.invalidate(none)  # or a rollback of the dead one would fail, and hide the error
            raise

    def _run(
        self, state: ConnectionState, statement: str, parameters: Any, context: ExecutionContext, *, ordinary: bool
    ) -> None:
        is_read = _is_read(statement, context)
        if is_read and ordinary and state.reads_in_autocommit:
            try:
                self._run_in_autocommit(state.connection, statement, parameters, context)
            except self._errors as error:
                if wants_another_connection(context, error) or _took_too_long(error):
                    raise
                # Run it again as the first statement of a transaction. It fails there too, so that the transaction is a
                # failed one, as whoever catches the error expects.
            else:
                return
        state.started = True
        self._do_execute(context.cursor, statement, parameters, context)
        state.has_effects |= not is_read

    def _run_in_autocommit(self, connection: Any, statement: str, parameters: Any, context: ExecutionContext) -> None:
        # Only during the statement: code that uses the driver's connection directly finds it as always.
        connection.autocommit = True
        try:
            self._do_execute(context.cursor, statement, parameters, context)
        finally:
            if not getattr(connection, "closed", False):  # there psycopg2 would raise, and hide the error under way
                connection.autocommit = False


def _note_start(*arguments: Any) -> None:
    *_, context = arguments  # the parameters before it may be missing
    if state := state_of(context.root_connection):
        state.started = state.has_effects = True


def _allow_autocommit(engine: Engine, connection: Any, record: ConnectionPoolEntry) -> None:
    with connect_errors_translated(engine.url, engine.dialect):
        state_in(record).reads_in_autocommit = _default_isolation(connection) == "read committed"


def _begins_ordinarily(state: ConnectionState) -> bool:
    """Whether a transaction is still to begin, with a mere BEGIN: no AUTOCOMMIT, no level, not read only."""
    connection = state.connection
    return (
        not connection.autocommit
        and (
            connection.isolation_level in _ORDINARY_LEVELS
            or (connection.isolation_level == _PSYCOPG2_READ_COMMITTED and state.reads_in_autocommit)
        )
        and not connection.readonly
        and not state.in_transaction()
    )


def _took_too_long(error: Exception) -> bool:
    """Whether a statement ran into a time limit: run again, it would only take as long again."""
    return isinstance(error, TimeoutError) or timed_out(error)  # asyncpg's command_timeout is the former


def _is_read(statement: str, context: ExecutionContext) -> bool:
    if not (isinstance(context.invoked_statement, (Select, CompoundSelect)) and is_plain_read(statement)):
        return False
    # A server-side cursor lives in a transaction: asyncpg's adapter says so, psycopg2's cursors have a name.
    return not (getattr(context.cursor, "server_side", False) or getattr(context.cursor, "name", None))


def _default_isolation(connection: Any) -> str:
    connection.autocommit = True
    cursor = connection.cursor()
    cursor.execute("SHOW default_transaction_isolation")
    level: str = cursor.fetchone()[0]
    cursor.close()
    connection.autocommit = False
    return level
