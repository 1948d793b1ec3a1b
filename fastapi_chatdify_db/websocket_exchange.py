"""A websocket under a unit of work: when it commits, and which tasks' messages make it commit."""

from __future__ import annotations

import asyncio
import logging
from typing import Any, Final, TypeGuard
from weakref import WeakSet

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastapi_chatdify_db.async_unit_of_work import AsyncUnitOfWork
from fastapi_chatdify_db.engines import Engines
from fastapi_chatdify_db.exceptions import TransactionAborted
from fastapi_chatdify_db.exchange import CommitOn
from fastapi_chatdify_db.surroundings import in_event_loop

logger: Final = logging.getLogger(__name__)

_NORMAL_CLOSURES: Final = (1000, 1001)  # https://www.rfc-editor.org/rfc/rfc6455#section-7.4.1


class WebSocketExchange(AsyncUnitOfWork):
    """The unit of work of a websocket, from its handshake to its closing.

    Commits when the handler waits for the client, and before it answers. A task is answering if it sends after it asked
    for the session or read from the client. Messages that other tasks push do not commit.
    """

    is_root = True
    _accepted = False
    _receiving = False
    """Whether the handler waits for the client."""
    _handler_asked = False
    """Whether the handler has asked for a session since it, or a task of its own, began to wait for the client."""
    _handler_waits = False
    """Whether the handler waits for a task that it made to read the next message."""
    _settling = False
    """Whether a commit or a rollback is under way, or the callbacks after it, which may use a session in a thread."""
    _unread: Message | None = None
    """The message that the client has sent and the handler does not have yet."""

    def __init__(self, receive: Receive, send: Send, commit_on: CommitOn) -> None:
        self._receive = receive
        self._send = send
        self._commit_on = commit_on
        self._handler = self._reader = asyncio.current_task()
        self._workers: set[asyncio.Task[Any] | None] = set()
        """The tasks that used the unit since the last commit; None stands for a thread, whose task is unknown."""
        self._undone: WeakSet[asyncio.Task[Any]] = WeakSet()
        """Tasks whose work was rolled back because another one failed, and that have not been told yet."""

    def async_session(self, engines: Engines) -> AsyncSession:
        """The unit's session on one database; the task that asks for it is at work until the next commit."""
        self._note_worker()
        return super().async_session(engines)

    def sync_session(self, engines: Engines) -> Session:
        """The same for threads."""
        self._note_worker()
        return super().sync_session(engines)

    def roll_back_only(self) -> None:
        """Roll back what the task that asks for it is at work on."""
        self._note_worker()
        super().roll_back_only()

    async def run(self, app: ASGIApp, scope: Scope) -> None:
        """Run the application until its handler ends; what it raises rolls back and goes on to the caller."""
        async with self:
            await app(scope, self._receive_settled, self._send_settled)
            await self._undo_failures()

    async def _receive_settled(self) -> Message:
        task = asyncio.current_task()
        is_helper = task not in (self._reader, self._handler)
        self._reader = task
        await self._undo_failures()
        # Else a task is at work on what this one has read, and settles when it answers.
        if not (self.in_use or (self.rollback_only and self._others_at_work())):
            await self._settle(commit=True)
        self._receiving, self._handler_asked = True, False
        try:
            if self._unread is None:
                self._unread = await self._receive()
        finally:
            self._receiving = False
        self._handler_waits = is_helper and not self._handler_asked
        try:
            await self._undo_failures()  # before a task for this message begins; if cancelled, the message stays unread
            if self._handler_waits and self.rollback_only and not (self.in_use or self._others_at_work()):
                await self._settle(commit=True)
        finally:
            self._handler_waits = False
        message, self._unread = self._unread, None
        return message

    async def _send_settled(self, message: Message) -> None:
        if self._receiving:
            await self._undo_failures()
        self._raise_if_undone()
        if self._is_answering():
            await self._settle(commit=self._wants_commit(message))
        self._accepted |= message["type"] == "websocket.accept"
        await self._send(message)

    def _is_answering(self) -> bool:
        # Before Python 3.12, asyncio.wait_for() makes a task for each message that it reads.
        task = asyncio.current_task()
        if task is self._reader or task in (self._workers or {self._handler}):
            return True
        if task is self._handler and all(map(_is_done, self._workers)):
            return True  # it has waited for them
        if None in self._workers:
            return not (self.in_use or self._settling)
        # While the handler waits for the next message, another task may send the answers of tasks that are done.
        return self._receiving and bool(self._workers) and all(map(_is_done, self._workers))

    def _note_worker(self) -> None:
        if not in_event_loop():
            self._workers.add(None)
            return
        self._raise_if_undone()
        self._workers.add(task := asyncio.current_task())
        self._handler_asked |= task is self._handler

    def _raise_if_undone(self) -> None:
        if (task := asyncio.current_task()) is not None and task in self._undone:
            self._undone.discard(task)
            raise TransactionAborted(
                "nothing was committed, because another task of this websocket failed; give each task a session of its "
                "own: async with db.transaction() as session: ..."
            )

    async def _undo_failures(self) -> None:
        """Keep nothing of a task that ended in an exception which nobody has asked it for."""
        if self._has_failed_task():
            await asyncio.sleep(0)  # whoever awaits the task gets its exception in this turn of the loop
            if self._has_failed_task():
                logger.warning("a task of a websocket failed, and what was done since the last commit is rolled back")
                self._undone.update(self._others_at_work())
                await self._settle(commit=False)

    def _has_failed_task(self) -> bool:
        # asyncio's own mark of an exception that nobody has retrieved; nothing public tells.
        return any(_is_done(worker) and worker._log_traceback for worker in self._workers)

    def _others_at_work(self) -> list[asyncio.Task[Any]]:
        """All but whoever reads or waits for the next message, who has sent what was to be sent."""
        idle = (None, self._reader, self._handler if self._handler_waits else None)
        return [task for task in self._workers if task not in idle and not task.done()]

    async def _settle(self, *, commit: bool) -> None:
        self._settling = True
        try:
            await self.finish_async(commit=commit)
        finally:
            self._settling = False
        self.rollback_only = False
        self._workers.clear()

    def _wants_commit(self, message: Message) -> bool:
        if message["type"] == "websocket.close":  # before it was accepted, the client gets a 403
            return self._accepted and message.get("code", 1000) in _NORMAL_CLOSURES
        if message["type"] == "websocket.http.response.start":
            return self._commit_on(message["status"])
        return True


def _is_done(worker: asyncio.Task[Any] | None) -> TypeGuard[asyncio.Task[Any]]:
    return worker is not None and worker.done()
