"""The signal of Celery's soft time limit, kept from what must not be interrupted."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def soft_limit_held_back() -> Iterator[None]:
    """Let a soft time limit that passes during the block take effect at its end.

    Raises:
        celery.exceptions.SoftTimeLimitExceeded: One did pass.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "pthread_sigmask"):
        yield  # no signal comes here
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})  # billiard's for it
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
