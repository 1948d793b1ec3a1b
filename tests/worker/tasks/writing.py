"""What tasks leave in the database: rows of their unit, and a count that no rollback takes back."""

from __future__ import annotations

from sqlalchemy import text

from fastapi_chatdify_db import db
from tests.models import Item


def insert(name: str) -> None:
    """A row in the unit around the caller."""
    db.sync_session.add(Item(name))
    db.sync_session.flush()


def first_time() -> bool:
    """Whether nobody has asked before; counted by a sequence, which no rollback takes back."""
    return bool(db.sync_session.scalar(text("SELECT nextval('kills')")) == 1)
