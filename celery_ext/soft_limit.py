"""Celery's soft time limit, held back from what must not be interrupted."""

from __future__ import annotations

import os
import signal
import threading
from functools import lru_cache
from types import FrameType
from typing import Final

from billiard.pool import SIG_SOFT_TIMEOUT, soft_timeout_sighandler
from celery.exceptions import SoftTimeLimitExceeded


class _HeldBack:
    """A context manager that delays a soft time limit until the end of the outermost block.

    A signal mask would do the same, at the cost of two system calls for each task.

    Raises:
        celery.exceptions.SoftTimeLimitExceeded: At that end, if the limit has passed.
    """

    _depth = 0
    _passed = False

    def __enter__(self) -> None:
        if _in_main_thread():  # the only one that gets signals
            _listen(os.getpid())
            self._depth += 1

    def __exit__(self, *_: object) -> None:
        if _in_main_thread():
            self._depth -= 1
            if self._passed and not self._depth:
                self._passed = False
                raise SoftTimeLimitExceeded

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        if self._depth:
            self._passed = True
        else:
            soft_timeout_sighandler(number, frame)


soft_limit_held_back: Final = _HeldBack()


def _in_main_thread() -> bool:
    return threading.get_ident() == threading.main_thread().ident


@lru_cache(maxsize=1)
def _listen(pid: int) -> None:
    """Replace billiard's signal handler, once in each process: it is set after the last of Celery's own signals."""
    if SIG_SOFT_TIMEOUT is not None and signal.getsignal(SIG_SOFT_TIMEOUT) is soft_timeout_sighandler:
        signal.signal(SIG_SOFT_TIMEOUT, soft_limit_held_back.handle)
