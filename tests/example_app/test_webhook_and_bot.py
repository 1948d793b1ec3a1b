"""Whom the bot answers, and what a webhook leaves for the worker."""

from __future__ import annotations

import httpx
import pytest

from example_app.tasks import delete_dify_conversation
from tests.example_app.conftest import WEBHOOK_SECRET, Configure, rows
from tests.example_app.test_webhook import PATH, deliver, message


@pytest.mark.parametrize("setting", ["BOT_ERROR_MESSAGE_INTERNAL", "BOT_CONVERSATION_OPENED_MESSAGE_EXTERNAL"])
async def test_bot_does_not_answer_itself(client: httpx.AsyncClient, configure: Configure, setting: str) -> None:
    """Also where it answers what agents write, which has no mark of the bot's when it comes from elsewhere."""
    configure(ALLOWED_MESSAGE_TYPES="incoming,outgoing", **{setting: "One moment"})
    response = await deliver(client, message(content="One moment, please", message_type="outgoing"))
    assert response.json() == {"status": "skipped", "reason": "the bot's own message"}


async def test_message_is_stored_as_it_came(client: httpx.AsyncClient, configure: Configure) -> None:
    """With its direction and its conversation's status, which Dify is told."""
    configure(ALLOWED_MESSAGE_TYPES="incoming,outgoing")
    changes = message(message_type="outgoing", conversation={"id": 7, "status": "open"})
    assert (await deliver(client, changes)).json()["status"] == "processing"
    assert await rows("SELECT message_type, conversation_status FROM message") == [("outgoing", "open")]
    assert await rows("SELECT status FROM dialogue") == [("open",)]


async def test_message_without_a_sender(client: httpx.AsyncClient) -> None:
    """It is no bot's."""
    assert (await deliver(client, message(sender=None))).json()["status"] == "processing"


async def test_deleted_conversation_is_deleted_in_dify(client: httpx.AsyncClient) -> None:
    """Once, by a task that waits for the question under way; of a conversation that is not known nothing is there."""
    for number in (7, 9):
        await deliver(client, message(id=number, conversation={"id": number}))
    for conversation in (7, 7, 8):
        response = await deliver(client, {"event": "conversation_deleted", "id": conversation})
        assert response.json() == {"status": "success"}
    tasks = "SELECT arguments::json -> 0 ->> 0, ordering_key FROM durable_task WHERE name = '{}'"
    assert await rows(tasks.format(delete_dify_conversation.name)) == [("7", "ask 7")]
    assert await rows("SELECT chatwoot_conversation_id FROM dialogue") == [("9",)]


@pytest.mark.parametrize(("delivery", "status"), [("x" * 255, 200), ("x" * 256, 422), ("\xe9", 422), ("a\tb", 422)])
async def test_strange_delivery_ids(client: httpx.AsyncClient, delivery: str, status: int) -> None:
    """An id is short and printable, or the webhook is refused."""
    headers = {b"X-Chatwoot-Delivery": delivery.encode("latin-1")}
    response = await client.post(f"{PATH}?secret={WEBHOOK_SECRET}", json=message(), headers=headers)
    assert response.status_code == status
    assert await rows("SELECT count(*) FROM webhook_delivery") == [(status == 200,)]
