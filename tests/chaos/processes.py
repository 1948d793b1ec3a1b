"""The processes of an application: started, killed without notice, and started again."""

from __future__ import annotations

import os
import random
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from threading import Lock, Thread
from typing import Final, Literal

import httpx
import psutil

Kind = Literal["web", "worker", "relay"]

ROOT: Final = Path(__file__).parents[2]


def wait_until(what: str, condition: Callable[[], bool], seconds: float) -> None:
    """Return when ``condition`` holds.

    Raises:
        TimeoutError: It did not, in the given time.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {seconds:g} s")
        time.sleep(0.05)


def free_port() -> int:
    """A TCP port for a process that comes and goes: outgoing connections, whose ports are higher, never take it."""
    while True:
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", 10_000 + secrets.randbelow(20_000)))
            return int(probe.getsockname()[1])


class Member:
    """One process of the fleet, through all its lives: whenever it ends it is started again."""

    def __init__(self, kind: Kind, command: list[str], environment: Mapping[str, str], log: Path) -> None:
        self.kind = kind
        self.log = log
        self._command = command
        self._environment = environment
        self._lives: list[subprocess.Popen[bytes]] = []
        self._kills = 0
        self._over = False
        self._lock = Lock()
        self._start()
        self._keeper = Thread(target=self._keep, name=log.stem, daemon=True)
        self._keeper.start()

    @property
    def ended_by_itself(self) -> int:
        """How often it ended without having been killed."""
        return len(self._lives) - 1 - self._kills

    def kill(self) -> None:
        """``kill -9``; its children are left to themselves."""
        self._kills += 1
        process = self._lives[-1]
        process.kill()
        process.wait()

    def kill_child(self, dice: random.Random) -> bool:
        """``kill -9`` of one of its children; False when it has none."""
        with suppress(psutil.NoSuchProcess):
            if children := psutil.Process(self._lives[-1].pid).children():
                dice.choice(children).kill()
                return True
        return False

    def end(self) -> None:
        """Kill it for good, with whatever descends from it and its former lives."""
        with self._lock:
            self._over = True
            self._lives[-1].kill()
        self._keeper.join()
        for process in self._lives:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def _start(self) -> None:
        with self.log.open("a") as log:
            self._lives.append(
                subprocess.Popen(
                    self._command,
                    cwd=ROOT,
                    env=self._environment,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )

    def _keep(self) -> None:
        while True:
            self._lives[-1].wait()
            with self._lock:
                if self._over:
                    return
                self._start()


class Fleet:
    """Two web servers, two workers with two children each, and two relays."""

    def __init__(self, environment: Mapping[str, str], logs: Path) -> None:
        environment = os.environ | environment
        python = sys.executable
        self.ports = [free_port(), free_port()]
        celery = [python, "-m", "celery", "-A", "tests.chaos.application", "worker", "-l", "WARNING", "-c", "2"]
        relay = [python, "-m", "celery_ext.relay", "-A", "tests.chaos.application", "run", "--grace", "1"]
        commands: list[tuple[Kind, list[str]]] = [
            *(
                ("web", [python, "-m", "uvicorn", "tests.chaos.web:app", "--port", str(port), "--no-access-log"])
                for port in self.ports
            ),
            *(("worker", [*celery, "--without-gossip", "--without-mingle", "-n", f"{n}@chaos"]) for n in "12"),
            *(("relay", relay) for _ in "12"),
        ]
        self.members = [
            Member(kind, command, environment, logs / f"{kind}{number % 2 + 1}.log")
            for number, (kind, command) in enumerate(commands)
        ]

    def of(self, kind: Kind) -> list[Member]:
        """Both processes of a kind."""
        return [member for member in self.members if member.kind == kind]

    def until_ready(self) -> None:
        """Return when both web servers answer: then there are tables.

        Raises:
            TimeoutError: They do not answer.
        """
        for port in self.ports:
            wait_until(f"the web server on port {port} answers", partial(_answers, port), 60)

    def ended_by_themselves(self) -> list[str]:
        """Whose logs to read: web servers and relays that ended without having been killed.

        A worker may: Celery ends it when a child dies that has just been started.
        """
        return [member.log.name for member in self.members if member.kind != "worker" and member.ended_by_itself > 0]

    def log(self) -> str:
        """The last lines of every process's log."""
        return "\n".join(
            f"--- {member.log.name}\n" + "".join(member.log.read_text().splitlines(keepends=True)[-15:])
            for member in self.members
        )

    def end(self) -> None:
        """Kill all of it."""
        for member in self.members:
            member.end()


@contextmanager
def fleet(environment: Mapping[str, str], logs: Path) -> Iterator[Fleet]:
    """The processes, for the time of the block; what they logged is printed when it fails."""
    running = Fleet(environment, logs)
    try:
        running.until_ready()
        yield running
    except BaseException:
        print(running.log())
        raise
    finally:
        running.end()


def _answers(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/ready", timeout=2).is_success
    except httpx.HTTPError:
        return False
