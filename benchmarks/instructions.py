"""Instructions per request and task: ``python -m benchmarks.instructions``, with valgrind on the PATH.

The contender runs under https://valgrind.org/docs/manual/cg-manual.html, called in its own process: uvicorn, the
kernel and PostgreSQL are not counted, and no noise changes the result. Of a task, both processes of a worker are
counted, which changes by 1%: how often they look for news is a matter of time.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from tempfile import NamedTemporaryFile

from sqlalchemy import URL

from benchmarks import tasks
from benchmarks.databases import environment, scratch_database
from benchmarks.peers import HERE, OURS, Contender
from benchmarks.workloads import WORKLOADS

FEW, MANY = 100, 400
"""Requests of two runs; their difference leaves the start of the process out."""
COUNTED = re.compile(r"I\s+refs:\s+([\d,]+)")
CACHEGRIND = ("valgrind", "--tool=cachegrind", "--cache-sim=no", "--cachegrind-out-file=/dev/null")


def count(contender: Contender, path: str, url: URL) -> float:
    """Instructions per request of a contender.

    Raises:
        RuntimeError: Something else than answers of status 200 came back.
    """
    command = [contender.python(), str(HERE / "in_process.py"), contender.module, path]
    with ThreadPoolExecutor(2) as both:
        few, many = both.map(lambda requests: run([*command, str(requests)], url), (FEW, MANY))
    return (many - few) / (MANY - FEW)


def run(command: Sequence[str], url: URL) -> int:
    """Instructions of a command that asks a contender.

    Raises:
        RuntimeError: It failed.
    """
    variables = os.environ | environment(url) | {"PYTHONHASHSEED": "0", "DB_POOL_TIMEOUT": "300"}
    done = subprocess.run(
        [*CACHEGRIND, *command], cwd=HERE / "contenders", env=variables, capture_output=True, text=True, check=False
    )
    counted = COUNTED.search(done.stderr)
    if done.returncode or counted is None:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr}")
    return int(counted[1].replace(",", ""))


def count_task(contender: str, task: str, url: URL) -> float:
    """Instructions per Celery task of a contender."""

    def run_worker(number: int) -> int:
        with NamedTemporaryFile("r+") as output:
            with tasks.worker(contender, url, under=CACHEGRIND, output=output) as app:
                for _ in range(number):
                    app.send_task(f"celery_tasks.{task}")
                app.send_task("celery_tasks.mark").get(timeout=300)
            output.seek(0)
            return sum(int(found.replace(",", "")) for found in COUNTED.findall(output.read()))

    few, many = FEW, 3 * MANY
    return (run_worker(many) - run_worker(few)) / (many - few)


def main() -> None:
    """Count for the named workloads and print a Markdown table for each."""
    parser = argparse.ArgumentParser(prog="benchmarks.instructions", description=__doc__)
    parser.add_argument("workloads", nargs="*", default=["plain", "read", "insert", tasks.NAME])
    names = parser.parse_args().workloads
    with scratch_database() as url:
        for workload in (each for each in WORKLOADS if each.name in names):
            print(f"\n| {workload.name} | instructions a request | ours needs |\n|---|---|---|")
            ours = count(OURS, workload.paths[0], url)
            print(f"| **ours** | {ours:,.0f} | |", flush=True)
            for contender in workload.against:
                others = count(contender, workload.paths[0], url)
                print(f"| {contender.name} | {others:,.0f} | {ours / others:.2f}x |", flush=True)
        for task, (peer, _) in tasks.TARGETS.items() if tasks.NAME in names else ():
            print(f"\n| task: {task} | instructions a task | ours needs |\n|---|---|---|")
            ours = count_task("ours", task, url)
            print(f"| **ours** | {ours:,.0f} | |", flush=True)
            others = count_task(peer, task, url)
            print(f"| {peer} | {others:,.0f} | {ours / others:.3f}x |", flush=True)


if __name__ == "__main__":
    main()
