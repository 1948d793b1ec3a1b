"""A unit that only reads is in no transaction that anybody would miss: whoever relies on one gets it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from sqlalchemy import delete, insert, make_url, select
from sqlalchemy.orm import Session

from fastapi_chatdify_db import Database, DatabaseSettings, db
from tests.either_driver import in_transaction, names, run
from tests.models import Counter, Item
from tests.observing import Observer, Other


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg2"])
@pytest.mark.parametrize("lazy", [True, False])
async def test_unit_that_only_reads_is_idle_in_no_transaction(other: Other, driver: str, lazy: bool) -> None:
    """With DB_LAZY_BEGIN a handler may read, and wait for something slow, without a transaction open meanwhile."""
    database = Database(settings=DatabaseSettings(db_lazy_begin=lazy))

    def read(session: Session) -> None:
        names(session)
        session.get(Counter, 1)
        assert in_transaction(session.connection()) is not lazy

    await run(database, driver, read)
    await database.dispose()


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg2"])
@pytest.mark.parametrize("level", ["repeatable read", "serializable"])
async def test_isolation_level_of_the_server_counts(other: Other, database_url: str, driver: str, level: str) -> None:
    """Where the server's default is a stricter level, two reads of a transaction see the same."""
    url = make_url(database_url)
    options = f"-c default_transaction_isolation={level.replace(' ', chr(92) + ' ')}"
    strict = Database(
        settings=DatabaseSettings(database_url=url.update_query_dict({"options": options}).render_as_string(False))
    )

    def read_twice(session: Session) -> None:
        assert names(session) == []
        other.ask("INSERT INTO item (name) VALUES ('a')")
        assert names(session) == []

    await run(strict, driver, read_twice)
    await strict.dispose()


def write_on_the_driver(session: Session) -> None:
    session.connection().connection.cursor().execute("INSERT INTO item (name) VALUES ('a')")


def write_on_a_detached_connection(session: Session) -> None:
    session.connection().detach()
    session.execute(insert(Item).values(name="a"))


@pytest.mark.parametrize("write", [write_on_the_driver, write_on_a_detached_connection])
async def test_what_is_not_known_of_a_connection_may_be_a_write(
    observer: Observer, write: Callable[[Session], None]
) -> None:
    """It is committed too, although no statement that SQLAlchemy ran, or on no connection of the pool's, began it."""
    async with db.transaction() as session:
        await session.scalars(select(Item))
        await session.run_sync(write)
    assert await observer.names() == ["a"]
    with db.sync_transaction() as sync_session:
        sync_session.execute(delete(Item))
        write(sync_session)
    assert await observer.names() == ["a"]
