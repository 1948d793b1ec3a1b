"""What a forked child drops: connections, locks and threads are its parent's."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Final

from sqlalchemy import Engine

_inherited: Final[list[object]] = []
"""Pools that are kept for good: garbage collection would close the parent's connections."""


def in_forked_child(drop: Callable[[], None]) -> Callable[[], None]:
    """Decorator: call the function at the start of every child that this process forks."""
    if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
        os.register_at_fork(after_in_child=drop)
    return drop


def forget_connections(engine: Engine) -> None:
    """Let an engine start over with an empty pool, in a child whose parent goes on using the connections."""
    _inherited.append(engine.pool)
    engine.dispose(close=False)
