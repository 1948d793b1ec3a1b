"""Closing connections in bounded time: a silent server never confirms it, and a closed loop cannot ask for it."""

from __future__ import annotations

import time
from asyncio import AbstractEventLoop, Transport
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from socket import SHUT_RDWR
from typing import Final
from weakref import WeakKeyDictionary, WeakSet

LIMIT: Final = 5.0
"""Seconds until a connection that is being closed is dropped instead."""

_deadline: Final[ContextVar[float | None]] = ContextVar("_deadline", default=None)


@contextmanager
def within_one_limit() -> Iterator[None]:
    """Let all connections that are closed in the block, one after the other, share one limit."""
    token = _deadline.set(time.monotonic() + LIMIT)
    try:
        yield
    finally:
        _deadline.reset(token)


def seconds_left() -> float:
    """How long closing a connection may take now."""
    deadline = _deadline.get()
    return LIMIT if deadline is None else max(0.0, deadline - time.monotonic())


_transports: Final[WeakKeyDictionary[AbstractEventLoop, WeakSet[Transport]]] = WeakKeyDictionary()
"""The transports of each event loop's connections to the server."""


def note_transport(transport: Transport, loop: AbstractEventLoop) -> None:
    """Remember a connection for ``cut_off``."""
    _transports.setdefault(loop, WeakSet()).add(transport)


def cut_off(loop: AbstractEventLoop) -> None:
    """End the connections of a closed loop, which cannot close them any more.

    Until they are garbage collected, they would count towards the server's ``max_connections``.

    Parameters:
        loop: One of this process's own; a parent's connections are not ours to end.
    """
    for transport in _transports.pop(loop, ()):
        connected = transport.get_extra_info("socket")
        if connected is not None:
            with suppress(OSError, TypeError):  # it has ended already, as uvloop's always have: those refuse this
                connected.shutdown(SHUT_RDWR)
