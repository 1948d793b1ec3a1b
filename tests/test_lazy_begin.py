"""Transactions mean the same whether they begin at once or, DB_LAZY_BEGIN, with the first statement but a read."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import psycopg2
import pytest
from sqlalchemy import func, insert, literal, select, text, update
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.orm import Session

from fastapi_chatdify_db import Database, DatabaseSettings
from tests.either_driver import in_transaction, names, run
from tests.models import Counter, Item
from tests.observing import Other

Scenario = Callable[[Session, Other], None]
SCENARIOS: list[Scenario] = []


def scenario(function: Scenario) -> Scenario:
    SCENARIOS.append(function)
    return function


@pytest.fixture(params=[True, False], ids=["lazy", "eager"])
async def database(request: pytest.FixtureRequest) -> AsyncIterator[Database]:
    made = Database(settings=DatabaseSettings(db_lazy_begin=request.param))
    yield made
    await made.dispose()


@scenario
def rows_for_update_stay_locked(session: Session, other: Other) -> None:
    other.ask("INSERT INTO item (name) VALUES ('a')")
    item = session.scalars(select(Item)).one()
    session.refresh(item, with_for_update=True)
    assert other.ask("SELECT id FROM item FOR UPDATE NOWAIT") is psycopg2.errors.LockNotAvailable
    session.commit()
    assert other.ask("SELECT name FROM item FOR UPDATE NOWAIT") == "a"


@scenario
def rows_for_share_stay_locked(session: Session, other: Other) -> None:
    other.ask("INSERT INTO item (name) VALUES ('a')")
    session.scalars(select(Item).with_for_update(read=True)).one()
    assert other.ask("SELECT id FROM item FOR UPDATE NOWAIT") is psycopg2.errors.LockNotAvailable


@scenario
def advisory_lock_of_a_transaction_is_held_to_its_end(session: Session, other: Other) -> None:
    names(session)
    session.execute(select(func.pg_advisory_xact_lock(7)))
    assert other.ask("SELECT pg_try_advisory_xact_lock(7)") is False
    session.rollback()
    assert other.ask("SELECT pg_try_advisory_xact_lock(7)") is True


@scenario
def what_a_users_function_wrote_is_rolled_back(session: Session, other: Other) -> None:
    other.ask(
        "CREATE OR REPLACE FUNCTION write_item() RETURNS int LANGUAGE sql AS"
        " $$ INSERT INTO item (name) VALUES ('written') RETURNING id $$"
    )
    names(session)
    session.execute(select(func.write_item()))
    assert other.names() == ""
    assert names(session) == ["written"]
    session.rollback()
    assert other.names() == ""
    session.execute(select(literal(1)).where(text("write_item() > 0")))
    session.rollback()
    assert other.names() == ""


@scenario
def sequence_is_read_in_a_transaction(session: Session, other: Other) -> None:
    session.execute(select(func.nextval("item_id_seq")))
    assert in_transaction(session.connection())


@scenario
def time_stands_still_in_a_transaction(session: Session, other: Other) -> None:
    first = session.scalar(select(func.now()))
    names(session)
    assert session.scalar(select(func.current_timestamp())) == first


@scenario
def set_local_lasts_for_the_transaction(session: Session, other: Other) -> None:
    names(session)
    session.execute(text("SET LOCAL work_mem = '123kB'"))
    names(session)
    assert session.scalar(text("SHOW work_mem")) == "123kB"
    session.commit()
    assert session.scalar(text("SHOW work_mem")) != "123kB"


@scenario
def text_begins_a_transaction(session: Session, other: Other) -> None:
    names(session)
    session.execute(text("SELECT 1"))
    assert in_transaction(session.connection())
    session.execute(text("INSERT INTO item (name) VALUES ('a')"))
    assert other.names() == ""
    session.rollback()
    assert other.names() == ""


@scenario
def server_side_cursor_reads_on(session: Session, other: Other) -> None:
    other.ask("INSERT INTO item (name) SELECT 'item ' || n FROM generate_series(1, 120) n")
    rows = session.scalars(select(Item.name).execution_options(stream_results=True, max_row_buffer=10))
    first = next(iter(rows))
    assert first.startswith("item ")
    assert in_transaction(session.connection())
    assert len(list(rows)) == 119


@scenario
def savepoint_takes_back_its_own(session: Session, other: Other) -> None:
    names(session)
    savepoint = session.begin_nested()
    session.add(Item("inner"))
    session.flush()
    assert names(session) == ["inner"]
    savepoint.rollback()
    session.add(Item("outer"))
    with session.begin_nested():
        session.add(Item("kept"))
    assert other.names() == ""
    session.commit()
    assert other.names() == "kept,outer"


@scenario
def deferred_constraint_is_checked_at_the_commit(session: Session, other: Other) -> None:
    other.ask("INSERT INTO item (name) VALUES ('a')")
    assert names(session) == ["a"]
    session.add_all([Item("b"), Item("a")])
    session.flush()
    assert names(session) == ["a", "a", "b"]
    with pytest.raises(IntegrityError):
        session.commit()
    session.rollback()
    assert other.names() == "a"


@scenario
def read_committed_sees_what_others_committed(session: Session, other: Other) -> None:
    assert names(session) == []
    other.ask("INSERT INTO item (name) VALUES ('a')")
    assert names(session) == ["a"]
    session.add(Item("b"))
    session.flush()
    other.ask("INSERT INTO item (name) VALUES ('c')")
    assert names(session) == ["a", "b", "c"]


@scenario
def repeatable_read_sees_what_there_was(session: Session, other: Other) -> None:
    session.connection(execution_options={"isolation_level": "REPEATABLE READ"})
    assert names(session) == []
    other.ask("INSERT INTO item (name) VALUES ('a')")
    assert names(session) == []
    session.commit()
    assert names(session) == ["a"]  # at the default again
    other.ask("INSERT INTO item (name) VALUES ('b')")
    assert names(session) == ["a", "b"]


@scenario
def serializable_refuses_what_depends_on_old_reads(session: Session, other: Other) -> None:
    other.ask("INSERT INTO counter VALUES (1, 1)")
    session.connection(execution_options={"isolation_level": "SERIALIZABLE"})
    counter = session.get_one(Counter, 1)
    other.ask("UPDATE counter SET value = 10")
    counter.value += 1
    with pytest.raises(DBAPIError, match="could not serialize access"):
        session.flush()
    session.rollback()


@scenario
def autocommit_commits_at_once(session: Session, other: Other) -> None:
    session.connection(execution_options={"isolation_level": "AUTOCOMMIT"})
    assert names(session) == []
    session.add(Item("a"))
    session.flush()
    assert other.names() == "a"
    session.rollback()
    assert other.names() == "a"


@scenario
def temporary_table_lasts_for_the_transaction(session: Session, other: Other) -> None:
    names(session)
    session.execute(text("CREATE TEMPORARY TABLE scratch ON COMMIT DROP AS SELECT 'a' AS name"))
    assert session.scalar(select(text("name")).select_from(text("scratch"))) == "a"
    session.commit()
    with pytest.raises(DBAPIError, match="scratch"):
        session.scalar(select(text("name")).select_from(text("scratch")))


@scenario
def rollback_keeps_nothing(session: Session, other: Other) -> None:
    names(session)
    session.add(Item("a"))
    session.flush()
    assert names(session) == ["a"]
    session.rollback()
    assert other.names() == ""
    assert names(session) == []


@scenario
def begin_by_the_user_is_a_transaction(session: Session, other: Other) -> None:
    with session.begin():
        assert names(session) == []
        session.add(Item("a"))
    assert other.names() == "a"
    transaction = session.begin()
    session.execute(update(Item).values(name="b"))
    assert names(session) == ["b"]
    transaction.rollback()
    assert other.names() == "a"


@scenario
def select_from_an_insert_is_rolled_back(session: Session, other: Other) -> None:
    names(session)
    added = insert(Item).values(name="a").returning(Item.name).cte("added")
    assert session.scalar(select(added.c.name)) == "a"
    session.rollback()
    assert other.names() == ""


@scenario
def many_rows_at_once_are_rolled_back(session: Session, other: Other) -> None:
    names(session)
    session.execute(insert(Item), [{"name": "a"}, {"name": "b"}])
    session.rollback()
    session.add_all([Item("c"), Item("d")])
    session.flush()
    session.rollback()
    session.connection().execute(text("INSERT INTO item (name) VALUES (:name)"), [{"name": "e"}, {"name": "f"}])
    session.rollback()
    assert other.names() == ""


@scenario
def failed_read_fails_its_transaction(session: Session, other: Other) -> None:
    names(session)
    with pytest.raises(DBAPIError, match="division by zero"):
        session.execute(select(1 / literal(0)))
    with pytest.raises(DBAPIError, match="current transaction is aborted"):
        names(session)
    session.rollback()
    assert names(session) == []


@scenario
def drivers_own_cursor_is_in_the_transaction(session: Session, other: Other) -> None:
    names(session)
    session.connection().connection.cursor().execute("INSERT INTO item (name) VALUES ('a')")
    assert names(session) == ["a"]
    assert other.names() == ""
    session.rollback()
    assert other.names() == ""


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg2"])
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda function: function.__name__)
async def test_transaction_means_the_same(database: Database, driver: str, other: Other, scenario: Scenario) -> None:
    """Locks, savepoints, isolation, rollback, ...: each as its name says, lazily and eagerly, with both drivers."""
    await run(database, driver, lambda session: scenario(session, other))


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg2"])
async def test_callbacks_of_a_unit_that_only_read(database: Database, driver: str, other: Other) -> None:
    """``on_commit`` callbacks run after a unit of reads, and not after it was rolled back."""
    ran: list[str] = []

    def read(session: Session) -> None:
        names(session)
        database.on_commit(lambda: ran.append("committed"))

    def read_and_fail(session: Session) -> None:
        names(session)
        database.on_commit(lambda: ran.append("rolled back"))
        raise ZeroDivisionError

    await run(database, driver, read)
    with pytest.raises(ZeroDivisionError):
        await run(database, driver, read_and_fail)
    assert ran == ["committed"]
