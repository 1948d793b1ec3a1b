"""ORM reads by hand: no transaction, no ping, no dependency. Nothing here could write safely."""

from __future__ import annotations

from fastapi import FastAPI
from model import POOL, URL, plain, read_one, read_twenty
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

engine = create_async_engine(URL, isolation_level="AUTOCOMMIT", **POOL)
Session = async_sessionmaker(engine, expire_on_commit=False)
app = FastAPI()
app.get("/plain")(plain)


@app.get("/read")
async def read() -> dict[str, object]:
    async with Session() as session:
        return await read_one(session)


@app.get("/read-20")
async def read_20() -> list[dict[str, object]]:
    async with Session() as session:
        return await read_twenty(session)
