"""fastapi-async-sqlalchemy, as its README writes it, committing by itself."""

from __future__ import annotations

from fastapi import FastAPI
from fastapi_async_sqlalchemy import SQLAlchemyMiddleware, db
from model import POOL, URL, insert_one, plain, read_one

app = FastAPI()
app.add_middleware(SQLAlchemyMiddleware, db_url=URL, engine_args={"pool_pre_ping": True, **POOL}, commit_on_exit=True)
app.get("/plain")(plain)


@app.get("/read")
async def read() -> dict[str, object]:
    return await read_one(db.session)


@app.get("/insert")
async def insert() -> dict[str, bool]:
    return insert_one(db.session)
