"""The one command: every workload, all contenders in turn, the ratios of this run, and what was missed."""

from __future__ import annotations

import argparse
import os
import platform
import socket
import statistics
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

import psycopg2
from sqlalchemy import URL

from benchmarks import durable, sockets, tasks, web
from benchmarks.databases import scratch_database
from benchmarks.generators import wrk
from benchmarks.peers import DISPATCHING, HERE, OURS
from benchmarks.results import Comparison, Figure, Results
from benchmarks.workloads import WORKLOADS

LATEST = HERE / "results" / "latest.json"


def require_brokers(names: Iterable[str], broker: str) -> None:
    """Say at once what is missing, not in ten minutes.

    Raises:
        SystemExit: A broker is not there, and something chosen needs it.
    """
    needed = {tasks.NAME: tasks.BROKER, durable.NAME: durable.BROKERS[broker]}
    for name in set(needed).intersection(names):
        address = urlsplit(needed[name])
        try:
            socket.create_connection((address.hostname, address.port), timeout=2).close()
        except OSError:
            sys.exit(f"{name} needs a broker at {address.hostname}:{address.port}; or leave it out: --only plain read")


def machine(url: URL, arguments: argparse.Namespace) -> dict[str, str]:
    """What the figures depend on besides the packages."""
    connection = psycopg2.connect(url.render_as_string(hide_password=False))
    postgresql = str(connection.get_parameter_status("server_version")).split()[0]
    connection.close()
    return {
        "Date": datetime.now(UTC).date().isoformat(),
        "Cores": str(os.cpu_count()),
        "Python": platform.python_version(),
        "PostgreSQL": postgresql,
        "Load": "wrk" if wrk() else "Python",
        "Rounds": f"{arguments.rounds} of {arguments.seconds} s",
    }


def show(comparison: Comparison) -> None:
    """Print one workload's ratios."""
    ours, *others = comparison.measures
    counted = "" if ours.round_trips is None else f", {ours.round_trips:g} round trips"
    print(f"\n{comparison.name}: ours {statistics.median(ours.rates):.0f} {comparison.unit}/s{counted}")
    for other in others:
        ratio = comparison.ratio(other)
        wanted = "" if ratio.bar is None else f", wanted {ratio.bar}x{'' if ratio.reached else '  NOT REACHED'}"
        spread = f"{ratio.lowest:.2f} to {ratio.highest:.2f}"
        print(f"  {ratio.median:6.2f}x  ({spread})  {other.contender}{wanted}", flush=True)


def show_figure(figure: Figure) -> None:
    """Print one figure."""
    wanted = f", wanted {figure.wanted}" if figure.wanted else ""
    print(f"  {figure.what}: {figure.value:.4g}{wanted}{'  NOT REACHED' if figure.missed() else ''}", flush=True)


def main() -> None:
    """Measure and report; with ``--check``, fail when a bar is missed."""
    names = [*(workload.name for workload in WORKLOADS), sockets.NAME, tasks.NAME, durable.NAME]
    parser = argparse.ArgumentParser(prog="benchmarks.run", description=__doc__)
    parser.add_argument("--only", choices=names, nargs="+", default=names, metavar="WORKLOAD", help=", ".join(names))
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds (5)")
    parser.add_argument("--seconds", type=int, default=2, help="seconds of load, a contender and round (2)")
    parser.add_argument("--broker", choices=durable.BROKERS, default="rabbitmq", help="for durable (rabbitmq)")
    parser.add_argument("--output", type=Path, default=LATEST, help="the run as JSON (benchmarks/results/latest.json)")
    parser.add_argument("--check", action="store_true", help="exit with 1 when a bar is missed")
    arguments = parser.parse_args()
    require_brokers(arguments.only, arguments.broker)
    with scratch_database() as url:
        results = Results(machine(url, arguments))
        for name in arguments.only:
            measure(name, url, arguments, results)
            results.write(arguments.output)
    missed = results.missed()
    print("\nNot reached:" if missed else "\nEvery bar is reached.", *missed, sep="\n  ")
    sys.exit(1 if missed and arguments.check else 0)


def measure(name: str, url: URL, arguments: argparse.Namespace, results: Results) -> None:
    """Measure what is called so, show it, and add it to the results."""
    comparisons: list[Comparison] = []
    figures: list[Figure] = []
    if name == sockets.NAME:
        figures = sockets.measure(url)
    elif name == tasks.NAME:
        comparisons = tasks.measure(url, arguments.rounds)
    elif name == durable.NAME:
        results.versions[DISPATCHING.name] = DISPATCHING.versions()
        comparison, figures = durable.measure(url, arguments.broker, arguments.rounds, arguments.seconds)
        comparisons = [comparison]
    else:
        workload = next(workload for workload in WORKLOADS if workload.name == name)
        for contender in (OURS, *workload.against):
            results.versions.setdefault(contender.name, contender.versions())
        comparisons = [web.measure(workload, url, arguments.rounds, arguments.seconds)]
    for comparison in comparisons:
        show(comparison)
    for figure in figures:
        show_figure(figure)
    results.comparisons += comparisons
    results.figures += figures


if __name__ == "__main__":
    main()
