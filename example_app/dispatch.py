"""Which task a message needs next, and how a task gets to a worker: this is the one place."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Final

import celery_ext
from example_app.db.models import Message, MessageState
from example_app.worker import app

PROCESS: Final = "chatdify.process_message_with_dify"
RESPOND: Final = "chatdify.handle_dify_response"
HAND_OVER: Final = "chatdify.handle_dify_error"
DELETE: Final = "chatdify.delete_dify_conversation"

_TASKS: Final = {
    MessageState.RECEIVED: PROCESS,
    MessageState.ASKING: PROCESS,
    MessageState.ANSWERED: RESPOND,
    MessageState.POSTING: RESPOND,
    MessageState.FAILED: HAND_OVER,
    MessageState.HANDING_OVER: HAND_OVER,
}


def dispatch_for(message: Message) -> None:
    """Send the task that does the next step of a message, when it is due and this unit of work has committed."""
    wait = (message.due_at - datetime.now(UTC)).total_seconds()
    _send(_TASKS[message.state], [message.dialogue_id], wait)


def dispatch_processing(dialogue_id: int) -> None:
    """Send the task that answers the dialogue's messages, once this unit of work has committed."""
    _send(PROCESS, [dialogue_id])


def dispatch_deletion(dify_conversation_id: str, user: str) -> None:
    """Send the task that deletes a Dify conversation, once this unit of work has committed."""
    _send(DELETE, [dify_conversation_id, user])


def _send(name: str, args: list[int | str], countdown: float = 0.0) -> None:
    # A broker that is down is logged and no more: the message's row is the truth, and resume_dialogues looks for it.
    task = app.tasks[name]
    assert isinstance(task, celery_ext.Task)
    task.apply_async_on_commit(args, countdown=countdown if countdown > 0 else None)
