"""A task's state, its rows and its callbacks agree, on every path."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from celery import chain, chord, group
from celery.result import AsyncResult
from sqlalchemy.exc import NoResultFound

from celery_ext import ResultNotSerializable, StatementFailed
from fastapi_chatdify_db import DatabaseUnavailable
from tests.observing import Observer
from tests.worker.running import Worker

TASKS = 2000


async def test_results_rows_and_callbacks_agree(prefork: Worker, empty_tables: Observer) -> None:
    """Of 2,000 tasks exactly those that succeed have rows and ran their ``link``."""
    task, link = prefork.task("add_item"), prefork.task("record")
    outcomes = {f"{n:04}": {3: "raise", 7: "duplicate"}.get(n % 10, "succeed") for n in range(TASKS)}
    results: dict[str, AsyncResult[Any]] = {
        name: task.apply_async((name, outcome), link=link.s()) for name, outcome in outcomes.items()
    }
    raised: dict[str, str] = {}
    for name, result in results.items():
        value = await asyncio.to_thread(result.get, timeout=60, propagate=False)
        raised[name] = type(value).__name__ if result.failed() else "nothing"
    kinds = {"raise": "ValueError", "duplicate": "StatementFailed", "succeed": "nothing"}
    assert raised == {name: kinds[outcome] for name, outcome in outcomes.items()}
    succeeded = [name for name, outcome in outcomes.items() if outcome == "succeed"]
    await empty_tables.until_names([*succeeded, *(f"linked {name}" for name in succeeded)])
    assert await empty_tables.in_transaction() == 0


@pytest.mark.parametrize("task", ["unserializable", "unserializable_async"])
async def test_result_that_cannot_be_stored(prefork: Worker, empty_tables: Observer, task: str) -> None:
    """It fails the task before the commit; a task whose result is ignored may return what it likes."""
    result = prefork.task(task).delay("x")
    with pytest.raises(ResultNotSerializable, match="return ids, or set ignore_result=True"):
        await asyncio.to_thread(result.get, timeout=20)
    assert await empty_tables.names() == []
    prefork.task(task).apply_async(("ignored",), ignore_result=True)
    await empty_tables.until_names(["ignored"])


@pytest.mark.parametrize("outcome", ["raise", "duplicate"])
async def test_error_callback_of_a_failed_task_writes(prefork: Worker, empty_tables: Observer, outcome: str) -> None:
    """What an errback writes stays, whether the body or its commit failed; of a failing errback, nothing."""
    errbacks = [prefork.task("errback").s("x"), prefork.task("failing_errback").s("y")]
    result = prefork.task("add_item").apply_async(("x", outcome), link_error=errbacks)
    await asyncio.to_thread(result.get, timeout=20, propagate=False)
    await empty_tables.until_names(["errback x"])


@pytest.mark.parametrize(
    ("outcome", "expected"),
    [
        ("succeed", ["x 0", "on_success x", "after_return x SUCCESS"]),
        ("raise", ["on_failure x", "after_return x FAILURE"]),
        ("duplicate", ["on_failure x", "after_return x FAILURE"]),
        ("retry", ["on_retry x", "x 1", "on_success x", "after_return x SUCCESS"]),
    ],
)
async def test_handlers_write(prefork: Worker, empty_tables: Observer, outcome: str, expected: list[str]) -> None:
    """``on_failure`` and its kin, of a base class of the user's own, have a unit that outlives the body's."""
    result = prefork.task("handled").delay("x", outcome)
    await asyncio.to_thread(result.get, timeout=20, propagate=False)
    await empty_tables.until_names(expected)


async def test_handlers_whose_commit_fails_are_logged(prefork: Worker, empty_tables: Observer) -> None:
    """The task's state cannot change any more; the log has the error with its traceback."""
    result = prefork.task("handled").delay("handler fails", "succeed")
    await asyncio.to_thread(result.get, timeout=20)
    await asyncio.to_thread(prefork.until_logged, "what the handlers of task tests.worker.tasks.callbacks.handled")
    await asyncio.to_thread(prefork.until_logged, "UniqueViolation")
    assert await empty_tables.names() == ["handler fails 0"]


async def test_failed_commit_is_retried(prefork: Worker, empty_tables: Observer) -> None:
    """``autoretry_for`` sees SQLAlchemy's exception of a COMMIT, in ``def`` and ``async def`` tasks."""
    for name in ("unique_at_second_try", "unique_at_second_try_async"):
        result = prefork.task(name).delay(name)
        assert await asyncio.to_thread(result.get, timeout=20) == 1
    assert await empty_tables.names() == ["unique_at_second_try", "unique_at_second_try_async"]


@pytest.mark.parametrize("kind", ["fails_to_send", "fails_to_send_async"])
async def test_failure_to_send_does_not_run_the_task_again(prefork: Worker, empty_tables: Observer, kind: str) -> None:
    """``autoretry_for`` leaves alone what the commit does not undo."""
    sent = prefork.task(kind).delay("x")
    assert "DispatchFailed" in repr(await prefork.result(sent.id))
    assert await empty_tables.names() == ["x"]


@pytest.mark.parametrize("outcome", ["ignore", "reject"])
async def test_ignored_and_rejected_tasks_leave_nothing(prefork: Worker, empty_tables: Observer, outcome: str) -> None:
    """``Ignore`` and ``Reject`` roll back."""
    result = prefork.task("add_item").delay("x", outcome)
    await asyncio.to_thread(prefork.until_logged, f"add_item[{result.id}] {outcome}")
    assert await empty_tables.names() == []
    assert await empty_tables.in_transaction() == 0


async def test_serialization_failures_are_retried(prefork: Worker, empty_tables: Observer) -> None:
    """``db_isolation_level`` and ``db_retry``: increments of one row by two processes at SERIALIZABLE all count."""
    await empty_tables.connection.execute("INSERT INTO counter VALUES (1, 0)")
    results = [prefork.task("increment").delay() for _ in range(60)]
    for result in results:
        await asyncio.to_thread(result.get, timeout=60)
    assert await empty_tables.connection.fetchval("SELECT value FROM counter") == 60


async def test_task_without_a_session(prefork: Worker, empty_tables: Observer) -> None:
    """``db_session=False`` opens no unit; asking for its session says what to write instead."""
    result = prefork.task("without_session").delay()
    assert await asyncio.to_thread(result.get, timeout=20) == "OutsideUnitOfWork"


@pytest.mark.parametrize("task", ["bad_statement", "bad_statement_retried"])
async def test_result_names_the_error_and_no_parameter(prefork: Worker, empty_tables: Observer, task: str) -> None:
    """``get()`` raises the SQLAlchemy class and SQLSTATE by name; no value is in result, traceback or log."""
    result = prefork.task(task).delay("hunter2")
    with pytest.raises(StatementFailed, match=r"^DataError: SQLSTATE 22P02$"):
        await asyncio.to_thread(result.get, timeout=20)
    assert "hunter2" not in str(result.traceback)
    assert f"in {task}\n" in str(result.traceback)
    assert "hunter2" not in prefork.log.replace("'hunter2'", "")


async def test_group_names_its_errors_and_no_parameter(prefork: Worker, empty_tables: Observer) -> None:
    """A task group's exception has ``StatementFailed`` in it, also in result, traceback and log."""
    result = prefork.task("bad_statement_in_group").delay("hunter2")
    error = await asyncio.to_thread(result.get, timeout=20, propagate=False)
    assert "StatementFailed" in str(error)
    assert "SQLSTATE 22P02" in str(result.traceback)
    assert "hunter2" not in f"{error} {result.traceback}"
    prefork.until_logged(f"[{result.id}] raised")
    assert "hunter2" not in prefork.log.partition(f"[{result.id}] raised")[2]


async def test_row_that_is_not_there(prefork: Worker, empty_tables: Observer) -> None:
    """No statement is to blame: the caller gets SQLAlchemy's own exception, without the one before it."""
    result = prefork.task("one_of_none").delay("hunter2")
    with pytest.raises(NoResultFound):
        await asyncio.to_thread(result.get, timeout=20)
    assert "hunter2" not in str(result.traceback)


async def test_database_that_is_not_there(prefork: Worker, empty_tables: Observer) -> None:
    """The error says which one, and why."""
    with pytest.raises(DatabaseUnavailable, match=r"127\.0\.0\.1:1/gone gives no connection \(OperationalError: "):
        await asyncio.to_thread(prefork.task("elsewhere").delay().get, timeout=20)


async def test_error_that_quotes_another_is_not_shown(prefork: Worker, empty_tables: Observer) -> None:
    """A session whose flush failed says so with the first error's text, when its commit is refused."""
    result = prefork.task("handled_flush_error").delay("hunter2")
    error = await asyncio.to_thread(result.get, timeout=20, propagate=False)
    assert (type(error), str(error)) == (StatementFailed, "PendingRollbackError")
    prefork.until_logged(f"[{result.id}] raised")
    assert "hunter2" not in prefork.log.partition(f"[{result.id}] raised")[2]
    assert await empty_tables.names() == []


@pytest.mark.parametrize("task", ["add_item", "add_item_async"])
async def test_constraint_is_named(prefork: Worker, empty_tables: Observer, task: str) -> None:
    """The constraint that failed at COMMIT is in what the caller gets."""
    result = prefork.task(task).delay("x", "duplicate")
    with pytest.raises(StatementFailed, match=r"IntegrityError: SQLSTATE 23505, constraint uq_item_name, table item"):
        await asyncio.to_thread(result.get, timeout=20)


async def test_called_function_shares_its_callers_fate(prefork: Worker, empty_tables: Observer) -> None:
    """A task that is called as a function inside another one is part of that one's transaction."""
    result = prefork.task("both_sessions").delay("x")
    await asyncio.to_thread(result.get, timeout=20, propagate=False)
    assert result.failed()
    assert await empty_tables.names() == []


async def test_chains_groups_and_chords(prefork: Worker, empty_tables: Observer) -> None:
    """Each link of a canvas finds what the ones before it committed."""
    add, record, count = (prefork.task(name) for name in ("add_item", "record", "count_items"))
    chained = chain(add.s("chained"), record.s()).apply_async()
    await asyncio.to_thread(chained.get, timeout=20)
    counted = chord(group(add.s(f"member {n}") for n in range(5)), count.s()).apply_async()
    assert await asyncio.to_thread(counted.get, timeout=20) == 7
