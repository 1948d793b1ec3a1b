"""How long the end of connections is waited for: a server that has fallen silent never confirms it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final

LIMIT: Final = 5.0
"""Seconds until a connection that is being closed is dropped instead."""

_until: Final[ContextVar[float | None]] = ContextVar("_until", default=None)


@contextmanager
def within_one_limit() -> Iterator[None]:
    """Let all connections that are closed in the block, one after the other, take no longer than one."""
    token = _until.set(time.monotonic() + LIMIT)
    try:
        yield
    finally:
        _until.reset(token)


def seconds_left() -> float:
    """What the connection that is being closed here may take."""
    until = _until.get()
    return LIMIT if until is None else max(0.0, until - time.monotonic())
