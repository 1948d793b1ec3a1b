"""New processes, by exec and by fork, and the connections they have."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable

from sqlalchemy import text

from fastapi_chatdify_db import Database

PID = text("SELECT pg_backend_pid()")


def in_a_new_process(code: str, **environment: str) -> None:
    """Run ``code``, to which any warning is an error, with no database but that of ``environment``."""
    everything = {name: value for name, value in os.environ.items() if name != "DATABASE_URL"} | environment
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, env=everything)


def backends(database: Database) -> list[int]:
    """The backend of each engine's connection, in a loop of one's own."""

    async def ask() -> int:
        async with database.transaction() as session:
            return int((await session.execute(PID)).scalar_one())

    with database.sync_transaction() as session:
        return [asyncio.run(ask()), int(session.execute(PID).scalar_one())]


def fork_and_wait(child: Callable[[], None]) -> int:
    """``os.fork``; returns the child's exit status."""
    pid = os.fork()
    if pid == 0:
        try:
            child()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
