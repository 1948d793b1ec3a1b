"""What a benchmark's run found is kept, judged by its bars, and put into the documentation."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.results import Comparison, Figure, Measure, Results
from benchmarks.tables import BEGIN, END, insert, markdown

PAGE = Path(__file__).parent.parent / "docs" / "performance.md"


def run(ours: list[float], round_trips: float = 1, latency: float = 5) -> Results:
    measures = [Measure("ours", ours, [300.0] * 3, round_trips), Measure("peer", [100.0, 200.0, 50.0])]
    comparison = Comparison("read", "requests", measures, bars={"peer": 1.5}, round_trips=1)
    return Results(
        {"Cores": "2"}, {"ours": {"asyncpg": "0.32.0"}}, [comparison], [Figure("w", "ms", latency, None, 20)]
    )


def test_bars_are_for_the_median_of_each_rounds_ratio() -> None:
    """A round in which everything was slow counts as any other."""
    assert run([160.0, 320.0, 20.0]).missed() == []
    assert run([140.0, 280.0, 500.0]).missed() == ["read: 1.40x peer, wanted 1.5x"]


def test_too_many_round_trips_or_too_large_a_figure_is_missed() -> None:
    """What is counted, or has to be small, has a bar as ratios have."""
    missed = run([160.0, 320.0, 80.0], round_trips=3, latency=21).missed()
    assert missed == ["read: 3 round trips, wanted 1", "w: ms 21, wanted <= 20"]


def test_run_is_read_as_it_was_written(tmp_path: Path) -> None:
    """The JSON holds everything that the report needs."""
    results = run([160.0, 320.0, 80.0])
    results.write(tmp_path / "results" / "run.json")
    assert Results.read(tmp_path / "results" / "run.json") == results


def test_report_replaces_only_what_is_between_the_markers() -> None:
    """The page's own words stay, whatever the last run was."""
    tables = markdown(run([160.0, 320.0, 80.0]))
    page = insert(insert(f"before\n{BEGIN}\nold\n{END}\nafter", "older"), tables)
    assert page == f"before\n{BEGIN}\n\n{tables}\n\n{END}\nafter"
    assert "| peer | 100 | 1.60x (1.60 to 1.60) | 1.5x | | |" in page


def test_page_has_a_place_for_the_report() -> None:
    """docs/performance.md can be written by the report."""
    insert(PAGE.read_text(), "tables")
    with pytest.raises(ValueError, match="needs the lines"):
        insert("a page without markers", "tables")
