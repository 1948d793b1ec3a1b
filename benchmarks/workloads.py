"""The workloads of the web: what is asked of which contenders, and how far ahead of each ours has to be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.peers import (
    ADVANCED_ALCHEMY,
    AUTOCOMMIT,
    BARE,
    CONTEXT_ASYNC,
    CONTEXT_ASYNC_BEST,
    CORE,
    PEERS,
    RAW,
    SIX_LINE,
    SIX_LINE_BEST,
    Contender,
)

ROW = b'{"id":1,"name":"benchmark"}'
TWENTY = b"[" + b",".join(b'{"id":%d,"name":"benchmark"}' % number for number in range(1, 21)) + b"]"
DONE = b'{"done":true}'


@dataclass(frozen=True)
class Workload:
    """Requests, and who answers them.

    Parameters:
        name: How the command line calls it.
        paths: Asked for in turn.
        answer: What the first path answers.
        against: The other contenders, each with the ratio that ours has to reach, or None.
        clients: Connections, each of which waits for its answer; fewer than a pool keeps open, usually. Ten
            contenders of six stay below PostgreSQL's default of 100 connections.
        slow_readers: Connections beside them that take a large body at 60 kB/s.
        max_overflow: Connections that a pool of 10 may open beyond them.
        round_trips: How many ours may need per request.
    """

    name: str
    paths: tuple[str, ...]
    answer: bytes
    against: Mapping[Contender, float | None]
    clients: int = 6
    slow_readers: int = 0
    max_overflow: int = 20
    round_trips: float | None = None


WORKLOADS = (
    Workload("plain", ("/plain",), b'{"hello":"world"}', {BARE: 0.98}, round_trips=0),
    Workload(
        "read",
        ("/read",),
        ROW,
        {
            SIX_LINE: 1.6,
            SIX_LINE_BEST: None,
            AUTOCOMMIT: 0.95,
            CORE: None,
            RAW: None,
            **dict.fromkeys(PEERS, 1.4),
            CONTEXT_ASYNC_BEST: None,
        },
        round_trips=1,
    ),
    Workload("read-alone", ("/read",), ROW, dict.fromkeys((SIX_LINE, SIX_LINE_BEST, AUTOCOMMIT)), clients=1),
    Workload("read-many", ("/read",), ROW, dict.fromkeys((SIX_LINE, SIX_LINE_BEST, AUTOCOMMIT)), clients=20),
    Workload(
        "read-20",
        ("/read-20",),
        TWENTY,
        dict.fromkeys((SIX_LINE, SIX_LINE_BEST, AUTOCOMMIT, CONTEXT_ASYNC, CORE, RAW)),
        round_trips=1,
    ),
    Workload(
        "modify",
        ("/modify",),
        DONE,
        dict.fromkeys((SIX_LINE, SIX_LINE_BEST, CONTEXT_ASYNC, CORE, RAW)),
        round_trips=4,
    ),
    Workload(
        "insert",
        ("/insert",),
        DONE,
        {
            SIX_LINE: 1.2,
            SIX_LINE_BEST: None,
            CORE: None,
            RAW: None,
            **dict.fromkeys(PEERS, 1.0),
            CONTEXT_ASYNC_BEST: None,
        },
        round_trips=3,
    ),
    Workload(
        "mixed",
        ("/read",) * 9 + ("/insert",),
        ROW,
        dict.fromkeys((SIX_LINE, SIX_LINE_BEST, CONTEXT_ASYNC, ADVANCED_ALCHEMY, RAW)),
        round_trips=1.2,
    ),
    Workload("slow-readers", ("/read",), ROW, {SIX_LINE: 8.0, SIX_LINE_BEST: None}, slow_readers=30, max_overflow=0),
    Workload("outside-call", ("/wait",), DONE, {SIX_LINE: 5.0, SIX_LINE_BEST: None}, clients=200, max_overflow=0),
)
