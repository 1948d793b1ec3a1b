"""Dialogues, stored and listed: one model, and what the promise means for its routes."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from sqlalchemy import UniqueConstraint, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Mapped, mapped_column

from fastapi_chatdify_db import Base, db, get_session, health_router

Session = Annotated[AsyncSession, Depends(get_session)]


class Dialogue(Base):
    """A conversation; that its number is unique, PostgreSQL checks at COMMIT."""

    __tablename__ = "dialogue"
    __table_args__ = (UniqueConstraint("conversation", deferrable=True, initially="DEFERRED"),)

    id: Mapped[int] = mapped_column(primary_key=True, init=False)
    conversation: Mapped[int]
    status: Mapped[str] = mapped_column(default="pending")


class NewDialogue(BaseModel):
    """What a client sends to open a dialogue."""

    conversation: Annotated[int, Field(gt=0)]


class DialogueOut(BaseModel):
    """What a client is told about a dialogue."""

    model_config = {"from_attributes": True}

    id: int
    conversation: int
    status: str


app = FastAPI(title="Dialogues")
db.init_app(app)
app.include_router(health_router)


@app.exception_handler(IntegrityError)
async def conflict(request: Request, error: IntegrityError) -> JSONResponse:
    """Also reached by a constraint that only fails at COMMIT, after the endpoint returned."""
    return JSONResponse({"detail": "There is a dialogue for this conversation."}, status_code=409)


@app.post("/dialogues", status_code=201)
async def open_dialogue(new: NewDialogue, session: Session) -> DialogueOut:
    """Store a dialogue; the client reads 201 when the row is committed, and not before."""
    dialogue = Dialogue(new.conversation)
    session.add(dialogue)
    await session.flush()
    return DialogueOut.model_validate(dialogue)


@app.get("/dialogues")
async def list_dialogues(session: Session) -> list[DialogueOut]:
    """All dialogues, in the order of their conversations."""
    dialogues = await session.scalars(select(Dialogue).order_by(Dialogue.conversation))
    return [DialogueOut.model_validate(dialogue) for dialogue in dialogues]


@app.post("/dialogues/{conversation}/close")
def close_dialogue(conversation: int) -> DialogueOut:
    """The same in a ``def`` endpoint, with the synchronous session."""
    dialogue = db.sync_session.scalar(select(Dialogue).where(Dialogue.conversation == conversation))
    if dialogue is None:
        raise HTTPException(404, "There is no such dialogue.")
    dialogue.status = "closed"
    return DialogueOut.model_validate(dialogue)
