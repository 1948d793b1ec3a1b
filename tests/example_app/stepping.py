"""Doing the steps of a message one by one, as a worker does."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from example_app.clients.http import UpstreamError
from example_app.dialogues import store_message, upsert_dialogue
from example_app.events import MessageCreated, WebhookConversation
from example_app.fakes.dify import DifyConversation
from example_app.fakes.faults import Fault
from example_app.tasks import handle_dify_error, handle_dify_response, process_message_with_dify
from fastapi_chatdify_db import db
from tests.example_app.conftest import Outside, rows

Step = Callable[[int], Awaitable[str]]
ASK = ("POST", "/chat-messages")

ask: Step = process_message_with_dify
respond: Step = handle_dify_response
hand_over: Step = handle_dify_error


async def run(step: Step, message_id: int) -> str:
    """Do a step as a worker does: returns the message's state, or "again" when the task asks to be retried."""
    try:
        async with db.transaction():
            return await step(message_id)
    except UpstreamError:
        return "again"


async def until_answered(outside: Outside) -> None:
    """Return when Dify has an answer to every question."""
    while any(not message.answer for each in outside.dify.conversations.values() for message in each.messages):
        await asyncio.sleep(0.01)


async def receive(outside: Outside, *contents: str, status: str = "pending") -> list[int]:
    """Store messages of conversation 7; returns their ids."""
    outside.chatwoot.conversation(7)
    stored = []
    async with db.transaction():
        for number, content in enumerate(contents, 1):
            conversation = WebhookConversation(id=7, status=status)
            dialogue_id = await upsert_dialogue(conversation)
            event = MessageCreated(
                event="message_created", id=number, content=content, message_type="incoming", conversation=conversation
            )
            message_id = await store_message(dialogue_id, event)
            assert message_id is not None
            stored.append(message_id)
    return stored


async def dispatched() -> list[tuple[object, ...]]:
    """The tasks that are stored, and the lines that they wait in."""
    return await rows("SELECT name, arguments::json -> 0 ->> 0, ordering_key FROM durable_task ORDER BY seq")


async def states() -> list[str]:
    """The messages' states, the oldest first."""
    return [str(state) for (state,) in await rows("SELECT state FROM message ORDER BY id")]


async def ask_in_vain(outside: Outside, status: int) -> tuple[int, DifyConversation]:
    """Have a question answered when nobody listens any more; returns the message and Dify's conversation."""
    [message] = await receive(outside, "Hello")
    outside.dify.faults.add(Fault(*ASK, status, too_late=True))
    assert await run(ask, message) == "again"
    [conversation] = outside.dify.conversations.values()
    return message, conversation
