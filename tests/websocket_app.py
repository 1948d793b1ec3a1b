"""An application with one websocket. Apart from ``serving``, which does without FastAPI."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import FastAPI

from fastapi_chatdify_db import DBSessionMiddleware


def websocket_app(handler: Callable[..., object], path: str = "/") -> FastAPI:
    """An application that has units of work, and a websocket."""
    app = FastAPI()
    app.add_middleware(DBSessionMiddleware)
    app.add_api_websocket_route(path, handler)
    return app
