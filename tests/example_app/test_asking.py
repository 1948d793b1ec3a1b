"""A question is asked as Dify wants it, and its answer kept, with no connection held meanwhile."""

from __future__ import annotations

import asyncio

import pytest
from celery.exceptions import Ignore, Retry

from example_app import dialogues
from example_app.clients.http import Rejected, Unanswered
from example_app.dialogues import delete_dialogue
from example_app.events import WebhookConversation
from example_app.fakes.faults import Fault
from example_app.steps import dify_user
from example_app.tasks import (
    delete_dify_conversation,
    dispatch_deletion,
    forget_old_deliveries,
    handle_dify_response,
)
from fastapi_chatdify_db import db
from tests.example_app.conftest import Configure, Outside, rows, write
from tests.example_app.stepping import ASK, ask, ask_in_vain, dispatched, receive, respond, run


async def test_question_carries_what_dify_needs(outside: Outside) -> None:
    """Dify gets the conversation's own user and inputs, and its conversation is stored."""
    [message] = await receive(outside, "Hello")
    assert await run(ask, message) == "answered"
    [conversation] = outside.dify.conversations.values()
    assert conversation.user == dify_user(7)
    assert conversation.inputs == {
        "chatwoot_conversation_id": "7",
        "conversation_status": "pending",
        "message_direction": "incoming",
    }
    assert await rows("SELECT dify_conversation_id FROM dialogue") == [(conversation.id,)]
    assert await dispatched() == [(handle_dify_response.name, str(message), "tell 7")]
    assert await run(respond, message) == "posted"
    assert outside.chatwoot.conversation(7).answers() == ["You said: Hello"]
    assert len(await dispatched()) == 1


@pytest.mark.parametrize("mode", ["blocking", "streaming"])
async def test_either_response_mode(outside: Outside, configure: Configure, mode: str) -> None:
    """A streamed answer is put together from its pieces."""
    configure(DIFY_RESPONSE_MODE=mode)
    assert [await run(ask, message) for message in await receive(outside, "Hello 🎉\u2028", "again")] == [
        "answered"
    ] * 2
    answers = await rows("SELECT answer FROM message ORDER BY id")
    assert answers == [("You said: Hello 🎉\u2028",), ("You said: again",)]
    assert len(outside.dify.conversations) == 1


async def test_moderated_answer(outside: Outside, configure: Configure) -> None:
    """What Dify's moderation has replaced does not reach the customer."""
    configure(DIFY_RESPONSE_MODE="streaming")
    outside.dify.replaced = "[removed]"
    [message] = await receive(outside, "Hello")
    assert await run(ask, message) == "answered"
    assert await rows("SELECT answer FROM message") == [("[removed]",)]


@pytest.mark.parametrize("mode", ["blocking", "streaming"])
async def test_provider_of_the_model_fails_dify(
    outside: Outside, configure: Configure, caplog: pytest.LogCaptureFixture, mode: str
) -> None:
    """What Dify says with a 400 when the model is overloaded may pass; the log has its code, and no more."""
    configure(DIFY_RESPONSE_MODE=mode)
    [message] = await receive(outside, "Hello")
    outside.dify.faults.add(Fault(*ASK, 400, code="completion_request_error"))
    assert [await run(ask, message), await run(ask, message)] == ["again", "answered"]
    outside.dify.faults.add(Fault(*ASK, 400, code="provider_quota_exceeded"))
    outside.dify.faults.add(Fault(*ASK, 400, code="Hello\nfrom an attacker"))
    assert [await run(ask, message), await run(ask, message)] == ["failed", "failed"]
    told = [record.getMessage().split("answered ")[1] for record in caplog.records if record.name == "chatdify"]
    assert told == ["400 completion_request_error', 0.0)", "400 provider_quota_exceeded', 0.0)", "400', 0.0)"]


async def test_forgotten_conversation_starts_anew(outside: Outside) -> None:
    """A conversation that Dify no longer knows is followed by a new one, whose id is stored."""
    first, second = await receive(outside, "Hello", "again")
    await run(ask, first)
    outside.dify.forget(*outside.dify.conversations)
    assert await run(ask, second) == "answered"
    assert await rows("SELECT dify_conversation_id FROM dialogue") == [(*outside.dify.conversations,)]


async def test_new_conversation_that_dify_does_not_find(outside: Outside) -> None:
    """There is nothing to begin anew: the question is asked once."""
    [message] = await receive(outside, "Hello")
    outside.dify.faults.add(Fault(*ASK, 404, headers={"Content-Type": "application/json"}))
    assert await run(ask, message) == "failed"
    assert outside.dify.conversations == {}


@pytest.mark.parametrize("answer", ["", " \n"])
async def test_empty_answer_posts_nothing(outside: Outside, answer: str) -> None:
    """Where Dify has nothing to say, the message is done."""
    [message] = await receive(outside, "Hello")
    await run(ask, message)
    await write(f"UPDATE message SET answer = '{answer}'")
    assert await run(respond, message) == "posted"
    assert outside.chatwoot.conversation(7).answers() == []


@pytest.mark.parametrize(
    ("event", "state"),
    [
        ({"event": "error", "status": 400, "code": "provider_quota_exceeded"}, "failed"),
        ({"event": "error", "status": 400, "code": "invalid_param"}, "failed"),
        ({"event": "error", "status": 400, "code": "completion_request_error"}, "again"),
        ({"event": "error", "status": 500, "code": "internal_server_error"}, "again"),
        ({"event": "error", "status": 429, "code": "too_many_requests"}, "again"),
        ({"event": "error"}, "again"),
        ({"event": "workflow_paused"}, "failed"),
        ({"event": "workflow_finished", "data": {"status": "failed", "error": "told to"}}, "failed"),
    ],
    ids=str,
)
async def test_stream_that_ends_otherwise(
    outside: Outside, configure: Configure, event: dict[str, object], state: str
) -> None:
    """An error in the middle of a stream counts as the same error at its beginning; nobody can answer a pause.

    But the question has been asked then, and is not asked again at once.
    """
    configure(DIFY_RESPONSE_MODE="streaming")
    [message] = await receive(outside, "Hello")
    outside.dify.last_event = event
    assert await run(ask, message) == state
    assert len(outside.dify.conversations) == 1


async def test_workflow_that_pauses(outside: Outside) -> None:
    """A blocking answer that is none is handed over, too."""
    [message] = await receive(outside, "Hello")
    outside.dify.last_event = {"event": "workflow_paused"}
    assert await run(ask, message) == "failed"


async def test_accounts_do_not_share_a_memory(outside: Outside, configure: Configure) -> None:
    """A conversation's number is its account's only."""
    users = set()
    for account in ("1", "2"):
        configure(CHATWOOT_ACCOUNT_ID=account)
        users.add(dify_user(7))
    assert len(users) == 2


async def test_no_connection_is_held_while_dify_thinks(outside: Outside) -> None:
    """During the call the pool has all of its connections, and no transaction is open."""
    [message] = await receive(outside, "Hello")
    outside.dify.answering.clear()
    asking = asyncio.create_task(run(ask, message))
    await outside.dify.asked.wait()
    assert "Current Checked out connections: 0" in db.async_engine.pool.status()
    idle = "SELECT count(*) FROM pg_stat_activity WHERE state LIKE 'idle in%' AND datname = current_database()"
    assert await rows(idle) == [(0,)]
    outside.dify.answering.set()
    assert await asking == "answered"


async def test_no_connection_is_held_while_an_answer_is_looked_for(outside: Outside) -> None:
    """Dify may take its time to tell what became of an earlier attempt."""
    message, _ = await ask_in_vain(outside, 504)
    outside.dify.faults.add(Fault("GET", "/messages", 500, delay=0.3))
    looking = asyncio.create_task(run(ask, message))
    async with asyncio.timeout(10):
        while outside.dify.faults.had < 2:
            await asyncio.sleep(0.01)
    assert "Current Checked out connections: 0" in db.async_engine.pool.status()
    assert await looking == "answered"


async def test_dialogue_deleted_while_dify_answers(outside: Outside) -> None:
    """Nothing is stored or posted; the deletion in Dify waits for the question to be answered."""
    [message] = await receive(outside, "Hello")
    outside.dify.answering.clear()
    asking = asyncio.create_task(run(ask, message))
    await outside.dify.asked.wait()
    async with db.transaction():
        assert await delete_dialogue(WebhookConversation(id=7))
        dispatch_deletion("7")
    outside.dify.answering.set()
    with pytest.raises(Ignore):
        await asking
    with pytest.raises(Ignore):
        await run(respond, message)
    assert await dispatched() == [(delete_dify_conversation.name, "7", "ask 7")]


async def test_deletion_in_dify(outside: Outside, configure: Configure) -> None:
    """All that the conversation's user has in Dify is deleted, and nobody else's; what is gone is fine."""
    [message] = await receive(outside, "Hello")
    await run(ask, message)
    async with db.transaction():
        await delete_dify_conversation("8")
        assert len(outside.dify.conversations) == 1
        outside.dify.faults.add(Fault("DELETE", "", 500, times=3))
        with pytest.raises(Unanswered):
            await delete_dify_conversation("7")
        outside.dify.faults.add(Fault("DELETE", "", 400))
        with pytest.raises(Rejected):
            await delete_dify_conversation("7")
        outside.dify.faults.add(Fault("DELETE", "", 404))
        await delete_dify_conversation("7")
        assert len(outside.dify.conversations) == 1
        await delete_dify_conversation("7")
    assert outside.dify.conversations == {}


async def test_pauses_of_a_deletion(outside: Outside, configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Dify that breaks is tried again, later each time; one that refuses is not."""
    pauses = []

    def retry(*, exc: Exception, countdown: float) -> Retry:
        pauses.append(countdown)
        return Retry(exc=exc)

    configure(CELERY_RETRY_COUNTDOWN="5")
    monkeypatch.setattr(delete_dify_conversation, "retry", retry)
    outside.dify.faults.add(Fault("GET", "/conversations", 500, times=6))
    outside.dify.faults.add(Fault("GET", "/conversations", 400))
    for retries, raised in ((0, Retry), (2, Retry), (3, Rejected)):
        delete_dify_conversation.push_request(retries=retries)
        async with db.transaction():
            with pytest.raises(raised):
                await delete_dify_conversation("7")
        delete_dify_conversation.pop_request()
    assert pauses == [5.0, 20.0]


async def test_old_deliveries_are_forgotten(outside: Outside) -> None:
    """The ids of deliveries are kept for a week, and so is what is left of tasks."""
    async with db.transaction():
        assert await dialogues.is_new_delivery("old", "message_created")
        assert await dialogues.is_new_delivery("new", "message_created")
    await write("UPDATE webhook_delivery SET received_at = now() - interval '8 days' WHERE delivery_id = 'old'")
    for days in (6, 8):
        await write(
            "INSERT INTO durable_task (id, name, arguments, options, status, due_at, ring_at, finished_at)"
            f" VALUES ('{days}', 'a task', '[]', '{{}}', 'done', now(), now(), now() - interval '{days} days')"
        )
    await asyncio.to_thread(forget_old_deliveries)
    assert await rows("SELECT delivery_id FROM webhook_delivery") == [("new",)]
    assert await rows("SELECT id FROM durable_task") == [("6",)]
