"""The command line runs a relay, and counts, cancels, retries and deletes the rows of durable tasks."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from sqlalchemy import text

from celery_ext.durable import administration
from fastapi_chatdify_db import db
from tests.observing import Observer
from tests.worker.running import Worker, task


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_command_line(prefork: Worker, rows: Observer, number: signal.Signals) -> None:
    """The relay as a process sends what is there, ends at a signal, and its other commands look after the rows."""
    command = [sys.executable, "-m", "celery_ext.relay", "-A", "tests.worker.application"]
    environment = os.environ | prefork.environment

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, check=False)

    async with db.transaction():
        done = prefork.task("add_item").delay_durably("x")
        failing = prefork.task("add_item").delay_durably("y", "raise")
        cancelled = prefork.task("add_item").apply_durably(("z",), countdown=3600)
    process = await asyncio.create_subprocess_exec(*command, "run", env=environment, stderr=subprocess.PIPE)
    await rows.until_status(done, "done")
    await rows.until_status(failing, "failed")
    process.send_signal(number)
    _, log = await process.communicate()
    assert process.returncode == 0
    assert b"relayed sent=2" in log
    status = await asyncio.to_thread(run, "status")
    assert status.stdout.split()[:2] == ["pending", "1"]
    assert failing in (await asyncio.to_thread(run, "failed")).stdout
    assert (await asyncio.to_thread(run, "cancel", cancelled)).stdout == f"{cancelled} cancelled\n"
    assert (await asyncio.to_thread(run, "cancel", done)).returncode == 1
    assert (await asyncio.to_thread(run, "retry", failing)).stdout == "1 to be run again\n"
    unknown = await asyncio.to_thread(run, "retry", "nobody")
    assert (unknown.returncode, unknown.stderr) == (1, "nobody has not failed, or is not known\n")
    assert (await asyncio.to_thread(run, "retry", "--all")).stdout == "0 to be run again\n"
    assert (await asyncio.to_thread(run, "retry")).returncode == 2
    assert (await asyncio.to_thread(run, "retry", failing, "--all")).returncode == 2
    assert (await asyncio.to_thread(run, "prune", "--days", "0")).stdout == "2 deleted\n"
    assert [status for status, _ in await rows.durable_tasks()] == ["pending"]


async def test_errors_are_shown_in_a_line_each(prefork: Worker, rows: Observer) -> None:
    """What a stranger wrote into an error neither looks like another task nor reaches the terminal."""
    async with db.transaction():
        task_id = prefork.task("add_item").delay_durably("x")
    error = "ValueError: Ana\n2026-01-01 00:00:00  other  \x1b[2J\x9b0mÄ"
    await rows.connection.execute(
        "UPDATE durable_task SET status = 'failed', finished_at = now(), error = $1 WHERE id = $2", error, task_id
    )
    command = [sys.executable, "-m", "celery_ext.relay", "-A", "tests.worker.application", "failed"]
    environment = os.environ | prefork.environment
    shown = await asyncio.to_thread(subprocess.check_output, command, env=environment, text=True)
    assert shown.count("\n") == 1
    assert shown.endswith(r"ValueError: Ana\n2026-01-01 00:00:00  other  \x1b[2J\x9b0mÄ" + "\n")


async def test_cancelling_does_not_wait_for_the_worker(unheard: Celery[Any], rows: Observer) -> None:
    """Of a row that is locked, which its worker does, it is said at once that it cannot be cancelled."""
    async with db.transaction():
        task_id = task(unheard, "record").delay_durably("x")
    async with rows.connection.transaction():
        await rows.connection.execute("SELECT FROM durable_task FOR UPDATE")
        assert not await asyncio.wait_for(asyncio.to_thread(administration.cancel, db, task_id), 10)
    assert administration.cancel(db, task_id)


async def test_figures(unheard: Celery[Any], rows: Observer) -> None:
    """What is not due yet has no age, what was sent once was not rung again, and what has ended does not count."""
    async with db.transaction():
        task(unheard, "record").apply_durably(("later",), countdown=3600)
        for _ in range(6):
            task(unheard, "record").delay_durably("x")
    await rows.connection.execute("UPDATE durable_task SET status = 'done' WHERE due_at < now()")
    assert administration.figures(db) == {
        "pending": 1,
        "sent": 0,
        "rerung": 0,
        "failed": 0,
        "oldest_pending_age": None,
    }
    await rows.connection.execute(
        """UPDATE durable_task SET rings = seq - 2, due_at = now() - interval '100 s',
           status = CASE seq WHEN 6 THEN 'failed' WHEN 7 THEN 'cancelled' ELSE 'pending' END WHERE seq > 1"""
    )
    figures = administration.figures(db)
    assert 100 <= (figures.pop("oldest_pending_age") or 0) < 160
    assert figures == {"pending": 5, "sent": 3, "rerung": 2, "failed": 1}


async def test_backlog_makes_no_health_check_late(
    unheard: Celery[Any], rows: Observer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which counts no more than it can within its time; operators get all of it."""
    monkeypatch.setattr(administration, "_COUNTED", 4)
    await rows.connection.execute(
        """INSERT INTO durable_task (id, name, arguments, options, due_at, ring_at, status)
           SELECT n, '', '', '', at, at, CASE n % 2 WHEN 0 THEN 'pending' ELSE 'failed' END
           FROM (SELECT n, now() - n * interval '1 minute' AS at FROM generate_series(1, 10) AS n) AS backlog"""
    )
    async with db.async_engine.connect() as connection:
        seen = await administration.health_figures(connection)
    assert 600 <= (seen.pop("oldest_pending_age") or 0) < 660
    assert seen == {"pending": 4, "sent": 0, "rerung": 0, "failed": 4}
    figures = administration.figures(db)
    assert (figures["pending"], figures["failed"]) == (5, 5)


async def test_locked_table_makes_no_health_check_late(unheard: Celery[Any], rows: Observer) -> None:
    """Whose database answers all the same, as other figures see; there are none of the durable tasks meanwhile."""
    async with db.async_engine.connect() as connection, rows.connection.transaction():
        await rows.connection.execute("LOCK TABLE durable_task")
        async with asyncio.timeout(2):
            assert await administration.health_figures(connection) == {}
        assert await connection.scalar(text("SELECT 1")) == 1


async def test_failed_tasks(unheard: Celery[Any], rows: Observer) -> None:
    """The newest come first; one that is retried begins anew, and is as old as that."""
    async with db.transaction():
        ids = [task(unheard, "record").delay_durably(f"{number}") for number in range(3)]
    await rows.connection.execute(
        """UPDATE durable_task SET status = 'failed', retries = 3, rings = 2, due_at = now() - interval '1 day',
           finished_at = now() - CASE seq WHEN 2 THEN 2 ELSE 3 END * seq * interval '1 minute'"""
    )
    assert [row.id for row in administration.failed(db, 2)] == [ids[0], ids[1]]
    assert administration.retry(db, ids[1]) == 1
    row = await rows.connection.fetchrow(
        """SELECT retries, rings, finished_at, now() - due_at < '1 minute' AND now() - ring_at < '1 minute' AS due
           FROM durable_task WHERE status = 'pending'"""
    )
    assert row == (0, 0, None, True)


async def test_prune_goes_on(unheard: Celery[Any], rows: Observer, monkeypatch: pytest.MonkeyPatch) -> None:
    """It deletes in batches, and all of them."""
    monkeypatch.setattr(administration, "_PRUNED_AT_ONCE", 2)
    async with db.transaction():
        for _ in range(5):
            task(unheard, "record").delay_durably("x")
    await rows.connection.execute("UPDATE durable_task SET status = 'done', finished_at = now() - interval '1 day'")
    assert administration.prune(db, 0) == 5
    assert await rows.durable_tasks() == []


async def test_prune_keeps_what_is_young_or_failed(unheard: Celery[Any], rows: Observer) -> None:
    """Deleted is what was done, or cancelled, before those days."""
    async with db.transaction():
        for name in ("done", "cancelled", "failed", "pending", "young"):
            task(unheard, "record").delay_durably(name)
    await rows.connection.execute(
        """UPDATE durable_task SET
           status = CASE arguments::json -> 0 ->> 0 WHEN 'young' THEN 'done' ELSE arguments::json -> 0 ->> 0 END,
           finished_at = now() - CASE arguments::json -> 0 ->> 0 WHEN 'young' THEN 6 ELSE 8 END * interval '1 day'"""
    )
    assert administration.prune(db, 7) == 2
    assert [status for status, _ in await rows.durable_tasks()] == ["failed", "pending", "done"]


@pytest.mark.usefixtures("rows")
def test_settings_in_a_module_of_tasks(tmp_path: Path, database_url: str) -> None:
    """The application's modules are imported first, as in its worker: one may say where the database is."""
    (tmp_path / "app.py").write_text(
        """
import celery, celery_ext
app = celery.Celery("app", broker="memory://", include=["jobs"])
celery_ext.init_app(app)
"""
    )
    (tmp_path / "jobs.py").write_text(
        f"""
from fastapi_chatdify_db import DatabaseSettings, db
db.settings = DatabaseSettings(database_url={database_url!r})
"""
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "DATABASE_URL": "postgresql://nobody@127.0.0.1:1/gone"}
    command = [sys.executable, "-m", "celery_ext.relay", "-A", "app", "status"]
    status = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert status.stdout.split()[:2] == ["pending", "0"], status.stderr
