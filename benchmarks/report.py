"""Puts a run into docs/performance.md and draws docs/performance.svg: ``python -m benchmarks.report results.json``."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.peers import HERE
from benchmarks.plot import draw
from benchmarks.results import Results
from benchmarks.tables import insert, markdown

DOCS = HERE.parent / "docs"


def main() -> None:
    """Report the run at the given path."""
    parser = argparse.ArgumentParser(prog="benchmarks.report", description=__doc__)
    parser.add_argument("results", type=Path, nargs="?", default=HERE / "results" / "latest.json")
    results = Results.read(parser.parse_args().results)
    page = DOCS / "performance.md"
    page.write_text(insert(page.read_text(), markdown(results)))
    draw(results, DOCS / "performance.svg")


if __name__ == "__main__":
    main()
