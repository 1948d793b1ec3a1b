"""What a task inherits from who sent it: the request's id and OpenTelemetry's context, in the message's headers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

from celery.app.task import Context

from fastapi_chatdify_db.request_id import carried_request_id, current_request_id

if TYPE_CHECKING:
    from opentelemetry.propagators.textmap import TextMapPropagator

try:
    from opentelemetry import context as otel
    from opentelemetry import propagate
except ImportError:  # optional
    otel = propagate = None  # type: ignore[assignment]

# The header of asgi-correlation-id's own Celery extension.
_REQUEST_ID: Final = "CORRELATION_ID"


def inject(headers: dict[str, Any]) -> None:
    """Write the current context into a message's headers, unless somebody else has."""
    if (request_id := current_request_id()) is not None:
        headers.setdefault(_REQUEST_ID, request_id)
    if propagate is not None:
        carrier: dict[str, str] = {}
        propagate.inject(carrier)
        for name, value in carrier.items():
            headers.setdefault(name, value)


def restore(request: Context) -> Callable[[], None] | None:
    """Make the sender's context the current one; returns what ends that, or None where nothing was sent along."""
    sent = vars(request)
    names = _trace_headers()
    if _REQUEST_ID not in sent and sent.keys().isdisjoint(names):
        return None
    stack = ExitStack()
    if (request_id := request.get(_REQUEST_ID)) is not None:
        stack.enter_context(carried_request_id(request_id))
    if carrier := {name: value for name in names if (value := request.get(name)) is not None}:
        stack.callback(otel.detach, otel.attach(propagate.extract(carrier)))
    return stack.close


def _trace_headers() -> frozenset[str]:
    return frozenset() if propagate is None else _fields(propagate.get_global_textmap())


@lru_cache(maxsize=1)
def _fields(propagator: TextMapPropagator) -> frozenset[str]:
    return frozenset(propagator.fields)
