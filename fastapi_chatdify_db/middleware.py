"""A unit of work for every HTTP request and websocket: pure ASGI, committed before the client is told."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import Final
from weakref import WeakValueDictionary

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from fastapi_chatdify_db.exchange import CommitOn, HTTPExchange, TryAgain, WebSocketExchange

_ENTERED: Final = "fastapi_chatdify_db.entered"


def commit_below_400(status: int) -> bool:
    """The default rule: a response that tells the client no keeps nothing."""
    return status < 400


class DBSessionMiddleware:
    """Opens a unit of work for each request and websocket, on every ``Database`` that the application has.

    Middleware of Starlette's ``BaseHTTPMiddleware`` kind belongs outside of this one (``add_middleware`` it later):
    it runs the response in a task of its own, beside the commit.

    Parameters:
        app: The application.
        commit_on: Given the response's status, whether to commit.
        retries: How often a request is run again whose transaction PostgreSQL asked to retry (40001, 40P01). Its body
            is kept in memory for that, and whatever else the handler does, it does again.
    """

    def __init__(self, app: ASGIApp, *, commit_on: CommitOn = commit_below_400, retries: int = 0) -> None:
        self._app = app
        self._commit_on = commit_on
        self._retries = retries
        self._turns: WeakValueDictionary[tuple[str, str], asyncio.Lock] = WeakValueDictionary()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind = scope["type"]
        if kind not in ("http", "websocket") or _ENTERED in scope:
            await self._app(scope, receive, send)  # a mounted application joins the unit around it
            return
        scope[_ENTERED] = True
        if kind == "websocket":
            await WebSocketExchange(receive, send, self._commit_on).run(self._app, scope)
        elif self._retries:
            await self._run_with_retries(scope, receive, send)
        else:
            await HTTPExchange(receive, send, self._commit_on).run(self._app, scope)

    async def _run_with_retries(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application until it answers with anything but a serialization failure.

        Requests for one path are likely to want the same rows. So those which are run again take turns, and newcomers
        wait for them: each then meets at most those that were under way already, and few tries are enough.
        """
        request = _RecordedRequest(receive)
        path = scope["method"], scope["path"]
        if (turn := self._turns.get(path)) is not None:
            async with turn:
                pass
        async with AsyncExitStack() as turns:
            async for attempt in AsyncRetrying(
                retry=retry_if_exception_type(TryAgain),
                stop=stop_after_attempt(1 + self._retries),
                wait=wait_random_exponential(multiplier=0.01, exp_base=5, max=1),
            ):
                number = attempt.retry_state.attempt_number
                with attempt:
                    if number == 2:
                        await turns.enter_async_context(self._turns.setdefault(path, asyncio.Lock()))
                    # The application writes into its scope; another run starts from a clean one.
                    attempted = dict(scope)
                    may_retry = number <= self._retries
                    exchange = HTTPExchange(request.replay(), send, self._commit_on, may_retry=may_retry)
                    await exchange.run(self._app, attempted)


class _RecordedRequest:
    """What the client sent so far, to be received again from the start."""

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
