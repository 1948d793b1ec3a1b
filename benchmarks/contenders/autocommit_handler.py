"""A hand-written handler: the ORM in AUTOCOMMIT, no ping, nothing around it."""

from __future__ import annotations

from fastapi import FastAPI
from model import POOL, URL, Item, as_json
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

engine = create_async_engine(URL, isolation_level="AUTOCOMMIT", **POOL)
new_session = async_sessionmaker(engine, class_=AsyncSession, expire_on_commit=False)
app = FastAPI()


@app.get("/read")
async def read() -> dict[str, object]:
    async with new_session() as session:
        return as_json(await session.get(Item, 1))
