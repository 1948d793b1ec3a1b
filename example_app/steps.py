"""The steps of a message, which call the outside APIs: ask Dify, post the answer, hand over to a human.

An earlier attempt may have died, or got no answer, after its call was made. So from the second attempt on, each step
looks first whether it has been done.
"""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Final

from sqlalchemy import func, select

from example_app.clients import get_chatwoot, get_dify
from example_app.clients.dify import Answer, Question, StillAnswering
from example_app.clients.http import NotFound, Rejected
from example_app.db import db
from example_app.db.models import Message, MessageState
from example_app.logs import logger
from example_app.settings import get_settings

_CLOCK_SKEW: Final = 60.0
"""Seconds by which Dify's clock may differ from ours."""


def dify_user(chatwoot_conversation_id: str | int) -> str:
    """The Dify user of a conversation: one each, so that no customer is answered out of another's memory."""
    return f"chatwoot-{get_settings().chatwoot_account_id}-conversation-{chatwoot_conversation_id}"


async def ask(message: Message) -> MessageState:
    """Ask Dify, in the dialogue's conversation there."""
    dify = await get_dify()
    dialogue = message.dialogue
    question = Question(
        query=message.content,
        user=dify_user(dialogue.chatwoot_conversation_id),
        conversation_id=dialogue.dify_conversation_id,
        inputs={
            "chatwoot_conversation_id": dialogue.chatwoot_conversation_id,
            "conversation_status": message.conversation_status,
            "message_direction": message.message_type,
        },
    )
    answer = await _earlier_answer(question, message) if message.attempts > 1 else None
    if answer is None:
        try:
            answer = await dify.ask(question)
        except NotFound:
            if question.conversation_id is None:
                raise
            # Dify forgot the conversation: begin anew.
            answer = await dify.ask(question.model_copy(update={"conversation_id": None}))
    # A pair of surrogates may come in two events. What PostgreSQL does not store: NUL, and half of a pair.
    message.answer = answer.answer.replace("\0", "").encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    message.dify_message_id = answer.message_id
    dialogue.dify_conversation_id = answer.conversation_id
    return MessageState.ANSWERED


async def _earlier_answer(question: Question, message: Message) -> Answer | None:
    """Dify's answer to an earlier attempt; its conversation becomes the question's."""
    dify = await get_dify()
    # Not always the dialogue's: an earlier attempt may have begun a new conversation.
    question.conversation_id = next(iter(await dify.conversations(question.user)), None)
    if question.conversation_id is None:
        return None
    mine = Message.dialogue_id == message.dialogue_id
    known = await db.session.scalars(select(Message.dify_message_id).where(mine))
    ids = [message_id for message_id in known if message_id is not None]
    await db.release()
    try:
        since = message.created_at.timestamp() - _CLOCK_SKEW
        return await dify.find_answer(question.query, question.user, question.conversation_id, ids, since)
    except StillAnswering as error:
        seconds_ago = time.time() - error.asked_at
        if seconds_ago > get_settings().celery_task_soft_time_limit:
            return None  # it never will answer
        if seconds_ago >= -_CLOCK_SKEW:  # a clock far ahead of ours would have us wait without end
            message.attempts -= 1  # waiting for the answer is no attempt
            await db.release()
        raise


async def respond(message: Message) -> MessageState:
    """Post Dify's answer into the Chatwoot conversation, unless that has become a human's meanwhile."""
    if message.answer and message.answer.strip():
        if not await _belongs_to_human(message):
            await _post_once(message, message.answer, "answer")
        elif not await _is_posted(message, "answer"):
            logger.info("message %d: its answer is withheld, a human has the conversation", message.id)
            return MessageState.HANDED_OVER
    return MessageState.POSTED


async def hand_over(message: Message) -> MessageState:
    """Open the conversation for a human, and say so to the customer and to the agents, unless a human has it."""
    settings = get_settings()
    chatwoot = await get_chatwoot()
    try:
        with suppress(Rejected):  # if the key may not read, go on as if no human had the conversation
            if await _belongs_to_human(message):
                if message.workflow_status == "open":  # as the human who has it since found it
                    message.dialogue.handed_over_at = func.now()
                return MessageState.HANDED_OVER
        message.workflow_status = "open"
        await db.release()  # noted first: if Chatwoot's answer is lost, the next attempt knows that it was us
        await chatwoot.set_status(message.dialogue.chatwoot_conversation_id, "open")
        if message.conversation_status == "pending" and settings.bot_error_message_internal:
            await _post_once(message, settings.bot_error_message_internal, "note", private=True)
        if settings.bot_conversation_opened_message_external:
            await _post_once(message, settings.bot_conversation_opened_message_external, "opened")
    except NotFound:
        return MessageState.UNDELIVERABLE  # there is no such conversation any more
    message.dialogue.status = "open"
    message.dialogue.handed_over_at = func.now()
    return MessageState.HANDED_OVER


async def _belongs_to_human(message: Message) -> bool:
    """Whether the conversation has a status that the bot leaves alone, unless Dify's workflow or we have set it."""
    chatwoot = await get_chatwoot()
    conversation = await chatwoot.conversation(message.dialogue.chatwoot_conversation_id)
    if conversation.status in get_settings().allowed_conversation_statuses:
        return False
    # Read anew: the workflow of the next message may have set it in the middle of this attempt.
    noted = await db.session.scalar(select(Message.workflow_status).where(Message.id == message.id))
    await db.release()
    return conversation.status != noted


async def _post_once(message: Message, content: str, what: str, *, private: bool = False) -> None:
    if await _is_posted(message, what):
        return
    chatwoot = await get_chatwoot()
    conversation = message.dialogue.chatwoot_conversation_id
    await chatwoot.send_message(conversation, content, private=private, marker=_marker(message, what))


async def _is_posted(message: Message, what: str) -> bool:
    """Whether an earlier attempt has posted this."""
    if message.attempts == 1:
        return False
    chatwoot = await get_chatwoot()
    conversation, after = message.dialogue.chatwoot_conversation_id, message.chatwoot_message_id
    return await chatwoot.has_message(conversation, _marker(message, what), after)


def _marker(message: Message, what: str) -> str:
    return f"{message.chatwoot_message_id}:{what}"
