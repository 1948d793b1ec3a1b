"""Faults that a fake API can be told to have."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send


@dataclass
class Fault:
    """What goes wrong with the next requests to some endpoint.

    Parameters:
        method: Of the requests, e.g. ``POST``.
        path: End of their path.
        status: What they are answered.
        times: How many requests fail.
        every: Which of the matching requests fail: all, or every tenth, ...
        seen: How many requests matched so far.
        headers: Of the answer.
        code: Of the error, as Dify names it.
        delay: Seconds until the answer.
        too_late: Whether the request is carried out all the same, only its answer is lost.
    """

    method: str
    path: str
    status: int
    times: int = 1
    every: int = 1
    seen: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    code: str | None = None
    delay: float = 0.0
    too_late: bool = False


@dataclass
class Faults:
    """The faults that are due, and an ASGI middleware that makes requests fail by them."""

    due: list[Fault] = field(default_factory=list)
    had: int = 0

    def add(self, fault: Fault) -> None:
        """Have this fault from now on."""
        self.due.append(fault)

    def wrap(self, app: ASGIApp) -> ASGIApp:
        """``app`` with these faults."""

        async def faulty(scope: Scope, receive: Receive, send: Send) -> None:
            fault = self._next(scope) if scope["type"] == "http" else None
            if fault is None:
                await app(scope, receive, send)
                return
            if fault.too_late:
                await app(scope, receive, _discard)
            await asyncio.sleep(fault.delay)
            error = {"error": "told to"} | ({"code": fault.code} if fault.code else {})
            await JSONResponse(error, fault.status, fault.headers)(scope, receive, send)

        return faulty

    def _next(self, scope: Scope) -> Fault | None:
        for fault in self.due:
            if fault.method != scope["method"] or not scope["path"].endswith(fault.path):
                continue
            fault.seen += 1
            if fault.seen % fault.every == 0:
                fault.times -= 1
                if not fault.times:
                    self.due.remove(fault)
                self.had += 1
                return fault
        return None


async def _discard(_: Message) -> None:
    pass
