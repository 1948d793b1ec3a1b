"""Where the running code stands: on an event loop, within a generator."""

from __future__ import annotations

import asyncio
import inspect
from typing import Final

_PACKAGE: Final = __name__.partition(".")[0]


def in_event_loop() -> bool:
    """Whether the running code can await."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def in_generator() -> bool:
    """Whether a generator is on the stack; those of this package do not count, which are context managers."""
    frame = inspect.currentframe()
    while frame is not None:
        is_ours = frame.f_globals.get("__name__", "").partition(".")[0] == _PACKAGE
        if frame.f_code.co_flags & inspect.CO_GENERATOR and not is_ours:
            return True
        frame = frame.f_back
    return False
