"""The web application under chaos: each request stores what it is about and its tasks, in one transaction."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, FastAPI
from pydantic import BaseModel
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession

from tests.chaos.application import Transfer, apply_transfer, database, take_step


class NewTransfer(BaseModel):
    """A transfer, with the client's idempotency key."""

    key: str
    source: int
    target: int
    amount: int


class NewSteps(BaseModel):
    """Steps of one key, in their order."""

    key: str
    numbers: list[int]


async def session() -> AsyncSession:
    """The request's session."""
    return database.session


app = FastAPI()
database.init_app(app)


@app.get("/ready")
async def ready(session: Annotated[AsyncSession, Depends(session)]) -> None:
    """The lifespan is through: the tables are there."""


@app.post("/transfers", status_code=201)
async def post_transfer(new: NewTransfer, session: Annotated[AsyncSession, Depends(session)]) -> str:
    """Store a transfer once, however often the client asks."""
    await session.execute(insert(Transfer).values(**new.model_dump()).on_conflict_do_nothing())
    return apply_transfer.apply_durably([new.key], idempotency_key=new.key)


@app.post("/steps", status_code=201)
async def post_steps(new: NewSteps) -> None:
    """Store some steps of a key."""
    for number in new.numbers:
        take_step.apply_durably([new.key, number], ordering_key=new.key, idempotency_key=f"{new.key}/{number}")
