"""Dialogues and their messages in the database: stored without races, each webhook once."""

from __future__ import annotations

from datetime import timedelta
from typing import Final

from sqlalchemy import delete, func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from example_app.db import db
from example_app.db.models import FINISHED, Dialogue, Message, MessageState, WebhookDelivery
from example_app.events import MessageCreated, WebhookConversation

DELIVERIES_KEPT: Final = timedelta(days=7)
"""Longer than anybody sends the same webhook again."""


async def is_new_delivery(delivery_id: str, event: str) -> bool:
    """Remember a webhook's delivery id; False when it is known. The same id at the same time waits for our commit."""
    known = insert(WebhookDelivery).values(delivery_id=delivery_id, event=event).on_conflict_do_nothing()
    return (await db.session.execute(known.returning(WebhookDelivery.id))).first() is not None


def forget_old_deliveries(session: Session) -> None:
    """Delete the deliveries older than ``DELIVERIES_KEPT``."""
    session.execute(delete(WebhookDelivery).where(WebhookDelivery.received_at < func.now() - DELIVERIES_KEPT))


async def upsert_dialogue(conversation: WebhookConversation) -> int:
    """Find or make the conversation's dialogue and bring it up to date; any number at once make one.

    Returns:
        Its id. Its row is locked until the unit ends, so that messages of one conversation are stored one by one.
    """
    facts: dict[str, str | int | None] = {"status": conversation.status}
    if "meta" in conversation.model_fields_set:
        facts |= {"assignee_id": conversation.assignee_id}
    statement = insert(Dialogue).values(chatwoot_conversation_id=str(conversation.id), **facts)
    statement = statement.on_conflict_do_update(
        index_elements=[Dialogue.chatwoot_conversation_id], set_=facts | {"updated_at": func.now()}
    )
    return (await db.session.execute(statement.returning(Dialogue.id))).scalar_one()


async def store_message(dialogue_id: int, event: MessageCreated) -> int | None:
    """Store a message to be answered; returns its id, or None when it is stored already."""
    statement = insert(Message).values(
        dialogue_id=dialogue_id,
        chatwoot_message_id=event.id,
        content=event.content,
        message_type=event.message_type,
        conversation_status=event.conversation.status,
        state=MessageState.RECEIVED,
        attempts=0,
    )
    return (await db.session.execute(statement.on_conflict_do_nothing().returning(Message.id))).scalar()


async def note_workflow_status(conversation_id: int, status: str) -> None:
    """Remember that the workflow which is answering a message of the conversation sets its status.

    Unless it opens the conversation, note that for all messages under way: no human sees them, so they are to be
    answered.
    """
    in_conversation = Message.dialogue.has(Dialogue.chatwoot_conversation_id == str(conversation_id))
    concerned = update(Message).where(in_conversation, Message.state.not_in(FINISHED))
    if status == "open":
        concerned = concerned.where(Message.state == MessageState.RECEIVED, Message.attempts > 0)
    await db.session.execute(concerned.values(workflow_status=status))


async def delete_dialogue(conversation: WebhookConversation) -> bool:
    """Delete the conversation's dialogue with its messages; False when there is none."""
    gone = delete(Dialogue).where(Dialogue.chatwoot_conversation_id == str(conversation.id))
    return (await db.session.execute(gone.returning(Dialogue.id))).first() is not None


async def find_by_conversation(conversation_id: int) -> Dialogue | None:
    """The dialogue of a Chatwoot conversation."""
    return await db.session.scalar(select(Dialogue).where(Dialogue.chatwoot_conversation_id == str(conversation_id)))


async def find_by_dify_conversation(dify_conversation_id: str) -> Dialogue | None:
    """The dialogue of a Dify conversation."""
    return await db.session.scalar(select(Dialogue).where(Dialogue.dify_conversation_id == dify_conversation_id))
