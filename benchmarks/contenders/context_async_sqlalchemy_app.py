"""context-async-sqlalchemy, with its pure ASGI middleware."""

from __future__ import annotations

from context_async_sqlalchemy import DBConnect, db_session
from context_async_sqlalchemy.asgi_utils import ASGIHTTPDBSessionMiddleware
from fastapi import FastAPI
from model import POOL, URL, insert_one, modify_one, plain, read_one, read_twenty
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine

OPTIONS = {"pool_pre_ping": True, **POOL}


def create_engine(host: str | None) -> AsyncEngine:
    return create_async_engine(URL, **OPTIONS)


def create_session_maker(engine: AsyncEngine) -> async_sessionmaker[AsyncSession]:
    return async_sessionmaker(engine, class_=AsyncSession, expire_on_commit=False)


connection = DBConnect(create_engine, create_session_maker, host="unused")
app = FastAPI()
app.add_middleware(ASGIHTTPDBSessionMiddleware)
app.get("/plain")(plain)


@app.get("/read")
async def read() -> dict[str, object]:
    return await read_one(await db_session(connection))


@app.get("/read-20")
async def read_20() -> list[dict[str, object]]:
    return await read_twenty(await db_session(connection))


@app.get("/modify")
async def modify() -> dict[str, bool]:
    return await modify_one(await db_session(connection))


@app.get("/insert")
async def insert() -> dict[str, bool]:
    return insert_one(await db_session(connection))
