"""Keeps the statements of threads that outlive their unit off a connection that was given back."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from threading import Lock, get_ident
from typing import Any, Final
from weakref import ReferenceType, ref

from sqlalchemy import Connection, Engine, event
from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection

from fastapi_chatdify_db.exceptions import OutsideUnitOfWork

_TURN: Final = "fastapi_chatdify_db.turn"


class _Turn:
    """Which borrower of a connection, and which of its threads, may use it."""

    def __init__(self) -> None:
        self.lock = Lock()
        self.holder: ReferenceType[PoolProxiedConnection] | None = None
        """The pool's proxy that has it; None in the pool. Weak, as the pool's own: a lost proxy gives it back."""
        self.ended_by: int | None = None
        """The thread that rolls back what the holder did; None before a rollback."""

    def is_over(self, proxy: PoolProxiedConnection) -> bool:
        """Whether the running thread may use a connection that it was lent as ``proxy`` no longer."""
        is_lent = self.holder is not None and self.holder() is proxy
        return not is_lent or self.ended_by not in (None, get_ident())


def keep_threads_off(engine: Engine) -> None:
    """Refuse statements on a connection that is being rolled back, or was given back in the meantime.

    psycopg2 lets the statements of several threads wait for each other. So while a unit rolls back, the next statement
    of a thread that nobody waits for any more may come to stand behind the ROLLBACK, and would begin a transaction on a
    connection that the pool has lent to the next request by then.

    Parameters:
        engine: A synchronous one; on an event loop no statement comes between.
    """
    event.listen(engine, "connect", _note_connect)
    event.listen(engine, "checkout", _lend)
    event.listen(engine, "checkin", _take_back)
    dialect: Any = engine.dialect
    for name in ("do_execute", "do_executemany", "do_execute_no_params"):
        setattr(dialect, name, partial(_in_turn, getattr(dialect, name)))


def end_turn(connection: Connection) -> None:
    """Before a rollback, let other threads run no more statements: psycopg2 might always let theirs go first.

    Parameters:
        connection: Neither closed nor invalidated.
    """
    if (turn := _turn_of(connection)) is not None:
        turn.ended_by = get_ident()


def _turn_of(connection: Connection) -> _Turn | None:
    information = connection.connection.record_info
    return None if information is None else information.get(_TURN)


def _in_turn(execute: Callable[..., None], cursor: Any, statement: str, *arguments: Any) -> None:
    *_, context = arguments
    turn = None if context is None else _turn_of(context.root_connection)
    if turn is None:  # a connection that is being made, or is detached
        execute(cursor, statement, *arguments)
        return
    with turn.lock:
        if turn.is_over(context.root_connection.connection):
            raise OutsideUnitOfWork(
                "the unit of work around this statement has ended meanwhile, and was rolled back; wait for the thread, "
                "e.g. by starlette.concurrency.run_in_threadpool in place of asyncio.to_thread"
            )
        execute(cursor, statement, *arguments)


def _note_connect(_: Any, record: ConnectionPoolEntry) -> None:
    record.record_info[_TURN] = _Turn()  # type: ignore[index]  # None only if detached


def _lend(_: Any, record: ConnectionPoolEntry, proxy: PoolProxiedConnection) -> None:
    turn = record.record_info[_TURN]  # type: ignore[index]
    turn.holder, turn.ended_by = ref(proxy), None


def _take_back(_: Any, record: ConnectionPoolEntry) -> None:
    turn = record.record_info[_TURN]  # type: ignore[index]
    with turn.lock:  # which a statement holds until its answer is there
        turn.holder = None
