"""Running a request again, from its recorded body, while no other request for its URL's path runs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from copy import deepcopy
from typing import Final
from weakref import WeakValueDictionary

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from fastapi_chatdify_db.exchange import CommitOn, HTTPExchange, TryAgain

_PATIENCE: Final = 1.0
"""Seconds that a repeated request waits for those before it, one of which may be slow; and the longest pause."""


class Retries:
    """Runs the requests of an application until they end in anything but a serialization failure or deadlock.

    Parameters:
        app: The application.
        commit_on: Given the response's status, whether to commit.
        limit: How often a request is run again.
    """

    def __init__(self, app: ASGIApp, commit_on: CommitOn, limit: int) -> None:
        self._app = app
        self._commit_on = commit_on
        self._limit = limit
        self._paths: WeakValueDictionary[tuple[str, str], _Path] = WeakValueDictionary()

    async def run(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run one request."""
        request = _RecordedRequest(receive)
        restore = _snapshot(scope)
        path = self._paths.setdefault((scope["method"], scope["path"]), _Path())
        async for attempt in AsyncRetrying(
            retry=retry_if_exception_type(TryAgain),
            stop=stop_after_attempt(1 + self._limit),
            wait=wait_random_exponential(multiplier=0.01, exp_base=5, max=_PATIENCE),
        ):
            number = attempt.retry_state.attempt_number
            with attempt:
                async with AsyncExitStack() as unanswered:
                    await unanswered.enter_async_context(path.beside_others() if number == 1 else path.alone())
                    exchange = HTTPExchange(
                        request.replay(),
                        _leave_at_start(unanswered, send),
                        self._commit_on,
                        may_retry=number <= self._limit,
                    )
                    if number > 1:
                        restore()
                    await exchange.run(self._app, scope)


class _Path:
    """The requests for one path that are not answered yet, and so are likely to want the same rows.

    A request that is run again has the path to itself within its process, so that few tries are enough.
    """

    def __init__(self) -> None:
        self._turn = asyncio.Lock()
        self._under_way = 0
        self._free = asyncio.Event()

    @asynccontextmanager
    async def beside_others(self) -> AsyncIterator[None]:
        """Enter once no repeated request has the path to itself."""
        async with self._turn:
            self._under_way += 1
            self._free.clear()
        try:
            yield
        finally:
            self._under_way -= 1
            if not self._under_way:
                self._free.set()

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Keep new requests out, and enter once those under way are answered, or after ``_PATIENCE`` seconds."""
        async with self._turn:
            with suppress(TimeoutError):
                async with asyncio.timeout(_PATIENCE):
                    await self._free.wait()
            yield


def _snapshot(scope: Scope) -> Callable[[], None]:
    """Copy what a run may change; returns what restores it, in place, since outer middleware has the same mappings."""
    scope_before = dict(scope)
    state, session = scope.get("state", {}), scope.get("session", {})
    state_before = dict(state)  # shallow: its values, e.g. the lifespan's, are shared
    session_before = deepcopy(dict(session))

    def restore() -> None:
        for written, before in ((scope, scope_before), (state, state_before)):
            written.clear()
            written.update(before)
        if session != session_before:  # else Starlette would take it for changed, and set its cookie again
            session.clear()
            session.update(deepcopy(session_before))

    return restore


def _leave_at_start(unanswered: AsyncExitStack, send: Send) -> Send:
    async def send_answer(message: Message) -> None:
        if message["type"] == "http.response.start":  # committed: the others need not wait for the body
            await unanswered.aclose()
        await send(message)

    return send_answer


class _RecordedRequest:
    """The messages that the client sent so far, to be received again from the start."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._messages: list[Message] = []

    def replay(self) -> Receive:
        position = 0

        async def receive() -> Message:
            nonlocal position
            if position == len(self._messages):
                self._messages.append(await self._receive())
            position += 1
            return self._messages[position - 1]

        return receive
