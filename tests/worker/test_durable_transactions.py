"""A durable task is stored with the transaction of the call, wherever in it that is made."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from celery import Celery
from sqlalchemy import event, text
from sqlalchemy.exc import IntegrityError, InvalidRequestError
from sqlalchemy.orm import Session

import celery_ext
from fastapi_chatdify_db import db
from tests.models import Item
from tests.observing import Observer
from tests.worker.running import task


def savepoint_that_fails(session: Session, store: Callable[[], str]) -> None:
    store()
    savepoint = session.begin_nested()
    session.add_all([Item("a"), Item("a")])
    session.flush()
    with pytest.raises(IntegrityError):
        session.execute(text("SET CONSTRAINTS ALL IMMEDIATE"))
    savepoint.rollback()


def inner_savepoint_released(session: Session, store: Callable[[], str]) -> None:
    store()
    savepoint = session.begin_nested()
    with session.begin_nested():
        session.add(Item("inner"))
    savepoint.rollback()


def handler_of_the_commits_flush(session: Session, store: Callable[[], str]) -> None:
    event.listen(Item, "after_insert", lambda *_: store(), once=True)
    session.add(Item("b"))


def handler_of_another_flush(session: Session, store: Callable[[], str]) -> None:
    handler_of_the_commits_flush(session, store)
    session.flush()


def handler_of_the_commit(session: Session, store: Callable[[], str]) -> None:
    session.add(Item("b"))
    event.listen(session, "before_commit", lambda _: store())


def later_handler_of_the_commit(session: Session, store: Callable[[], str]) -> None:
    savepoint = session.begin_nested()
    store()
    savepoint.rollback()
    handler_of_the_commit(session, store)


def savepoint_of_a_handler_of_the_commit(session: Session, store: Callable[[], str]) -> None:
    def store_in_a_savepoint(_: Session) -> None:
        if not session.in_nested_transaction():  # its release is a commit too
            with session.begin_nested():
                store()

    session.add(Item("b"))
    event.listen(session, "before_commit", store_in_a_savepoint)


def savepoint_of_a_later_handler_of_the_commit(session: Session, store: Callable[[], str]) -> None:
    savepoint = session.begin_nested()
    store()
    savepoint.rollback()
    savepoint_of_a_handler_of_the_commit(session, store)


def released_transaction_that_somebody_keeps(session: Session, store: Callable[[], str]) -> None:
    session.execute(text("INSERT INTO item (name) VALUES ('b')"))
    kept = session.get_transaction()
    session.commit()
    store()
    assert kept is not session.get_transaction()


def another_transaction_reset(session: Session, store: Callable[[], str]) -> None:
    store()
    session.reset()
    store()


@pytest.mark.parametrize(
    "work",
    [
        savepoint_that_fails,
        inner_savepoint_released,
        handler_of_the_commits_flush,
        handler_of_another_flush,
        handler_of_the_commit,
        later_handler_of_the_commit,
        savepoint_of_a_handler_of_the_commit,
        savepoint_of_a_later_handler_of_the_commit,
        released_transaction_that_somebody_keeps,
        another_transaction_reset,
    ],
)
async def test_stored_with_the_transaction_of_the_call(
    unheard: Celery[celery_ext.Task], rows: Observer, work: Callable[[Session, Callable[[], str]], None]
) -> None:
    """Savepoints that come and go after the call do not matter, nor whether it is called within a flush or commit."""
    with db.sync_transaction() as session:
        work(session, lambda: task(unheard, "record").delay_durably("x"))
    assert await rows.durable_tasks() == [("pending", '[["x"], {}]')]


async def test_handler_of_a_savepoints_flush(unheard: Celery[celery_ext.Task], rows: Observer) -> None:
    """What it stores takes nothing away from what was stored before the savepoint."""
    record = task(unheard, "record")
    event.listen(Item, "after_insert", lambda *_: record.delay_durably("inner"), once=True)
    with db.sync_transaction() as session:
        record.delay_durably("outer")
        with session.begin_nested():
            session.add(Item("x"))
            session.flush()
    assert sorted(arguments for _, arguments in await rows.durable_tasks()) == ['[["inner"], {}]', '[["outer"], {}]']


async def test_call_after_the_commit_is_refused(unheard: Celery[celery_ext.Task], rows: Observer) -> None:
    """A handler of ``after_commit`` has no transaction to store it in, and is told so."""
    refused = []

    def store(_: Session) -> None:
        with pytest.raises(InvalidRequestError) as error:
            task(unheard, "record").delay_durably("x")
        refused.append(error)

    with db.sync_transaction() as session:
        event.listen(session, "after_commit", store)
        session.execute(text("SELECT 1"))
    assert len(refused) == 1


async def test_call_after_a_commit_that_was_refused(unheard: Celery[celery_ext.Task], rows: Observer) -> None:
    """The transaction goes on, and is committed later, with the task."""

    def refuse(_: Session) -> None:
        event.remove(session.sync_session, "before_commit", refuse)
        raise ZeroDivisionError

    async with db.transaction() as session:
        session.add(Item("x"))
        event.listen(session.sync_session, "before_commit", refuse)
        with pytest.raises(ZeroDivisionError):
            await session.commit()
        task(unheard, "record").delay_durably("x")
    assert await rows.durable_tasks() == [("pending", '[["x"], {}]')]
