"""What goes wrong: one thing after the other, in an order and at moments that a seed decides."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from threading import Event, Thread
from types import TracebackType
from typing import Final, Self

from tests.chaos.books import Books
from tests.chaos.brokers import Broker
from tests.chaos.processes import Fleet, Kind

_BETWEEN: Final = 2.0
"""Seconds from one fault to the next, on average."""


class Chaos:
    """Inject faults for the time of the block, in a thread.

    Parameters:
        fleet: The processes that are killed.
        broker: The broker that forgets.
        books: Of the database whose sessions are terminated.
        seed: Of the dice.
        only: The one fault to inject; None for all of them.
        seconds: Time after which no more are injected: a slow machine restarts processes more slowly than they die.
    """

    def __init__(self, fleet: Fleet, broker: Broker, books: Books, seed: int, only: str | None, seconds: float) -> None:
        self.injected: Counter[str] = Counter()
        self._fleet = fleet
        self._books = books
        self._dice = random.Random(seed)
        self._faults: dict[str, Callable[[], object]] = {
            "web killed": lambda: self._kill("web"),
            "worker killed": lambda: self._kill("worker"),
            "worker's child killed": self._kill_child,
            "relay killed": lambda: self._kill("relay"),
            "database sessions terminated": self._terminate_sessions,
            **broker.faults,
        }
        if only is not None:
            self._faults = {only: self._faults[only]}
        self._seconds = seconds
        self._over = Event()
        self._error: BaseException | None = None
        self._thread = Thread(target=self._run, name="chaos")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()
        if self._error is not None and error is None:
            raise self._error

    def _run(self) -> None:
        deadline = time.monotonic() + self._seconds
        try:
            while time.monotonic() < deadline:
                for name in self._dice.sample(list(self._faults), len(self._faults)):
                    if self._over.wait(self._dice.expovariate(1 / _BETWEEN)):
                        return
                    self._faults[name]()
                    self.injected[name] += 1
        except BaseException as error:  # raised where the block ends
            self._error = error

    def _kill(self, kind: Kind) -> None:
        self._dice.choice(self._fleet.of(kind)).kill()

    def _kill_child(self) -> None:
        workers = self._fleet.of("worker")
        for worker in self._dice.sample(workers, len(workers)):
            if worker.kill_child(self._dice):
                return

    def _terminate_sessions(self) -> None:
        sessions = self._books.sessions()
        self._books.terminate(self._dice.sample(sessions, (len(sessions) + 2) // 3))
