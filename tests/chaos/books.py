"""The books: what the database says was done, against what the client was told."""

from __future__ import annotations

from functools import partial
from typing import Any, Final, Self

import psycopg2

from tests.chaos.client import ACCOUNTS, Client
from tests.chaos.processes import wait_until

BALANCE: Final = 1000
"""Of each account, in the beginning."""

_LONGEST_PAUSE: Final = 80.0
"""Seconds without a task that is done; a row that was rung in vain six times is rung again after 64."""

_WRONG: Final = {
    "transfers that were applied never": """
        SELECT key FROM transfer WHERE key NOT IN (SELECT key FROM applied)""",
    "transfers that were applied more than once": """
        SELECT key, count(*) FROM applied GROUP BY key HAVING count(*) > 1""",
    "accounts that do not balance": f"""
        SELECT id, balance FROM account WHERE balance <> {BALANCE}
            + coalesce((SELECT sum(amount) FROM transfer WHERE target = account.id), 0)
            - coalesce((SELECT sum(amount) FROM transfer WHERE source = account.id), 0)""",
    "money made or lost": f"""
        SELECT sum(balance) FROM account HAVING sum(balance) <> {BALANCE} * count(*)""",
    "steps that were taken out of order, twice or never": """
        SELECT key, array_agg(number ORDER BY id) FROM step GROUP BY key
        HAVING array_agg(number ORDER BY id) <> ARRAY(SELECT generate_series(0, max(number)))""",
    "tasks of one key that ran at once": """
        SELECT key, count(*) FROM overlap GROUP BY key""",
    "tasks that are not done": """
        SELECT status, name, error, count(*) FROM durable_task WHERE status <> 'done' GROUP BY 1, 2, 3""",
}

_PENDING: Final = "SELECT count(*) FROM durable_task WHERE status = 'pending'"

_IDLE_IN_TRANSACTION: Final = """
    SELECT count(*) FROM pg_stat_activity
    WHERE datname = current_database() AND state IN ('idle in transaction', 'idle in transaction (aborted)')"""

_SESSIONS: Final = """
    SELECT pid FROM pg_stat_activity
    WHERE datname = current_database() AND backend_type = 'client backend' AND pid <> pg_backend_pid() ORDER BY pid"""


class Books:
    """The test's database, seen from outside, on one connection for the time of the block.

    Parameters:
        database_url: Where it is.
    """

    def __init__(self, database_url: str) -> None:
        self._connection = psycopg2.connect(database_url, application_name="books")
        self._connection.autocommit = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def open_accounts(self) -> None:
        """Give every account its first balance."""
        self._ask(
            f"INSERT INTO account SELECT id, {BALANCE} FROM generate_series(0, {ACCOUNTS - 1}) AS id RETURNING id"
        )

    def until_pending(self, most: int) -> None:
        """Return when at most so many tasks are pending.

        Raises:
            TimeoutError: For a while none was done.
        """
        pending = self._number(_PENDING)
        while pending > most:
            wait_until(f"{pending} pending tasks become fewer", partial(self._fewer_pending, pending), _LONGEST_PAUSE)
            pending = self._number(_PENDING)

    def until_at_rest(self) -> None:
        """Return when nothing is pending, and nobody idle in a transaction.

        Raises:
            TimeoutError: That does not come to pass.
        """
        self.until_pending(0)
        wait_until("no session is idle in transaction", lambda: self._number(_IDLE_IN_TRANSACTION) == 0, 30)

    def violations(self, client: Client) -> dict[str, object]:
        """Every way in which the promise is broken, with the first examples."""
        broken: dict[str, object] = {}
        for name, query in _WRONG.items():
            if rows := self._ask(query):
                broken[name] = rows[:5]
        if lost := client.transfers - {key for (key,) in self._ask("SELECT key FROM transfer")}:
            broken["transfers that were acknowledged and not stored"] = sorted(lost)[:5]
        taken = dict(self._ask("SELECT key, count(*) FROM step GROUP BY key"))
        if client.steps != taken:
            broken["steps that were acknowledged and not taken"] = set(client.steps.items()) ^ set(taken.items())
        return broken

    def terminate(self, pids: list[int]) -> None:
        """End these sessions."""
        self._ask(f"SELECT pg_terminate_backend(pid) FROM unnest(ARRAY{pids}::int[]) AS pid")

    def sessions(self) -> list[int]:
        """The process ids of all other sessions of the database."""
        return [pid for (pid,) in self._ask(_SESSIONS)]

    def _fewer_pending(self, than: int) -> bool:
        return self._number(_PENDING) < than

    def _number(self, query: str) -> int:
        [(number,)] = self._ask(query)
        return int(number)

    def _ask(self, query: str) -> list[tuple[Any, ...]]:
        with self._connection.cursor() as cursor:
            cursor.execute(query)
            return cursor.fetchall()
