"""BEGIN as the test whether a pooled connection is alive: a pre-ping that costs no round trip."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Engine, event
from sqlalchemy.dialects.postgresql.asyncpg import AsyncAdapt_asyncpg_connection
from sqlalchemy.exc import InvalidatePoolError
from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection

CAN_BEGIN_EARLY = hasattr(AsyncAdapt_asyncpg_connection, "_start_transaction")
"""Whether this SQLAlchemy has what ``begin_at_checkout`` builds on; it is not documented."""


def begin_at_checkout(engine: Engine) -> None:
    """Give an asyncpg engine what ``pool_pre_ping`` is for.

    SQLAlchemy's own ping takes three round trips with asyncpg (BEGIN, an empty statement, ROLLBACK), and then begins
    the transaction before the first statement. Beginning it at the checkout tells as much: a connection that cannot
    is replaced, before anybody has used it.
    """
    errors = (engine.dialect.loaded_dbapi.Error, OSError)

    def begin(dbapi_connection: Any, record: ConnectionPoolEntry, proxy: PoolProxiedConnection) -> None:
        try:
            dbapi_connection.run_async(lambda _: dbapi_connection._start_transaction())
        except errors as error:
            # The pool replaces this connection, and at their checkout all others that are as old.
            raise InvalidatePoolError from error

    event.listen(engine, "checkout", begin)
