"""fastapi_chatdify_db with its defaults."""

from __future__ import annotations

from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from model import URL, Base, Item, as_json, large_body

from fastapi_chatdify_db import Database, DatabaseSettings

db = Database(settings=DatabaseSettings(database_url=URL), base=Base)
app = FastAPI()
db.init_app(app)


@app.get("/plain")
async def plain() -> dict[str, str]:
    return {"hello": "world"}


@app.get("/read")
async def read() -> dict[str, object]:
    return as_json(await db.session.get(Item, 1))


@app.get("/large")
async def large() -> StreamingResponse:
    await db.session.get(Item, 1)
    return StreamingResponse(large_body())
