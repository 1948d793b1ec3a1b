"""The chaos test has teeth: it notices when one of the things is missing that durable dispatch rests on."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.client import Load
from tests.chaos.playing import play


@pytest.mark.parametrize(
    ("switched_off", "transfers", "seconds", "in_calm", "only", "violation"),
    [
        # Fewer than there are children: one is free when a row is rung again, after a second, while its task runs.
        pytest.param("lock", 3, 4, 1, None, "tasks of one key that ran at once", id="lock"),
        pytest.param("mark after", 3, 1, 1, None, "transfers that were applied more than once", id="mark after"),
        # Every child is busy all the time, so that one is killed in the middle of a transfer.
        pytest.param(
            "mark before", 30, 1.5, 0, "worker's child killed", "transfers that were applied never", id="mark before"
        ),
    ],
)
def test_switched_off(
    switched_off: str,
    transfers: int,
    seconds: float,
    in_calm: float,
    only: str | None,
    violation: str,
    own_database: str,
    tmp_path: Path,
    pytestconfig: pytest.Config,
) -> None:
    """Without the lock a task runs twice at once; marked in a transaction of its own, a transfer is doubled, or lost.

    Whatever seed, that is: each transfer takes some seconds here.
    """
    environment = {"CHAOS_SWITCHED_OFF": switched_off, "CHAOS_BODY_SECONDS": str(seconds)}
    load = Load(transfers, keys=0, steps=0)
    seed = pytestconfig.getoption("--chaos-seed")
    violations, _ = play(
        "redis", own_database, load, seed, tmp_path, in_calm=in_calm, only=only, environment=environment
    )
    assert violation in violations
