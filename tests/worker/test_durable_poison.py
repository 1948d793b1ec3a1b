"""What is wrong with one durable task is no harm to the others."""

from __future__ import annotations

import asyncio
import logging

import pytest
from celery import Celery

import celery_ext
from celery_ext import ArgumentsNotSerializable
from celery_ext.durable import administration
from celery_ext.durable.relay import relaying
from fastapi_chatdify_db import db
from tests.observing import Observer
from tests.worker.running import Worker, brokers, task, urls


@pytest.mark.parametrize(
    "argument",
    [
        {"__type__": kind, "__value__": value}
        for kind, value in (("x", 1), ("datetime", "now"), ("bytes", 1), ("decimal", "x"))
    ],
)
async def test_what_cannot_be_read_back_is_not_stored(
    unheard: Celery[celery_ext.Task], rows: Observer, argument: object
) -> None:
    """A dictionary that only looks like kombu's way to write a date is refused at the call, and no relay meets it."""
    async with db.transaction():
        with pytest.raises(ArgumentsNotSerializable):
            task(unheard, "record").delay_durably(argument)
    assert await rows.durable_tasks() == []


async def test_row_that_cannot_be_read_is_passed_over(
    relayed: Worker, rows: Observer, caplog: pytest.LogCaptureFixture
) -> None:
    """Nor can one that was stored by something else, or was rung for weeks, stop a relay."""
    add = relayed.task("add_item")
    async with db.transaction() as session:
        bad, old = add.apply_durably(("bad",), countdown=3600), add.apply_durably(("old",), countdown=3600)
        await session.flush()
    await rows.connection.execute("UPDATE durable_task SET rings = 2000 WHERE id = $1", old)
    await rows.connection.execute("""UPDATE durable_task SET arguments = '{"__type__": "x"' WHERE id = $1""", bad)
    await rows.connection.execute("UPDATE durable_task SET due_at = now(), ring_at = now()")
    async with db.transaction():
        innocent = add.delay_durably("innocent")
    await rows.until_status(old, "done")
    await rows.until_status(innocent, "done")
    assert f"[{bad}] cannot be sent" in caplog.text


@pytest.mark.skipif("rabbitmq" not in brokers(), reason="needs RabbitMQ")
@pytest.mark.parametrize("alone", [False, True])
async def test_row_that_the_broker_refuses(
    rows: Observer, prefork: Worker, caplog: pytest.LogCaptureFixture, alone: bool
) -> None:
    """An exchange that is not there closes the channel; the other rows of the batch are sent, once each."""
    caplog.set_level(logging.INFO, logger="celery_ext")
    app = Celery("refused", broker=urls("rabbitmq")[0], task_cls=celery_ext.Task, set_as_current=False)
    app.conf.task_default_queue = prefork.app.conf.task_default_queue
    app.conf.broker_transport_options = {"confirm_publish": True}
    celery_ext.init_app(app)
    app.set_default()
    try:
        add = task(app, "add_item")
        async with db.transaction():
            good = [] if alone else [add.delay_durably(name) for name in ("a", "b")]
            add.apply_durably(("refused",), exchange="chatdify-test-nowhere", routing_key="x")
            good += [] if alone else [add.delay_durably("c")]
        with relaying(app, db):
            while "cannot be sent" not in caplog.text or "relayed sent=" not in caplog.text:
                await asyncio.sleep(0.02)
                assert "relay pauses (3)" not in caplog.text
    finally:
        app.close()
    figures = administration.figures(db)
    assert figures["rerung"] == 0
    assert "pauses" not in caplog.text
    assert f"relayed sent={len(good)} rerung=0 refused=1" in caplog.text
