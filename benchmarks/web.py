"""Measures one workload of the web: all contenders in interleaved rounds."""

from __future__ import annotations

from contextlib import ExitStack

from sqlalchemy import URL

from benchmarks.databases import environment
from benchmarks.generators import generate
from benchmarks.peers import OURS, Contender
from benchmarks.results import Comparison, Measure
from benchmarks.servers import Server, ask, serving, wait_for_answer
from benchmarks.workloads import Workload
from tests.counting import counting_proxy

WARMED, COUNTED = 20, 50  # requests


def measure(workload: Workload, url: URL, rounds: int, seconds: int) -> Comparison:
    """Rates, processor time and round trips. In every round all contenders run once, in another order."""
    contenders = [OURS, *workload.against]
    measures = {contender: Measure(contender.name) for contender in contenders}
    with ExitStack() as running:
        servers = {
            contender: running.enter_context(serving(contender, environment(url, workload.max_overflow)))
            for contender in contenders
        }
        for server in servers.values():
            wait_for_answer(server.port, workload.paths[0], workload.answer)
            _round(server, workload, 1)
        for number in range(rounds):
            turn = number % len(contenders)
            for contender in [*contenders[turn:], *contenders[:turn]]:
                rate, cpu = _round(servers[contender], workload, seconds)
                measures[contender].rates.append(rate)
                if not workload.slow_readers:  # their bodies take processor time of their own
                    measures[contender].cpu.append(cpu)
    for contender in contenders:
        measures[contender].round_trips = round_trips(contender, workload, url)
    bars = {contender.name: bar for contender, bar in workload.against.items() if bar is not None}
    return Comparison(workload.name, "requests", [*measures.values()], bars, workload.round_trips)


def _round(server: Server, workload: Workload, seconds: int) -> tuple[float, float]:
    """Requests per second, and microseconds of the server's processor for each."""
    before = server.cpu_seconds()
    answered, took = generate(server.port, workload, seconds)
    cpu = server.cpu_seconds() - before
    # What clients that left asked for is still in the pool's queue: whoever is next must not run beside it.
    ask(server.port, workload.paths[0])
    return answered / took, cpu / max(answered, 1) * 1e6


def round_trips(contender: Contender, workload: Workload, url: URL) -> float:
    """Round trips to PostgreSQL per request, of one client on a warm connection."""
    with counting_proxy(url) as proxy:
        through = url.set(host="127.0.0.1", port=proxy.url.port)
        with serving(contender, environment(through)) as server:
            wait_for_answer(server.port, workload.paths[0], workload.answer)
            for number in range(WARMED + COUNTED):
                if number == WARMED:
                    before = proxy.round_trips
                ask(server.port, workload.paths[number % len(workload.paths)])
    return (proxy.round_trips - before) / COUNTED
