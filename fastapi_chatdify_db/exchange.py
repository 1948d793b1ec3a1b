"""A request and its response under a unit of work: when it commits, and what a failed commit becomes."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Awaitable, Callable
from enum import Enum
from typing import Any, Final

from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastapi_chatdify_db.async_unit_of_work import AsyncUnitOfWork, finish, run_to_completion
from fastapi_chatdify_db.exceptions import DatabaseUnavailable
from fastapi_chatdify_db.nesting import units_inside, units_left_inside
from fastapi_chatdify_db.unit_of_work import UnitOfWork

logger: Final = logging.getLogger(__name__)

CommitOn = Callable[[int], bool]

_START: Final = "http.response.start"
_WITHOUT_BODY: Final = (204, 304)  # https://www.rfc-editor.org/rfc/rfc9110#section-6.4.1
_NO_CONNECTION: Final = (PoolTimeout, DatabaseUnavailable)
_BODY: Final = ("http.response.body", "http.response.pathsend")
_BODY_LIMIT: Final = "starlette.max_body_size"
"""The scope's key for the limit of Starlette's ``RequestBodyLimitMiddleware``."""


class _Sent(Enum):
    """How much of the response the client was sent."""

    NOTHING = 0
    START = 1
    ALL = 2


_NOTHING, _START_LINE, _ALL = _Sent  # Python 3.11 calls a function for each look at a member of the class


class TryAgain(Exception):
    """PostgreSQL asked for the transaction to be run again, and the client was told nothing yet."""


class HTTPExchange(AsyncUnitOfWork):
    """The unit of work of a request and its response.

    Parameters:
        commit_on: Given the response's status, whether to commit.
        may_retry: Whether ``run`` raises ``TryAgain`` instead of answering with a serialization failure.
    """

    # uvicorn begins a pipelined request in the context of the one before.
    is_root = True
    _sent: _Sent = _NOTHING
    _keeps_body = True
    """Whether what is written while the body is sent is to be committed."""
    _failure: Exception | None = None
    """What committing before a message raised. The application may turn it into another exception where it sends."""

    def __init__(self, receive: Receive, send: Send, commit_on: CommitOn, *, may_retry: bool = False) -> None:
        self._receive = receive
        self._send = send
        self._commit_on = commit_on
        self._may_retry = may_retry

    async def run(self, app: ASGIApp, scope: Scope) -> None:
        """Run the application; return when the response and its background tasks are done.

        Raises:
            TryAgain: Nothing was sent, and another run may well succeed.
            Exception: Whatever the application raised and has no handler for.
        """
        self._scope = scope
        self.open()
        try:
            try:
                await app(scope, self._receive, self._send_settled)
                failure = self._failure
            except Exception as error:
                failure = self._failure or error
            if failure is not None:
                await self.finish_async(commit=False)
                await self._answer(failure)
            if not self.at_rest:
                # An incomplete body means that the client left: it keeps nothing of what was written meanwhile.
                if self._sent is not _ALL:
                    self._log_loss([self])
                await self.finish_async(commit=self._sent is _ALL)
        except BaseException:
            self.abandon_sessions_in_use()
            await self.finish_async(commit=False)
            raise
        finally:
            self.close()
            del self._receive  # and a recorded body: a pooled connection keeps the context it was made in, and so us
            if self._sent is _START_LINE and self.has_inner:
                left_behind = units_left_inside(self)
                self._log_loss(left_behind)
                await run_to_completion(_roll_back(left_behind))

    # Not a coroutine function: before most messages there is nothing to commit, and they pass straight through.
    def _send_settled(self, message: Message) -> Awaitable[None]:
        kind = message["type"]
        if kind == _START:
            if not self.untouched or self.has_inner or self._producer:
                if not self._body_is_under_way(message):
                    return self._commit_and_start(message)
                self._hold_back(message)
            self._sent = _START_LINE
        elif kind in _BODY and not message.get("more_body"):
            if (not self.untouched or self.has_inner) and (not self.at_rest or self._producer or self._blocks()):
                return self._commit_and_end(message)
            self._sent = _ALL
        return self._send(message)

    async def _commit_and_start(self, start: Message) -> None:
        blocks = self._blocks()
        for block in blocks:
            block.needs_whole_response = True  # for what is done after this commit
        await self._finish_with(blocks, commit=self._wants_commit(start))
        for session in self._sessions:
            session.forget_block()
        self._sent = _START_LINE
        await self._send(start)

    async def _commit_and_end(self, last: Message) -> None:
        if self._producer:
            # A producer that failed ends the stream one turn of the loop before its task group cancels this task.
            await asyncio.sleep(0)
        blocks = self._blocks()
        for block in blocks:
            block.needs_whole_response = False
        await self._finish_with(blocks, commit=self._keeps_body)
        self._sent = _ALL
        await self._send(last)

    async def _finish_with(self, blocks: list[UnitOfWork], *, commit: bool) -> None:
        try:
            if not commit and self._wants_retry():
                raise TryAgain
            if blocks:
                # A cancellation comes neither between their commits nor during a sync one's.
                await run_to_completion(self._finish_all(blocks, commit=commit))
            else:
                await self.finish_async(commit=commit)
        except Exception as error:
            self._failure = error
            raise
        self._failure = None
        self.rollback_only = False

    async def _finish_all(self, blocks: list[UnitOfWork], *, commit: bool) -> None:
        for block in blocks:
            await finish(block, commit=commit)
        await self.finish_async(commit=commit)

    def _hold_back(self, start: Message) -> None:
        """Commit at the end of the body: before it, the COMMIT may meet a statement of the task that produces it."""
        self._keeps_body = self._wants_commit(start)
        blocks = self._blocks()
        for block in blocks:
            block.needs_whole_response = True
        producer = self._producer
        if producer and inspect.isasyncgenfunction(inspect.unwrap(producer)):  # a def goes on in its thread meanwhile
            for unit in (self, *blocks):
                unit.end_reads()

    def _wants_commit(self, start: Message) -> bool:
        if not self._commit_on(start["status"]):
            return False
        # Starlette's limit (FastAPI's max_body_size=) is enforced outside of us: a 413 takes the place of any response.
        limit = self._scope.get(_BODY_LIMIT)
        if limit is None:
            return True
        length = Headers(scope=self._scope).get("content-length", "")
        return not (length.isdecimal() and int(length) > limit)

    def _log_loss(self, units: list[UnitOfWork]) -> None:
        if any(unit.end_may_wait for unit in units):
            logger.warning(
                "a response was not completed, since its client left or it was never sent, and what it wrote is "
                "rolled back; path %a",  # whose characters the client chose
                self._scope["path"],
            )

    def _body_is_under_way(self, start: Message) -> bool:
        """Whether another task already produces the body, whose end then commits."""
        if start["status"] in _WITHOUT_BODY:
            return False
        if any(name.lower() == b"content-length" for name, _ in start.get("headers", ())):
            return False
        # FastAPI's producer may begin a statement at any moment, also during our COMMIT.
        return self._producer is not None or any(unit.in_use for unit in (self, *self._blocks()))

    def _blocks(self) -> list[UnitOfWork]:
        """The open ``transaction()`` blocks of dependencies with ``yield``, which FastAPI ends after the response."""
        if not self.has_inner:
            return []
        blocks = units_inside(self)
        if not self._producer:
            return blocks
        # A def dependency's block looks like one of a def producer, which ends its own.
        return [block for block in blocks if not block.is_suspended]

    @property
    def _producer(self) -> Callable[..., object] | None:
        """The generator function that produces the body in FastAPI's task group: of server-sent events."""
        # The route of an included router does not know the arguments of include_router(); its context does.
        effective = self._scope.get("fastapi", {}).get("effective_route_context")
        route: Any = effective or self._scope.get("route")
        return route.endpoint if getattr(route, "is_sse_stream", False) else None

    def _wants_retry(self) -> bool:
        if not (self._may_retry and self.asked_to_retry) or self._sent is not _NOTHING:
            return False
        return not any(unit.has_committed for unit in (self, *self.inside))

    async def _answer(self, failure: Exception) -> None:
        if self._wants_retry():
            raise TryAgain
        if self._sent is not _NOTHING:
            raise failure
        try:
            if self._failure is None:
                raise failure  # the application's own: its handlers have seen it
            await self._ask_handlers(failure)
        except Exception as error:
            if self._sent is not _NOTHING or self.has_committed or not _is_for_want_of_a_connection(error):
                raise
            logger.error("answered 503: %r", error)
            busy = HTTPException(503, "The database gives no connection, try again.", headers={"Retry-After": "1"})
            await self._ask_handlers(busy)

    async def _ask_handlers(self, error: Exception) -> None:
        """Answer as the application answers ``error``; raises it when the application has no handler for it."""

        async def fail(scope: Scope, receive: Receive, send: Send) -> None:
            raise error

        by_class, by_status = self._scope.get("starlette.exception_handlers", ({}, {}))
        handlers = ExceptionMiddleware(fail, handlers={**by_class, **by_status})
        await handlers(self._scope, self._receive, self._send_settled)


async def _roll_back(left_behind: list[UnitOfWork]) -> None:
    """Roll back blocks in a body whose client is gone: Starlette leaves its generator to the garbage collector."""
    for block in left_behind:
        block.abandon_sessions()  # it may belong to a thread that goes on
        await finish(block, commit=False)


def _is_for_want_of_a_connection(error: Exception) -> bool:
    """Whether ``error`` says, in a group all of its errors, that no connection was to be had."""
    if isinstance(error, ExceptionGroup):
        return error.split(_NO_CONNECTION)[1] is None
    return isinstance(error, _NO_CONNECTION)
