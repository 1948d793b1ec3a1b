"""Whatever two sessions do, in whatever order, lazy and eager transactions give the same."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import psycopg2
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sqlalchemy import delete, func, insert, literal, make_url, select, text, update
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, SessionTransaction

from fastapi_chatdify_db import Database, DatabaseSettings, TransactionAborted
from tests.models import Counter

# A session that goes on after a failed flush, or after a failed release of a savepoint, warns of it.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Session's state has been changed"),
    pytest.mark.filterwarnings("ignore:nested transaction already deassociated"),
]

COUNTERS = 3


@dataclass
class Client:
    """A session and its open savepoints."""

    session: Session
    savepoints: list[SessionTransaction] = field(default_factory=list)

    def do(self, action: str, row: int, value: int) -> object:
        """Take one step; returns what it gave, or the class of its error."""
        try:
            return getattr(self, action)(row, value)
        except (SQLAlchemyError, TransactionAborted, ArithmeticError) as error:
            return type(error).__name__, type(getattr(error, "orig", None)).__name__

    def get(self, row: int, value: int) -> object:
        self.session.expire_all()
        counter = self.session.get(Counter, row)
        return counter and counter.value

    def read_all(self, row: int, value: int) -> object:
        return [tuple(each) for each in self.session.execute(select(Counter.id, Counter.value).order_by(Counter.id))]

    def aggregate(self, row: int, value: int) -> object:
        return self.session.scalar(select(func.sum(Counter.value)).where(Counter.id >= row))

    def read_by_text(self, row: int, value: int) -> object:
        return self.session.scalar(text("SELECT value FROM counter WHERE id = :row"), {"row": row})

    def lock(self, row: int, value: int) -> object:
        return self.session.scalar(select(Counter.value).where(Counter.id == row).with_for_update(nowait=True))

    def fail(self, row: int, value: int) -> object:
        return self.session.scalar(select(Counter.value / literal(0)))

    def insert(self, row: int, value: int) -> object:
        self.session.execute(insert(Counter).values(id=row, value=value))
        return None

    def add(self, row: int, value: int) -> object:
        self.session.expunge_all()
        self.session.add(Counter(id=row, value=value))
        self.session.flush()
        return None

    def update(self, row: int, value: int) -> object:
        self.session.execute(update(Counter).where(Counter.id == row).values(value=value))
        return None

    def delete(self, row: int, value: int) -> object:
        self.session.execute(delete(Counter).where(Counter.id == row))
        return None

    def savepoint(self, row: int, value: int) -> object:
        self.savepoints.append(self.session.begin_nested())
        return None

    def roll_back_to_savepoint(self, row: int, value: int) -> object:
        if self.savepoints:
            self.savepoints.pop().rollback()
        return None

    def release_savepoint(self, row: int, value: int) -> object:
        if self.savepoints:
            self.savepoints.pop().commit()
        return None

    def commit(self, row: int, value: int) -> object:
        self.savepoints.clear()
        try:
            self.session.commit()
        finally:
            self.session.rollback()
        return None

    def roll_back(self, row: int, value: int) -> object:
        self.savepoints.clear()
        self.session.rollback()
        return None


ACTIONS = [name for name, value in vars(Client).items() if callable(value) and name[0] != "_" and name != "do"]
STEPS = st.lists(
    st.tuples(
        st.integers(0, 1),  # which session
        st.sampled_from(ACTIONS),
        st.integers(1, COUNTERS),
        st.integers(0, 9),
    ),
    max_size=14,
)
Steps = list[tuple[int, str, int, int]]


def outcome(sessions: list[Session], steps: Steps, url: str) -> object:
    """What every step gave, and what is committed in the end."""
    other = psycopg2.connect(url)
    other.autocommit = True
    cursor = other.cursor()
    cursor.execute("SET lock_timeout = '10s'")  # a transaction that nobody ends shall fail the test, not block it
    cursor.execute("DELETE FROM counter")
    cursor.execute("INSERT INTO counter SELECT n, 0 FROM generate_series(2, %s) n", (COUNTERS,))
    clients = [Client(session) for session in sessions]
    try:
        seen: list[Any] = [clients[which].do(action, row, value) for which, action, row, value in steps]
    finally:
        for session in sessions:
            session.rollback()  # by close() alone, SQLAlchemy raises, and keeps the locks, after INNER_RELEASE_FAILS
            session.close()
    cursor.execute("SELECT id, value FROM counter ORDER BY id")
    seen.append(cursor.fetchall())
    other.close()
    return seen


def databases(url: str) -> tuple[Database, Database]:
    lazy, eager = (
        # A row that the other session holds is not waited for; that it does, fails alike.
        Database(settings=DatabaseSettings(database_url=impatient(url), db_lazy_begin=begin_lazily))
        for begin_lazily in (True, False)
    )
    return lazy, eager


def impatient(url: str) -> str:
    return make_url(url).update_query_dict({"options": "-c lock_timeout=15"}).render_as_string(hide_password=False)


@pytest.fixture
def run_on_psycopg2(tables: None, database_url: str) -> Iterator[Callable[[Steps], list[object]]]:
    both = databases(database_url)

    def run(steps: Steps) -> list[object]:
        return [outcome([Session(each.sync_engine), Session(each.sync_engine)], steps, database_url) for each in both]

    yield run
    for each in both:
        each.sync_engine.dispose()


@pytest.fixture
def run_on_asyncpg(tables: None, database_url: str) -> Iterator[Callable[[Steps], list[object]]]:
    both = databases(database_url)

    async def run(database: Database, steps: Steps) -> object:
        async with AsyncSession(database.async_engine) as one, AsyncSession(database.async_engine) as two:
            return await one.run_sync(lambda first: outcome([first, two.sync_session], steps, database_url))

    with asyncio.Runner() as runner:
        yield lambda steps: [runner.run(run(each, steps)) for each in both]
        for each in both:
            runner.run(each.dispose())


thorough = settings(
    max_examples=int(os.environ.get("EXAMPLES", "60")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


INNER_RELEASE_FAILS = [(0, action, 1, 0) for action in ("savepoint", "savepoint", "fail", "release_savepoint")]


@thorough
@given(steps=STEPS)
@example(INNER_RELEASE_FAILS)
def test_same_with_psycopg2(run_on_psycopg2: Callable[[Steps], list[object]], steps: Steps) -> None:
    """Reads, writes, savepoints, errors, commits and rollbacks of two concurrent sessions."""
    lazily, eagerly = run_on_psycopg2(steps)
    assert lazily == eagerly


@thorough
@given(steps=STEPS)
@example(INNER_RELEASE_FAILS)
def test_same_with_asyncpg(run_on_asyncpg: Callable[[Steps], list[object]], steps: Steps) -> None:
    """The same with the other driver."""
    lazily, eagerly = run_on_asyncpg(steps)
    assert lazily == eagerly
