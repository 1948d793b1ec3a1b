"""A thousand websockets that read a row once and are idle from then on: what they hold."""

from __future__ import annotations

import asyncio
import time

import asyncpg
from sqlalchemy import URL
from websockets.asyncio.client import connect

from benchmarks.databases import environment
from benchmarks.peers import BARE, OURS, SIX_LINE, Contender
from benchmarks.results import Figure
from benchmarks.servers import Server, serving, wait_for_answer
from benchmarks.workloads import ROW

NAME = "websockets"
SOCKETS = 1000
PATIENCE = 15.0  # seconds without one more socket that was answered
IDLE = 3.0  # seconds
HELD = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND state = 'idle in transaction'"


def measure(url: URL) -> list[Figure]:
    """For ours, the six-line dependency and an application without database."""
    return [figure for contender in (OURS, SIX_LINE, BARE) for figure in _measure(contender, url)]


def _measure(contender: Contender, url: URL) -> list[Figure]:
    with serving(contender, environment(url)) as server:
        path, answer = ("/plain", b'{"hello":"world"}') if contender is BARE else ("/read", ROW)
        wait_for_answer(server.port, path, answer)
        return asyncio.run(_hold(contender, server, url))


async def _hold(contender: Contender, server: Server, url: URL) -> list[Figure]:
    memory = server.process.memory_info().rss
    rows: list[str | bytes] = []
    sockets = [asyncio.create_task(_idle(server.port, rows)) for _ in range(SOCKETS)]
    try:
        before, since = 0, time.perf_counter()
        while len(rows) < SOCKETS and time.perf_counter() - since < PATIENCE:
            await asyncio.sleep(0.1)
            if len(rows) > before:
                before, since = len(rows), time.perf_counter()
        observer = await asyncpg.connect(url.render_as_string(hide_password=False))
        held = await observer.fetchval(HELD)
        await observer.close()
        cpu, started = server.cpu_seconds(), time.perf_counter()
        await asyncio.sleep(IDLE)
        cpu = (server.cpu_seconds() - cpu) / (time.perf_counter() - started)
        memory = server.process.memory_info().rss - memory
    finally:
        for socket in sockets:
            socket.cancel()
        await asyncio.gather(*sockets, return_exceptions=True)
    ours, answered = contender is OURS, len(rows)
    return [
        Figure(NAME, f"{contender.name}: sockets answered", answered, at_least=SOCKETS if ours else None),
        Figure(NAME, f"{contender.name}: connections idle in transaction", held, at_most=0 if ours else None),
        Figure(NAME, f"{contender.name}: kB a socket", memory / 1000 / SOCKETS),
        Figure(NAME, f"{contender.name}: processor in % when idle", cpu * 100),
    ]


async def _idle(port: int, rows: list[str | bytes]) -> None:
    async with connect(f"ws://127.0.0.1:{port}/socket", open_timeout=60, ping_interval=None) as socket:
        rows.append(await socket.recv())
        await socket.wait_closed()
