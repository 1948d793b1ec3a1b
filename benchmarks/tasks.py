"""Celery tasks through ``celery_ext`` against the same by hand: ``python -m benchmarks.tasks``."""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from celery import Celery
from sqlalchemy import make_url

from benchmarks.run import execute, scratch_database
from benchmarks.servers import HERE, LOAD_CORE, SERVER_CORE, pin

BROKER, BACKEND = "redis://127.0.0.1:6379/10", "redis://127.0.0.1:6379/11"
TARGETS = {"insert": ("by-hand", 0.95), "nothing": ("bare", 0.98)}


@contextmanager
def worker(contender: str, url: str) -> Iterator[Celery]:
    """A worker of one process on a core of its own; yields the application that sends to it."""
    queue = f"benchmark-{contender}"
    environment = {
        "BENCHMARK_CONTENDER": contender,
        "BENCHMARK_BROKER": BROKER,
        "BENCHMARK_BACKEND": BACKEND,
        "BENCHMARK_URL": url,
        "DATABASE_URL": url,
        "DB_POOL_SIZE": "10",
        "DB_MAX_OVERFLOW": "20",
        "PYTHONPATH": str(HERE.parent),
    }
    command = [sys.executable, "-m", "celery", "-A", "celery_tasks", "worker", "-c", "1", "-l", "WARNING"]
    process = subprocess.Popen(
        [*command, "-n", f"{queue}@benchmark", "--without-gossip", "--without-mingle", "--without-heartbeat"],
        cwd=HERE / "contenders",
        env=os.environ | environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
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


def main() -> None:
    """Measure in interleaved rounds and report the ratios; with ``--check``, fail when a target is missed."""
    parser = argparse.ArgumentParser(prog="benchmarks.tasks", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--number", type=int, default=3000)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    reached = True
    pin(os.getpid(), LOAD_CORE)
    with scratch_database() as url, ExitStack() as running:
        plain = make_url(url).set(drivername="postgresql").render_as_string(False)
        execute(plain, "CREATE TABLE benchmark_entry (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, name text)")
        apps = {name: running.enter_context(worker(name, url)) for name in ("ours", "by-hand", "bare")}
        for task, (peer, target) in TARGETS.items():
            rates: dict[str, list[float]] = {"ours": [], peer: []}
            for turn in range(arguments.rounds):
                for contender in (("ours", peer), (peer, "ours"))[turn % 2]:
                    rates[contender].append(rate(apps[contender], task, arguments.number))
            ratios = [ours / theirs for ours, theirs in zip(rates["ours"], rates[peer], strict=True)]
            median = statistics.median(ratios)
            reached &= median >= target
            print(
                f"{task}: ours {statistics.median(rates['ours']):.0f} tasks/s, {median:.2f}x"
                f" ({min(ratios):.2f} to {max(ratios):.2f}) {peer}, wanted {target}x"
                f"{'' if median >= target else '  NOT REACHED'}",
                flush=True,
            )
    sys.exit(0 if reached or not arguments.check else 1)


if __name__ == "__main__":
    main()
