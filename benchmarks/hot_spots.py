"""Where the server's time goes on routes of ours, by package: ``python -m benchmarks.hot_spots``, for the docs."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread

from sqlalchemy import URL

from benchmarks.databases import environment, scratch_database
from benchmarks.generators import generate
from benchmarks.peers import OURS
from benchmarks.servers import serving, wait_for_answer
from benchmarks.workloads import WORKLOADS, Workload

SECONDS = 8
NAMES = "fastapi_chatdify_db|sqlalchemy|asyncpg|fastapi|starlette|uvicorn"
PACKAGE = re.compile(rf"\((?:[^()]*/)?({NAMES})/[^()]*\)")
EVENT_LOOP, HANDLER = "uvloop", "the handler"


def sample(workload: Workload, url: URL) -> Counter[str]:
    """How many of py-spy's samples of a busy server fall to each package.

    The standard library's code and C code count for who calls them: asyncpg's part holds the system calls that send
    to PostgreSQL, uvicorn's those that send to the client.
    """
    with serving(OURS, environment(url)) as server, TemporaryDirectory() as directory:
        wait_for_answer(server.port, workload.paths[0], workload.answer)
        load = Thread(target=generate, args=(server.port, workload, SECONDS + 3))
        load.start()
        stacks = Path(directory) / "stacks"
        py_spy = Path(sys.executable).with_name("py-spy")
        record = [str(py_spy), "record", "--pid", str(server.process.pid), "--duration", str(SECONDS)]
        subprocess.run([*record, "--rate", "250", "--format", "raw", "--output", str(stacks)], check=True)
        load.join()
        lines = stacks.read_text().splitlines()
    found: Counter[str] = Counter()
    for line in lines:
        stack, _, count = line.rpartition(" ")
        found[blamed(stack.split(";"))] += int(count)
    return found


def blamed(stack: list[str]) -> str:
    """Whom the innermost frame belongs to."""
    for frame in reversed(stack):
        package = PACKAGE.search(frame)
        if package is not None:
            # The server's own frames at the bottom are those of the loop that runs everything.
            return EVENT_LOOP if frame.startswith(("run (", "Server.run (")) else package[1]
        if "(ours.py" in frame or "(model.py" in frame:
            return HANDLER
    return EVENT_LOOP


def main() -> None:
    """Sample the named workloads and print a Markdown table."""
    parser = argparse.ArgumentParser(prog="benchmarks.hot_spots", description=__doc__)
    parser.add_argument("workloads", nargs="*", default=["read", "insert"])
    names = parser.parse_args().workloads
    with scratch_database() as url:
        found = {each.name: sample(each, url) for each in WORKLOADS if each.name in names}
    print(f"\n| package | {' | '.join(found)} |\n|---|{'---|' * len(found)}")
    packages = sorted(set().union(*found.values()), key=lambda package: -found[next(iter(found))][package])
    for package in packages:
        shares = (f"{counts[package] / counts.total():.0%}" for counts in found.values())
        print(f"| {package} | {' | '.join(shares)} |")


if __name__ == "__main__":
    main()
