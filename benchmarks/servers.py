"""The contenders: which virtual environment each needs, and its uvicorn."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
SERVER_CORE, LOAD_CORE = 0, 1


@dataclass(frozen=True)
class Contender:
    """An application in ``contenders/`` and what its virtual environment holds."""

    name: str
    module: str
    environment: str
    requirements: tuple[str, ...]

    def python(self) -> str:
        """The interpreter of its virtual environment, which is made when it is missing."""
        directory = HERE / ".venvs" / self.environment
        interpreter = directory / "bin" / "python"
        if not (directory / "complete").exists():
            print(f"making the environment of {self.name}", flush=True)
            subprocess.run([sys.executable, "-m", "venv", "--clear", str(directory)], check=True)
            wanted = ("fastapi", "uvicorn[standard]", "asyncpg", "greenlet", *self.requirements)
            subprocess.run([interpreter, "-m", "pip", "install", "--quiet", *wanted], check=True, cwd=HERE.parent)
            (directory / "complete").touch()
        return str(interpreter)

    def versions(self) -> str:
        """What is measured, by version."""
        packages = ("sqlalchemy", "fastapi", "starlette", "uvicorn", "asyncpg", self.name)
        code = f"""
from importlib.metadata import PackageNotFoundError, version
for name in {packages!r}:
    try: print(name, version(name), end='  ')
    except PackageNotFoundError: pass
"""
        return subprocess.run([self.python(), "-c", code], capture_output=True, text=True, check=True).stdout


THIS_CHECKOUT = ("--editable", ".[fastapi]")
OURS = Contender("ours", "ours", "ours", THIS_CHECKOUT)
BARE = Contender("no middleware", "bare", "ours", THIS_CHECKOUT)
SIX_LINE = Contender("six-line dependency", "six_line", "ours", THIS_CHECKOUT)
AUTOCOMMIT = Contender("hand-written AUTOCOMMIT", "autocommit_handler", "ours", THIS_CHECKOUT)
PEERS = (
    Contender(
        "fastapi-async-sqlalchemy",
        "fastapi_async_sqlalchemy_app",
        "fastapi-async-sqlalchemy",
        ("fastapi-async-sqlalchemy",),
    ),
    Contender(
        "context-async-sqlalchemy",
        "context_async_sqlalchemy_app",
        "context-async-sqlalchemy",
        ("context-async-sqlalchemy",),
    ),
    # 4.0.1 calls add_event_handler, which Starlette 1.0 removed
    Contender("fastapi-sqla", "fastapi_sqla_app", "fastapi-sqla", ("fastapi-sqla[asyncpg]", "starlette<1")),
    Contender("advanced-alchemy", "advanced_alchemy_app", "advanced-alchemy", ("advanced-alchemy[fastapi]",)),
)


@contextmanager
def serving(contender: Contender, environment: dict[str, str]) -> Iterator[int]:
    """Serve a contender on a core of its own; yields the port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    command = [contender.python(), "-m", "uvicorn", f"{contender.module}:app", "--port", str(port)]
    process = subprocess.Popen(
        [*command, "--no-access-log", "--log-level", "error"],
        cwd=HERE / "contenders",
        env=os.environ | environment,
    )
    pin(process.pid, SERVER_CORE)
    try:
        yield port
    finally:
        process.kill()
        process.wait()


def wait_for_answer(port: int, path: str, expected: bytes) -> None:
    """Return when the server gives the expected answer.

    Raises:
        RuntimeError: It answers something else, or nothing in 20 seconds.
    """
    answer: bytes | OSError = b""
    for _ in range(200):
        try:
            answer = urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5).read()
        except OSError as error:
            answer = error
        if answer == expected:
            return
        time.sleep(0.1)
    raise RuntimeError(f"{path} answered {answer!r} instead of {expected!r}")


def rate(port: int, path: str, seconds: float, slow: int) -> float:
    """Successful requests per second, the load being generated on the other core."""
    command = [sys.executable, str(HERE / "load.py"), str(port), path]
    process = subprocess.Popen(
        [*command, "--seconds", str(seconds), "--slow", str(slow)], stdout=subprocess.PIPE, text=True
    )
    pin(process.pid, LOAD_CORE)
    output, _ = process.communicate()
    return float(output)


def pin(pid: int, core: int) -> None:
    """Keep a process on one core, where the system can and there is more than one."""
    if hasattr(os, "sched_setaffinity") and (os.cpu_count() or 1) > 1:
        os.sched_setaffinity(pid, {core})
