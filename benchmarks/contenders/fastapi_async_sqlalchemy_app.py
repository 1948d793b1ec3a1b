"""fastapi-async-sqlalchemy, as its README writes it."""

from __future__ import annotations

from fastapi import FastAPI
from fastapi_async_sqlalchemy import SQLAlchemyMiddleware, db
from model import POOL, URL, Item, as_json

app = FastAPI()
app.add_middleware(SQLAlchemyMiddleware, db_url=URL, engine_args={"pool_pre_ping": True, **POOL})


@app.get("/read")
async def read() -> dict[str, object]:
    return as_json(await db.session.get(Item, 1))
