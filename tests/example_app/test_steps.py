"""Each step of a message does its work once, tried again as often as it takes, and holds no connection meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from uuid import uuid4

import pytest

from example_app import dialogues, steps
from example_app.dialogues import delete_dialogue, store_message, upsert_dialogue
from example_app.fakes.faults import Fault
from example_app.schemas import MessageCreated, WebhookConversation
from example_app.steps import ask, dify_user, hand_over, respond
from example_app.tasks import delete_dify_conversation, forget_old_deliveries, resume_dialogues
from fastapi_chatdify_db import db
from tests.example_app.conftest import Configure, Outside, rows, write

Step = Callable[[int, str | None], Awaitable[str]]
ASK = ("POST", "/chat-messages")


async def run(step: Step, dialogue_id: int, task_id: str | None = None) -> str:
    """Do a step as its task does."""
    async with db.transaction():
        return await step(dialogue_id, task_id or str(uuid4()))


async def receive(outside: Outside, *contents: str, status: str = "pending", first: int = 1) -> int:
    """Store messages of conversation 7; returns the dialogue's id."""
    outside.chatwoot.conversation(7)
    async with db.transaction():
        for number, content in enumerate(contents, first):
            conversation = WebhookConversation(id=7, status=status)
            dialogue_id = await upsert_dialogue(conversation)
            event = MessageCreated(
                event="message_created", id=number, content=content, message_type="incoming", conversation=conversation
            )
            assert await store_message(dialogue_id, event)
    return dialogue_id


async def states() -> list[str]:
    """The messages' states, the oldest first."""
    return [str(state) for (state,) in await rows("SELECT state FROM message ORDER BY id")]


async def test_question_carries_what_dify_needs(outside: Outside) -> None:
    """Dify gets the conversation's own user and inputs, and its conversation is stored."""
    dialogue = await receive(outside, "Hello")
    assert await run(ask, dialogue) == "answered"
    [conversation] = outside.dify.conversations.values()
    assert conversation.user == dify_user(7)
    assert conversation.inputs == {
        "chatwoot_conversation_id": "7",
        "conversation_status": "pending",
        "message_direction": "incoming",
    }
    assert await rows("SELECT dify_conversation_id FROM dialogue") == [(conversation.id,)]
    assert await run(respond, dialogue) == "posted"
    assert outside.chatwoot.conversation(7).answers() == ["You said: Hello"]


@pytest.mark.parametrize("mode", ["blocking", "streaming"])
async def test_either_response_mode(outside: Outside, configure: Configure, mode: str) -> None:
    """A streamed answer is put together from its pieces."""
    configure(DIFY_RESPONSE_MODE=mode)
    await receive(outside, "Hello 🎉")
    dialogue = await receive(outside, "again", first=2)
    assert [await run(ask, dialogue), await run(respond, dialogue), await run(ask, dialogue)] == [
        "answered",
        "posted",
        "answered",
    ]
    assert await rows("SELECT answer FROM message ORDER BY id") == [("You said: Hello 🎉",), ("You said: again",)]
    assert len(outside.dify.conversations) == 1


@pytest.mark.parametrize("mode", ["blocking", "streaming"])
@pytest.mark.parametrize(("status", "retry_after"), [(429, "0"), (503, "Wed, 21 Oct 2015 07:28:00 GMT"), (500, None)])
async def test_passing_faults_are_retried(
    outside: Outside, configure: Configure, mode: str, status: int, retry_after: str | None
) -> None:
    """After a 429, 503 or 500 Dify is asked again, until it answers."""
    configure(DIFY_RESPONSE_MODE=mode)
    dialogue = await receive(outside, "Hello")
    outside.dify.faults.add(Fault(*ASK, status, times=2, retry_after=retry_after))
    while await run(ask, dialogue) != "answered":
        pass
    [conversation] = outside.dify.conversations.values()
    assert len(conversation.messages) == 1


async def test_lost_answer_is_found_again(outside: Outside) -> None:
    """Dify answered, and its answer did not arrive: it is looked up, not asked for again."""
    dialogue = await receive(outside, "Hello", "Hello")
    for _ in range(2):
        outside.dify.faults.add(Fault(*ASK, 504, too_late=True, delay=1.5))
        assert await run(ask, dialogue) == "failed"
        assert await run(ask, dialogue) == "answered"
        assert await run(respond, dialogue) == "posted"
    [conversation] = outside.dify.conversations.values()
    assert [message.query for message in conversation.messages] == ["Hello", "Hello"]
    assert await rows("SELECT count(DISTINCT dify_message_id) FROM message") == [(2,)]


async def test_post_whose_answer_was_lost_is_not_repeated(outside: Outside) -> None:
    """Chatwoot took the answer and said 502: it is found there, not posted again."""
    dialogue = await receive(outside, "Hello")
    await run(ask, dialogue)
    outside.chatwoot.faults.add(Fault("POST", "/messages", 502, too_late=True))
    assert [await run(respond, dialogue), await run(respond, dialogue)] == ["failed", "posted"]
    assert len(outside.chatwoot.conversation(7).answers()) == 1


async def test_post_that_chatwoot_refused_is_repeated(outside: Outside) -> None:
    """Chatwoot said 500 and did nothing: the answer is posted in the second attempt."""
    dialogue = await receive(outside, "Hello")
    await run(ask, dialogue)
    outside.chatwoot.faults.add(Fault("POST", "/messages", 500))
    assert [await run(respond, dialogue), await run(respond, dialogue)] == ["failed", "posted"]
    assert len(outside.chatwoot.conversation(7).answers()) == 1


async def test_forgotten_conversation_starts_anew(outside: Outside) -> None:
    """A conversation that Dify no longer knows is followed by a new one, whose id is stored."""
    dialogue = await receive(outside, "Hello", "again")
    await run(ask, dialogue)
    await run(respond, dialogue)
    outside.dify.forget(*outside.dify.conversations)
    assert await run(ask, dialogue) == "answered"
    assert await rows("SELECT dify_conversation_id FROM dialogue") == [(*outside.dify.conversations,)]


async def test_conversation_that_replaced_a_forgotten_one_is_found_again(outside: Outside) -> None:
    """An answer that was lost together with the new conversation's id is found in that conversation."""
    dialogue = await receive(outside, "Hello", "again")
    await run(ask, dialogue)
    await run(respond, dialogue)
    outside.dify.forget(*outside.dify.conversations)
    outside.dify.faults.add(Fault(*ASK, 500, every=2, too_late=True))  # the first one answers 404
    assert [await run(ask, dialogue), await run(ask, dialogue)] == ["failed", "answered"]
    [conversation] = outside.dify.conversations.values()
    assert [message.query for message in conversation.messages] == ["again"]
    assert await rows("SELECT dify_conversation_id FROM dialogue") == [(conversation.id,)]


async def test_empty_answer_posts_nothing(outside: Outside) -> None:
    """Where Dify has nothing to say, the message is done."""
    dialogue = await receive(outside, "Hello")
    await run(ask, dialogue)
    await write("UPDATE message SET answer = ''")
    assert await run(respond, dialogue) == "posted"
    assert outside.chatwoot.conversation(7).answers() == []


@pytest.mark.parametrize(("status", "notes"), [("pending", 1), ("open", 0)])
async def test_failure_for_good_hands_over(outside: Outside, status: str, notes: int) -> None:
    """A human gets the conversation: opened, with a note if it was pending, and the customer is told, once."""
    dialogue = await receive(outside, "Hello", status=status)
    outside.dify.faults.add(Fault(*ASK, 400))
    assert await run(ask, dialogue) == "failed"
    assert await states() == ["failed"]
    outside.chatwoot.faults.add(Fault("POST", "/messages", 502, times=2, too_late=True))
    while await run(hand_over, dialogue) == "failed":
        pass
    conversation = outside.chatwoot.conversation(7)
    assert (conversation.status, len(conversation.notes()), len(conversation.answers())) == ("open", notes, 1)
    assert await states() == ["handed_over"]
    assert await rows("SELECT status FROM dialogue") == [("open",)]


async def test_retries_end(outside: Outside) -> None:
    """After CELERY_TASK_MAX_RETRIES more attempts Dify's failure is for good, and Chatwoot's too."""
    dialogue = await receive(outside, "Hello")
    outside.dify.faults.add(Fault(*ASK, 500, times=1000))
    assert [await run(ask, dialogue) for _ in range(5)] == ["failed"] * 4 + ["nothing to do"]
    assert await states() == ["failed"]
    outside.chatwoot.faults.add(Fault("POST", "", 500, times=1000))
    assert [await run(hand_over, dialogue) for _ in range(5)] == ["failed"] * 4 + ["nothing to do"]
    assert await states() == ["undeliverable"]


async def test_worker_that_dies_over_a_message_each_time(outside: Outside) -> None:
    """A message over which its worker died four times is given up."""
    dialogue = await receive(outside, "Hello")
    await write("UPDATE message SET state = 'asking', attempts = 4")
    assert await run(ask, dialogue) == "nothing to do"
    assert await states() == ["failed"]


async def test_unforeseen_exception_is_an_attempt(outside: Outside, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug of ours ends the turn as well, so that the message is not stuck."""
    dialogue = await receive(outside, "Hello")
    with monkeypatch.context() as patch:
        patch.setattr(steps, "Question", None)
        assert await run(ask, dialogue) == "failed"
    assert await run(ask, dialogue) == "answered"


async def test_one_turn_at_a_time(outside: Outside) -> None:
    """Of ten tasks at once one asks; a second message is not asked before the first is posted."""
    dialogue = await receive(outside, "first", "second")
    outside.dify.delay = 0.2
    results = await asyncio.gather(*(run(ask, dialogue) for _ in range(10)))
    assert sorted(results) == ["answered"] + ["nothing to do"] * 9
    assert await run(ask, dialogue) == "nothing to do"
    assert await states() == ["answered", "received"]


async def test_redelivered_task_takes_its_turn_over(outside: Outside) -> None:
    """The turn of a worker that died goes to the same task when it is delivered again, and to no other one."""
    dialogue = await receive(outside, "Hello")
    outside.dify.delay = 3
    died = asyncio.create_task(run(ask, dialogue, "task-1"))
    await outside.dify.asked.wait()
    died.cancel()
    await asyncio.gather(died, return_exceptions=True)
    outside.dify.delay = 0
    assert await run(ask, dialogue, "task-2") == "nothing to do"
    assert await run(ask, dialogue, "task-1") == "failed"  # Dify is still at it
    for conversation in outside.dify.conversations.values():
        conversation.messages[0].answer = "at last"
    assert await run(ask, dialogue) == "answered"
    assert await rows("SELECT answer FROM message") == [("at last",)]


async def test_answer_that_never_comes_is_asked_for_again(outside: Outside) -> None:
    """A Dify that died over the question is asked again in the last attempt, in the same conversation."""
    dialogue = await receive(outside, "Hello")
    outside.dify.faults.add(Fault(*ASK, 504, too_late=True))
    assert await run(ask, dialogue) == "failed"
    [conversation] = outside.dify.conversations.values()
    conversation.messages[0].answer = ""
    assert [await run(ask, dialogue) for _ in range(3)] == ["failed", "failed", "answered"]
    assert [*outside.dify.conversations.values()] == [conversation]


async def test_turn_runs_out(outside: Outside) -> None:
    """A turn that nobody ended is anybody's after the tasks' time limit."""
    dialogue = await receive(outside, "Hello")
    await write("UPDATE dialogue SET turn_task_id = 'dead', turn_until = now() + interval '1 minute'")
    assert await run(ask, dialogue) == "nothing to do"
    await write("UPDATE dialogue SET turn_until = now() - interval '1 second'")
    assert await run(ask, dialogue) == "answered"


async def test_task_that_lost_its_turn_stores_nothing(outside: Outside) -> None:
    """Who comes back after another took over leaves the other's work alone."""
    dialogue = await receive(outside, "Hello")
    outside.dify.delay = 0.5
    slow = asyncio.create_task(run(ask, dialogue, "task-1"))
    await outside.dify.asked.wait()
    await write("UPDATE dialogue SET turn = gen_random_uuid()")
    assert await slow == "overtaken"
    assert await states() == ["asking"]


async def test_no_connection_is_held_while_dify_thinks(outside: Outside) -> None:
    """During the call the pool has all of its connections, and no transaction is open."""
    dialogue = await receive(outside, "Hello")
    outside.dify.delay = 0.5
    asking = asyncio.create_task(run(ask, dialogue))
    await outside.dify.asked.wait()
    assert "Current Checked out connections: 0" in db.async_engine.pool.status()
    idle = "SELECT count(*) FROM pg_stat_activity WHERE state LIKE 'idle in%' AND datname = current_database()"
    assert await rows(idle) == [(0,)]
    assert await asking == "answered"


async def test_dialogue_deleted_while_dify_answers(outside: Outside, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Dify conversation that nobody else knows of is deleted."""
    deleted: list[tuple[str, str]] = []
    monkeypatch.setattr("example_app.dispatch.dispatch_deletion", lambda *args: deleted.append(args))
    dialogue = await receive(outside, "Hello")
    outside.dify.delay = 0.5
    asking = asyncio.create_task(run(ask, dialogue))
    await outside.dify.asked.wait()
    async with db.transaction():
        await delete_dialogue(WebhookConversation(id=7))
    assert await asking == "overtaken"
    assert deleted == [(*outside.dify.conversations, dify_user(7))]


async def test_deletion_in_dify(outside: Outside) -> None:
    """DELETE brings the conversation's user; one that is gone is deleted."""
    dialogue = await receive(outside, "Hello")
    await run(ask, dialogue)
    [conversation] = outside.dify.conversations
    async with db.transaction():
        await delete_dify_conversation(conversation, dify_user(8))
        assert list(outside.dify.conversations) == [conversation]
        await delete_dify_conversation(conversation, dify_user(7))
        await delete_dify_conversation(conversation, dify_user(7))
    assert outside.dify.conversations == {}


async def test_lost_tasks_are_dispatched_again(outside: Outside, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever state a message waits in, its dialogue is found; not one whose turn is taken or which is not due."""
    dispatched: list[str] = []
    monkeypatch.setattr("example_app.dispatch.dispatch_for", lambda message: dispatched.append(message.state))
    await receive(outside, "first", "second")
    for change, expected in (
        ("UPDATE message SET state = 'answered' WHERE content = 'first'", ["answered"]),
        ("UPDATE message SET state = 'posted' WHERE content = 'first'", ["received"]),
        ("UPDATE message SET due_at = now() + interval '1 minute'", []),
        ("UPDATE message SET due_at = now()", ["received"]),
        ("UPDATE dialogue SET turn_until = now() + interval '1 minute'", []),
        ("UPDATE dialogue SET turn_until = now() - interval '1 second'", ["received"]),
        ("UPDATE message SET state = 'handed_over'", []),
    ):
        await write(change)
        dispatched.clear()
        async with db.transaction():
            assert await resume_dialogues() == len(expected)
        assert dispatched == expected


async def test_old_deliveries_are_forgotten(outside: Outside) -> None:
    """The ids of deliveries are kept for a week."""
    async with db.transaction():
        assert await dialogues.is_new_delivery("old", "message_created")
        assert await dialogues.is_new_delivery("new", "message_created")
    await write("UPDATE webhook_delivery SET received_at = now() - interval '8 days' WHERE delivery_id = 'old'")
    await asyncio.to_thread(forget_old_deliveries)
    assert await rows("SELECT delivery_id FROM webhook_delivery") == [("new",)]
