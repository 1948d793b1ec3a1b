"""What a run found: rates side by side, single figures, and the bars that they have to reach. Kept as JSON."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass
class Measure:
    """One contender at one workload.

    Parameters:
        contender: Its name.
        rates: Per second, one for each round.
        cpu: Microseconds of the server's processor per request, one for each round; empty when that says nothing.
        round_trips: To PostgreSQL, per request; None when they were not counted.
    """

    contender: str
    rates: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    round_trips: float | None = None


@dataclass(frozen=True)
class Ratio:
    """Ours to another contender's, round by round; and what it has to be at least, if anything."""

    median: float
    lowest: float
    highest: float
    bar: float | None

    @property
    def reached(self) -> bool:
        """Whether the median is at the bar, or there is none."""
        return self.bar is None or self.median >= self.bar


@dataclass
class Comparison:
    """A workload: several contenders in interleaved rounds, ours the first.

    Parameters:
        name: The workload's.
        unit: What the rates count.
        measures: One for each contender.
        bars: What the ratio of ours to a contender has to be, by the contender's name.
        round_trips: What ours must not exceed; None when anything will do.
    """

    name: str
    unit: str
    measures: list[Measure]
    bars: dict[str, float] = field(default_factory=dict)
    round_trips: float | None = None

    def ratio(self, other: Measure) -> Ratio:
        """Ours to another's; one that answers nothing counts as one answer per second."""
        ours = self.measures[0].rates
        ratios = [mine / max(theirs, 1.0) for mine, theirs in zip(ours, other.rates, strict=True)]
        return Ratio(statistics.median(ratios), min(ratios), max(ratios), self.bars.get(other.contender))

    def missed(self) -> list[str]:
        """The bars that were not reached, in words."""
        ratios = {other.contender: self.ratio(other) for other in self.measures[1:]}
        found = [
            f"{self.name}: {ratio.median:.2f}x {contender}, wanted {ratio.bar}x"
            for contender, ratio in ratios.items()
            if not ratio.reached
        ]
        counted = self.measures[0].round_trips
        if self.round_trips is not None and counted is not None and counted > self.round_trips:
            found.append(f"{self.name}: {counted:g} round trips, wanted {self.round_trips:g}")
        return found


@dataclass(frozen=True)
class Figure:
    """A single figure of ours, which has to be at least, or at most, its bar."""

    workload: str
    what: str
    value: float
    at_least: float | None = None
    at_most: float | None = None

    def missed(self) -> list[str]:
        """The bar, when it was not reached."""
        low = self.at_least is not None and self.value < self.at_least
        high = self.at_most is not None and self.value > self.at_most
        return [f"{self.workload}: {self.what} {self.value:.4g}, wanted {self.wanted}"] if low or high else []

    @property
    def wanted(self) -> str:
        """The bar in words."""
        if self.at_least is not None:
            return f">= {self.at_least:g}"
        return "" if self.at_most is None else f"<= {self.at_most:g}"


@dataclass
class Results:
    """A run.

    Parameters:
        machine: What it ran on, by name.
        versions: Of the packages, by contender and package.
        comparisons: By workload.
        figures: The others.
    """

    machine: dict[str, str] = field(default_factory=dict)
    versions: dict[str, dict[str, str]] = field(default_factory=dict)
    comparisons: list[Comparison] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)

    def missed(self) -> list[str]:
        """All bars that were not reached, in words."""
        compared = [line for comparison in self.comparisons for line in comparison.missed()]
        return compared + [line for figure in self.figures for line in figure.missed()]

    def write(self, path: Path) -> None:
        """Keep the run."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> Results:
        """A run that was kept."""
        kept = json.loads(path.read_text())
        return cls(
            kept["machine"],
            kept["versions"],
            [
                Comparison(**each | {"measures": [Measure(**measure) for measure in each["measures"]]})
                for each in kept["comparisons"]
            ],
            [Figure(**each) for each in kept["figures"]],
        )
