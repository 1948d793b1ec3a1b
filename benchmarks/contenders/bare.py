"""The application of ``ours`` without the middleware: the same imports, lifespan and idle pool."""

from __future__ import annotations

from fastapi import FastAPI, WebSocket
from model import URL, Base, plain

from fastapi_chatdify_db import Database, DatabaseSettings

db = Database(settings=DatabaseSettings(database_url=URL), base=Base)
app = FastAPI()
db.init_app(app, middleware=False)
app.get("/plain")(plain)


@app.websocket("/socket")
async def socket(websocket: WebSocket) -> None:
    await websocket.accept()
    await websocket.send_json({"id": 1, "name": "benchmark"})
    await websocket.receive()  # idle from here on
