"""A connection pool whose waiting threads do not keep other threads of the web server from running."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from anyio import from_thread, to_thread
from sqlalchemy.pool import ConnectionPoolEntry, QueuePool

# As SQLAlchemy does for its own pools: a worker makes a pool for each lease, and each would log that.
logging.getLogger(__name__).setLevel(logging.WARNING)


class ThreadLendingPool(QueuePool):
    """SQLAlchemy's ``QueuePool`` for ``def`` endpoints, which run in Starlette's 40 threads.

    FastAPI serializes a ``def`` endpoint's result in another of these threads. If all of them waited for a connection,
    requests that hold one could not finish and give it back. So a thread that has to wait, for one of the pool's or for
    a new one, lends its place, as Java's ``ForkJoinPool.ManagedBlocker`` does.
    """

    def _do_get(self) -> ConnectionPoolEntry:
        if self.checkedin():
            return super()._do_get()
        with _place_lent():
            return super()._do_get()


@contextmanager
def _place_lent() -> Iterator[None]:
    try:
        from_thread.run_sync(_add_places, 1)
    except RuntimeError:  # not one of these threads
        yield
        return
    try:
        yield
    finally:
        from_thread.run_sync(_add_places, -1)


def _add_places(number: int) -> None:
    to_thread.current_default_thread_limiter().total_tokens += number
