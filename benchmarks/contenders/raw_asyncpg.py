"""asyncpg by hand, the floor: no SQLAlchemy, and a pool that does not reset what it gets back."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg
from fastapi import FastAPI
from model import DONE, POOL, URL, any_id, plain


async def as_it_is(connection: asyncpg.Connection) -> None:
    """The pool's own reset is one more round trip."""


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    global pool
    sizes = {"min_size": 1, "max_size": POOL["pool_size"] + POOL["max_overflow"]}
    async with asyncpg.create_pool(URL.replace("+asyncpg", ""), reset=as_it_is, **sizes) as pool:
        yield


app = FastAPI(lifespan=lifespan)
app.get("/plain")(plain)


@app.get("/read")
async def read() -> dict[str, object]:
    async with pool.acquire() as connection:
        return dict(await connection.fetchrow("SELECT id, name FROM benchmark_item WHERE id = $1", 1))


@app.get("/read-20")
async def read_20() -> list[dict[str, object]]:
    async with pool.acquire() as connection:
        rows = await connection.fetch("SELECT id, name FROM benchmark_item WHERE id <= $1 ORDER BY id", 20)
        return [dict(row) for row in rows]


@app.get("/modify")
async def modify() -> dict[str, bool]:
    async with pool.acquire() as connection, connection.transaction():
        key = any_id()
        visits = await connection.fetchval("SELECT visits FROM benchmark_item WHERE id = $1", key)
        await connection.execute("UPDATE benchmark_item SET visits = $2 WHERE id = $1", key, visits + 1)
    return DONE


@app.get("/insert")
async def insert() -> dict[str, bool]:
    async with pool.acquire() as connection, connection.transaction():
        await connection.fetchval("INSERT INTO benchmark_entry (name) VALUES ($1) RETURNING id", "benchmark")
    return DONE
