"""What another connection sees of the database under test."""

from __future__ import annotations

import asyncio
from typing import Final

import asyncpg

PATIENCE: Final = 60.0
"""Seconds until what does not happen is a failure."""


class Observer:
    """Asks PostgreSQL over a connection of its own, so that only committed rows count."""

    def __init__(self, connection: asyncpg.Connection) -> None:
        self.connection = connection

    async def names(self) -> list[str]:
        """The names of the committed items, in alphabetical order."""
        return [row["name"] for row in await self.connection.fetch("SELECT name FROM item ORDER BY name")]

    async def in_transaction(self) -> int:
        """How many other sessions are idle in a transaction."""
        query = """SELECT count(*) FROM pg_stat_activity
                   WHERE datname = current_database() AND state LIKE 'idle in transaction%'"""
        return int(await self.connection.fetchval(query))

    async def connections(self, application_name: str) -> int:
        """How many connections of that name the server has."""
        query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = $1"
        return int(await self.connection.fetchval(query, application_name))

    async def until_connections(self, application_name: str, number: int) -> None:
        """Return when the server has that many connections of that name."""
        async with asyncio.timeout(PATIENCE):
            while await self.connections(application_name) != number:
                await self.connection.execute("SELECT pg_sleep(0.01)")

    async def until_somebody_waits_for_a_lock(self) -> None:
        """Return when a statement of another session is held up by a lock."""
        await self._until_another("wait_event_type = 'Lock'")

    async def until_active(self) -> None:
        """Return when another session is in the middle of a statement."""
        await self._until_another("state = 'active'")

    async def _until_another(self, condition: str) -> None:
        query = f"""SELECT count(*) FROM pg_stat_activity
                    WHERE datname = current_database() AND pid <> pg_backend_pid() AND {condition}"""
        async with asyncio.timeout(PATIENCE):
            while not await self.connection.fetchval(query):
                await self.connection.execute("SELECT pg_sleep(0.01)")

    async def terminate_others(self) -> None:
        """What a restart of the server does to every pool: all other sessions end."""
        await self.connection.fetch(
            """SELECT pg_terminate_backend(pid) FROM pg_stat_activity
               WHERE datname = current_database() AND pid <> pg_backend_pid()"""
        )
