"""Which task does the next step of a message, and in which line it waits: decided here alone.

A conversation has two lines. Dify is asked one question after the other, each with all that was said before; what
came of them goes to Chatwoot one after the other, in that order, while the next question is being answered.
"""

from __future__ import annotations

from typing import Final

import celery_ext
from example_app.db.models import MessageState
from example_app.worker import app

PROCESS: Final = "chatdify.process_message_with_dify"
RESPOND: Final = "chatdify.handle_dify_response"
HAND_OVER: Final = "chatdify.handle_dify_error"
DELETE: Final = "chatdify.delete_dify_conversation"

STEPS: Final = {
    MessageState.RECEIVED: (PROCESS, "ask"),
    MessageState.ANSWERED: (RESPOND, "tell"),
    MessageState.FAILED: (HAND_OVER, "tell"),
}
"""By a message's state: the task whose turn it is, and its line."""


def dispatch_step(message_id: int, state: MessageState, conversation: str) -> None:
    """Store, with this unit of work, the task that goes on from ``state``; a finished message needs none.

    Parameters:
        conversation: The message's conversation in Chatwoot.
    """
    if state in STEPS:
        name, line = STEPS[state]
        _send(name, message_id, f"{line} {conversation}")


def dispatch_deletion(conversation: str) -> None:
    """Store, with this unit of work, the task that deletes in Dify what it has of a conversation.

    It waits for the question under way, which may begin another conversation there.
    """
    _send(DELETE, conversation, f"ask {conversation}")


def _send(name: str, argument: int | str, ordering_key: str) -> None:
    task = app.tasks[name]
    assert isinstance(task, celery_ext.Task)
    task.apply_durably([argument], ordering_key=ordering_key)
