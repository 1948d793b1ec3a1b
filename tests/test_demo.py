"""The demo comes up by itself, answers what it says, and stops cleanly."""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import signal
import sys
from itertools import pairwise

import httpx

from tests.serving import free_socket


async def curl(client: httpx.AsyncClient, arguments: list[str]) -> httpx.Response:
    """What curl does with the few options that the demo prints."""
    [url] = [argument for argument in arguments if argument.startswith("http")]
    options = dict(pairwise(arguments))
    body = options.get("-d")
    headers = dict([options["-H"].split(": ")]) if "-H" in options else {}
    return await client.request(options.get("-X", "POST" if body else "GET"), url, content=body, headers=headers)


async def test_demo_serves_what_it_prints() -> None:
    """On an embedded PostgreSQL: each printed curl line gets the answer printed beside it; Ctrl-C ends it."""
    with free_socket() as listener:
        port = str(listener.getsockname()[1])
    theirs = ("DATABASE_URL", "XDG_RUNTIME_DIR")
    environment = {name: value for name, value in os.environ.items() if name not in theirs}
    demo = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-u", "-m", "example_app", "--port", port),
        env=environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    assert demo.stdout is not None
    printed = (await asyncio.wait_for(demo.stdout.readuntil(b"Ctrl-C"), 60)).decode()
    assert "Warning" not in printed
    lines = re.findall(r"^\s*curl -i (.+?)\s*# (\d+)?", printed, re.MULTILINE)
    assert len(lines) == 5
    async with httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(retries=8)) as client:
        for arguments, status in lines:
            assert (await curl(client, shlex.split(arguments))).status_code == int(status or 200)
    demo.send_signal(signal.SIGINT)
    rest, _ = await asyncio.wait_for(demo.communicate(), 60)
    assert demo.returncode in (0, -signal.SIGINT)
    assert b"Traceback" not in rest
