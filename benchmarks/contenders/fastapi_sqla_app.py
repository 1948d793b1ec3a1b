"""fastapi-sqla, whose engine options are environment variables."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from model import POOL, URL
from routes import add_routes

os.environ["sqlalchemy_url"] = URL
os.environ["sqlalchemy_pool_pre_ping"] = "true"
for option, value in POOL.items():
    os.environ[f"sqlalchemy_{option}"] = str(value)

import fastapi_sqla  # noqa: E402
from fastapi import FastAPI  # noqa: E402
from fastapi_sqla import AsyncSession  # noqa: E402


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    await fastapi_sqla.startup()
    yield


app = FastAPI(lifespan=lifespan)
fastapi_sqla.setup_middlewares(app)
add_routes(app, AsyncSession)
