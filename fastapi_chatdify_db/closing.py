"""How long the end of connections is waited for: a server that has fallen silent never confirms it."""

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


_transports: Final[WeakKeyDictionary[AbstractEventLoop, WeakSet[Transport]]] = WeakKeyDictionary()
"""What each event loop's connections to the server go through."""


def note(transport: Transport, loop: AbstractEventLoop) -> None:
    """Remember a connection for ``cut_off``."""
    _transports.setdefault(loop, WeakSet()).add(transport)


def cut_off(loop: AbstractEventLoop) -> None:
    """End the connections of a closed loop, which cannot close them any more.

    The server would keep them until they are garbage collected, which may be after it has no more to give.

    Parameters:
        loop: One of this process's own; a parent's connections are not ours to end.
    """
    for transport in _transports.pop(loop, ()):
        connected = transport.get_extra_info("socket")
        if connected is not None:
            with suppress(OSError, TypeError):  # it has ended by itself; so has any of uvloop's, which refuses this
                connected.shutdown(SHUT_RDWR)
