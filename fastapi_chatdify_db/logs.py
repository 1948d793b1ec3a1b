"""Log records that say which unit of work they belong to."""

from __future__ import annotations

import logging

from fastapi_chatdify_db.nesting import innermost_unit
from fastapi_chatdify_db.request_id import current_request_id


class UnitOfWorkFilter(logging.Filter):
    """Gives every record ``unit_id``, ``task_id`` and ``request_id``; None where there is none.

    Put it on a handler, so that it sees the records of all loggers::

        handler.addFilter(UnitOfWorkFilter())
        handler.setFormatter(logging.Formatter("%(levelname)s [%(request_id)s/%(unit_id)s] %(message)s"))

    ``request_id`` is asgi-correlation-id's, where that is installed; Celery tasks carry it on.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Add the attributes; keeps every record."""
        unit = innermost_unit()
        record.unit_id = None if unit is None else unit.id
        record.task_id = None if unit is None else unit.task_id
        record.request_id = current_request_id()
        return True
