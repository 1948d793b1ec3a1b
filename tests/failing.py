"""Statements that fail."""

from __future__ import annotations

ASKS_TO_RETRY = "DO $$ BEGIN RAISE EXCEPTION USING ERRCODE = '40001'; END $$"
"""As a serialization failure does, after which the same transaction may succeed."""
