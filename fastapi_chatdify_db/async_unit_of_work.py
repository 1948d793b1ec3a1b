"""The unit of work of a task on an event loop: async sessions, and sync ones whose I/O is kept off the loop."""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cached_property, partial
from types import TracebackType
from typing import Any, Final, Self, TypeVar

from anyio import CancelScope, CapacityLimiter, to_thread
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from fastapi_chatdify_db.after_commit import AfterCommit, CallbackQueue, log_failed_callback
from fastapi_chatdify_db.engines import Engines
from fastapi_chatdify_db.exceptions import AfterCommitError
from fastapi_chatdify_db.refused_commits import prepare_commit
from fastapi_chatdify_db.session_end import (
    FollowedSession,
    end_may_wait,
    end_reads,
    roll_back_or_discard,
    rollback_may_wait,
    states,
)
from fastapi_chatdify_db.surroundings import in_event_loop
from fastapi_chatdify_db.unit_of_work import UnitOfWork, logger

T = TypeVar("T")

_ROLLBACK_LIMIT: Final = 5.0
"""Seconds for the server to answer a ROLLBACK."""


class AsyncUnitOfWork(UnitOfWork):
    """The sessions of one request, websocket message or ``async with db.transaction()``.

    Ending it is shielded: a cancellation that arrives during a COMMIT waits for the COMMIT's answer.
    """

    ended_in_commit: bool = False
    """Whether the last ``finish_async`` committed, even if it then raised a cancellation."""
    _async_sessions: Mapping[Engines, AsyncSession] = {}

    @cached_property
    def _rolling_back(self) -> asyncio.Lock:
        """Held during a rollback: the response may end the block of a generator that its finalizer ends, too."""
        return asyncio.Lock()

    def async_session(self, engines: Engines) -> AsyncSession:
        """The unit's session on one database."""
        session = self._async_sessions.get(engines)
        if session is None:
            session = engines.new_async_session(self.isolation_level)
            self._async_sessions = {**self._async_sessions, engines: session}
            assert isinstance(session.sync_session, FollowedSession)
            self._sessions = (*self._sessions, session.sync_session)
            self.untouched = False
        return session

    def session_of_writes(self, engines: Engines) -> Session:
        """In a thread the sync session; on the event loop the async one, unless there is only a sync one."""
        if in_event_loop() and (engines in self._async_sessions or engines not in self._sync_sessions):
            return self.async_session(engines).sync_session
        return self.sync_session(engines)

    def on_commit(self, engines: Engines, callback: AfterCommit) -> None:
        """Run ``callback``, a plain or a coroutine function, once what the unit did so far is committed."""
        known = engines in self._async_sessions or engines in self._sync_sessions
        self._add_callback(callback, self.session_of_writes(engines) if known else None)

    @property
    def at_rest(self) -> bool:
        """Whether nothing happened since the unit last ended, so that there is nothing to end."""
        if self.untouched:
            return True
        if self.rollback_only or self._callbacks is not None:
            return False
        for session in self._sessions:  # noqa: SIM110  # asked twice a request; a generator costs more
            if session.in_transaction():
                return False
        return True

    async def finish_async(self, *, commit: bool) -> None:
        """``finish`` for the event loop; a cancellation waits until it is done.

        Raises:
            sqlalchemy.exc.SQLAlchemyError: A commit failed. What was not committed yet is rolled back.
        """
        self.ended_in_commit = False
        if self._callbacks is None and not self._sync_sessions:
            begun = [session for session in self._sessions if session.in_transaction()]
            keeps = commit and not self.rollback_only
            if not any(map(end_may_wait, begun)) and (keeps or not any(map(rollback_may_wait, begun))):
                # Nothing here waits for the server: no cancellation can interrupt it, and it needs no greenlet.
                end = end_reads if keeps else roll_back_or_discard
                for session in begun:
                    end(session)
                return
        await run_to_completion(self._finish_async(commit=commit))

    async def commit_sync_sessions(self) -> None:
        """Commit the sessions of threads ahead of the others, which are flushed before; a cancellation waits.

        Raises:
            sqlalchemy.exc.SQLAlchemyError: A flush or a commit failed. The unit is still to be rolled back.
        """
        if self._sync_sessions and not self.rollback_only:
            await run_to_completion(self._commit_sync_sessions())

    async def __aenter__(self) -> Self:
        self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if error is not None:
            self.abandon_sessions_in_use()
        try:
            await self.finish_async(commit=self.may_commit(error))
        finally:
            self.close()

    async def _finish_async(self, *, commit: bool) -> None:
        try:
            if commit and not self.rollback_only:
                await self._commit_async()
                self.ended_in_commit = True
            else:
                await self._rollback_async()
        finally:
            if self._callbacks is not None:
                with self.made_current():
                    await self._run_due_async(self._callbacks)

    async def _commit_async(self) -> None:
        try:
            # The async ones last, with an async durable task's mark: if the process dies in between, it runs again.
            await self._commit_sync_sessions()
            async_sessions = self._begun_async_sessions()
            if len(async_sessions) > 1:
                for async_session in async_sessions:
                    await async_session.run_sync(prepare_commit)
            for async_session in async_sessions:
                await async_session.commit()
        except BaseException:
            await self._rollback_async()
            raise
        self._settle_callbacks(committed=True)

    async def _commit_sync_sessions(self) -> None:
        sync_sessions = [session for session in self._sync_sessions.values() if session.in_transaction()]
        async_sessions = self._begun_async_sessions() if sync_sessions else []
        if len(sync_sessions) + len(async_sessions) > 1:
            for async_session in async_sessions:
                await async_session.run_sync(prepare_commit)
            for sync_session in sync_sessions:
                await _in_thread(partial(prepare_commit, sync_session))
        for sync_session in sync_sessions:
            await _in_thread(sync_session.commit)

    def _begun_async_sessions(self) -> list[AsyncSession]:
        return [session for session in self._async_sessions.values() if session.in_transaction()]

    async def _rollback_async(self) -> None:
        # A commit waits for nobody: after one that failed it would find nothing to do, and call that success.
        async with self._rolling_back:
            for async_session in self._async_sessions.values():
                if async_session.in_transaction():
                    with _not_for_ever(async_session):
                        await async_session.run_sync(roll_back_or_discard)
            for sync_session in self._sync_sessions.values():
                if sync_session.in_transaction():
                    await _in_thread(partial(roll_back_or_discard, sync_session))
        self._settle_callbacks(committed=False)

    async def _run_due_async(self, callbacks: CallbackQueue) -> None:
        to_raise: AfterCommitError | None = None
        while callback := callbacks.pop_due():
            try:
                if inspect.iscoroutinefunction(callback):
                    await callback()
                elif inspect.isawaitable(result := await _in_thread(callback)):
                    await result
                await self._commit_async()
            except AfterCommitError as error:
                await self._rollback_async()
                to_raise = to_raise or error
            except (Exception, asyncio.CancelledError) as error:
                await self._rollback_async()
                if isinstance(error, asyncio.CancelledError) and _is_cancelled():  # by the end of the loop
                    raise
                log_failed_callback(callback, error)
        if to_raise is not None:
            raise to_raise


@contextmanager
def _not_for_ever(session: AsyncSession) -> Iterator[None]:
    """End the session's connections if its rollback takes too long: a silent server would keep their pool places.

    Nothing depends on the answer to a ROLLBACK, unlike on that to a COMMIT.
    """
    followed = session.sync_session
    assert isinstance(followed, FollowedSession)

    def cut_off() -> None:
        for state in states(followed):
            state.cut_off()

    limit = asyncio.get_running_loop().call_later(_ROLLBACK_LIMIT, cut_off)
    try:
        yield
    finally:
        limit.cancel()


def _is_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


async def finish(unit: UnitOfWork, *, commit: bool) -> None:
    """End a unit of either kind, from the event loop."""
    if isinstance(unit, AsyncUnitOfWork):
        await unit.finish_async(commit=commit)
    else:
        await _in_thread(partial(unit.finish, commit=commit))


async def _in_thread(function: Callable[[], T]) -> T:
    # A limiter of its own without a limit: the threads of Starlette's pool may all be waiting for the very
    # connections that these calls are about to give back.
    return await to_thread.run_sync(function, limiter=CapacityLimiter(math.inf))


async def run_to_completion(work: Coroutine[Any, Any, None]) -> None:
    """Await ``work``; a cancellation that arrives meanwhile is raised when it is done."""
    task = asyncio.create_task(work)
    try:
        await _wait_for(task)
    except asyncio.CancelledError:
        with CancelScope(shield=True):  # or anyio would cancel again in every turn of the loop
            while not task.done():
                with suppress(asyncio.CancelledError):
                    await _wait_for(task)
        if (error := task.exception()) is not None:
            logger.error("the end of a cancelled unit of work failed", exc_info=error)
        raise
    task.result()


async def _wait_for(task: asyncio.Task[None]) -> None:
    """Wait until the task is done; unlike with ``await task``, a cancellation does not reach the task.

    ``asyncio.wait`` does the same, but would add 1% to an insert's instructions.
    """
    done = asyncio.get_running_loop().create_future()

    def wake(_: asyncio.Task[None]) -> None:
        if not done.done():
            done.set_result(None)

    task.add_done_callback(wake)
    await done
