"""uvicorn processes on a core of their own."""

from __future__ import annotations

import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil

from benchmarks.peers import HERE, Contender

SERVER_CORE, LOAD_CORE = 0, 1
LOG = HERE / ".venvs" / "servers.log"


@dataclass(frozen=True)
class Server:
    """A contender that serves."""

    port: int
    process: psutil.Process

    def cpu_seconds(self) -> float:
        """How long it has computed."""
        times = self.process.cpu_times()
        return float(times.user + times.system)


@contextmanager
def serving(contender: Contender, environment: dict[str, str]) -> Iterator[Server]:
    """Serve a contender."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    log = LOG.open("a")
    command = [contender.python(), "-m", "uvicorn", f"{contender.module}:app", "--port", str(port)]
    process = subprocess.Popen(
        [*command, "--no-access-log", "--log-level", "error"],
        cwd=HERE / "contenders",
        env=os.environ | environment,
        stdout=log,
        stderr=log,
    )
    pin(process.pid, SERVER_CORE)
    try:
        yield Server(port, psutil.Process(process.pid))
    finally:
        process.kill()
        process.wait()
        log.close()


def wait_for_answer(port: int, path: str, expected: bytes) -> None:
    """Return when the server gives the expected answer.

    Raises:
        RuntimeError: It answers something else, or nothing in 20 seconds.
    """
    answer: bytes | OSError = b""
    for _ in range(200):
        answer = ask(port, path)
        if answer == expected:
            return
        time.sleep(0.1)
    raise RuntimeError(f"{path} answered {answer!r} instead of {expected!r}, see {LOG}")


def ask(port: int, path: str) -> bytes | OSError:
    """What a server answers to one request."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=60) as response:
            answer: bytes = response.read()
            return answer
    except OSError as error:
        return error


def pin(pid: int, core: int) -> None:
    """Keep a process on one core, where the system can and there is more than one."""
    if hasattr(os, "sched_setaffinity") and (os.cpu_count() or 1) > 1:
        os.sched_setaffinity(pid, {core})
