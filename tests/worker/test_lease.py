"""The lease of a durable task that has ended its first transaction."""

from __future__ import annotations

import pytest
from sqlalchemy.exc import DBAPIError

from celery_ext.durable import lease
from fastapi_chatdify_db import Database
from tests.observing import Observer

LOCK = "hashtextextended('a', 21)"
IS_FREE = f"SELECT CASE WHEN pg_try_advisory_lock({LOCK}) THEN pg_advisory_unlock({LOCK}) ELSE false END"


async def test_lease_of_somebody_else(rows: Observer) -> None:
    """It is refused until the other process has given it up, and then it is really there."""
    database = Database("leasing")
    await rows.connection.execute(f"SELECT pg_advisory_lock({LOCK})")
    assert not lease.hold(database, "a")
    await rows.connection.execute(f"SELECT pg_advisory_unlock({LOCK})")
    assert lease.hold(database, "a")
    assert not await rows.connection.fetchval(IS_FREE)
    lease.free(database, "a")
    assert await rows.connection.fetchval(IS_FREE)


async def test_lease_whose_connection_died(rows: Observer) -> None:
    """It has gone with the connection, and is taken again, not remembered."""
    database = Database("leasing")
    assert lease.hold(database, "a")
    await rows.terminate_others()
    with pytest.raises(DBAPIError):
        lease.hold(database, "b")
    assert lease.hold(database, "a")
    assert not await rows.connection.fetchval(IS_FREE)
    lease.free(database, "a")
    assert await rows.connection.fetchval(IS_FREE)
