"""The routes of contenders whose session is a FastAPI dependency."""

# Annotations are not postponed: the session's is an argument here.

import asyncio
from typing import Any

from fastapi import FastAPI, WebSocket
from fastapi.responses import StreamingResponse
from model import OUTSIDE_CALL, insert_one, large_body, modify_one, plain, read_one, read_twenty


def add_routes(app: FastAPI, Session: Any) -> None:  # noqa: N803  # it is used as a type
    """Add every route.

    Parameters:
        app: The application.
        Session: The annotation that makes FastAPI provide a session.
    """

    app.get("/plain")(plain)

    @app.get("/read")
    async def read(session: Session) -> dict[str, object]:
        return await read_one(session)

    @app.get("/read-20")
    async def read_20(session: Session) -> list[dict[str, object]]:
        return await read_twenty(session)

    @app.get("/modify")
    async def modify(session: Session) -> dict[str, bool]:
        return await modify_one(session)

    @app.get("/insert")
    async def insert(session: Session) -> dict[str, bool]:
        return insert_one(session)

    @app.get("/large")
    async def large(session: Session) -> StreamingResponse:
        await read_one(session)
        return StreamingResponse(large_body())

    @app.get("/wait")
    async def wait(session: Session) -> dict[str, bool]:
        await read_one(session)
        await asyncio.sleep(OUTSIDE_CALL)
        return insert_one(session)

    @app.websocket("/socket")
    async def socket(websocket: WebSocket, session: Session) -> None:
        await websocket.accept()
        await websocket.send_json(await read_one(session))
        await websocket.receive()  # idle from here on
