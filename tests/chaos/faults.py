"""What goes wrong: one thing after the other, in an order and at moments that a seed decides."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from threading import Event, Thread
from types import TracebackType
from typing import Final, Self

import psycopg2

from tests.chaos.books import OBSERVER
from tests.chaos.brokers import Broker
from tests.chaos.processes import Fleet, Kind

_BETWEEN: Final = 1.2
"""Seconds from one fault to the next, on average."""


class Chaos:
    """Inject faults for the time of the block, in a thread.

    Parameters:
        fleet: The processes that are killed.
        broker: The broker that forgets.
        database_url: Where sessions are terminated.
        seed: Of the dice.
    """

    def __init__(self, fleet: Fleet, broker: Broker, database_url: str, seed: int) -> None:
        self.injected: Counter[str] = Counter()
        self._fleet = fleet
        self._database_url = database_url
        self._dice = random.Random(seed)
        self._faults: dict[str, Callable[[], object]] = {
            "web killed": lambda: self._kill("web"),
            "worker killed": lambda: self._kill("worker"),
            "worker's child killed": self._kill_child,
            "relay killed": lambda: self._kill("relay"),
            "database sessions terminated": self._terminate_sessions,
            **broker.faults,
        }
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
        try:
            while True:
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
        connection = psycopg2.connect(self._database_url, application_name=OBSERVER)
        try:
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute(
                    """SELECT pid FROM pg_stat_activity WHERE datname = current_database()
                       AND backend_type = 'client backend' AND application_name <> %s ORDER BY pid""",
                    (OBSERVER,),
                )
                pids = [pid for (pid,) in cursor.fetchall()]
                chosen = self._dice.sample(pids, (len(pids) + 2) // 3)
                cursor.execute("SELECT pg_terminate_backend(pid) FROM unnest(%s) AS pid", (chosen,))
        finally:
            connection.close()
