"""Whatever dies, what the client was told, what the database holds and what the workers did agree in the end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from tests.chaos.books import Books
from tests.chaos.brokers import own_broker
from tests.chaos.client import Client, Load
from tests.chaos.faults import Chaos
from tests.chaos.processes import fleet

_CALM_BELOW = 300
"""Tasks that are left for the time after the last fault."""


def play(
    broker_name: str, database_url: str, load: Load, seed: int, logs: Path, environment: Mapping[str, str] | None = None
) -> tuple[dict[str, object], str]:
    """Let everything die while a client asks and workers work; returns what is wrong afterwards, and the figures."""
    books = Books(database_url)
    began = time.monotonic()
    with own_broker(broker_name) as broker:
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
            with Chaos(processes, broker, database_url, seed) as chaos:
                asyncio.run(client.post(load))
                posted = time.monotonic()
                books.until_pending(_CALM_BELOW)
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


@pytest.mark.parametrize(
    ("broker_name", "load"),
    [("rabbitmq", Load(transfers=3000, keys=100, steps=50)), ("redis", Load(transfers=3000, keys=20, steps=50))],
    ids=["rabbitmq", "redis"],
)
def test_everything_dies_and_the_books_balance(
    broker_name: str,
    load: Load,
    own_database: str,
    tmp_path: Path,
    pytestconfig: pytest.Config,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Every acknowledged transfer is applied once and every key's steps in order, although everything dies."""
    load = replace(load, seconds=pytestconfig.getoption("--chaos-seconds"))
    violations, figures = play(broker_name, own_database, load, pytestconfig.getoption("--chaos-seed"), tmp_path)
    with capsys.disabled():
        print(f"\n{figures}")
    assert not violations
