"""The one command: every scenario, all contenders in turn, and the ratios of this run."""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import psycopg2
from sqlalchemy import make_url

from benchmarks.servers import AUTOCOMMIT, BARE, OURS, PEERS, SIX_LINE, Contender, rate, serving, wait_for_answer

DATABASE = "chatdify_benchmark"
ROW = b'{"id":1,"name":"benchmark"}'


@dataclass(frozen=True)
class Scenario:
    """What is asked of which contenders, and by how much we want to be ahead of each."""

    name: str
    path: str
    answer: bytes
    targets: dict[Contender, float]
    slow_readers: int = 0
    max_overflow: int = 20


SCENARIOS = (
    Scenario("plain", "/plain", b'{"hello":"world"}', {BARE: 0.97}),
    Scenario("read", "/read", ROW, {SIX_LINE: 1.6, **dict.fromkeys(PEERS, 1.4), AUTOCOMMIT: 0.95}),
    Scenario("slow-readers", "/read", ROW, {SIX_LINE: 8.0}, slow_readers=30, max_overflow=0),
)


@contextmanager
def scratch_database() -> Iterator[str]:
    """A database with one row; yields its URL for asyncpg."""
    server = make_url(os.environ.get("DATABASE_URL", "postgresql://postgres@127.0.0.1:5432/postgres"))
    own = server.set(drivername="postgresql", database=DATABASE)
    execute(server.set(drivername="postgresql").render_as_string(False), f"CREATE DATABASE {DATABASE}")
    try:
        execute(
            own.render_as_string(False),
            "CREATE TABLE benchmark_item (id int PRIMARY KEY, name text NOT NULL)",
            "INSERT INTO benchmark_item VALUES (1, 'benchmark')",
        )
        yield own.set(drivername="postgresql+asyncpg").render_as_string(False)
    finally:
        execute(server.set(drivername="postgresql").render_as_string(False), f"DROP DATABASE {DATABASE} WITH (FORCE)")


def execute(url: str, *statements: str) -> None:
    """Run statements outside any transaction, as CREATE DATABASE wants."""
    connection = psycopg2.connect(url)
    connection.autocommit = True
    for statement in statements:
        connection.cursor().execute(statement)
    connection.close()


def measure(scenario: Scenario, url: str, rounds: int, seconds: float) -> dict[Contender, list[float]]:
    """The rates of each contender by round. In every round all of them run once, in another order."""
    contenders = [OURS, *scenario.targets]
    environment = {"BENCHMARK_URL": url, "DB_POOL_SIZE": "10", "DB_MAX_OVERFLOW": str(scenario.max_overflow)}
    rates: dict[Contender, list[float]] = {contender: [] for contender in contenders}
    with ExitStack() as running:
        ports = {contender: running.enter_context(serving(contender, environment)) for contender in contenders}
        for port in ports.values():
            wait_for_answer(port, scenario.path, scenario.answer)
            rate(port, scenario.path, 1, 0)
        for number in range(rounds):
            turn = number % len(contenders)
            for contender in [*contenders[turn:], *contenders[:turn]]:
                rates[contender].append(rate(ports[contender], scenario.path, seconds, scenario.slow_readers))
    return rates


def report(scenario: Scenario, rates: dict[Contender, list[float]]) -> bool:
    """Print the ratios of one scenario; returns whether each reaches its target."""
    reached = True
    print(f"\n{scenario.name}: ours {statistics.median(rates[OURS]):.0f} requests/s")
    for contender, target in scenario.targets.items():
        ratios = [ours / max(theirs, 0.1) for ours, theirs in zip(rates[OURS], rates[contender], strict=True)]
        median = statistics.median(ratios)
        reached &= median >= target
        print(
            f"  {median:6.2f}x  ({min(ratios):.2f} to {max(ratios):.2f})  {contender.name},"
            f" wanted {target}x{'' if median >= target else '  NOT REACHED'}",
            flush=True,
        )
    return reached


def main() -> None:
    """Measure and report; with ``--check``, fail when a target is missed."""
    parser = argparse.ArgumentParser(prog="benchmarks.run", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--only", choices=[scenario.name for scenario in SCENARIOS])
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    chosen = [scenario for scenario in SCENARIOS if arguments.only in (None, scenario.name)]
    for contender in dict.fromkeys([OURS, *(each for scenario in chosen for each in scenario.targets)]):
        print(f"{contender.name}: {contender.versions()}")
    with scratch_database() as url:
        reached = [report(each, measure(each, url, arguments.rounds, arguments.seconds)) for each in chosen]
    sys.exit(0 if all(reached) or not arguments.check else 1)


if __name__ == "__main__":
    main()
