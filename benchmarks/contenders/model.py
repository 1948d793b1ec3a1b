"""The table and the routes' answers, alike for every contender. Needs SQLAlchemy only: peers run it on their own."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator

from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

URL = os.environ["BENCHMARK_URL"]
POOL = {
    "pool_size": int(os.environ["DB_POOL_SIZE"]),
    "max_overflow": int(os.environ["DB_MAX_OVERFLOW"]),
}
CHUNK = b"x" * 65_536


class Base(DeclarativeBase):
    """Base of the benchmark's table."""


class Item(Base):
    """One row is read."""

    __tablename__ = "benchmark_item"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


def as_json(item: Item | None) -> dict[str, object]:
    """What every read answers."""
    assert item is not None
    return {"id": item.id, "name": item.name}


async def large_body() -> AsyncIterator[bytes]:
    """Four megabytes, sent as fast as the client takes them."""
    for _ in range(64):
        yield CHUNK
