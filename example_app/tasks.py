"""The tasks: each does one step of one message, and the next one is dispatched with what it stored.

A conversation has two lines, in which its tasks wait. Dify is asked one question after the other, each with all that
was said before; what came of them goes to Chatwoot one after the other, in that order, while the next question is being
answered.
"""

from __future__ import annotations

from typing import Final

import celery_ext
from celery_ext.durable import administration
from example_app import dialogues, steps
from example_app.attempts import attempt, pause
from example_app.clients import get_dify
from example_app.clients.http import UpstreamError
from example_app.db import db
from example_app.db.models import Message, MessageState
from example_app.worker import app

TASKS_KEPT: Final = 7
"""Days for which the rows of tasks that are done are kept."""


# max_retries=None: Message.attempts counts instead, which also counts those whose worker died.
@app.task(bind=True, name="chatdify.process_message_with_dify", max_retries=None)
async def process_message_with_dify(self: celery_ext.Task, message_id: int) -> str:
    """Ask Dify about a message; returns the message's state."""
    return _go_on(await attempt(self, message_id, steps.ask, MessageState.FAILED))


@app.task(bind=True, name="chatdify.handle_dify_response", max_retries=None)
async def handle_dify_response(self: celery_ext.Task, message_id: int) -> str:
    """Post Dify's answer; returns the message's state."""
    return _go_on(await attempt(self, message_id, steps.respond, MessageState.FAILED))


@app.task(bind=True, name="chatdify.handle_dify_error", max_retries=None)
async def handle_dify_error(self: celery_ext.Task, message_id: int) -> str:
    """Hand the conversation to a human; returns the message's state."""
    return _go_on(await attempt(self, message_id, steps.hand_over, given_up=None))


@app.task(bind=True, name="chatdify.delete_dify_conversation", max_retries=None)
async def delete_dify_conversation(self: celery_ext.Task, chatwoot_conversation_id: str) -> None:
    """Delete what Dify has of a conversation that Chatwoot deleted."""
    dify = await get_dify()
    user = steps.dify_user(chatwoot_conversation_id)
    await db.release()
    try:
        for conversation in await dify.conversations(user):
            await dify.delete_conversation(conversation, user)
    except UpstreamError as error:
        if not error.may_pass:
            raise
        raise self.retry(exc=error, countdown=pause(self.request.retries + 1, error)) from error


@app.task(name="chatdify.forget_old_deliveries")
def forget_old_deliveries() -> None:
    """Delete webhook deliveries that are too old to be repeated, and the rows of old tasks."""
    dialogues.forget_old_deliveries(db.sync_session)
    administration.prune(db, TASKS_KEPT)


STEPS: Final = {
    MessageState.RECEIVED: (process_message_with_dify, "ask"),
    MessageState.ANSWERED: (handle_dify_response, "tell"),
    MessageState.FAILED: (handle_dify_error, "tell"),
}
"""By a message's state: the task whose turn it is, and its line."""


def dispatch_step(message_id: int, state: MessageState, conversation: str) -> None:
    """Store, with this unit of work, the task that goes on from ``state``; a finished message needs none.

    Parameters:
        conversation: The message's conversation in Chatwoot.
    """
    if state in STEPS:
        task, line = STEPS[state]
        task.apply_durably([message_id], ordering_key=f"{line} {conversation}")


def dispatch_deletion(conversation: str) -> None:
    """Store, with this unit of work, the task that deletes in Dify what it has of a conversation.

    It waits for the question under way, which may begin another conversation there.
    """
    delete_dify_conversation.apply_durably([conversation], ordering_key=f"ask {conversation}")


def _go_on(message: Message) -> MessageState:
    dispatch_step(message.id, message.state, message.dialogue.chatwoot_conversation_id)
    return message.state
