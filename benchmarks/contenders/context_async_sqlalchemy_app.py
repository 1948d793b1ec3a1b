"""context-async-sqlalchemy, with its pure ASGI middleware."""

from __future__ import annotations

from context_async_sqlalchemy import DBConnect, db_session
from context_async_sqlalchemy.asgi_utils import ASGIHTTPDBSessionMiddleware
from fastapi import FastAPI
from model import POOL, URL, Item, as_json
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine


def create_engine(host: str | None) -> AsyncEngine:
    return create_async_engine(URL, pool_pre_ping=True, **POOL)


def create_session_maker(engine: AsyncEngine) -> async_sessionmaker[AsyncSession]:
    return async_sessionmaker(engine, class_=AsyncSession, expire_on_commit=False)


connection = DBConnect(create_engine, create_session_maker, host="unused")
app = FastAPI()
app.add_middleware(ASGIHTTPDBSessionMiddleware)


@app.get("/read")
async def read() -> dict[str, object]:
    session = await db_session(connection)
    return as_json(await session.get(Item, 1))
