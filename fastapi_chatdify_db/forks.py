"""What a forked child drops: connections, locks and threads are its parent's."""

from __future__ import annotations

import os
from collections.abc import Callable


def in_forked_child(drop: Callable[[], None]) -> Callable[[], None]:
    """Decorator: call the function at the start of every child that this process forks."""
    if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
        os.register_at_fork(after_in_child=drop)
    return drop
