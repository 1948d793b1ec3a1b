"""Statements that fail."""

from __future__ import annotations

from sqlalchemy import Integer, cast, select, text

from tests.models import Item


def raising(sqlstate: str) -> str:
    """A statement that fails with this code."""
    return f"DO $$ BEGIN RAISE EXCEPTION USING ERRCODE = '{sqlstate}'; END $$"


DUPLICATE = text("INSERT INTO counter VALUES (1, 1), (1, 1)")
NOT_A_NUMBER = select(cast(Item.name, Integer))
ASKS_TO_RETRY = raising("40001")
"""As a serialization failure does, after which the same transaction may succeed."""
