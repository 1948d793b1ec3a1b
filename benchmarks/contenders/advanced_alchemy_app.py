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
from model import POOL, URL
from routes import add_routes
from sqlalchemy.ext.asyncio import AsyncSession

config = SQLAlchemyAsyncConfig(
    connection_string=URL,
    commit_mode="autocommit",
    session_config=AsyncSessionConfig(expire_on_commit=False),
    engine_config=EngineConfig(pool_pre_ping=True, **POOL),
)
app = FastAPI()
alchemy = AdvancedAlchemy(config=config, app=app)
add_routes(app, Annotated[AsyncSession, Depends(alchemy.provide_session())])
