"""The tasks: each does one step of one message, and the next one is dispatched with what it stored."""

from __future__ import annotations

from celery.signals import worker_ready

import celery_ext
from example_app import dialogues, dispatch, steps
from example_app.clients import get_dify
from example_app.clients.http import OutsideError
from example_app.settings import get_settings
from example_app.worker import app
from fastapi_chatdify_db import db


@app.task(bind=True, name=dispatch.PROCESS)
async def process_message_with_dify(self: celery_ext.Task, dialogue_id: int) -> str:
    """Ask Dify about the dialogue's oldest message that waits for it; returns the message's state."""
    return await steps.ask(dialogue_id, self.request.id)


@app.task(bind=True, name=dispatch.RESPOND)
async def handle_dify_response(self: celery_ext.Task, dialogue_id: int) -> str:
    """Post Dify's answer; returns the message's state."""
    return await steps.respond(dialogue_id, self.request.id)


@app.task(bind=True, name=dispatch.HAND_OVER)
async def handle_dify_error(self: celery_ext.Task, dialogue_id: int) -> str:
    """Hand the conversation to a human; returns the message's state."""
    return await steps.hand_over(dialogue_id, self.request.id)


@app.task(bind=True, name=dispatch.DELETE)
async def delete_dify_conversation(self: celery_ext.Task, dify_conversation_id: str, user: str) -> None:
    """Delete a conversation in Dify, as the user that it belongs to."""
    dify = await get_dify()
    settings = get_settings()
    try:
        await dify.delete_conversation(dify_conversation_id, user)
    except OutsideError as error:
        if not error.may_pass:
            raise
        pause = max(error.retry_after, settings.celery_retry_countdown * 2**self.request.retries)
        raise self.retry(exc=error, countdown=pause, max_retries=settings.celery_task_max_retries) from error


@app.task(name="chatdify.resume_dialogues")
async def resume_dialogues() -> int:
    """Dispatch again for messages whose task got lost: a broker was down, or forgot; returns how many dialogues."""
    waiting = await dialogues.waiting()
    for message in waiting:
        dispatch.dispatch_for(message)
    return len(waiting)


@worker_ready.connect
def _resume_at_start(**_: object) -> None:
    resume_dialogues.delay()


@app.task(name="chatdify.forget_old_deliveries")
def forget_old_deliveries() -> None:
    """Delete the webhook deliveries that are older than anybody repeats them."""
    dialogues.forget_old_deliveries(db.sync_session)
