"""A client that asks again, with the same idempotency key, until it has a yes."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice
from typing import Final

import httpx

ACCOUNTS: Final = 50
_LONGEST: Final = 40.0
"""Seconds, unless the client is told to go on for longer."""
_AT_ONCE: Final = 2
"""Requests of each kind in flight: about as fast as the workers, or else rows wait long, and are rung ever later."""
_STEPS_IN_A_REQUEST: Final = 25
_PATIENCE: Final = 90.0
"""Seconds within which a request is said yes to, at last."""


@dataclass(frozen=True)
class Load:
    """What the client asks for.

    Parameters:
        transfers: How many transfers.
        keys: How many keys have steps.
        steps: How many steps each key has.
        seconds: Time for which it goes on with transfers in any case.
    """

    transfers: int
    keys: int
    steps: int
    seconds: float = 0

    @property
    def longest(self) -> float:
        """Seconds after which a slow machine is asked for no more, and nothing more is killed."""
        return max(self.seconds, _LONGEST)

    @property
    def tasks(self) -> int:
        """How many tasks that makes, at least."""
        return self.transfers + self.keys * self.steps


class Client:
    """The client's side of the books.

    Parameters:
        ports: Of the web servers.
        seed: Of the dice.
    """

    def __init__(self, ports: list[int], seed: int) -> None:
        self.transfers: set[str] = set()
        """The keys of the transfers that were acknowledged."""
        self.steps: dict[str, int] = {}
        """How many steps of each key were acknowledged."""
        self.again = 0
        """How often it had to ask again."""
        self._ports = ports
        self._dice = random.Random(seed)

    async def post(self, load: Load) -> None:
        """Ask for everything, as far as the time goes, and return when all that was asked for is acknowledged.

        Raises:
            TimeoutError: Something never was.
        """
        self._deadline = time.monotonic() + load.longest
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(limits=limits, timeout=10) as self._http, asyncio.TaskGroup() as group:
            transfers = self._new_transfers(load)
            keys = iter([f"key {number}" for number in range(load.keys)])
            for _ in range(_AT_ONCE):
                group.create_task(self._post_transfers(transfers))
                group.create_task(self._post_steps(keys, load.steps))

    def _new_transfers(self, load: Load) -> Iterator[dict[str, object]]:
        enough = time.monotonic() + load.seconds
        for number in count():
            now = time.monotonic()
            if now >= self._deadline or (number >= load.transfers and now >= enough):
                return
            source, target = self._dice.sample(range(ACCOUNTS), 2)
            yield {
                "key": f"transfer {number}",
                "source": source,
                "target": target,
                "amount": self._dice.randint(1, 100),
            }

    async def _post_transfers(self, transfers: Iterator[dict[str, object]]) -> None:
        for transfer in transfers:
            await self._post("/transfers", transfer)
            self.transfers.add(str(transfer["key"]))

    async def _post_steps(self, keys: Iterator[str], steps: int) -> None:
        for key in keys:
            numbers = iter(range(steps))
            while time.monotonic() < self._deadline and (some := list(islice(numbers, _STEPS_IN_A_REQUEST))):
                await self._post("/steps", {"key": key, "numbers": some})
                self.steps[key] = some[-1] + 1

    async def _post(self, path: str, content: dict[str, object]) -> None:
        async with asyncio.timeout(_PATIENCE):
            for attempt in count():
                port = self._dice.choice(self._ports)
                try:
                    answer = await self._http.post(f"http://127.0.0.1:{port}{path}", json=content)
                    if answer.status_code == 201:
                        return
                except httpx.TransportError:
                    pass
                self.again += 1
                await asyncio.sleep(min(0.05 * 2**attempt, 0.5))
