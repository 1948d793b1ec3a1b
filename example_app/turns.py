"""Turns: one task at a time works on a dialogue, on its oldest unfinished message, and holds no connection meanwhile.

A turn is a lease on the dialogue's row. ``begin`` takes it and notes that a call may be under way; ``finish`` writes
what became of it, ends the turn and dispatches the next task, all in one transaction. A task that finds the turn taken
leaves: the one who has it looks for what is left when it finishes, under the same row lock. When a worker dies, the
redelivered task (it has the same id) takes the turn over; anybody does once the lease has run out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final
from uuid import UUID, uuid4

from sqlalchemy import select

from example_app.db.models import FINISHED, Dialogue, Message, MessageState
from example_app.dispatch import dispatch_for
from example_app.logs import logger
from example_app.settings import get_settings
from fastapi_chatdify_db import db

_UNDER_WAY: Final = {
    MessageState.RECEIVED: MessageState.ASKING,
    MessageState.ANSWERED: MessageState.POSTING,
    MessageState.FAILED: MessageState.HANDING_OVER,
}
_GIVEN_UP: Final = {
    MessageState.ASKING: MessageState.FAILED,
    MessageState.POSTING: MessageState.FAILED,
    MessageState.HANDING_OVER: MessageState.UNDELIVERABLE,
}


@dataclass(frozen=True)
class Step:
    """One step of one message, which whoever holds the turn has to do. The rows are as they were when it began."""

    turn: UUID
    dialogue: Dialogue
    message: Message
    attempt: int
    """1 for the first; from 2 on, an earlier attempt may have done it already."""


@dataclass(frozen=True)
class Done:
    """What became of a step: the message's next state, and what to store with it."""

    state: MessageState
    message: Mapping[str, str | None]
    dialogue: Mapping[str, str | None]


async def begin(dialogue_id: int, task_id: str | None, state: MessageState) -> Step | None:
    """Take the dialogue's turn for a step that begins (or goes on) in ``state``.

    Returns:
        The step; None when there is nothing to do here now. The unit has to be committed before the step is done.
    """
    dialogue = await _lock(dialogue_id)
    now = datetime.now(UTC)
    if dialogue is None:
        return None
    taken = dialogue.turn_until is not None and dialogue.turn_until > now
    if taken and (task_id is None or dialogue.turn_task_id != task_id):
        return None
    message = await _oldest_unfinished(dialogue_id)
    if message is None:
        return None
    if message.state not in (state, _UNDER_WAY[state]):
        return None  # its own task was dispatched when it came into that state
    if message.due_at > now:
        dispatch_for(message)
        return None
    if message.attempts > get_settings().celery_task_max_retries:  # each time the worker died over it
        _settle(message, _GIVEN_UP[_UNDER_WAY[state]])
        dispatch_for(message)
        return None
    message.state = _UNDER_WAY[state]
    message.attempts += 1
    dialogue.turn = uuid4()
    dialogue.turn_task_id = task_id
    # Nothing outlives the hard time limit, which is counted from before now.
    dialogue.turn_until = now + timedelta(seconds=get_settings().celery_task_time_limit)
    return Step(dialogue.turn, dialogue, message, message.attempts)


async def finish(step: Step, done: Done) -> bool:
    """Store what became of a step, end the turn and dispatch what is next.

    Returns:
        False when the turn was no longer ours, or the dialogue is gone: then nothing is stored.
    """
    dialogue = await _lock(step.dialogue.id)
    if dialogue is None or dialogue.turn != step.turn:
        logger.warning("dialogue %d: another task took over, or it was deleted", step.dialogue.id)
        return False
    message = await db.session.get_one(Message, step.message.id, populate_existing=True)
    for name, value in done.message.items():
        setattr(message, name, value)
    for name, value in done.dialogue.items():
        setattr(dialogue, name, value)
    _settle(message, done.state)
    await _end(dialogue)
    return True


async def put_off(step: Step, *, may_pass: bool, retry_after: float) -> None:
    """End the turn of a step that failed: once more later, or given up.

    Parameters:
        step: What failed.
        may_pass: Whether trying again may help.
        retry_after: Seconds to wait at least.
    """
    settings = get_settings()
    dialogue = await _lock(step.dialogue.id)
    if dialogue is None or dialogue.turn != step.turn:
        return
    message = await db.session.get_one(Message, step.message.id, populate_existing=True)
    if may_pass and step.attempt <= settings.celery_task_max_retries:
        pause = max(retry_after, settings.celery_retry_countdown * 2 ** (step.attempt - 1))
        message.due_at = datetime.now(UTC) + timedelta(seconds=pause)
    else:
        _settle(message, _GIVEN_UP[message.state])
    await _end(dialogue)


async def _end(dialogue: Dialogue) -> None:
    dialogue.turn = dialogue.turn_task_id = dialogue.turn_until = None
    await db.session.flush()
    if (waiting := await _oldest_unfinished(dialogue.id)) is not None:
        dispatch_for(waiting)


async def _lock(dialogue_id: int) -> Dialogue | None:
    return await db.session.get(Dialogue, dialogue_id, with_for_update=True, populate_existing=True)


async def _oldest_unfinished(dialogue_id: int) -> Message | None:
    query = select(Message).where(Message.dialogue_id == dialogue_id, Message.state.not_in(FINISHED))
    return await db.session.scalar(query.order_by(Message.id).limit(1))


def _settle(message: Message, state: MessageState) -> None:
    message.state = state
    message.attempts = 0
    message.due_at = datetime.now(UTC)


async def is_gone(dialogue_id: int) -> bool:
    """Whether the dialogue was deleted."""
    return await _lock(dialogue_id) is None
