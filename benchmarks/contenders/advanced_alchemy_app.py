"""advanced-alchemy's FastAPI extension, committing by itself."""

from __future__ import annotations

from typing import Annotated

from advanced_alchemy.extensions.fastapi import (
    AdvancedAlchemy,
    AsyncSessionConfig,
    EngineConfig,
    SQLAlchemyAsyncConfig,
)
from fastapi import Depends, FastAPI
from model import POOL, URL, Item, as_json
from sqlalchemy.ext.asyncio import AsyncSession

config = SQLAlchemyAsyncConfig(
    connection_string=URL,
    commit_mode="autocommit",
    session_config=AsyncSessionConfig(expire_on_commit=False),
    engine_config=EngineConfig(pool_pre_ping=True, **POOL),
)
app = FastAPI()
alchemy = AdvancedAlchemy(config=config, app=app)
Session = Annotated[AsyncSession, Depends(alchemy.provide_session())]


@app.get("/read")
async def read(session: Session) -> dict[str, object]:
    return as_json(await session.get(Item, 1))
