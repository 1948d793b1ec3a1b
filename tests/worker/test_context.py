"""What travels with a task: the request's id, the trace, and the names of its log records."""

from __future__ import annotations

import asyncio
import io
import logging
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
from asgi_correlation_id import CorrelationIdMiddleware, correlation_id
from celery import Celery
from celery.app.trace import trace_task
from celery.signals import task_postrun, task_prerun
from celery.utils import uuid
from fastapi import FastAPI
from opentelemetry import context, propagate
from opentelemetry.trace import NonRecordingSpan, SpanContext, get_current_span, set_span_in_context

import celery_ext
from celery_ext.context import senders_trace
from celery_ext.durable.relay import relaying
from fastapi_chatdify_db import UnitOfWorkFilter, db
from fastapi_chatdify_db.request_id import carried_request_id, current_request_id
from tests.observing import Observer
from tests.serving import serve
from tests.worker.running import Worker, publishing, task

REQUEST_ID = "6f1c7c52-3c1d-4f0a-9d55-2f1f1d2e3a4b"
TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
OWN_SPAN = 0xB9C7C989F97918E1
OTHER_TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


async def test_request_id_reaches_the_task(app: FastAPI, relayed: Worker, rows: Observer) -> None:
    """However it was sent, a task has the id of the request that sent it; the next task has none."""
    task = relayed.task("seen_context")
    app.add_middleware(CorrelationIdMiddleware)

    @app.post("/")
    async def send() -> list[str]:
        return [task.delay_on_commit(), task.delay_durably(), str(task.delay().id)]

    async with serve(app) as client:
        response = await client.post("/", headers={"X-Request-ID": REQUEST_ID})
    for task_id in response.json():
        seen = await asyncio.to_thread(task.AsyncResult(task_id).get, timeout=20)
        assert seen["request_id"] == REQUEST_ID
        assert seen["logged"]["request_id"] == REQUEST_ID
        assert seen["logged"]["task_id"] == task_id
        assert isinstance(seen["logged"]["unit_id"], int)
    assert (await asyncio.to_thread(task.delay().get, timeout=20))["request_id"] is None


async def test_trace_reaches_the_task(prefork: Worker, empty_tables: Observer) -> None:
    """OpenTelemetry's context goes with the message and is the current one while the task runs."""
    token = context.attach(propagate.extract({"traceparent": TRACE}))
    result = prefork.task("seen_context").delay()
    context.detach(token)
    assert (await asyncio.to_thread(result.get, timeout=20))["trace"] == TRACE.split("-")[1]


def test_context_ends_with_the_task(unheard: Celery[celery_ext.Task]) -> None:
    """asgi-correlation-id's own variable has the id as well, and the next task of the process neither id nor trace."""

    @unheard.task(shared=False)
    def seen() -> list[object]:
        return [correlation_id.get(), current_request_id(), get_current_span().get_span_context().trace_id]

    def delivered(**headers: str) -> object:
        return trace_task(seen, "id", (), {}, headers, app=unheard).retval

    assert delivered(CORRELATION_ID=REQUEST_ID, traceparent=TRACE) == [REQUEST_ID] * 2 + [int(TRACE.split("-")[1], 16)]
    assert delivered() == [None, None, 0]


@pytest.fixture(params=["first", "last"])
def instrumentation(request: pytest.FixtureRequest) -> Iterator[None]:
    """A span of its own around each task that was sent within one, as OpenTelemetry's instrumentation makes it.

    One that is not sampled, and so does not record.
    """
    tokens: list[Any] = []

    def begin(task: Any, **_: object) -> None:
        sender = get_current_span(propagate.extract(vars(task.request), context.Context())).get_span_context()
        if sender.is_valid:
            own = SpanContext(sender.trace_id, OWN_SPAN, is_remote=False)
            tokens.append(context.attach(set_span_in_context(NonRecordingSpan(own))))

    def end(**_: object) -> None:
        if tokens:
            context.detach(tokens.pop())

    handlers = ((task_prerun, begin), (task_postrun, end))
    for signal, handler in handlers:
        signal.connect(handler)
        if request.param == "first":
            signal.receivers.insert(0, signal.receivers.pop())
    yield
    for signal, handler in handlers:
        signal.disconnect(handler)


@pytest.mark.usefixtures("instrumentation")
def test_beside_opentelemetrys_own_instrumentation(unheard: Celery[celery_ext.Task]) -> None:
    """Its span is the task's, whoever hears of the task first; a task without a sender's trace gets no other's."""

    @unheard.task(shared=False)
    def seen() -> int:
        return get_current_span().get_span_context().span_id

    def delivered(**headers: str) -> object:
        return trace_task(seen, "id", (), {}, headers, app=unheard).retval

    for _ in range(2):
        assert delivered(traceparent=TRACE) == OWN_SPAN
        assert delivered() == 0
        assert delivered(CORRELATION_ID=REQUEST_ID) == 0


def test_eager_task_in_a_trace(unheard: Celery[celery_ext.Task]) -> None:
    """It is in the trace of whoever runs it, although no message brought that along."""

    @unheard.task(shared=False)
    def seen() -> int:
        return get_current_span().get_span_context().trace_id

    token = context.attach(propagate.extract({"traceparent": TRACE}))
    try:
        assert seen.apply().get() == int(TRACE.split("-")[1], 16)
    finally:
        context.detach(token)


@pytest.mark.parametrize("trail", [True, False])
@pytest.mark.parametrize("kind", ["def", "async def"])
def test_children_of_a_result(unheard: Celery[celery_ext.Task], kind: str, trail: bool) -> None:
    """They are the tasks that it sent on its commit, without those of a rolled back savepoint; none without trail."""
    child = task(unheard, "seen_context")

    @unheard.task(shared=False, trail=trail)
    def parent() -> str:
        with suppress(ValueError), db.sync_session.begin_nested():
            child.delay_on_commit()
            raise ValueError
        return child.delay_on_commit()

    @unheard.task(shared=False, trail=trail)
    async def async_parent() -> str:
        with suppress(ValueError):
            async with db.session.begin_nested():
                child.delay_on_commit()
                raise ValueError
        return child.delay_on_commit()

    sender = unheard.AsyncResult(uuid())
    trace_task(parent if kind == "def" else async_parent, sender.id, (), {}, {"id": sender.id}, app=unheard)
    children: Any = sender.children
    assert [result.id for result in children] == ([sender.get()] if trail else [])


async def test_a_relays_span_belongs_to_the_senders_trace(unheard: Celery[celery_ext.Task], rows: Observer) -> None:
    """What OpenTelemetry's instrumentation makes of the sending, also in a relay, goes on with the stored trace."""
    traces: dict[str, int] = {}

    def instrument(headers: dict[str, str], **_: object) -> None:
        traces[headers["id"]] = get_current_span().get_span_context().trace_id  # that of the span which it begins

    async def store(**headers: str) -> str:
        token = context.attach(propagate.extract(headers, context.Context()))
        async with db.transaction():
            task_id = task(unheard, "seen_context").delay_durably()
        context.detach(token)
        return task_id

    traced, other = await store(traceparent=TRACE), await store()
    with publishing(instrument), relaying(unheard, db):
        await rows.until_sent(traced)
        await rows.until_sent(other)
    assert traces == {traced: int(TRACE.split("-")[1], 16), other: 0}


def test_a_relay_that_was_started_within_a_trace() -> None:
    """It sends under the trace of each row's sender, also under none; its own may be that of the one who started it."""
    token = context.attach(propagate.extract({"traceparent": OTHER_TRACE}))
    try:
        for headers, trace in ({"traceparent": TRACE}, int(TRACE.split("-")[1], 16)), ({}, 0):
            with senders_trace(headers):
                assert get_current_span().get_span_context().trace_id == trace
        assert get_current_span().get_span_context().trace_id == int(OTHER_TRACE.split("-")[1], 16)
    finally:
        context.detach(token)


async def test_log_records_name_their_unit() -> None:
    """Records within one unit share an id, those of another have another, and outside there is none."""

    def unit_id() -> object:
        record = logging.makeLogRecord({})
        UnitOfWorkFilter().filter(record)
        return record.__dict__["unit_id"]

    async with db.transaction():
        first = unit_id()
        assert first == unit_id() is not None
        async with db.transaction():
            assert unit_id() not in (first, None)
        assert unit_id() == first
    assert unit_id() is None


def test_log_lines_name_their_unit() -> None:
    """The filter of a handler adds to records, of whatever logger, and drops none."""
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    handler.addFilter(UnitOfWorkFilter())
    handler.setFormatter(logging.Formatter("%(levelname)s [%(request_id)s/%(unit_id)s] %(message)s"))
    logger = logging.getLogger("somebody's")
    logger.addHandler(handler)
    logger.warning("kept")
    logger.removeHandler(handler)
    assert written.getvalue() == "WARNING [None/None] kept\n"


@pytest.mark.parametrize("header", [{"CORRELATION_ID": "theirs"}, {"traceparent": TRACE}])
def test_headers_of_the_callers_own(unheard: Celery[celery_ext.Task], header: dict[str, str]) -> None:
    """What somebody put into a message, be it another instrumentation, is left as it is."""
    sent: list[dict[str, object]] = []

    def note(headers: dict[str, object], **_: object) -> None:
        sent.append(headers)

    token = context.attach(propagate.extract({"traceparent": OTHER_TRACE}))
    try:
        with publishing(note), carried_request_id(REQUEST_ID):
            task(unheard, "seen_context").apply_async(headers=header)
    finally:
        context.detach(token)
    ours = {"CORRELATION_ID": REQUEST_ID, "traceparent": OTHER_TRACE}
    assert {name: sent[0][name] for name in ours} == ours | header


def test_request_id_without_opentelemetry() -> None:
    """Where that is not installed, the request's id goes with the message all the same."""
    code = """
import sys
sys.modules["opentelemetry"] = None  # an import of it fails

import celery_ext
from celery import Celery
from celery.app.trace import trace_task
from celery.signals import before_task_publish, task_postrun, task_prerun
from fastapi_chatdify_db.request_id import carried_request_id, current_request_id

app = Celery("without", broker="memory://", backend="cache+memory://")
celery_ext.init_app(app)

@app.task(db_session=False)
def seen():
    return current_request_id()

app.finalize()
sent = []

@before_task_publish.connect
def note(headers, **_):
    sent.append(headers)

with carried_request_id("carried"):
    seen.delay()
assert current_request_id() is None
assert trace_task(seen, "id", (), {}, sent[0], app=app).retval == "carried"
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
