"""One run: the processes, the client, the faults, and the books at the end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from pathlib import Path

from tests.chaos.books import Books
from tests.chaos.brokers import own_broker
from tests.chaos.client import Client, Load
from tests.chaos.faults import Chaos
from tests.chaos.processes import fleet


def play(
    broker_name: str,
    database_url: str,
    load: Load,
    seed: int,
    logs: Path,
    *,
    in_calm: float,
    only: str | None = None,
    environment: Mapping[str, str] | None = None,
) -> tuple[dict[str, object], str]:
    """Let everything die while a client asks and workers work; returns what is wrong afterwards, and the figures.

    Parameters:
        broker_name: ``"rabbitmq"`` or ``"redis"``.
        database_url: An empty database.
        load: What the client asks for.
        seed: Of all dice.
        logs: The directory for the processes' logs.
        in_calm: The share of the tasks that may be left when the faults end, after the last request.
        only: The one fault to inject; None for all of them.
        environment: Further settings of the application.
    """
    began = time.monotonic()
    with own_broker(broker_name) as broker, Books(database_url) as books:
        settings = {
            "DATABASE_URL": database_url,
            "CHAOS_BROKER": broker.url,
            "DB_POOL_SIZE": "3",
            "DB_MAX_OVERFLOW": "3",
            **(environment or {}),
        }
        with fleet(settings, logs) as processes:
            books.open_accounts()
            client = Client(processes.ports, seed)
            with Chaos(processes, broker, books, seed, only, load.longest) as chaos:
                asyncio.run(client.post(load))
                posted = time.monotonic()
                books.until_pending(int(load.tasks * in_calm))
                calm = time.monotonic()
            books.until_at_rest()
            violations = books.violations(client)
            if died := processes.ended_by_themselves():
                violations["web servers and relays that ended by themselves"] = died
    faults = ", ".join(f"{count} x {name}" for name, count in sorted(chaos.injected.items()))
    return violations, (
        f"chaos on {broker_name}, seed {seed}: "
        f"{len(client.transfers)} transfers and {sum(client.steps.values())} steps, "
        f"asked {client.again} times again; posted after {posted - began:.0f} s, calm after {calm - began:.0f} s, "
        f"at rest after {time.monotonic() - began:.0f} s; {faults}"
    )
