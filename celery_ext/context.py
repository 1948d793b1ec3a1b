"""What a task inherits from who sent it: the request's id and OpenTelemetry's context, in the message's headers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Final

from celery.app.task import Context

try:
    from asgi_correlation_id.context import correlation_id
except ImportError:  # optional
    correlation_id = None  # type: ignore[assignment]
try:
    from opentelemetry import context as otel
    from opentelemetry import propagate
except ImportError:  # optional
    otel = propagate = None  # type: ignore[assignment]

# The header of asgi-correlation-id's own Celery extension.
_REQUEST_ID: Final = "CORRELATION_ID"


def inject(headers: dict[str, Any]) -> None:
    """Write the current context into a message's headers, unless somebody else has."""
    if correlation_id is not None and (request_id := correlation_id.get()) is not None:
        headers.setdefault(_REQUEST_ID, request_id)
    if propagate is not None:
        carrier: dict[str, str] = {}
        propagate.inject(carrier)
        for name, value in carrier.items():
            headers.setdefault(name, value)


def restore(request: Context) -> Callable[[], None]:
    """Make the sender's context the current one; returns what ends that."""
    stack = ExitStack()
    if correlation_id is not None and (request_id := request.get(_REQUEST_ID)) is not None:
        stack.callback(correlation_id.reset, correlation_id.set(request_id))
    if propagate is not None and otel is not None:
        carrier = {name: value for name in propagate.get_global_textmap().fields if (value := request.get(name))}
        if carrier:
            stack.callback(otel.detach, otel.attach(propagate.extract(carrier)))
    return stack.close
