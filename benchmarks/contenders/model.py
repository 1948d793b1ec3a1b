"""The tables and what each route does with a session, alike for every contender. Peers run it without our package."""

from __future__ import annotations

import os
import random
from collections.abc import AsyncIterator

from sqlalchemy import Identity, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

URL = os.environ["BENCHMARK_URL"]
POOL = {
    "pool_size": int(os.environ["DB_POOL_SIZE"]),
    "max_overflow": int(os.environ["DB_MAX_OVERFLOW"]),
}
ITEMS = 10_000  # rows of the table, so that updates seldom wait for each other
OUTSIDE_CALL = 0.2  # seconds
CHUNK = b"x" * 65_536
DONE = {"done": True}


class Base(DeclarativeBase):
    """Base of the benchmark's tables."""


class Item(Base):
    """What is read and modified."""

    __tablename__ = "benchmark_item"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    visits: Mapped[int]


class Entry(Base):
    """What is inserted."""

    __tablename__ = "benchmark_entry"

    id: Mapped[int] = mapped_column(Identity(), primary_key=True)
    name: Mapped[str]


async def plain() -> dict[str, str]:
    return {"hello": "world"}


async def read_one(session: AsyncSession) -> dict[str, object]:
    item = await session.get_one(Item, 1)
    return {"id": item.id, "name": item.name}


async def read_twenty(session: AsyncSession) -> list[dict[str, object]]:
    items = await session.scalars(select(Item).where(Item.id <= 20).order_by(Item.id))
    return [{"id": item.id, "name": item.name} for item in items]


async def modify_one(session: AsyncSession) -> dict[str, bool]:
    item = await session.get_one(Item, any_id())
    item.visits += 1
    return DONE


def insert_one(session: AsyncSession) -> dict[str, bool]:
    session.add(Entry(name="benchmark"))
    return DONE


def any_id() -> int:
    return random.randint(1, ITEMS)


async def large_body() -> AsyncIterator[bytes]:
    """Four megabytes, sent as fast as the client takes them."""
    for _ in range(64):
        yield CHUNK
