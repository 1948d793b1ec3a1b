"""An attempt at one step of a message: counted before it begins, made again later, given up after a few.

The durable task's row ensures that there is an attempt, and only one at a time. Its outcome is committed together with
the end of that row and with the task of the next step.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

from celery.exceptions import Ignore
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import joinedload
from sqlalchemy.orm.exc import StaleDataError

import celery_ext
from example_app.clients.chatwoot import PerhapsRefused
from example_app.clients.http import UpstreamError
from example_app.db import db
from example_app.db.models import Message, MessageState
from example_app.logs import logger
from example_app.settings import get_settings

Work = Callable[[Message], Awaitable[MessageState]]
"""Does a step outside, holding no connection; notes the outcome and returns the message's next state."""

_LONGEST_PAUSE: Final = 300.0  # seconds


async def attempt(task: celery_ext.Task, message_id: int, work: Work, given_up: MessageState | None) -> Message:
    """Do ``work`` once.

    Parameters:
        task: The task that makes the attempt, to be retried.
        message_id: The message.
        work: The step.
        given_up: The message's state after ``CELERY_TASK_MAX_RETRIES`` retries or a failure that will not pass; None
            for a step that is tried for as long as its failure may pass.

    Returns:
        The message, in its new state.

    Raises:
        celery.exceptions.Retry: It failed, and is tried again later.
        celery.exceptions.Ignore: The dialogue was deleted, or another worker has the message.
        UpstreamError: There is no giving up, and the failure will not pass, or is a ``PerhapsRefused`` after as many
            attempts: the task has failed.
    """
    try:
        message = await db.session.get(Message, message_id, options=[joinedload(Message.dialogue)])
        if message is None:
            raise Ignore("deleted")
        message.attempts += 1
        await db.release()  # the attempt counts from here on, and no connection is held
        message.state = await _outcome(task, message, work, given_up)
        message.attempts = 0
        await db.session.flush()
    except StaleDataError as error:
        raise Ignore("deleted meanwhile") from error
    return message


async def _outcome(task: celery_ext.Task, message: Message, work: Work, given_up: MessageState | None) -> MessageState:
    settings = get_settings()
    retries = settings.celery_task_max_retries
    handed_over_at = message.dialogue.handed_over_at
    if handed_over_at is not None and message.created_at <= handed_over_at:
        # It waited when an earlier message was handed over, so the human who got the conversation has it too.
        return MessageState.HANDED_OVER
    if given_up is not None and message.attempts > retries + 1:  # the worker died each time
        return given_up
    try:
        async with asyncio.timeout(settings.celery_task_soft_time_limit):
            return await work(message)
    except (SQLAlchemyError, Ignore):
        raise  # celery_ext decides whether it may pass, or has found that another worker has the message
    except Exception as error:
        foreseen = isinstance(error, (UpstreamError, TimeoutError))
        logger.warning("message %d, attempt %d: %r", message.id, message.attempts, error, exc_info=not foreseen)
        if message.attempts <= retries:
            again = not isinstance(error, UpstreamError) or error.may_pass
        else:
            again = given_up is None and _may_pass_later(error)
        if again:
            raise task.retry(exc=error, countdown=pause(message.attempts, error)) from error
        if given_up is None:
            raise
        return given_up


def pause(attempts: int, error: Exception) -> float:
    """Seconds until the next attempt, five minutes at most even if the API asks for more.

    Parameters:
        attempts: How many have failed.
        error: What the last one failed with.
    """
    backoff = get_settings().celery_retry_countdown * 2.0 ** min(attempts - 1, 20)
    asked = error.retry_after if isinstance(error, UpstreamError) else 0.0
    return min(max(backoff, asked), _LONGEST_PAUSE)


def _may_pass_later(error: Exception) -> bool:
    """Whether a failure that outlasted the retries may pass some day."""
    if isinstance(error, UpstreamError):
        # If it stays, each try of a hand-over sets the conversation's status and posts in vain.
        return error.may_pass and not isinstance(error, PerhapsRefused)
    return isinstance(error, TimeoutError)  # an API that hangs may answer later; a bug of ours stays
