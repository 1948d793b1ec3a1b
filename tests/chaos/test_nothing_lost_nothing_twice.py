"""Whatever dies, what the client was told, what the database holds and what the workers did agree in the end."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.chaos.client import Load
from tests.chaos.playing import play


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
    seed = pytestconfig.getoption("--chaos-seed")
    violations, figures = play(broker_name, own_database, load, seed, tmp_path, in_calm=0.25)
    with capsys.disabled():
        print(f"\n{figures}", file=sys.stderr)  # which a process of pytest-xdist's passes on
    assert not violations
