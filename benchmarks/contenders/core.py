"""SQLAlchemy Core by hand: transactions, no ORM, no ping."""

from __future__ import annotations

from fastapi import FastAPI
from model import DONE, POOL, URL, Entry, Item, any_id, plain
from sqlalchemy import bindparam, insert, select, update
from sqlalchemy.ext.asyncio import create_async_engine

engine = create_async_engine(URL, **POOL)
app = FastAPI()
ONE = select(Item.id, Item.name).where(Item.id == bindparam("key"))
TWENTY = select(Item.id, Item.name).where(Item.id <= bindparam("last")).order_by(Item.id)
VISITS = select(Item.visits).where(Item.id == bindparam("key"))
VISIT = update(Item).where(Item.id == bindparam("key")).values(visits=bindparam("new"))
app.get("/plain")(plain)


@app.get("/read")
async def read() -> dict[str, object]:
    async with engine.connect() as connection:
        row = (await connection.execute(ONE, {"key": 1})).one()
        return {"id": row.id, "name": row.name}


@app.get("/read-20")
async def read_20() -> list[dict[str, object]]:
    async with engine.connect() as connection:
        return [{"id": row.id, "name": row.name} for row in await connection.execute(TWENTY, {"last": 20})]


@app.get("/modify")
async def modify() -> dict[str, bool]:
    async with engine.begin() as connection:
        key = any_id()
        visits = await connection.scalar(VISITS, {"key": key})
        await connection.execute(VISIT, {"key": key, "new": visits + 1})
    return DONE


@app.get("/insert")
async def insert_entry() -> dict[str, bool]:
    async with engine.begin() as connection:
        await connection.execute(insert(Entry), {"name": "benchmark"})
    return DONE
