"""Logging and, if it has a DSN, Sentry; the query strings of URLs are kept out of both."""

from __future__ import annotations

import logging
import re
from importlib import import_module
from typing import Any, Final

from example_app.settings import Settings
from fastapi_chatdify_db import InvalidSettings

logger: Final = logging.getLogger("chatdify")

# It may hold the webhook's secret, or a message to a customer.
_QUERY: Final = re.compile(r"(?<=\?)\S+")


class _WithoutQuery(logging.Filter):
    """Strikes out the query strings in what uvicorn logs about a request."""

    def filter(self, record: logging.LogRecord) -> bool:
        if isinstance(record.args, tuple):
            record.args = tuple(_QUERY.sub("***", arg) if isinstance(arg, str) else arg for arg in record.args)
        return True


_without_query: Final = _WithoutQuery()


def configure(settings: Settings) -> None:
    """Log to standard error, and to Sentry when it has a DSN.

    Raises:
        InvalidSettings: ``SENTRY_DSN`` is set and ``sentry-sdk`` is not installed.
    """
    logging.basicConfig(level=settings.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    logging.getLogger("uvicorn.access").addFilter(_without_query)
    if settings.sentry_dsn:
        _report_to_sentry(settings)


def _report_to_sentry(settings: Settings) -> None:
    try:
        sentry_sdk = import_module("sentry_sdk")
    except ImportError as error:
        raise InvalidSettings("SENTRY_DSN: pip install sentry-sdk, or leave it out") from error
    sentry_sdk.init(
        dsn=settings.sentry_dsn,
        environment=settings.sentry_environment,
        traces_sample_rate=settings.sentry_traces_sample_rate,
        send_default_pii=False,
        max_request_body_size="never",  # else each webhook's, with what the customer wrote
        include_local_variables=False,  # some hold keys
        before_send=_strike_query_out,
        before_send_transaction=_strike_query_out,
    )


def _strike_query_out(report: dict[str, Any], _: object) -> dict[str, Any]:
    """Take the query string out of a report to Sentry."""
    request = report.get("request") or {}
    request.pop("query_string", None)
    if "url" in request:
        request["url"] = _QUERY.sub("***", str(request["url"]))
    return report
