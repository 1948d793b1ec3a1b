"""The id of the request that the running code serves, or that sent the running task."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final

_carried: Final[ContextVar[str | None]] = ContextVar("fastapi_chatdify_db.request_id", default=None)


def current_request_id() -> str | None:
    """The id that asgi-correlation-id has set, if it is in use, or else the one that the running task was sent with."""
    variable = _of_asgi_correlation_id()
    return (variable and variable.get()) or _carried.get()


@contextmanager
def carried_request_id(request_id: str) -> Iterator[None]:
    """Make a sender's ``request_id`` the current one for the duration of the block."""
    variables = [each for each in (_carried, _of_asgi_correlation_id()) if each is not None]
    tokens = [variable.set(request_id) for variable in variables]
    try:
        yield
    finally:
        for variable, token in zip(variables, tokens, strict=True):
            variable.reset(token)


def _of_asgi_correlation_id() -> ContextVar[str | None] | None:
    # Not imported here: it imports Starlette, which a worker does without.
    module = sys.modules.get("asgi_correlation_id.context")
    return None if module is None else module.correlation_id
