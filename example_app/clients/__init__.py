"""The outside APIs: one client of each per event loop, so that its connections are used again."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Final
from weakref import WeakKeyDictionary

from example_app.clients.chatwoot import Chatwoot
from example_app.clients.dify import Dify
from example_app.settings import get_settings


@dataclass(frozen=True)
class _Clients:
    chatwoot: Chatwoot
    dify: Dify


_clients: Final[WeakKeyDictionary[asyncio.AbstractEventLoop, _Clients]] = WeakKeyDictionary()


async def get_chatwoot() -> Chatwoot:
    """The running loop's Chatwoot; as a FastAPI dependency, a ``def`` would run in a thread, which has no loop."""
    return _of_this_loop().chatwoot


async def get_dify() -> Dify:
    """The running loop's Dify."""
    return _of_this_loop().dify


async def close_clients() -> None:
    """Close the running loop's connections; a later use opens new ones."""
    if clients := _clients.pop(asyncio.get_running_loop(), None):
        await clients.chatwoot.client.aclose()
        await clients.dify.client.aclose()


def _of_this_loop() -> _Clients:
    loop = asyncio.get_running_loop()
    if loop not in _clients:
        settings = get_settings()
        _clients[loop] = _Clients(Chatwoot(settings), Dify(settings))
    return _clients[loop]
