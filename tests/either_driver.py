"""The same synchronous work in units on either driver."""

from __future__ import annotations

from collections.abc import Callable

from sqlalchemy import Connection, select
from sqlalchemy.orm import Session

from fastapi_chatdify_db import Database
from tests.models import Item


async def run(database: Database, driver: str, work: Callable[[Session], None]) -> None:
    """Run synchronous work in a unit on either driver: SQLAlchemy's sessions are the same to it."""
    if driver == "asyncpg":
        async with database.transaction() as session:
            await session.run_sync(work)
    else:
        with database.sync_transaction() as sync_session:
            work(sync_session)


def names(session: Session) -> list[str]:
    """The names of the items that the session sees, in alphabetical order."""
    return list(session.scalars(select(Item.name).order_by(Item.name)))


def in_transaction(connection: Connection) -> bool:
    """Whether the connection is in a transaction, as its driver sees it."""
    driver = connection.connection.driver_connection
    assert driver is not None
    return bool(driver.is_in_transaction() if hasattr(driver, "is_in_transaction") else driver.info.transaction_status)


def backend_of(session: Session) -> int:
    """The process that serves the session's connection, without asking it."""
    driver = session.connection().connection.driver_connection
    assert driver is not None
    return int(driver.info.backend_pid if hasattr(driver, "info") else driver.get_server_pid())
