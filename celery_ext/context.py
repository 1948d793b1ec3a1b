"""What a task inherits from its sender through the message's headers: the request's id, OpenTelemetry's context."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

from celery.app.task import Context

from fastapi_chatdify_db.request_id import carried_request_id, current_request_id

if TYPE_CHECKING:
    from opentelemetry.propagators.textmap import TextMapPropagator

try:
    from opentelemetry import context as otel
    from opentelemetry import propagate, trace
except ImportError:  # optional
    otel = propagate = trace = None  # type: ignore[assignment]

# The header of asgi-correlation-id's own Celery extension.
_REQUEST_ID: Final = "CORRELATION_ID"


def inject(headers: dict[str, Any]) -> None:
    """Write the current context into a message's headers, except for headers that are there already."""
    if (request_id := current_request_id()) is not None:
        headers.setdefault(_REQUEST_ID, request_id)
    if propagate is not None:
        carrier: dict[str, str] = {}
        propagate.inject(carrier)
        for name, value in carrier.items():
            headers.setdefault(name, value)


def restore(request: Context) -> Callable[[], None] | None:
    """Make the sender's context the current one; returns what undoes that, or None where there is nothing to change."""
    sent = vars(request)
    carrier = _trace_in(sent)
    has_another_trace = _has_another_trace(request, carrier)
    request_id = sent.get(_REQUEST_ID)
    if request_id is None and not has_another_trace:
        return None
    stack = ExitStack()
    if request_id is not None:
        stack.enter_context(carried_request_id(request_id))
    if has_another_trace:
        stack.callback(otel.detach, otel.attach(propagate.extract(carrier, otel.Context())))
    return stack.close


@contextmanager
def senders_trace(headers: Mapping[str, Any]) -> Iterator[None]:
    """Make the trace of some headers the current one: instrumentation's span of the sending then belongs to it.

    Parameters:
        headers: A message's, before it is sent for somebody else.
    """
    if propagate is None:
        yield
        return
    token = otel.attach(propagate.extract(_trace_in(headers), otel.Context()))
    try:
        yield
    finally:
        otel.detach(token)


def _has_another_trace(request: Context, carrier: dict[str, str]) -> bool:
    """Whether a task's trace is not the current one."""
    if trace is None:
        return False
    current = trace.get_current_span().get_span_context()
    if current.is_valid and not current.is_remote:
        return False  # a span is open: of a sender that runs the task in place, or of instrumentation that came first
    # OpenTelemetry's instrumentation ends after us, and restores the trace of the sender of the thread's last task.
    return bool(carrier) or (current.is_valid and not request.is_eager)


def _trace_in(headers: Mapping[str, Any]) -> dict[str, str]:
    """Those of some headers that OpenTelemetry's propagator reads."""
    names = () if propagate is None else _fields(propagate.get_global_textmap())
    return {name: value for name in names if (value := headers.get(name)) is not None}


@lru_cache(maxsize=1)
def _fields(propagator: TextMapPropagator) -> frozenset[str]:
    return frozenset(propagator.fields)
