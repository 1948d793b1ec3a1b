"""The tables: a dialogue, its messages with their state, and the webhooks that were received."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Final

from sqlalchemy import BigInteger, DateTime, Enum, ForeignKey, Text, func
from sqlalchemy.orm import Mapped, mapped_column, relationship

from fastapi_chatdify_db import Base

Timestamp: Final = DateTime(timezone=True)


class MessageState(StrEnum):
    """How far a message has got."""

    RECEIVED = "received"
    ANSWERED = "answered"
    POSTED = "posted"
    FAILED = "failed"
    HANDED_OVER = "handed_over"
    UNDELIVERABLE = "undeliverable"


FINISHED: Final = (MessageState.POSTED, MessageState.HANDED_OVER, MessageState.UNDELIVERABLE)


class Dialogue(Base):
    """A Chatwoot conversation and the Dify conversation that answers it."""

    __tablename__ = "dialogue"

    id: Mapped[int] = mapped_column(BigInteger, primary_key=True, init=False)
    chatwoot_conversation_id: Mapped[str] = mapped_column(Text, unique=True)
    dify_conversation_id: Mapped[str | None] = mapped_column(Text, index=True, default=None)
    status: Mapped[str] = mapped_column(Text, default="pending", server_default="pending")
    assignee_id: Mapped[int | None] = mapped_column(BigInteger, default=None)
    handed_over_at: Mapped[datetime | None] = mapped_column(Timestamp, init=False, default=None)  # the last time
    created_at: Mapped[datetime] = mapped_column(Timestamp, init=False, server_default=func.now())
    updated_at: Mapped[datetime] = mapped_column(Timestamp, init=False, server_default=func.now(), onupdate=func.now())


class Message(Base):
    """A customer's message: what was asked, what Dify answered, and how far it got."""

    __tablename__ = "message"

    id: Mapped[int] = mapped_column(BigInteger, primary_key=True, init=False)
    dialogue_id: Mapped[int] = mapped_column(ForeignKey("dialogue.id", ondelete="CASCADE"), index=True)
    chatwoot_message_id: Mapped[int] = mapped_column(BigInteger, unique=True)
    content: Mapped[str] = mapped_column(Text)
    message_type: Mapped[str] = mapped_column(Text, default="incoming")
    conversation_status: Mapped[str] = mapped_column(Text, default="pending")
    state: Mapped[MessageState] = mapped_column(
        Enum(MessageState, native_enum=False, length=16, values_callable=lambda states: [str(s) for s in states]),
        default=MessageState.RECEIVED,
    )
    attempts: Mapped[int] = mapped_column(default=0)  # at the step that comes next
    answer: Mapped[str | None] = mapped_column(Text, default=None)
    dify_message_id: Mapped[str | None] = mapped_column(Text, default=None)
    workflow_status: Mapped[str | None] = mapped_column(
        Text, default=None
    )  # what a workflow has set by our API, or our hand-over
    created_at: Mapped[datetime] = mapped_column(Timestamp, init=False, server_default=func.now())
    updated_at: Mapped[datetime] = mapped_column(Timestamp, init=False, server_default=func.now(), onupdate=func.now())
    dialogue: Mapped[Dialogue] = relationship(init=False, repr=False)


class WebhookDelivery(Base):
    """A webhook that was received, so that its repetition does nothing."""

    __tablename__ = "webhook_delivery"

    id: Mapped[int] = mapped_column(BigInteger, primary_key=True, init=False)
    delivery_id: Mapped[str] = mapped_column(Text, unique=True)
    event: Mapped[str] = mapped_column(Text)
    received_at: Mapped[datetime] = mapped_column(Timestamp, init=False, server_default=func.now(), index=True)
