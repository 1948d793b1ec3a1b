"""The six-line dependency at its best: no ping, and committed before the response is sent."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Annotated

from fastapi import Depends, FastAPI
from model import POOL, URL
from routes import add_routes
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

engine = create_async_engine(URL, pool_timeout=30, pool_recycle=1800, pool_use_lifo=True, **POOL)
AsyncSessionLocal = async_sessionmaker(engine, expire_on_commit=False)
app = FastAPI()


async def get_session() -> AsyncGenerator[AsyncSession]:
    async with AsyncSessionLocal.begin() as session:
        yield session


add_routes(app, Annotated[AsyncSession, Depends(get_session, scope="function")])
