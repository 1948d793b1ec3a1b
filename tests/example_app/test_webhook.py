"""A webhook is stored once, whatever arrives how often and at the same time."""

from __future__ import annotations

import asyncio
import json
import math
import time
from types import SimpleNamespace
from typing import Any, NoReturn

import httpx
import pytest

from example_app import dialogues
from example_app.api import security
from example_app.events import WEBHOOK_EXAMPLE
from example_app.main import create_app
from example_app.tasks import process_message_with_dify
from fastapi_chatdify_db import DatabaseUnavailable, db
from tests.example_app.conftest import WEBHOOK_SECRET, Configure, Outside, rows, signed, write
from tests.serving import serve

PATH = "/api/v1/chatwoot-webhook"


def message(**changes: object) -> dict[str, Any]:
    """A webhook about a customer's message."""
    return WEBHOOK_EXAMPLE | changes


async def deliver(client: httpx.AsyncClient, payload: Any, delivery: str | None = None) -> httpx.Response:
    """Send a webhook with a fresh signature."""
    body = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    return await client.post(PATH, content=body, headers=signed(body, str(int(time.time())), delivery))


async def test_message_is_stored_and_processing(client: httpx.AsyncClient) -> None:
    """A customer's message makes its dialogue, and is stored with the task that answers it."""
    response = await deliver(client, message())
    assert response.json() == {"status": "processing"}
    assert await rows("SELECT chatwoot_conversation_id, status FROM dialogue") == [("7", "pending")]
    assert await rows("SELECT chatwoot_message_id, content, state FROM message") == [
        (1041, "Where is my parcel?", "received")
    ]
    [(message_id,)] = await rows("SELECT id FROM message")
    task = "SELECT name, arguments::json -> 0 ->> 0, ordering_key, status FROM durable_task"
    assert await rows(task) == [(process_message_with_dify.name, str(message_id), "ask 7", "pending")]


async def test_twenty_first_webhooks_at_once_make_one_dialogue(client: httpx.AsyncClient) -> None:
    """Twenty first messages of one conversation, at the same time, make one dialogue with twenty messages."""
    responses = await asyncio.gather(*(deliver(client, message(id=number)) for number in range(1, 21)))
    assert {response.status_code for response in responses} == {200}
    assert await rows("SELECT count(*) FROM dialogue") == [(1,)]
    assert await rows("SELECT count(*) FROM message") == [(20,)]


async def test_same_delivery_three_times_at_once_is_one(client: httpx.AsyncClient) -> None:
    """The same webhook three times, concurrently: each is answered 200, one is processed."""
    responses = await asyncio.gather(*(deliver(client, message(), "delivery-1") for _ in range(3)))
    assert [response.status_code for response in responses] == [200] * 3
    assert sorted(response.json()["status"] for response in responses) == ["processing", "skipped", "skipped"]
    assert await rows("SELECT count(*) FROM message") == [(1,)]
    assert await rows("SELECT delivery_id, event FROM webhook_delivery") == [("delivery-1", "message_created")]


async def test_same_message_in_another_delivery_is_one(client: httpx.AsyncClient) -> None:
    """A message that is delivered under two ids, or under none, is stored once."""
    for delivery in ("delivery-1", "delivery-2", None, None):
        assert (await deliver(client, message(), delivery)).status_code == 200
    assert await rows("SELECT count(*) FROM message") == [(1,)]


@pytest.mark.parametrize(
    "changes",
    [
        {"message_type": "outgoing"},
        {"message_type": "activity"},
        {"message_type": "template"},
        {"private": True},
        {"sender": {"id": 1, "type": "agent_bot"}},
        {"content": ""},
        {"content": " \n"},
        {"content": None},
        {"content": "Bot unexpectedly broke down, conversation moved to open status", "message_type": "outgoing"},
        {"content": "Voice Call", "content_type": "voice_call"},
        {"content_attributes": {"email": {"auto_reply": True, "subject": "Out of office"}}},
        {"content_attributes": {"chatdify": "1:answer"}},
        {"content": "This message is unavailable.", "content_attributes": {"is_unsupported": True}},
        {"conversation": {"id": 7, "status": "resolved"}},
        {"account": {"id": 2}},
    ],
    ids=str,
)
async def test_messages_that_are_not_for_the_bot(client: httpx.AsyncClient, changes: dict[str, Any]) -> None:
    """What no customer says to the bot is acknowledged and leaves nothing."""
    response = await deliver(client, message(**changes))
    assert (response.status_code, response.json()["status"]) == (200, "skipped")
    assert await rows("SELECT count(*) FROM message") == [(0,)]


async def test_customer_who_speaks_like_the_bot(client: httpx.AsyncClient) -> None:
    """What the bot says itself is known by more than its beginning."""
    said = message(content="Bot unexpectedly broke down, conversation moved to open status? Why?")
    said["content_attributes"] = {"email": {"auto_reply": False}}
    assert (await deliver(client, said)).json()["status"] == "processing"


async def test_database_that_is_away(client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chatwoot sends an agent bot's webhook again after a 429 or a 500, and after no other status."""

    async def refuse(*_: object) -> NoReturn:
        raise DatabaseUnavailable("refused", OSError())

    with monkeypatch.context() as patch:
        patch.setattr(dialogues, "is_new_delivery", refuse)
        assert (await deliver(client, message(), "1")).status_code == 500
    assert (await deliver(client, message(), "1")).json()["status"] == "processing"
    documented = (await client.get("/openapi.json")).json()["paths"]["/api/v1/chatwoot-webhook"]["post"]["responses"]
    assert "500" in documented


async def test_pool_that_is_full(configure: Configure, own_database: str) -> None:
    """A webhook is answered 500 before Chatwoot, after five seconds, gives it up for good."""
    configure(ENVIRONMENT="development", DATABASE_URL=own_database, DB_POOL_SIZE="1", DB_MAX_OVERFLOW="0")
    async with serve(create_app()) as client:
        assert (await deliver(client, message(id=1))).status_code == 200  # the application has started
        async with asyncio.timeout(5), db.async_engine.connect():
            assert (await deliver(client, message(), "1")).status_code == 500
        assert (await deliver(client, message(), "1")).json()["status"] == "processing"


async def test_settings_widen_what_is_answered(client: httpx.AsyncClient, configure: Configure) -> None:
    """The bot answers other directions and statuses when it is told to."""
    configure(ALLOWED_MESSAGE_TYPES="incoming, outgoing", ALLOWED_CONVERSATION_STATUSES="resolved")
    changes = message(message_type="outgoing", conversation={"id": 7, "status": "resolved"})
    assert (await deliver(client, changes)).json()["status"] == "processing"


@pytest.mark.parametrize("event", ["created", "updated", "status_changed", "opened", "resolved"])
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "top level"])
async def test_conversation_events_update_the_dialogue(client: httpx.AsyncClient, event: str, nested: bool) -> None:
    """Status and assignee follow Chatwoot; what Dify calls the conversation stays."""
    event = f"conversation_{event}"
    await deliver(client, message())
    await write("UPDATE dialogue SET dify_conversation_id = 'dify-1'")
    conversation = {"id": 7, "status": "open", "meta": {"assignee": {"id": 3}}}
    payload = {"event": event} | ({"conversation": conversation} if nested else conversation)
    answer = (await deliver(client, payload)).json()
    found = await rows("SELECT id, status, assignee_id, dify_conversation_id FROM dialogue")
    assert answer == {"status": "success", "dialogue_id": found[0][0]}
    assert [row[1:] for row in found] == [("open", 3, "dify-1")]
    await deliver(client, {"event": event, "id": 7, "status": "open", "meta": {"assignee": None}})
    assert await rows("SELECT assignee_id FROM dialogue") == [(None,)]


@pytest.mark.parametrize(
    "meta",
    [{"assignee": {"id": 3, "type": "agent_bot"}}, {"assignee": {"id": 3}, "assignee_type": "AgentBot"}],
    ids=str,
)
async def test_conversation_of_an_agent_bot(client: httpx.AsyncClient, meta: dict[str, Any]) -> None:
    """A bot is no agent, although one may have its number."""
    agent = {"assignee": {"id": 3, "type": "user"}, "assignee_type": "User"}
    for told, assignee in ((agent, 3), (meta, None)):
        await deliver(client, {"event": "conversation_updated", "id": 7, "status": "open", "meta": told})
        assert await rows("SELECT assignee_id FROM dialogue") == [(assignee,)]


@pytest.mark.parametrize("event", ["conversation_updated", "conversation_deleted"])
@pytest.mark.parametrize(
    "account",
    [
        {"account": {"id": 2}, "id": 7},
        {"messages": [{"id": 1, "account_id": 2}], "id": 7},
        {"conversation": {"messages": [{"id": 1, "account_id": 2}], "id": 7}},
    ],
    ids=["named", "in its message", "nested"],
)
async def test_conversation_of_another_account(client: httpx.AsyncClient, event: str, account: dict[str, Any]) -> None:
    """A conversation that has our number in another account changes and deletes nothing here."""
    await deliver(client, message())
    response = await deliver(client, {"event": event, "status": "open"} | account)
    assert response.json() == {"status": "skipped", "reason": "another account"}
    assert await rows("SELECT status FROM dialogue") == [("pending",)]


async def test_deleted_conversation(client: httpx.AsyncClient) -> None:
    """The dialogue goes, with its messages."""
    await deliver(client, message())
    await write("UPDATE dialogue SET dify_conversation_id = 'dify-1'")
    assert (await deliver(client, {"event": "conversation_deleted", "id": 7})).json()["status"] == "success"
    assert await rows("SELECT count(*) FROM dialogue") == await rows("SELECT count(*) FROM message") == [(0,)]
    assert (await deliver(client, {"event": "conversation_deleted", "id": 7})).json()["status"] == "success"


@pytest.mark.parametrize(
    "headers",
    [
        lambda body, now: {},
        lambda body, now: signed(body, now) | {"X-Chatwoot-Signature": "sha256=" + "0" * 64},
        lambda body, now: signed(body + b" ", now),
        lambda body, now: signed(body, now) | {"X-Chatwoot-Timestamp": str(int(now) - 1)},
        lambda body, now: signed(body, str(int(now) - 301)),
        lambda body, now: signed(body, str(int(now) + 301)),
        lambda body, now: signed(body, "soon"),
        lambda body, now: signed(body, ""),
        lambda body, now: {"X-Chatwoot-Signature": signed(body, now)["X-Chatwoot-Signature"]},
    ],
    ids=["none", "wrong", "other body", "other time", "old", "of the future", "no time", "empty time", "without time"],
)
async def test_forged_webhook_is_refused(
    client: httpx.AsyncClient, headers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A webhook without, with a wrong or with an old signature gets 401, and nothing is stored."""
    body, now = json.dumps(message()).encode(), int(time.time())
    monkeypatch.setattr(security, "time", SimpleNamespace(time=lambda: now))  # a slow machine shall not make it valid
    response = await client.post(PATH, content=body, headers=headers(body, str(now)))
    assert response.status_code == 401
    assert response.headers["Content-Type"] == "application/problem+json"
    assert await rows("SELECT count(*) FROM dialogue") == [(0,)]


async def test_secret_in_the_url_for_older_versions(client: httpx.AsyncClient) -> None:
    """A Chatwoot that does not sign is known by the secret in the webhook's URL, and only by the right one."""
    assert (await client.post(PATH, json=message(), params={"secret": "guessed"})).status_code == 401
    assert (await client.post(PATH, json=message(), params={"secret": WEBHOOK_SECRET})).status_code == 200
    wrong = {"X-Chatwoot-Signature": "sha256=0", "X-Chatwoot-Timestamp": str(int(time.time()))}
    right = {"secret": WEBHOOK_SECRET}
    assert (await client.post(PATH, json=message(), params=right, headers=wrong)).status_code == 401


@pytest.mark.parametrize(
    ("payload", "status"),
    [
        (b"{", 422),
        (b"", 422),
        (b"\xff\xfe", 422),
        (b"[]", 422),
        (b"null", 422),
        (b'{"event": 1}', 422),
        ({"event": "contact_created", "id": "whatever"}, 200),
        ({"event": "no such event"}, 200),
        (message(id="one"), 422),
        (message(id=2**63), 422),
        (message(id=0), 422),
        (message(id=True), 422),
        (message(id="12", conversation={"id": "7"}, private=True), 200),
        (message(conversation={"id": True}), 422),
        (message(conversation={"id": 7, "meta": {"assignee": {"id": True}}}), 422),
        (message(account={"id": True}), 422),
        ({"event": "conversation_updated", "id": True}, 422),
        ({"event": "conversation_deleted", "id": True}, 422),
        ({"event": "conversation_updated", "id": 7, "messages": [{"account_id": True}]}, 422),
        (message(conversation={"id": 2**63}), 422),
        (message(conversation={"id": -1}), 422),
        (message(conversation=None), 422),
        (message(conversation="seven"), 422),
        (message(content=["a"]), 422),
        (message(content="NUL \0 inside"), 422),
        (json.dumps(message(content="lone \ud800")).encode(), 422),
        (json.dumps(message(**{"\ud800": 1})).encode(), 422),
        (message(id=math.nan), 422),
        (message(conversation={"id": math.inf}), 422),
        (message(content_attributes={"\0": math.nan}), 200),
        (message(content="🎉 emoji"), 200),
        (b'{"event": ' + b"[" * 5000 + b"]" * 5000 + b"}", 422),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_strange_bodies(
    client: httpx.AsyncClient, payload: Any, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever is in the body gets a 4xx, of which the log has a line, or is ignored."""
    caplog.set_level("INFO", "chatdify")
    response = await deliver(client, payload)
    assert response.status_code == status, response.text
    assert [part["part"].split(".")[0] for part in response.json().get("invalid", [])][:1] == ["body"] * (status == 422)
    told = [record.message for record in caplog.records if record.name == "chatdify"]
    assert [line.split(" (")[0] for line in told] == [f"POST '{PATH}' answered 422"] * (status == 422)
    assert [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")] == []


async def test_fake_chatwoot_signs_as_the_real_one(client: httpx.AsyncClient, outside: Outside) -> None:
    """What a customer says in the fake arrives through the signed webhook."""
    outside.chatwoot.webhook_url = f"{client.base_url}{PATH}"
    assert (await outside.chatwoot.say(7, "Hello")).json()["status"] == "processing"
