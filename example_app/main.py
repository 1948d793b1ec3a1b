"""The web application: ``uvicorn --factory example_app.main:create_app``."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final
from urllib.parse import urlsplit

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from starlette.middleware.trustedhost import TrustedHostMiddleware

import celery_ext
from example_app import logs, worker
from example_app.api import conversations, health, problems, webhook
from example_app.api.security import WEBHOOK, BodyLimit, SameOrigin
from example_app.clients import close_clients
from example_app.db import db
from example_app.page import routes as page
from example_app.settings import Settings, get_settings
from fastapi_chatdify_db import health_router

PREFIX: Final = "/api/v1"


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    """Close, at the end, what the application opens besides the database."""
    try:
        yield
    finally:
        await close_clients()


def create_app() -> FastAPI:
    """The application, with the settings of the environment.

    Raises:
        InvalidSettings: An environment variable is missing or cannot be used; the message names it.
    """
    settings = get_settings()
    settings.require_secrets()
    logs.configure(settings)
    logs.logger.info("Chatwoot's webhooks are expected at %s%s", settings.api_base_url, WEBHOOK)
    db.creates_tables = settings.in_development  # elsewhere "alembic upgrade head" has made them
    celery_ext.init_app(worker.app, relay=True)
    app = FastAPI(
        title="Chatdify",
        summary="Answers Chatwoot's conversations with Dify",
        lifespan=lifespan,
        redirect_slashes=False,  # a redirect would go to whatever Host the request names
    )
    db.init_app(app)
    app.add_middleware(BodyLimit)
    problems.init_app(app)
    for router in (webhook.router, conversations.router, health.router):
        app.include_router(router, prefix=PREFIX)
    app.include_router(health_router)
    if settings.in_development:
        page.init_app(app)
        # Doors may be open: no web site may come in through a developer's browser, also not by a name of its own that
        # it has made point to this machine.
        app.add_middleware(SameOrigin)
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=_hosts(settings), www_redirect=False)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]  # as FastAPI's documentation extends it
    return app


def _hosts(settings: Settings) -> list[str]:
    """The names by which this application is known in development."""
    return ["localhost", "127.0.0.1", "[::1]", *filter(None, [urlsplit(settings.api_base_url).hostname])]


def _openapi(app: FastAPI) -> dict[str, Any]:
    """FastAPI's document, and the schema of the problems that its responses refer to."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
        problem = problems.Problem.model_json_schema(ref_template="#/components/schemas/{model}")
        schema["components"]["schemas"] |= problem.pop("$defs") | {"Problem": problem}
        app.openapi_schema = schema
    return app.openapi_schema
