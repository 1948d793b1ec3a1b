"""Ask a contender in this process: ``python in_process.py MODULE PATH REQUESTS``, in its environment."""

from __future__ import annotations

import asyncio
import gc
import importlib
import os
import sys
from typing import Any

import uvloop


async def ask(app: Any, path: str) -> None:
    """One request.

    Raises:
        RuntimeError: The answer's status is not 200.
    """

    async def receive() -> dict[str, object]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: dict[str, object]) -> None:
        if message.get("status", 200) != 200:
            raise RuntimeError(f"{path} answered {message}")

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(b"host", b"localhost")],
        "client": ("127.0.0.1", 50000),
        "server": ("127.0.0.1", 8000),
    }
    await app(scope, receive, send)


async def main(module: str, path: str, requests: int) -> None:
    """Answer the requests, each in a task of its own as under a server.

    One at a time: with more, how many turns of the event loop a request takes is a matter of chance.
    """
    app = importlib.import_module(module).app
    async with app.router.lifespan_context(app):
        # Whether the collector walks all that was imported during the requests that are counted is a matter of chance.
        gc.collect()
        gc.freeze()
        for _ in range(requests):
            await asyncio.create_task(ask(app, path))


if __name__ == "__main__":
    sys.path.insert(0, os.getcwd())  # the contenders, one of which was named
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:  # uvicorn's
        runner.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
