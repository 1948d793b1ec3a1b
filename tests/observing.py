"""What another connection sees of the database under test."""

from __future__ import annotations

import asyncio
from typing import Any, Final

import asyncpg
import psycopg2
from psycopg2.extensions import connection as PsycopgConnection  # noqa: N812  # a class, whatever its name

PATIENCE: Final = 60.0
"""Seconds until what does not happen is a failure."""
_CONNECTIONS: Final = """
    (SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = $1)"""


class Observer:
    """Asks PostgreSQL over a connection of its own, so that only committed rows count."""

    def __init__(self, connection: asyncpg.Connection) -> None:
        self.connection = connection

    async def names(self) -> list[str]:
        """The names of the committed items, in alphabetical order."""
        return [row["name"] for row in await self.connection.fetch("SELECT name FROM item ORDER BY name")]

    async def in_transaction(self) -> int:
        """How many sessions are idle in a transaction, besides those of a queue in tables (kombu's), without a name."""
        query = """SELECT count(*) FROM pg_stat_activity
                   WHERE datname = current_database() AND state LIKE 'idle in transaction%'
                       AND application_name <> ''"""
        return int(await self.connection.fetchval(query))

    async def connections(self, application_name: str) -> int:
        """How many connections of that name the server has."""
        return int(await self.connection.fetchval(f"SELECT {_CONNECTIONS}", application_name))

    async def durable_tasks(self) -> list[tuple[str, str]]:
        """The status and the arguments of every durable task, in order."""
        query = "SELECT status, arguments FROM durable_task ORDER BY seq"
        return [(row["status"], row["arguments"]) for row in await self.connection.fetch(query)]

    async def until(self, condition: str, *arguments: object) -> None:
        """Return when an SQL expression is true."""
        async with asyncio.timeout(PATIENCE):
            while not await self.connection.fetchval(f"SELECT {condition}", *arguments):
                # Within a transaction of the observer's own, PostgreSQL would repeat what it first said of activity.
                await self.connection.execute("SELECT pg_sleep(0.01), pg_stat_clear_snapshot()")

    async def until_names(self, expected: list[str]) -> None:
        """Return when the committed items have just these names."""
        names = 'SELECT array_agg(name::text ORDER BY name COLLATE "C") FROM item'
        await self.until(f"({names}) = $1::text[]", sorted(expected))

    async def until_status(self, task_id: str, status: str) -> None:
        """Return when a durable task has this status."""
        await self.until("(SELECT status FROM durable_task WHERE id = $1) = $2", task_id, status)

    async def until_sent(self, task_id: str) -> None:
        """Return when a relay has sent a durable task."""
        await self.until("(SELECT rings FROM durable_task WHERE id = $1) > 0", task_id)

    async def until_no_transactions(self) -> None:
        """Return when no other session is in a transaction."""
        await self.until(
            """NOT EXISTS (SELECT FROM pg_stat_activity
                           WHERE datname = current_database() AND pid <> pg_backend_pid() AND state <> 'idle')"""
        )

    async def until_no_pending_tasks(self) -> None:
        """Return when every durable task has ended."""
        await self.until("NOT EXISTS (SELECT FROM durable_task WHERE status = 'pending')")

    async def until_no_advisory_locks(self) -> None:
        """Return when nobody holds an advisory lock in this database."""
        await self.until(
            """NOT EXISTS (SELECT FROM pg_locks JOIN pg_database ON pg_database.oid = database
                           WHERE locktype = 'advisory' AND datname = current_database())"""
        )

    async def until_connections(self, application_name: str, number: int) -> None:
        """Return when the server has that many connections of that name."""
        await self.until(f"{_CONNECTIONS} = $2", application_name, number)

    async def until_somebody_waits_for_a_lock(self) -> None:
        """Return when a statement of another session is held up by a lock."""
        await self._until_another("wait_event_type = 'Lock'")

    async def until_active(self) -> None:
        """Return when another session is in the middle of a statement."""
        await self._until_another("state = 'active'")

    async def until_committing(self) -> None:
        """Return when another session is in the middle of a COMMIT."""
        await self._until_another("state = 'active' AND query LIKE 'COMMIT%'")

    async def _until_another(self, condition: str) -> None:
        await self.until(
            f"""EXISTS (SELECT FROM pg_stat_activity
                        WHERE datname = current_database() AND pid <> pg_backend_pid() AND {condition})"""
        )

    async def terminate_others(self) -> None:
        """What a restart of the server does to every pool: all other sessions end."""
        await self.connection.fetch(
            """SELECT pg_terminate_backend(pid) FROM pg_stat_activity
               WHERE datname = current_database() AND pid <> pg_backend_pid()"""
        )


class Other:
    """Another client, of synchronous work: it sees what is committed, and asks for locks without waiting."""

    def __init__(self, connection: PsycopgConnection) -> None:
        self._connection = connection

    def ask(self, statement: str) -> Any:
        """Execute, committing at once; returns the first value, or the class of the error."""
        with self._connection.cursor() as cursor:
            try:
                cursor.execute(statement)
            except psycopg2.Error as error:
                return type(error)
            row = cursor.fetchone() if cursor.description else None
            return row and row[0]

    def names(self) -> str:
        """The names of the committed items, in alphabetical order, in one string."""
        return str(self.ask("SELECT coalesce(string_agg(name, ',' ORDER BY name), '') FROM item"))
