"""Threads that go on after their unit: their statements keep off a connection that was given back."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from threading import Lock
from typing import Any, Final
from weakref import ReferenceType, ref

from sqlalchemy import Engine, event
from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection

from fastapi_chatdify_db.exceptions import OutsideUnitOfWork

_TURN: Final = "fastapi_chatdify_db.turn"


class _Turn:
    """Who may use a connection."""

    def __init__(self) -> None:
        self.lock = Lock()
        self.holder: ReferenceType[PoolProxiedConnection] | None = None
        """What the pool has lent it as, None while it is there. Weak, as the pool's own: what is lost goes back."""


def keep_threads_off(engine: Engine) -> None:
    """Refuse statements on a connection that was given back in the meantime.

    psycopg2 lets the statements of several threads wait for each other. So while a unit rolls back, the next statement
    of a thread that nobody waits for any more may come to stand behind the ROLLBACK, and would begin a transaction on a
    connection that the pool has lent to the next request by then.

    Parameters:
        engine: A synchronous one; on an event loop nothing comes between.
    """
    event.listen(engine, "connect", _note_connect)
    event.listen(engine, "checkout", _lend)
    event.listen(engine, "checkin", _take_back)
    dialect: Any = engine.dialect
    for name in ("do_execute", "do_executemany", "do_execute_no_params"):
        setattr(dialect, name, partial(_in_turn, getattr(dialect, name)))


def _in_turn(execute: Callable[..., None], cursor: Any, statement: str, *arguments: Any) -> None:
    *_, context = arguments
    connection = None if context is None else context.root_connection.connection
    turn = None if connection is None or connection.record_info is None else connection.record_info.get(_TURN)
    if turn is None:  # a connection that is being made, or does not come back
        execute(cursor, statement, *arguments)
        return
    with turn.lock:
        if turn.holder is None or turn.holder() is not connection:
            raise OutsideUnitOfWork(
                "the unit of work around this statement has ended meanwhile, and was rolled back; wait for the thread, "
                "e.g. by starlette.concurrency.run_in_threadpool in place of asyncio.to_thread"
            )
        execute(cursor, statement, *arguments)


def _note_connect(_: Any, record: ConnectionPoolEntry) -> None:
    record.record_info[_TURN] = _Turn()  # type: ignore[index]  # None only if detached


def _lend(_: Any, record: ConnectionPoolEntry, proxy: PoolProxiedConnection) -> None:
    record.record_info[_TURN].holder = ref(proxy)  # type: ignore[index]


def _take_back(_: Any, record: ConnectionPoolEntry) -> None:
    turn = record.record_info[_TURN]  # type: ignore[index]
    with turn.lock:  # which a statement holds until its answer is there
        turn.holder = None
