"""The tables of the tests."""

from __future__ import annotations

from sqlalchemy import UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from fastapi_chatdify_db import Base


class Item(Base):
    """A row whose name is unique, which PostgreSQL checks only at COMMIT."""

    __tablename__ = "item"
    __table_args__ = (UniqueConstraint("name", deferrable=True, initially="DEFERRED"),)

    id: Mapped[int] = mapped_column(primary_key=True, init=False)
    name: Mapped[str]


class Counter(Base):
    """A number that many clients increment."""

    __tablename__ = "counter"

    id: Mapped[int] = mapped_column(primary_key=True)
    value: Mapped[int]
