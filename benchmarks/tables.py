"""A run as Markdown tables, and their place in a page."""

from __future__ import annotations

import statistics
from collections.abc import Iterable

from benchmarks.results import Comparison, Figure, Measure, Results

TITLES = {
    "plain": "A route that touches no database",
    "read": "Read one row; six clients",
    "read-alone": "Read one row; a single client",
    "read-many": "Read one row; 20 clients on a pool of 10",
    "read-20": "Read 20 rows",
    "modify": "Read, modify, write one row",
    "insert": "Insert one row",
    "mixed": "Nine reads and one insert",
    "slow-readers": "Read one row, beside 30 slow readers of a large body; pool of 10",
    "outside-call": "Read, wait 200 ms for an outside service, insert; pool of 10, 200 clients",
    "task: insert": "Celery task that inserts one row",
    "task: nothing": "Celery task that touches no database",
    "dispatch": "Insert one row and dispatch a task durably",
}
BEGIN, END = "<!-- results: begin, written by benchmarks.report -->", "<!-- results: end -->"


def markdown(results: Results) -> str:
    """Everything that a run found."""
    machine = ", ".join(f"{name.lower()} {value}" for name, value in results.machine.items())
    parts = [f"This run: {machine}.", *map(_compared, results.comparisons)]
    if results.figures:
        parts.append(_figures(results.figures))
    return "\n\n".join([*parts, _versions(results.versions)])


def insert(page: str, tables: str) -> str:
    """The page with what stands between its markers replaced.

    Raises:
        ValueError: The page lacks a marker.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page needs the lines {BEGIN} and {END}")
    return f"{before}{begin}\n\n{tables}\n\n{end}{after}"


def _compared(comparison: Comparison) -> str:
    ours = comparison.measures[0]
    rows = [_cells(comparison, ours, "", ""), *(_against(comparison, other) for other in comparison.measures[1:])]
    head = ("contender", f"{comparison.unit}/s", "ours is", "wanted", "CPU µs", "round trips")
    return f"**{TITLES[comparison.name]}** (`{comparison.name}`)\n\n{_table(head, rows)}"


def _against(comparison: Comparison, other: Measure) -> tuple[str, ...]:
    ratio = comparison.ratio(other)
    wanted = "" if ratio.bar is None else f"{ratio.bar}x{'' if ratio.reached else ' (missed)'}"
    spread = f"{ratio.median:.2f}x ({ratio.lowest:.2f} to {ratio.highest:.2f})"
    return _cells(comparison, other, spread, wanted)


def _cells(comparison: Comparison, measure: Measure, spread: str, wanted: str) -> tuple[str, ...]:
    name = f"**{measure.contender}**" if measure is comparison.measures[0] else measure.contender
    cpu = f"{statistics.median(measure.cpu):.0f}" if measure.cpu else ""
    round_trips = "" if measure.round_trips is None else f"{measure.round_trips:g}"
    return name, f"{statistics.median(measure.rates):.0f}", spread, wanted, cpu, round_trips


def _figures(figures: Iterable[Figure]) -> str:
    rows = [
        (figure.workload, figure.what, f"{figure.value:.4g}", figure.wanted + (" (missed)" if figure.missed() else ""))
        for figure in figures
    ]
    return "**Websockets, a thousand idle ones, and the relay of durable dispatch**\n\n" + _table(
        ("workload", "figure", "value", "wanted"), rows
    )


def _versions(versions: dict[str, dict[str, str]]) -> str:
    alike: dict[str, list[str]] = {}
    for contender, packages in versions.items():
        alike.setdefault(", ".join(f"{name} {version}" for name, version in packages.items()), []).append(contender)
    rows = [("; ".join(contenders), packages) for packages, contenders in alike.items()]
    return "**Versions**\n\n" + _table(("contenders", "packages"), rows)


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = (head, ("---",) * len(head), *rows)
    return "\n".join(f"| {' | '.join(cells)} |".replace("|  |", "| |").replace("|  |", "| |") for cells in lines)
