"""The six-line dependency, with the pool settings that its document gives."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Annotated

from fastapi import Depends, FastAPI
from model import POOL, URL
from routes import add_routes
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

engine = create_async_engine(URL, pool_timeout=30, pool_recycle=1800, pool_pre_ping=True, **POOL)
AsyncSessionLocal = async_sessionmaker(engine, expire_on_commit=False)
app = FastAPI()


async def get_session() -> AsyncGenerator[AsyncSession]:
    async with AsyncSessionLocal() as session:  # noqa: SIM117  # as its document writes it
        async with session.begin():
            yield session


add_routes(app, Annotated[AsyncSession, Depends(get_session)])
