"""Applications on real sockets: what a client sees, an in-process transport would hide."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import FrameType

import httpx
import uvicorn
import websockets
from starlette.types import ASGIApp
from websockets.asyncio.client import ClientConnection


def free_socket() -> socket.socket:
    """A listening socket: whoever connects before the server runs waits in its backlog."""
    return socket.create_server(("127.0.0.1", 0), backlog=512)


class _Server(uvicorn.Server):
    """Ends at once: uvicorn looks every tenth of a second whether it should, in a thousand tests."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.ended = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        self._loop.call_soon_threadsafe(self.ended.set)  # or Ctrl-C would not end a test that hangs

    async def main_loop(self) -> None:
        await self.on_tick(0)
        await self.ended.wait()


@asynccontextmanager
async def serve(app: ASGIApp) -> AsyncIterator[httpx.AsyncClient]:
    """Serve the app with uvicorn on this event loop; yields a client that speaks to it over TCP."""
    listener = free_socket()
    host, port = listener.getsockname()
    # An idle connection is the client's to close: a server that does it may meet the next request on its way.
    config = uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=5, timeout_keep_alive=60)
    server = _Server(config)
    running = asyncio.create_task(server.serve(sockets=[listener]))
    # Without TLS: to read the system's certificates takes longer than many a test.
    client = httpx.AsyncClient(
        base_url=f"http://{host}:{port}", timeout=60, limits=httpx.Limits(max_connections=None), verify=False
    )
    try:
        async with client:
            yield client
    finally:
        server.ended.set()
        await running
        listener.close()


@asynccontextmanager
async def connected(app: ASGIApp, path: str = "/") -> AsyncIterator[ClientConnection]:
    """Serve the app, and connect to its websocket at ``path``."""
    async with serve(app) as client:
        url = client.base_url.copy_with(scheme="ws", path=path)
        async with websockets.connect(str(url)) as connection:
            yield connection
