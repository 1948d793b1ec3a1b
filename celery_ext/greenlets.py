"""gevent's and eventlet's greenlets: whether a process has them for threads, and how psycopg2 waits among them."""

from __future__ import annotations

import select
import sys
import time
from typing import Any

import psycopg2
from psycopg2.extensions import POLL_OK, POLL_READ, POLL_WRITE, STATUS_SETUP, parse_dsn, set_wait_callback
from psycopg2.extras import wait_select


def replace_threads() -> bool:
    """Whether greenlets are in the place of threads."""
    gevent, eventlet = sys.modules.get("gevent.monkey"), sys.modules.get("eventlet.patcher")
    return (gevent is not None and gevent.is_module_patched("threading")) or (
        eventlet is not None and eventlet.is_monkey_patched("thread")
    )


def let_psycopg2_yield() -> None:
    """Have psycopg2 wait in Python's ``select``, where greenlets are switched, in place of libpq's, in C."""
    set_wait_callback(_wait)


def _wait(connection: Any) -> None:
    if connection.status == STATUS_SETUP:
        _wait_for_login(connection)
    else:
        wait_select(connection)


def _wait_for_login(connection: Any) -> None:
    """Wait for as long as the URL's ``connect_timeout`` says, of which libpq knows only where it waits itself."""
    limit = float(parse_dsn(connection.dsn).get("connect_timeout", 0))
    deadline = time.monotonic() + limit
    while (state := connection.poll()) != POLL_OK:
        left = max(0.0, deadline - time.monotonic()) if limit > 0 else None
        reads, writes = ([connection] if state == wanted else [] for wanted in (POLL_READ, POLL_WRITE))
        if not any(select.select(reads, writes, [], left)):
            raise psycopg2.OperationalError("timeout expired")  # libpq's own words
