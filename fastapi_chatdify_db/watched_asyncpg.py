"""asyncpg's connection, whose COMMIT fails where PostgreSQL answers it with ROLLBACK, and whose end has a limit."""

from __future__ import annotations

from asyncio import AbstractEventLoop, Transport
from contextlib import suppress
from typing import Any, Final

import asyncpg

from fastapi_chatdify_db.closing import note_transport, seconds_left
from fastapi_chatdify_db.connection_state import ConnectionState
from fastapi_chatdify_db.keepalive import keep_alive
from fastapi_chatdify_db.refused_commits import refusal

_ENDS: Final = ("COMMIT", "ROLLBACK;")


class WatchedConnection(asyncpg.Connection):  # type: ignore[misc]  # asyncpg has no types
    """Raises where a COMMIT became a ROLLBACK, also for a failed statement of the driver's own (``copy_to_table``).

    Without a ``timeout``, as SQLAlchemy's pools call it, ``close()`` has the limit of the module ``closing``.
    """

    state: ConnectionState

    def __init__(
        self, protocol: Any, transport: Transport, loop: AbstractEventLoop, *rest: Any, **options: Any
    ) -> None:
        super().__init__(protocol, transport, loop, *rest, **options)
        note_transport(transport, loop)
        keep_alive(transport)

    async def execute(self, query: str, *args: Any, timeout: float | None = None) -> str:
        """The answer to a query, as asyncpg gives it.

        Raises:
            asyncpg.ConnectionDoesNotExistError: The end of a transaction got no answer within ``command_timeout``.
        """
        try:
            answer: str = await super().execute(query, *args, timeout=timeout)
        except TimeoutError as error:
            if not query.startswith(_ENDS):
                raise
            self.terminate()  # nobody knows the outcome, as when the connection breaks
            raise asyncpg.ConnectionDoesNotExistError(f"no answer to {query} in time") from error
        if answer == "ROLLBACK" and query.startswith("COMMIT"):
            state = self.state
            if not state.adapter_began_none and state.lost_something:
                raise refusal(state)
        return answer

    async def close(self, *, timeout: float | None = None) -> None:
        """Wait until the server has ended the session, or drop the connection."""
        if timeout is not None:
            await super().close(timeout=timeout)
            return
        with suppress(TimeoutError):  # asyncpg has dropped it
            await super().close(timeout=seconds_left())
