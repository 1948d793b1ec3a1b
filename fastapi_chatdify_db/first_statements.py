"""What happens before a transaction has to begin: plain reads run without one, and a dead connection is replaced."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import CompoundSelect, Engine, Select, event
from sqlalchemy.engine import ExecutionContext
from sqlalchemy.engine.interfaces import ExecuteStyle
from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection

from fastapi_chatdify_db.liveness import died, replace_connection
from fastapi_chatdify_db.plain_reads import is_plain_read

_STATE: Final = "fastapi_chatdify_db.first_statements"
_QUERY_CANCELED: Final = "57014"


@dataclass(slots=True)
class _State:
    """Of one connection."""

    read_committed: bool
    """Whether that is the isolation level of a transaction which names none."""
    started: bool = False
    """Whether anything but plain reads was run since the checkout."""


class FirstStatements:
    """Runs the statements from the checkout of a connection to the first one that needs a transaction.

    At READ COMMITTED every statement has a snapshot of its own. So plain reads give the same without BEGIN and COMMIT,
    in one round trip instead of three, and the transaction begins with the first other statement.

    Until then the server has nothing of ours to lose. So a statement that finds its connection dead runs once more, on
    a new one.

    Parameters:
        engine: One of PostgreSQL, with asyncpg or psycopg2.
        begin_lazily: Whether plain reads run without a transaction.
        survive: Whether a dead connection is replaced.
    """

    def __init__(self, engine: Engine, *, begin_lazily: bool, survive: bool) -> None:
        self._begin_lazily = begin_lazily
        self._survive = survive
        self._errors = (engine.dialect.loaded_dbapi.Error, OSError)
        event.listen(engine, "connect", self._watch)
        event.listen(engine, "checkin", self._watch_again)
        event.listen(engine, "do_execute", self._execute)
        event.listen(engine, "do_executemany", self._start)
        event.listen(engine, "do_execute_no_params", self._start_without_parameters)

    def _watch(self, connection: Any, record: ConnectionPoolEntry) -> None:
        read_committed = self._begin_lazily and _default_isolation(connection) == "read committed"
        _information(record)[_STATE] = _State(read_committed)

    def _watch_again(self, connection: Any, record: ConnectionPoolEntry) -> None:
        _information(record)[_STATE].started = False

    def _start(self, cursor: Any, statement: str, parameters: Any, context: ExecutionContext) -> None:
        if state := _state(context):
            state.started = True

    def _start_without_parameters(self, cursor: Any, statement: str, context: ExecutionContext) -> None:
        self._start(cursor, statement, None, context)

    def _execute(self, cursor: Any, statement: str, parameters: Any, context: ExecutionContext) -> bool:
        """The ``do_execute`` event; returns whether the statement was run here."""
        state = _state(context)
        if state is None or state.started:
            return False
        replaceable = (
            self._survive
            and _begins_ordinarily(context.root_connection.connection)
            and context.execute_style is not ExecuteStyle.INSERTMANYVALUES  # it keeps the old cursor
        )
        try:
            self._run(statement, parameters, context)
        except self._errors as error:
            if not (replaceable and died(context, error)):
                raise
            replace_connection(context, error)
            self._run(statement, parameters, context)
        return True

    def _run(self, statement: str, parameters: Any, context: ExecutionContext) -> None:
        state = _state(context)
        assert state is not None  # checked before, and a new connection has one
        if (
            state.read_committed
            and _begins_ordinarily(context.root_connection.connection)
            and _is_read(statement, context)
        ):
            try:
                _run_in_autocommit(statement, parameters, context)
            except self._errors as error:
                if died(context, error) or getattr(error, "pgcode", None) == _QUERY_CANCELED:
                    raise
                # Now as the first statement of a transaction. It fails again, and so the transaction is a failed one,
                # as whoever catches the error expects.
            else:
                return
        state.started = True
        context.dialect.do_execute(context.cursor, statement, parameters, context)


def _is_read(statement: str, context: ExecutionContext) -> bool:
    cursor = context.cursor
    # A server-side cursor lives in a transaction: asyncpg's adapter says so, psycopg2's cursors have a name.
    server_side = getattr(cursor, "server_side", False) or getattr(cursor, "name", None)
    return (
        isinstance(context.invoked_statement, (Select, CompoundSelect)) and not server_side and is_plain_read(statement)
    )


def _run_in_autocommit(statement: str, parameters: Any, context: ExecutionContext) -> None:
    # Only around the statement: whoever uses the driver's connection directly finds it as always.
    connection: Any = context.root_connection.connection.dbapi_connection
    connection.autocommit = True
    try:
        context.dialect.do_execute(context.cursor, statement, parameters, context)
    finally:
        if not getattr(connection, "closed", False):  # psycopg2 would say so, instead of the error that is under way
            connection.autocommit = False


def _begins_ordinarily(proxy: PoolProxiedConnection) -> bool:
    """Whether a transaction is still to begin, with a mere BEGIN: no AUTOCOMMIT, no isolation level, not read only."""
    connection: Any = proxy.dbapi_connection
    return (
        not _in_transaction(proxy.driver_connection)
        and not connection.autocommit
        and connection.isolation_level in (None, "read_committed")  # asyncpg's adapter keeps a level that was reset
        and not connection.readonly
        and not connection.deferrable
    )


def _in_transaction(driver_connection: Any) -> bool:
    if hasattr(driver_connection, "is_in_transaction"):
        return bool(driver_connection.is_in_transaction())
    return bool(driver_connection.info.transaction_status)


def _default_isolation(connection: Any) -> str:
    connection.autocommit = True
    cursor = connection.cursor()
    cursor.execute("SHOW default_transaction_isolation")
    level: str = cursor.fetchone()[0]
    cursor.close()
    connection.autocommit = False
    return level


def _state(context: ExecutionContext) -> _State | None:
    """None for a connection that is detached from its pool, or still being made."""
    information = context.root_connection.connection.record_info
    return None if information is None else information.get(_STATE)


def _information(record: ConnectionPoolEntry) -> dict[Any, Any]:
    information = record.record_info
    assert information is not None  # only that of a detached connection is
    return information
