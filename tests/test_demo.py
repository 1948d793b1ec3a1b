"""The demo comes up by itself, tells its story, answers what it says, and stops cleanly."""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import signal
import sys
from itertools import pairwise
from pathlib import Path

import httpx
import psutil
import pytest

from tests.serving import free_socket


async def curl(client: httpx.AsyncClient, arguments: list[str]) -> httpx.Response:
    """What curl does with the few options that the demo prints."""
    [url] = [argument for argument in arguments if argument.startswith("http")]
    options = dict(pairwise(arguments))
    headers = dict([options["-H"].split(": ")])
    return await client.request(options.get("-X", "GET"), url, content=options.get("-d"), headers=headers)


async def start(port: int, directory: Path) -> asyncio.subprocess.Process:
    """The demo as ``make demo`` starts it, with a PostgreSQL of its own: a variable that is empty names none."""
    theirs = ("CELERY_BROKER_URL", "CELERY_RESULT_BACKEND", "XDG_RUNTIME_DIR")
    return await asyncio.create_subprocess_exec(
        sys.executable,
        *("-u", "-m", "example_app", "--port", str(port)),
        env={name: value for name, value in os.environ.items() if name not in theirs} | {"DATABASE_URL": ""},
        cwd=directory,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )


async def test_demo_answers_five_messages_and_serves_what_it_prints(tmp_path: Path) -> None:
    """Five answers, one past a killed worker; each printed curl line works; Ctrl-C leaves no process behind.

    A .env that lies about is somebody else's.
    """
    (tmp_path / ".env").write_text(
        "CELERY_BROKER_URL=amqp://nobody.invalid\nCHATWOOT_ADMIN_API_KEY=no-key-of-the-fake\n"
    )
    with free_socket() as listener:
        port: int = listener.getsockname()[1]
    demo = await start(port, tmp_path)
    assert demo.stdout is not None
    printed = (await asyncio.wait_for(demo.stdout.readuntil(b"Ctrl-C"), 240)).decode()
    assert "Warning" not in printed
    assert len(re.findall(r"^  answer +You said: ", printed, re.MULTILINE)) == 5
    assert printed.count("posted") >= 5
    assert "kill -9 of the worker" in printed
    lines = re.findall(r"^  curl (.+)$", printed, re.MULTILINE)
    assert len(lines) == 2
    async with httpx.AsyncClient(timeout=30) as client:
        for line in lines:
            assert (await curl(client, shlex.split(line))).status_code == 200
        assert (await client.get(f"http://127.0.0.1:{port}/docs")).status_code == 200
    started = psutil.Process(demo.pid).children(recursive=True)
    assert len(started) >= 4
    demo.send_signal(signal.SIGINT)
    rest, _ = await asyncio.wait_for(demo.communicate(), 60)
    assert demo.returncode == 0
    assert b"Traceback" not in rest
    _, alive = psutil.wait_procs(started, timeout=10)
    assert alive == []


async def test_taken_port_is_named(tmp_path: Path) -> None:
    """Where somebody else has the port, the demo says so in one line and ends with status 1, having started nothing."""
    with free_socket() as listener:
        port: int = listener.getsockname()[1]
        demo = await start(port, tmp_path)
        printed, _ = await asyncio.wait_for(demo.communicate(), 60)
    assert demo.returncode == 1
    [line] = printed.decode().splitlines()
    assert line.startswith(f"Port {port} is taken")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
async def test_signals_end_all_processes(tmp_path: Path, number: signal.Signals) -> None:
    """SIGTERM and SIGHUP, also sent twice, end the demo as Ctrl-C does."""
    demo = await start(0, tmp_path)
    assert demo.stdout is not None
    printed = (await asyncio.wait_for(demo.stdout.readuntil(b"customer"), 120)).decode()
    [postgresql] = re.findall(r"host=(\S+)", printed)
    servers = [each for each in psutil.process_iter(["cmdline"]) if postgresql in (each.info["cmdline"] or ())]
    web, worker = psutil.Process(demo.pid).children()
    demo.send_signal(number)
    await asyncio.to_thread(worker.wait, 60)
    demo.send_signal(number)
    rest, _ = await asyncio.wait_for(demo.communicate(), 60)
    assert (demo.returncode, rest.splitlines()[-1]) == (0, b"Stopped.")
    assert b"Traceback" not in rest
    assert servers
    assert psutil.wait_procs([web, *servers], timeout=10)[1] == []
