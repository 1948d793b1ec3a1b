"""TCP's own limits: they end a connection whose other side does not even acknowledge what arrives.

Without them, whoever waits for an answer when a firewall has forgotten the connection waits for hours, or for ever.
"""

from __future__ import annotations

import socket
from asyncio import Transport
from typing import Final

LIBPQS: Final = {
    "keepalives_idle": "30",
    "keepalives_interval": "10",
    "keepalives_count": "3",
    "tcp_user_timeout": "30000",
}
"""libpq's parameters: seconds until an idle connection is probed, between probes, how many; and milliseconds that sent
data may wait for its acknowledgement. https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-KEEPALIVES"""

_OPTIONS: Final = {
    "TCP_KEEPIDLE": "keepalives_idle",
    "TCP_KEEPINTVL": "keepalives_interval",
    "TCP_KEEPCNT": "keepalives_count",
    "TCP_USER_TIMEOUT": "tcp_user_timeout",
}
"""The system's names of these, as far as it has them."""


def keep_alive(transport: Transport) -> None:
    """Set the limits for a connection of asyncpg's, which sets none."""
    connected = transport.get_extra_info("socket")
    if connected is None or connected.family not in (socket.AF_INET, socket.AF_INET6):
        return
    # By a descriptor of our own: uvloop's sockets take no options.
    with socket.fromfd(connected.fileno(), connected.family, socket.SOCK_STREAM) as own:
        own.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, name in _OPTIONS.items():
            if hasattr(socket, option):
                own.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), int(LIBPQS[name]))
