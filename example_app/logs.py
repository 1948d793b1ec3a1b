"""Logging: the level, and the webhook's secret kept out of the access log."""

from __future__ import annotations

import logging
import re
from typing import Final

logger: Final = logging.getLogger("chatdify")

_SECRET: Final = re.compile(r"(?<=[?&]secret=)[^&\s]*")


class _WithoutSecret(logging.Filter):
    """Strikes the webhook's secret out of what uvicorn logs about a request."""

    def filter(self, record: logging.LogRecord) -> bool:
        if isinstance(record.args, tuple):
            record.args = tuple(_SECRET.sub("***", arg) if isinstance(arg, str) else arg for arg in record.args)
        return True


_without_secret: Final = _WithoutSecret()


def configure(level: str) -> None:
    """Log from ``level`` on, to standard error."""
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    logging.getLogger("uvicorn.access").addFilter(_without_secret)
