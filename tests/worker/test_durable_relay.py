"""A relay, beside an application or by itself, sends every row that is due, as the application would have."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from celery import Celery, current_app
from fastapi import FastAPI
from sqlalchemy import event, text

import celery_ext
from celery_ext.durable import administration, relay, statements
from celery_ext.durable.relay import relaying
from fastapi_chatdify_db import Database, DatabaseSettings, db, health_router
from tests.observing import PATIENCE, Observer
from tests.serving import serve
from tests.worker.application import create_app
from tests.worker.running import Worker, brokers, deliver, publishing, task, urls


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


async def test_many_batches(unheard: Celery[Any], rows: Observer, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a full batch a relay waits for nothing."""
    monkeypatch.setattr(relay, "BATCH", 1)
    monkeypatch.setattr(relay, "_POLL_INTERVAL", PATIENCE)
    async with db.transaction():
        for number in range(10):
            task(unheard, "record").delay_durably(f"{number}")
    with relaying(unheard, db):
        async with asyncio.timeout(PATIENCE / 2):
            await rows.until("NOT EXISTS (SELECT FROM durable_task WHERE rings = 0)")


async def test_who_has_waited_longest_is_sent_first(unheard: Celery[celery_ext.Task], rows: Observer) -> None:
    """A relay with more to do than it can lets no row wait for ever."""
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
    monkeypatch.setattr(relay, "_POLL_INTERVAL", PATIENCE)
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


async def test_result_backend_that_is_away(rows: Observer) -> None:
    """A relay, which waits for no results, does not ask for them either: its broker is enough."""
    app = create_app("memory://", "redis://127.0.0.1:1/0", "nowhere")
    async with db.transaction():
        task(app, "record").delay_durably("x")
    with relaying(app, db), app.connection_for_read() as connection:
        queue = connection.SimpleQueue(app.conf.task_default_queue)
        await asyncio.to_thread(queue.get, timeout=PATIENCE / 4)
    app.close()


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
        await rows.until_sent(task_id)
    assert any("statement_timeout" in statement for statement in seen) is not pgbouncer
    await database.dispose()


def test_stopped_twice(unheard: Celery[Any]) -> None:
    """A relay may get two signals, of which the second comes when it has ended."""
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

    async with db.transaction():
        task_id = task(unheard, "record").delay_durably("x")
    with publishing(note), relaying(unheard, db):  # which still sends what it has claimed
        await rows.until_sent(task_id)
    assert current == [unheard]
