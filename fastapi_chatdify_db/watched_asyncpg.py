"""asyncpg's connection, whose COMMIT fails where PostgreSQL answers it with ROLLBACK."""

from __future__ import annotations

from typing import Any

import asyncpg

from fastapi_chatdify_db.connection_state import ConnectionState
from fastapi_chatdify_db.refused_commits import refusal


class WatchedConnection(asyncpg.Connection):  # type: ignore[misc]  # asyncpg has no types
    """Tells a COMMIT that was none, whoever's statement failed: also one of the driver's own (``copy_to_table``)."""

    state: ConnectionState | None = None

    async def execute(self, query: str, *args: Any, timeout: float | None = None) -> str:
        """The answer to a query, as asyncpg gives it."""
        answer: str = await super().execute(query, *args, timeout=timeout)
        if answer == "ROLLBACK" and query.startswith("COMMIT"):
            state = self.state
            if state is not None and not state.adapter_began_none and state.lost_something:
                raise refusal(state)
        return answer
