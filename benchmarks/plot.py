"""A run as a plot."""

from __future__ import annotations

import statistics
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure as Canvas

from benchmarks.results import Comparison, Results
from benchmarks.tables import TITLES

COLUMNS = 2
OURS, OTHERS = "#0b6e4f", "#b8bfc6"


def draw(results: Results, path: Path) -> None:
    """Draw each workload's rates, fastest first, with their spread.

    Parameters:
        results: The run.
        path: An SVG file, the same for the same run.
    """
    mpl.rcParams["svg.hashsalt"] = "benchmarks"
    mpl.rcParams["svg.fonttype"] = "none"  # text stays text
    rows = -(-len(results.comparisons) // COLUMNS)
    canvas = Canvas(figsize=(12, 2.6 * rows), layout="constrained")
    for number, comparison in enumerate(results.comparisons, start=1):
        _bars(canvas, comparison, (rows, COLUMNS, number))
    canvas.savefig(path, format="svg", metadata={"Date": None})


def _bars(canvas: Canvas, comparison: Comparison, place: tuple[int, int, int]) -> None:
    axes = canvas.add_subplot(*place)
    measures = sorted(comparison.measures, key=lambda measure: statistics.median(measure.rates))
    medians = [statistics.median(measure.rates) for measure in measures]
    errors = [
        [median - min(measure.rates) for median, measure in zip(medians, measures, strict=True)],
        [max(measure.rates) - median for median, measure in zip(medians, measures, strict=True)],
    ]
    colours = [OURS if measure is comparison.measures[0] else OTHERS for measure in measures]
    axes.barh([measure.contender for measure in measures], medians, xerr=errors, color=colours, ecolor="#444444")
    axes.set_title(TITLES[comparison.name], fontsize=9, loc="left", wrap=True)
    axes.set_xlabel(f"{comparison.unit}/s", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
