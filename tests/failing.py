"""Statements that fail."""

from __future__ import annotations

from sqlalchemy import Integer, cast, select, text

from tests.models import Item

DUPLICATE = text("INSERT INTO counter VALUES (1, 1), (1, 1)")
NOT_A_NUMBER = select(cast(Item.name, Integer))
ASKS_TO_RETRY = "DO $$ BEGIN RAISE EXCEPTION USING ERRCODE = '40001'; END $$"
"""As a serialization failure does, after which the same transaction may succeed."""
