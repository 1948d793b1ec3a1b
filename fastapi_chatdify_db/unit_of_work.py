"""The unit of work: the sessions that are committed, or rolled back, together."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from itertools import count
from threading import Lock
from types import TracebackType
from typing import Any, Final, Self

from sqlalchemy.orm import Session

from fastapi_chatdify_db.after_commit import AfterCommit, CallbackQueue, log_failed_callback
from fastapi_chatdify_db.engines import Engines
from fastapi_chatdify_db.exceptions import AfterCommitError, NotInSyncUnit
from fastapi_chatdify_db.nesting import current, first_open, innermost_unit
from fastapi_chatdify_db.refused_commits import prepare_commit
from fastapi_chatdify_db.session_end import FollowedSession, end_may_wait, end_reads, in_use, roll_back_or_discard
from fastapi_chatdify_db.surroundings import in_event_loop, in_generator

logger: Final = logging.getLogger(__name__)

_ids: Final = count(1)


class UnitOfWork:
    """The sessions of one block of synchronous code, made when they are first asked for.

    Parameters:
        only: The database that the unit is for; None serves every database.
        isolation_level: PostgreSQL's name of the level that its transactions run at; None is the server's default.
    """

    # Defaults on the class, so that a unit that nobody uses costs little.
    only: Engines | None = None
    is_root: bool = False
    """Whether it has no ``outer`` even within another unit: code that outlives it is then left without a unit."""
    outer: UnitOfWork | None = None
    """The open unit that this one was opened in, which code that outlives this one goes on in."""
    isolation_level: str | None = None
    task_id: str | None = None
    """The id of the Celery task whose unit this is."""
    untouched: bool = True
    """Whether nothing was asked of the unit yet, so that there is nothing to end."""
    has_inner: bool = False
    """Whether a unit was opened within this one."""
    is_suspended: bool = False
    """Whether a ``def`` dependency with ``yield`` opened it, whose generator stands still while the endpoint runs."""
    needs_whole_response: bool = False
    """Whether it may only commit once the response around it, which has begun, is complete."""
    closed: bool = False
    rollback_only: bool = False
    asked_to_retry: bool = False
    _has_committed_inside = False
    _previous: UnitOfWork | None = None
    """The unit that was current before this one, and is again after it: ``outer``, if this is no root."""
    _inside: dict[UnitOfWork, asyncio.Task[Any] | None]
    _callbacks: CallbackQueue | None = None
    _sync_sessions: Mapping[Engines, FollowedSession] = {}
    _sessions: tuple[FollowedSession, ...] = ()
    """Every session, including those behind async ones."""

    def __init__(self, only: Engines | None = None, *, isolation_level: str | None = None) -> None:
        self.only = only
        self.isolation_level = isolation_level

    @cached_property
    def id(self) -> int:
        """The number that the unit's log records show; unique within the process."""
        return next(_ids)

    @property
    def inside(self) -> dict[UnitOfWork, asyncio.Task[Any] | None]:
        """The open units within the outermost one, in the order of their beginning, and their tasks (None: a thread).

        All of them have one registry: FastAPI may end a dependency's unit before another's that began within it.
        """
        registry: dict[UnitOfWork, asyncio.Task[Any] | None] = self.__dict__.setdefault("_inside", {})
        return registry

    def sync_session(self, engines: Engines) -> Session:
        """The unit's session on one database."""
        session = self._sync_sessions.get(engines)
        return self._first_sync_session(engines) if session is None else session

    def session_of_writes(self, engines: Engines) -> Session:
        """The session to add to for code that cannot await, e.g. ``delay_durably``."""
        return self.sync_session(engines)

    def on_commit(self, engines: Engines, callback: AfterCommit) -> None:
        """Run ``callback`` once what the unit did on one database so far is committed.

        Raises:
            NotInSyncUnit: A coroutine function has no event loop to run on here.
        """
        if inspect.iscoroutinefunction(callback):
            raise NotInSyncUnit("on_commit() in synchronous code takes a plain function, not a coroutine function")
        self._add_callback(callback, self._sync_sessions.get(engines))

    def roll_back_only(self) -> None:
        """Roll back at the end, whatever the outcome."""
        self.untouched = False
        self.rollback_only = True

    @property
    def in_use(self) -> bool:
        """Whether another task or thread is in the middle of an operation of one of the sessions."""
        return any(map(in_use, self._sessions))

    def abandon_sessions_in_use(self) -> None:
        """Before the rollback that ends the unit: refuse the commit of a task or thread amid an operation."""
        for session in self._sessions:
            session.abandoned = in_use(session)

    def abandon_sessions(self) -> None:
        """Before a rollback from outside the unit's code: refuse whatever that code does with the sessions later."""
        for session in self._sessions:
            session.abandoned = True

    @property
    def end_may_wait(self) -> bool:
        """Whether ending the unit may have to wait for the server; True when in doubt."""
        return any(end_may_wait(session) for session in self._sessions if session.in_transaction())

    def end_reads(self) -> None:
        """Give back, without waiting for the server, the connections of sessions that have only read."""
        for session in self._sessions:
            if session.in_transaction() and not (in_use(session) or end_may_wait(session)):
                end_reads(session)
                session.forget_block()

    @property
    def has_committed(self) -> bool:
        """Whether part of the unit, or a unit within it, is committed already, whatever becomes of the rest."""
        return self._has_committed_inside or any(session.has_committed for session in self._sessions)

    def open(self) -> None:
        """Make this the current unit of the running task or thread."""
        self._previous = outer = innermost_unit()
        if outer is not None and not self.is_root:
            self.outer = outer
            outer.has_inner = True
            self._inside = outer.inside
            on_loop = in_event_loop()
            self._inside[self] = asyncio.current_task() if on_loop else None
            # FastAPI runs a def dependency with yield in a thread, and drops that thread's context.
            self.is_suspended = not on_loop and in_generator()
        current.set(self)

    def close(self) -> None:
        """Refuse further work and return to the unit around this one; ``finish`` has been called before."""
        around = self._previous if self.has_committed else None
        while around is not None and not around._has_committed_inside:  # some may have ended before this one
            around._has_committed_inside = True
            around = around._previous
        if self.outer is not None:
            self.inside.pop(self, None)  # with the task: a connection keeps the context that it was made in
        self.closed = True
        for session in self._sessions:
            session.end()
        # Without a token: a generator that is finalized late runs in another context than it began in.
        if current.get() is self:
            current.set(self._previous)
        if self._previous is not None:
            # A job that starts the next one within its unit would keep all before it.
            self._previous, self.outer = first_open(self._previous), first_open(self.outer)

    def finish(self, *, commit: bool) -> None:
        """Commit, unless the unit is marked for rollback, or roll back; then run the callbacks that are due.

        The sessions go on in a new transaction when they are used again.

        Raises:
            sqlalchemy.exc.SQLAlchemyError: A commit failed. What was not committed yet is rolled back.
        """
        if self.untouched:
            return
        try:
            if commit and not self.rollback_only:
                self._commit()
            else:
                self._rollback()
        finally:
            if self._callbacks is not None:
                with self.made_current():
                    self._run_due(self._callbacks)

    @contextmanager
    def made_current(self) -> Iterator[None]:
        """Let callbacks belong to this unit also while a dependency's, within it, is the current one."""
        before = current.get()
        current.set(self)
        try:
            yield
        finally:
            current.set(before)

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is not None:
            self.abandon_sessions_in_use()
        try:
            self.finish(commit=self.may_commit(error))
        finally:
            self.close()

    def may_commit(self, error: BaseException | None) -> bool:
        """Whether the unit, whose block ended in ``error`` or None, may commit; logs what is lost unexpectedly."""
        if error is None and self.needs_whole_response and self.end_may_wait:
            logger.warning("a response was cut short, and what it wrote in a transaction() around it is rolled back")
        if isinstance(error, GeneratorExit) and (self.end_may_wait or self._callbacks is not None):
            # After a ``break`` the unit stayed the current one: the code that went on may have used its db.session.
            logger.warning(
                "a generator was left within its transaction(), which is rolled back, with what was done through "
                "db.session since; close the generator before you go on: async with contextlib.aclosing(...)"
            )
        return error is None and not self.needs_whole_response

    def _first_sync_session(self, engines: Engines) -> Session:
        # Threads that ask at the same time get one session: setdefault() gives all of them the first lock.
        with self.__dict__.setdefault("_making", Lock()):
            session = self._sync_sessions.get(engines)
            if session is None:
                session = engines.new_sync_session(self.isolation_level)
                self._sync_sessions = {**self._sync_sessions, engines: session}
                self._sessions = (*self._sessions, session)
                self.untouched = False
                if self.closed:  # while this thread waited for the lock or made the session
                    session.end()
        return session

    def _add_callback(self, callback: AfterCommit, session: Session | None) -> None:
        self.untouched = False
        # Atomic: threads may register their first callbacks at the same time.
        self.__dict__.setdefault("_callbacks", CallbackQueue()).add(callback, session)

    def _settle_callbacks(self, *, committed: bool) -> None:
        if self._callbacks is not None:
            self._callbacks.settle(committed=committed)

    def _commit(self) -> None:
        sessions = [session for session in self._sync_sessions.values() if session.in_transaction()]
        try:
            if len(sessions) > 1:
                for session in sessions:
                    prepare_commit(session)
            for session in sessions:
                session.commit()
        except BaseException:
            self._rollback()
            raise
        self._settle_callbacks(committed=True)

    def _rollback(self) -> None:
        for session in self._sync_sessions.values():
            if session.in_transaction():
                roll_back_or_discard(session)
        self._settle_callbacks(committed=False)

    def _run_due(self, callbacks: CallbackQueue) -> None:
        to_raise: AfterCommitError | None = None
        while callback := callbacks.pop_due():
            try:
                if inspect.iscoroutine(result := callback()):
                    result.close()
                    raise NotInSyncUnit("the callback returned a coroutine, which synchronous code cannot await")
                self._commit()
            except AfterCommitError as error:
                self._rollback()
                to_raise = to_raise or error
            except Exception as error:
                self._rollback()
                log_failed_callback(callback, error)
        if to_raise is not None:
            raise to_raise
