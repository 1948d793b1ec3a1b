"""Celery tasks through ``celery_ext`` against the same by hand."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO

from celery import Celery
from sqlalchemy import URL

from benchmarks.databases import environment
from benchmarks.peers import HERE
from benchmarks.results import Comparison, Measure
from benchmarks.servers import LOAD_CORE, SERVER_CORE, pin

NAME = "tasks"
BROKER, BACKEND = "redis://127.0.0.1:6379/10", "redis://127.0.0.1:6379/11"
BY_HAND, BARE = "session by hand, its defaults", "bare Celery"
TARGETS = {"insert": (BY_HAND, 1.0), "nothing": (BARE, 0.98)}
NUMBER = 2000  # tasks a round


@contextmanager
def worker(
    contender: str, url: URL, *, under: Sequence[str] = (), output: IO[str] | int = subprocess.DEVNULL
) -> Iterator[Celery]:
    """A worker of one process on a core of its own; yields the application that sends to it.

    Parameters:
        contender: Whose tasks it has.
        url: The database.
        under: A command that runs it.
        output: Where it may write.
    """
    queue = f"benchmark-{contender.split()[0]}"
    own = {
        "BENCHMARK_CONTENDER": contender,
        "BENCHMARK_BROKER": BROKER,
        "BENCHMARK_BACKEND": BACKEND,
        "BENCHMARK_QUEUE": queue,
        "PYTHONPATH": str(HERE.parent),
    }
    command = [sys.executable, "-m", "celery", "-A", "celery_tasks", "worker", "-c", "1", "-l", "WARNING"]
    process = subprocess.Popen(
        [*under, *command, "-n", f"{queue}@benchmark", "--without-gossip", "--without-mingle", "--without-heartbeat"],
        cwd=HERE / "contenders",
        env=os.environ | environment(url) | own,
        stdout=output,
        stderr=output,
    )
    pin(process.pid, SERVER_CORE)
    app = Celery("benchmark", broker=BROKER, backend=BACKEND)
    app.conf.task_default_queue = queue
    try:
        app.send_task("celery_tasks.mark").get(timeout=30)
        yield app
    finally:
        process.terminate()
        process.wait()
        app.close()


def rate(app: Celery, task: str, number: int) -> float:
    """Tasks per second, of ``number`` that were all in the queue before the first was taken out."""
    queue, host = app.conf.task_default_queue, [f"{app.conf.task_default_queue}@benchmark"]
    app.send_task("celery_tasks.clear")
    app.send_task("celery_tasks.mark").get(timeout=30)
    app.control.cancel_consumer(queue, destination=host, reply=True, timeout=5)
    first = app.send_task("celery_tasks.mark")
    for _ in range(number):
        app.send_task(f"celery_tasks.{task}")
    last = app.send_task("celery_tasks.mark")
    app.control.add_consumer(queue, destination=host, reply=True, timeout=5)
    started = first.get(timeout=60)
    return float(number / (last.get(timeout=120) - started))


def measure(url: URL, rounds: int) -> list[Comparison]:
    """A task that inserts a row, and one that does nothing, in interleaved rounds.

    Each round has workers of its own, one at a time: the layout of a process's memory makes one of two equal workers
    faster by some percent for as long as it lives.
    """
    pin(os.getpid(), LOAD_CORE)
    contenders = {"ours": [*TARGETS]} | {peer: [task] for task, (peer, _) in TARGETS.items()}
    rates: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    for turn in range(rounds):
        for name in [*contenders][:: -1 if turn % 2 else 1]:
            with worker(name, url) as app:
                for task in contenders[name]:
                    rate(app, task, NUMBER // 10)
                    rates[name, task].append(rate(app, task, NUMBER))
    return [
        Comparison(f"task: {task}", "tasks", [Measure(name, rates[name, task]) for name in ("ours", peer)], {peer: bar})
        for task, (peer, bar) in TARGETS.items()
    ]
