"""An application without any database layer."""

from __future__ import annotations

from fastapi import FastAPI

app = FastAPI()


@app.get("/plain")
async def plain() -> dict[str, str]:
    return {"hello": "world"}
