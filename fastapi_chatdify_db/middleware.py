"""A unit of work for every HTTP request and websocket: pure ASGI, committed before the client is told."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from typing import Final

from starlette.applications import Starlette
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.routing import Router
from starlette.types import ASGIApp, Receive, Scope, Send

from fastapi_chatdify_db.exchange import CommitOn, HTTPExchange
from fastapi_chatdify_db.nesting import innermost_unit
from fastapi_chatdify_db.retries import Retries
from fastapi_chatdify_db.websocket_exchange import WebSocketExchange

logger: Final = logging.getLogger(__name__)

_ENTERED: Final = "fastapi_chatdify_db.entered"


def commit_below_400(status: int) -> bool:
    """The default of ``commit_on``: an error response rolls back."""
    return status < 400


class DBSessionMiddleware:
    """Opens a unit of work for each request and websocket, on every ``Database`` that the application has.

    ``BaseHTTPMiddleware`` belongs outside of this one (``add_middleware`` it later): it runs the response in a task of
    its own, beside the commit.

    Parameters:
        app: The application.
        commit_on: Given the response's status, whether to commit.
        retries: How often to run a request again whose transaction failed with 40001 or 40P01. The request's body is
            kept in memory for that, and everything else the handler does is done again too.

    Raises:
        TypeError: ``commit_on`` is no function, or an ``async def``.
    """

    def __init__(self, app: ASGIApp, *, commit_on: CommitOn = commit_below_400, retries: int = 0) -> None:
        call = getattr(commit_on, "__call__", None)  # noqa: B004  # an object's may be async too
        if inspect.iscoroutinefunction(commit_on) or inspect.iscoroutinefunction(call) or call is None:
            raise TypeError(  # a coroutine is truthy: every status would commit
                f"DBSessionMiddleware's commit_on takes a plain function, not {commit_on!r}; "
                "write: commit_on=lambda status: status < 400"
            )
        self._app = app
        self._commit_on = commit_on
        self._retries = Retries(app, commit_on, retries) if retries else None
        for name in _base_http_middleware(app):
            logger.warning(
                "%s is a BaseHTTPMiddleware inside DBSessionMiddleware: streaming bodies may be cut short, "
                "and what they wrote kept though they fail. Add it after DBSessionMiddleware or db.init_app(app); "
                "that of a mounted application which does not use the database may stay",
                name,
            )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind = scope["type"]
        if kind not in ("http", "websocket") or (_ENTERED in scope and innermost_unit() is not None):
            await self._app(scope, receive, send)  # a mounted application joins the unit around it
            return
        scope[_ENTERED] = True
        if kind == "websocket":
            await WebSocketExchange(receive, send, self._commit_on).run(self._app, scope)
        elif self._retries is not None:
            await self._retries.run(scope, receive, send)
        else:
            await HTTPExchange(receive, send, self._commit_on).run(self._app, scope)


def _base_http_middleware(app: object) -> Iterator[str]:
    """The names of those in an application, in its routes, and in what is mounted there so far."""
    to_visit, seen = [app], set()
    while to_visit:
        inside = to_visit.pop()
        if id(inside) in seen:
            continue
        seen.add(id(inside))
        own = getattr(inside, "__dict__", {})  # not the attributes: a mock's are mocks, without end
        to_visit += [own.get("app"), own.get("_app")]
        if isinstance(inside, BaseHTTPMiddleware):
            yield _name(inside.dispatch_func)
        elif isinstance(inside, Router):
            to_visit += inside.routes
        elif isinstance(inside, Starlette):  # mounted; it builds its middleware stack later
            to_visit.append(inside.router)
            for entry in inside.user_middleware:
                if isinstance(entry.cls, type) and issubclass(entry.cls, BaseHTTPMiddleware):
                    yield _name(entry.kwargs.get("dispatch", entry.cls))


def _name(named: object) -> str:
    described = named if hasattr(named, "__qualname__") else type(named)
    return f"{described.__module__}.{described.__qualname__}"
