"""What each step of a message does outside: ask Dify, post the answer, hand the conversation to a human.

Every step may have been tried before by a worker that died or a call that got no answer. So from the second attempt
on it looks first whether it has been done.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from sqlalchemy import select

from example_app import dispatch, turns
from example_app.clients import get_chatwoot, get_dify
from example_app.clients.dify import Answer, Question, StillAnswering
from example_app.clients.http import NotFound, OutsideError
from example_app.db.models import Message, MessageState
from example_app.logs import logger
from example_app.settings import get_settings
from example_app.turns import Done, Step
from fastapi_chatdify_db import db

Work = Callable[[Step], Awaitable[Done]]


def dify_user(chatwoot_conversation_id: str | int) -> str:
    """The Dify user of a conversation: one each, so that no customer is answered out of another's memory."""
    return f"chatwoot-conversation-{chatwoot_conversation_id}"


async def ask(dialogue_id: int, task_id: str | None) -> str:
    """Ask Dify about the oldest message that waits for it."""
    return await _do(dialogue_id, task_id, MessageState.RECEIVED, _ask)


async def respond(dialogue_id: int, task_id: str | None) -> str:
    """Post Dify's answer into the Chatwoot conversation."""
    return await _do(dialogue_id, task_id, MessageState.ANSWERED, _respond)


async def hand_over(dialogue_id: int, task_id: str | None) -> str:
    """Open the conversation for a human, and say so to the customer and to the agents."""
    return await _do(dialogue_id, task_id, MessageState.FAILED, _hand_over)


async def _do(dialogue_id: int, task_id: str | None, state: MessageState, work: Work) -> str:
    step = await turns.begin(dialogue_id, task_id, state)
    if step is None:
        return "nothing to do"
    await db.release()  # from here on no connection is held
    try:
        done = await work(step)
    except OutsideError as error:
        logger.warning("dialogue %d, message %d, attempt %d: %s", dialogue_id, step.message.id, step.attempt, error)
        await turns.put_off(step, may_pass=error.may_pass, retry_after=error.retry_after)
        return "failed"
    except Exception:
        logger.exception("dialogue %d, message %d, attempt %d", dialogue_id, step.message.id, step.attempt)
        await turns.put_off(step, may_pass=True, retry_after=0.0)
        return "failed"
    if not await turns.finish(step, done):
        await _tidy_up(step, done)
        return "overtaken"
    return done.state


async def _ask(step: Step) -> Done:
    dify = await get_dify()
    message, dialogue = step.message, step.dialogue
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
    answer = await _earlier_answer(question, step) if step.attempt > 1 else None
    if answer is None:
        try:
            answer = await dify.ask(question)
        except NotFound:
            if question.conversation_id is None:
                raise
            # Dify forgot the conversation: begin anew.
            answer = await dify.ask(question.model_copy(update={"conversation_id": None}))
    return Done(
        MessageState.ANSWERED,
        message={"answer": answer.answer.replace("\0", ""), "dify_message_id": answer.message_id},
        dialogue={"dify_conversation_id": answer.conversation_id},
    )


async def _earlier_answer(question: Question, step: Step) -> Answer | None:
    """What Dify answered to an earlier attempt; the conversation that it stands in becomes the question's."""
    dify = await get_dify()
    # The user has one, and it need not be the one we know: an earlier attempt may have begun it.
    question.conversation_id = await dify.latest_conversation(question.user)
    if question.conversation_id is None:
        return None
    mine = Message.dialogue_id == step.dialogue.id
    known = await db.session.scalars(select(Message.dify_message_id).where(mine))
    ids = [message_id for message_id in known if message_id is not None]
    await db.release()
    try:
        return await dify.find_answer(question.query, question.user, question.conversation_id, ids)
    except StillAnswering:
        if step.attempt > get_settings().celery_task_max_retries:
            return None  # it never will
        raise


async def _respond(step: Step) -> Done:
    if step.message.answer:
        await _post_once(step, step.message.answer, "answer")
    return Done(MessageState.POSTED, message={}, dialogue={})


async def _hand_over(step: Step) -> Done:
    settings = get_settings()
    chatwoot = await get_chatwoot()
    await chatwoot.set_status(step.dialogue.chatwoot_conversation_id, "open")
    if step.message.conversation_status == "pending" and settings.bot_error_message_internal:
        await _post_once(step, settings.bot_error_message_internal, "note", private=True)
    if settings.bot_conversation_opened_message_external:
        await _post_once(step, settings.bot_conversation_opened_message_external, "opened")
    return Done(MessageState.HANDED_OVER, message={}, dialogue={"status": "open"})


async def _post_once(step: Step, content: str, what: str, *, private: bool = False) -> None:
    chatwoot = await get_chatwoot()
    conversation = step.dialogue.chatwoot_conversation_id
    marker = f"{step.message.chatwoot_message_id}:{what}"
    if step.attempt > 1 and await chatwoot.has_message(conversation, marker):
        return
    await chatwoot.send_message(conversation, content, private=private, marker=marker)


async def _tidy_up(step: Step, done: Done) -> None:
    """A dialogue that was deleted while Dify answered leaves a conversation over, which nobody else knows of."""
    left_over = done.dialogue.get("dify_conversation_id")
    if left_over and await turns.is_gone(step.dialogue.id):
        dispatch.dispatch_deletion(left_over, dify_user(step.dialogue.chatwoot_conversation_id))
