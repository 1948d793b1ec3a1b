"""fastapi_chatdify_db with its defaults."""

from __future__ import annotations

import asyncio

from fastapi import FastAPI, WebSocket
from fastapi.responses import StreamingResponse
from model import OUTSIDE_CALL, URL, Base, insert_one, large_body, modify_one, plain, read_one, read_twenty

from fastapi_chatdify_db import Database, DatabaseSettings

db = Database(settings=DatabaseSettings(database_url=URL), base=Base)
app = FastAPI()
db.init_app(app)
app.get("/plain")(plain)


@app.get("/read")
async def read() -> dict[str, object]:
    return await read_one(db.session)


@app.get("/read-20")
async def read_20() -> list[dict[str, object]]:
    return await read_twenty(db.session)


@app.get("/modify")
async def modify() -> dict[str, bool]:
    return await modify_one(db.session)


@app.get("/insert")
async def insert() -> dict[str, bool]:
    return insert_one(db.session)


@app.get("/large")
async def large() -> StreamingResponse:
    await read_one(db.session)
    return StreamingResponse(large_body())


@app.get("/wait")
async def wait() -> dict[str, bool]:
    await read_one(db.session)
    await db.release()
    await asyncio.sleep(OUTSIDE_CALL)
    return insert_one(db.session)


@app.websocket("/socket")
async def socket(websocket: WebSocket) -> None:
    await websocket.accept()
    await websocket.send_json(await read_one(db.session))
    await websocket.receive()  # idle from here on
