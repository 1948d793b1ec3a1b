"""How long a ``Retry-After`` header asks to wait."""

from __future__ import annotations

import time
from email.utils import parsedate_to_datetime
from typing import Final

_LONGEST_WAIT: Final = 3600.0
"""Seconds to which it is capped."""


def seconds(retry_after: str | None) -> float:
    """Seconds that the header asks for, 0 if it is missing or senseless.

    https://www.rfc-editor.org/rfc/rfc9110#field.retry-after
    """
    if retry_after is None:
        return 0.0
    try:
        if retry_after.strip().isdecimal():
            asked = float(retry_after)
        else:
            asked = parsedate_to_datetime(retry_after).timestamp() - time.time()
    except (ValueError, OverflowError):
        return 0.0
    return min(max(0.0, asked), _LONGEST_WAIT)
