"""The relay, by itself or beside an application, and its command line."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import pytest
from celery import Celery, current_app, signals
from fastapi import FastAPI
from sqlalchemy import event, text

import celery_ext
from celery_ext.durable import administration, relay, statements
from celery_ext.durable.relay import relaying
from fastapi_chatdify_db import Database, DatabaseSettings, db, health_router
from tests.observing import PATIENCE, Observer
from tests.serving import free_socket, serve
from tests.worker.application import create_app
from tests.worker.running import Worker, brokers, deliver, task, until_logged, urls


@asynccontextmanager
async def forwarding(door: socket.socket, port: int | None) -> AsyncIterator[None]:
    """Pass on what comes in at a socket to a port of this machine, and what comes back; then end every connection."""
    ends: list[asyncio.StreamWriter] = []

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        back, onward = await asyncio.open_connection("127.0.0.1", port)
        ends.extend((writer, onward))
        await asyncio.gather(pump(reader, onward), pump(back, writer))

    async with await asyncio.start_server(serve, sock=door):
        try:
            yield
        finally:  # or a relay that is stopped would wait for an answer, and keep this loop from passing it on
            for end in ends:
                end.close()
                await end.wait_closed()


async def test_relay_beside_the_application(prefork: Worker, rows: Observer) -> None:
    """``init_app(..., relay=True)`` relays in the lifespan; the health check shows what is left."""
    services = dict(db.services)
    for _ in range(2):
        celery_ext.init_app(prefork.app, relay=True)
    assert len(db.services) == len(services) + 1
    app = FastAPI()
    db.init_app(app)
    app.include_router(health_router)

    @app.post("/")
    async def send() -> str:
        prefork.task("add_item").apply_durably(("later",), countdown=3600)
        return prefork.task("add_item").delay_durably("x")

    try:
        async with serve(app) as client:
            assert await prefork.result((await client.post("/")).json()) == "x"
            ready = (await client.get("/health/ready")).json()
            assert ready["databases"]["db"]["figures"]["durable_tasks"]["pending"] == 1
    finally:
        db.services = services


async def test_relays_are_told(unheard: Celery[Any], rows: Observer) -> None:
    """Whatever leaves something to send says so, and no relay finds it only when it looks again."""
    told: asyncio.Queue[object] = asyncio.Queue()
    await rows.connection.add_listener(statements.CHANNEL, lambda *_: told.put_nowait(_))

    async def until_told() -> None:
        await asyncio.wait_for(told.get(), 10)
        assert told.empty()

    @unheard.task(bind=True, shared=False, max_retries=1)
    def retried(self: celery_ext.Task) -> None:
        raise self.retry(countdown=0)

    async with db.transaction():
        ids = [retried.apply_durably(ordering_key="k") for _ in range(3)]
    await until_told()
    assert await asyncio.to_thread(administration.cancel, db, ids[0])
    await until_told()  # of the second one
    deliver(retried, ids[1])
    await until_told()  # of its next attempt
    deliver(retried, ids[1])
    await until_told()  # of the third one, since the second has failed
    assert await asyncio.to_thread(administration.retry, db, ids[1]) == 1
    await until_told()


async def test_broker_that_comes_back(prefork: Worker, rows: Observer, caplog: pytest.LogCaptureFixture) -> None:
    """What a relay claimed for a broker that is down is due at once, not after the time of grace."""
    there = urlsplit(prefork.environment["TEST_BROKER"])
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        elsewhere = there._replace(netloc=there.netloc.replace(f":{there.port}", f":{door.getsockname()[1]}"))
        app = create_app(elsewhere.geturl(), prefork.environment["TEST_BACKEND"], prefork.environment["TEST_QUEUE"])
        app.finalize()
        with relaying(app, db, grace=3600):
            async with db.transaction():
                task_id = task(app, "add_item").delay_durably("x")
            await until_logged(caplog, "relay pauses")
            async with forwarding(door, there.port):
                await rows.until_status(task_id, "done")
        app.close()


@pytest.mark.parametrize("scheme", ["amqp", "redis"])
async def test_broker_that_is_mute(
    rows: Observer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    """One that accepts a connection and says nothing is waited for ten seconds (here a half), and then tried again."""
    monkeypatch.setattr(relay, "_BROKER_LIMIT", 0.5)
    with free_socket() as listener:
        app = create_app(f"{scheme}://127.0.0.1:{listener.getsockname()[1]}//", "cache+memory://", "nowhere")
        app.finalize()
        async with db.transaction():
            task(app, "record").delay_durably("x")
        with relaying(app, db):
            try:
                await until_logged(caplog, "relay pauses (2)")
            finally:
                listener.close()  # which ends a relay that waits
    app.close()


async def test_pauses_begin_anew(unheard: Celery[Any], rows: Observer, caplog: pytest.LogCaptureFixture) -> None:
    """A relay that lost its connection twice within a week is not one that has lost it twice on end."""
    with relaying(unheard, db):
        for times in (1, 2):
            async with db.transaction():
                task_id = task(unheard, "record").delay_durably("x")
            await rows.until("(SELECT rings FROM durable_task WHERE id = $1) > 0", task_id)
            await rows.terminate_others()
            while caplog.text.count("relay pauses (1)") < times:
                assert "relay pauses (2)" not in caplog.text
                await asyncio.sleep(0.01)


async def test_many_batches(unheard: Celery[Any], rows: Observer, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a full batch a relay waits for nothing."""
    monkeypatch.setattr(relay, "BATCH", 1)
    monkeypatch.setattr(relay, "_POLL", PATIENCE)
    async with db.transaction():
        for number in range(10):
            task(unheard, "record").delay_durably(f"{number}")
    with relaying(unheard, db):
        async with asyncio.timeout(PATIENCE / 2):
            await rows.until("NOT EXISTS (SELECT FROM durable_task WHERE rings = 0)")


async def test_who_has_waited_longest_is_sent_first(unheard: Celery[celery_ext.Task], rows: Observer) -> None:
    """So that a relay with more to do than it can has no row wait for ever."""
    async with db.transaction():
        ids = [task(unheard, "add_item").delay_durably(f"{number}") for number in range(3)]
    await rows.connection.execute("UPDATE durable_task SET ring_at = now() - seq * interval '1 second'")
    one = {"batch": 1, "grace": 10}
    async with db.transaction() as session:
        await session.execute(text("SET LOCAL enable_indexscan = off"))  # which has them in that order by itself
        await session.execute(text("SET LOCAL enable_bitmapscan = off"))
        assert [(await session.execute(statements.CLAIM, one)).one().id for _ in ids] == ids[::-1]


async def test_told_while_it_looks(unheard: Celery[Any], rows: Observer, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a relay was told of before it begins to wait, it does not wait for."""
    monkeypatch.setattr(relay, "_POLL", PATIENCE)
    ids: list[str] = []

    def store_meanwhile(_: object, __: object, statement: str, *___: object) -> None:
        if "extract(epoch FROM ring_at" in statement and not ids:
            with db.sync_transaction():
                ids.append(task(unheard, "record").delay_durably("x"))

    event.listen(db.sync_engine, "before_cursor_execute", store_meanwhile)
    try:
        with relaying(unheard, db):
            async with asyncio.timeout(PATIENCE / 2):
                await rows.until("EXISTS (SELECT FROM durable_task WHERE rings > 0)")
    finally:
        event.remove(db.sync_engine, "before_cursor_execute", store_meanwhile)


@pytest.mark.skipif("redis" not in brokers(), reason="needs Redis")
async def test_options_of_the_transport(rows: Observer) -> None:
    """A relay's messages go where the application's own do."""
    app = create_app(urls("redis")[0], "cache+memory://", f"chatdify-test-{uuid4().hex}")
    app.conf.broker_transport_options = {"global_keyprefix": "chatdify-test-"}
    async with db.transaction():
        task_id = task(app, "record").delay_durably("x")
    with relaying(app, db), app.connection_for_read() as connection:
        message = await asyncio.to_thread(connection.SimpleQueue(app.conf.task_default_queue).get, timeout=20)
    assert message.headers["id"] == task_id
    app.close()


@pytest.mark.parametrize("pgbouncer", [False, True])
async def test_limit_of_a_statement(unheard: Celery[Any], rows: Observer, database_url: str, pgbouncer: bool) -> None:
    """It is set for a relay's session, which behind PgBouncer would be that of others, too."""
    seen: list[str] = []
    settings = DatabaseSettings(database_url=database_url, db_pgbouncer=pgbouncer)
    database = Database("bounced", settings=settings)
    event.listen(database.sync_engine, "before_cursor_execute", lambda _, __, statement, *___: seen.append(statement))
    async with db.transaction():
        task_id = task(unheard, "record").delay_durably("x")
    with relaying(unheard, database):
        await rows.until("(SELECT rings FROM durable_task WHERE id = $1) > 0", task_id)
    assert any("statement_timeout" in statement for statement in seen) is not pgbouncer
    await database.dispose()


def test_stopped_twice(unheard: Celery[Any]) -> None:
    """By two signals, of which the second comes when it has ended."""
    ending = relay.Relay(unheard, db, grace=1)
    ending.stop()
    ending.run()
    ending.stop()


async def test_locked_row_holds_nothing_up(prefork: Worker, rows: Observer) -> None:
    """A relay passes over the rows that workers are at, or other relays."""
    add = prefork.task("add_item")
    async with db.transaction():
        locked, free = add.delay_durably("locked"), add.delay_durably("free")
    work = rows.connection.transaction()
    await work.start()
    await rows.connection.execute("SELECT FROM durable_task WHERE id = $1 FOR UPDATE", locked)
    with relaying(prefork.app, db):
        try:
            await rows.until_status(free, "done")
        finally:
            await work.rollback()
        await rows.until_status(locked, "done")


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


async def test_task_of_an_included_module(
    unheard: Celery[celery_ext.Task], rows: Observer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relay knows its options, as a worker does, which imports more than the application's own module, too."""
    (tmp_path / "included_module.py").write_text(
        "import celery\n\n@celery.shared_task(name='included', time_limit=77)\ndef included(name: str) -> None: ...\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    app = Celery("relayed", broker="memory://", include=["included_module"], set_as_current=False)
    celery_ext.init_app(app)
    async with db.transaction():
        task_id = task(unheard, "record").delay_durably("x")
    await rows.connection.execute("UPDATE durable_task SET name = 'included'")
    with relaying(app, db), app.connection_for_read() as connection:
        message = await asyncio.to_thread(connection.SimpleQueue("celery").get, timeout=20)
    assert (message.headers["id"], str(message.headers["timelimit"])) == (task_id, "[77, None]")
    app.close()


async def test_task_that_a_relay_does_not_know(unheard: Celery[Any], rows: Observer) -> None:
    """It is sent by its name, since a worker may know it."""
    async with db.transaction():
        task_id = task(unheard, "record").delay_durably("x")
    await rows.connection.execute("UPDATE durable_task SET name = 'known.elsewhere'")
    with unheard.connection_for_read() as connection:
        queue = connection.SimpleQueue("nowhere")
        queue.clear()  # of what other tests sent
        with relaying(unheard, db):
            message = await asyncio.to_thread(queue.get, timeout=20)
    assert (message.headers["id"], message.headers["task"]) == (task_id, "known.elsewhere")


async def test_handlers_in_a_relay(unheard: Celery[Any], rows: Observer) -> None:
    """They find the application that is relayed as Celery's current one, which is kept by thread."""
    current: list[object] = []

    def note(**_: object) -> None:
        current.append(current_app._get_current_object())  # type: ignore[attr-defined]  # missing in the stubs

    signals.before_task_publish.connect(note)
    async with db.transaction():
        task_id = task(unheard, "record").delay_durably("x")
    with relaying(unheard, db):  # which still sends what it has claimed
        await rows.until("(SELECT rings FROM durable_task WHERE id = $1) > 0", task_id)
    assert current == [unheard]
