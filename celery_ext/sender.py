"""Threads that send messages, so that nobody waits for a broker longer than agreed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from queue import SimpleQueue
from threading import Thread
from typing import Final

from fastapi_chatdify_db.forks import in_forked_child

_KEPT: Final = 10
"""How many threads are kept while idle; as many as Celery keeps connections to a broker (``broker_pool_limit``)."""

_MOST_OVERDUE: Final = 100
"""How many threads may hang in a send that did not end in time; beyond that, none is begun."""


def send_within(seconds: float, send: Callable[[], object]) -> BaseException | None:
    """Call ``send`` in another thread; returns what it raised, or a ``TimeoutError`` when it did not end in time.

    There are many ways for a broker not to answer, so the waiting itself is bounded. Threads are kept for the next
    message, because Celery gives each thread a result backend with connections of its own.

    Parameters:
        seconds: How long to wait. After that, ``send`` goes on by itself.
        send: The call that may hang.
    """
    if len(_overdue) >= _MOST_OVERDUE:
        return TimeoutError(f"{_MOST_OVERDUE} messages wait for the broker already")
    try:
        sender = _idle.pop()
    except IndexError:
        sender = _Sender()
        sender.start()
    outcome: Future[BaseException | None] = Future()
    sender.messages.put((send, outcome))
    with suppress(TimeoutError):
        return outcome.result(seconds)
    _overdue.add(outcome)
    outcome.add_done_callback(_overdue.discard)
    return TimeoutError(f"no answer in {seconds:g} s; it may still be sent")


class _Sender(Thread):
    def __init__(self) -> None:
        super().__init__(name="celery_ext.sender", daemon=True)  # so that a process does not wait for it at its end
        self.messages: SimpleQueue[tuple[Callable[[], object], Future[BaseException | None]]] = SimpleQueue()

    def run(self) -> None:
        kept = True
        while kept:
            send, outcome = self.messages.get()
            error: BaseException | None = None
            try:
                send()
            except BaseException as raised:  # returned by the thread that waits
                error = raised
            kept = len(_idle) < _KEPT
            if kept:
                _idle.append(self)  # before the outcome: the next message may come at once, and takes the same thread
            outcome.set_result(error)
            del send, outcome, error


_idle: Final[deque[_Sender]] = deque()
_overdue: Final[set[Future[BaseException | None]]] = set()


@in_forked_child
def _forget_parents_threads() -> None:
    _idle.clear()
    _overdue.clear()
