"""Each step of a message does its work once, tried again as often as it takes, and holds no connection meanwhile."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Awaitable, Callable

import httpx
import pytest
from celery.exceptions import Ignore, Retry

from example_app import dialogues, steps
from example_app.clients import get_chatwoot
from example_app.clients.dify import Answer, Dify, Question, StillAnswering
from example_app.clients.http import Busy, OutsideError, Rejected, Unanswered
from example_app.dialogues import delete_dialogue, store_message, upsert_dialogue
from example_app.dispatch import DELETE, HAND_OVER, RESPOND, dispatch_deletion
from example_app.fakes.dify import DifyConversation
from example_app.fakes.faults import Fault
from example_app.schemas import MessageCreated, WebhookConversation
from example_app.steps import dify_user
from example_app.tasks import (
    delete_dify_conversation,
    forget_old_deliveries,
    handle_dify_error,
    handle_dify_response,
    process_message_with_dify,
)
from fastapi_chatdify_db import db
from tests.example_app.conftest import Configure, Outside, rows, write

Step = Callable[[int], Awaitable[str]]
ASK = ("POST", "/chat-messages")
PROXY = {"Content-Type": "text/plain"}
UNREADABLE = {"Content-Encoding": "gzip"}

ask: Step = process_message_with_dify
respond: Step = handle_dify_response
hand_over: Step = handle_dify_error


async def run(step: Step, message_id: int) -> str:
    """Do a step as a worker does: returns the message's state, or "again" when the task asks to be retried."""
    try:
        async with db.transaction():
            return await step(message_id)
    except OutsideError:
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
    assert await dispatched() == [(RESPOND, str(message), "tell 7")]
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
@pytest.mark.parametrize(("status", "retry_after"), [(429, "0"), (503, "Wed, 21 Oct 2015 07:28:00 GMT"), (500, None)])
async def test_passing_faults_are_retried(
    outside: Outside, configure: Configure, mode: str, status: int, retry_after: str | None
) -> None:
    """After a 429, 503 or 500 Dify is asked again, until it answers."""
    configure(DIFY_RESPONSE_MODE=mode)
    [message] = await receive(outside, "Hello")
    outside.dify.faults.add(Fault(*ASK, status, times=2, retry_after=retry_after))
    while await run(ask, message) != "answered":
        pass
    [conversation] = outside.dify.conversations.values()
    assert len(conversation.messages) == 1


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


async def test_lost_answer_is_found_again(outside: Outside) -> None:
    """Dify answered, and its answer did not arrive: it is looked up, not asked for again."""
    for message in await receive(outside, "Hello", "Hello"):
        outside.dify.faults.add(Fault(*ASK, 504, too_late=True, delay=1.5))
        assert [await run(ask, message), await run(ask, message)] == ["again", "answered"]
    [conversation] = outside.dify.conversations.values()
    assert [message.query for message in conversation.messages] == ["Hello", "Hello"]
    assert await rows("SELECT count(DISTINCT dify_message_id) FROM message") == [(2,)]


async def test_old_answer_is_none_to_a_new_question(outside: Outside) -> None:
    """The same words as yesterday, whose answer nobody knows of: Dify is asked."""
    first, second = await receive(outside, "Hello", "Hello")
    await run(ask, first)
    await write(f"UPDATE message SET dify_message_id = NULL WHERE id = {first}")
    outside.dify.faults.add(Fault(*ASK, 500))
    [conversation] = outside.dify.conversations.values()
    conversation.messages[0].created_at -= 86400
    assert [await run(ask, second), await run(ask, second)] == ["again", "answered"]
    assert len(conversation.messages) == 2


@pytest.mark.parametrize("header", ["9" * 400, "Fri, 31 Dec 9999 23:59:59 GMT"])
async def test_nobody_waits_for_years(outside: Outside, header: str) -> None:
    """Whoever asks to wait longer than an hour is not believed."""
    outside.chatwoot.conversation(7)
    outside.chatwoot.faults.add(Fault("GET", "", 429, retry_after=header))
    chatwoot = await get_chatwoot()
    with pytest.raises(Busy) as caught:
        await chatwoot.conversation(7)
    assert caught.value.retry_after == 3600


async def test_post_whose_answer_was_lost_is_not_repeated(outside: Outside) -> None:
    """Chatwoot took the answer and said 502: it is found there, not posted again."""
    [message] = await receive(outside, "Hello")
    await run(ask, message)
    outside.chatwoot.faults.add(Fault("POST", "/messages", 502, too_late=True))
    assert [await run(respond, message), await run(respond, message)] == ["again", "posted"]
    assert len(outside.chatwoot.conversation(7).answers()) == 1


@pytest.mark.parametrize("step", ["ask", "respond"])
async def test_what_a_proxy_may_have_passed_on_is_not_repeated(outside: Outside, step: str) -> None:
    """A 503 does not say that nothing was done: it is looked up first."""
    [message] = await receive(outside, "Hello")
    if step == "ask":
        outside.dify.faults.add(Fault(*ASK, 503, too_late=True))
        assert [await run(ask, message), await run(ask, message)] == ["again", "answered"]
    else:
        await run(ask, message)
        outside.chatwoot.faults.add(Fault("POST", "/messages", 503, too_late=True))
        assert [await run(respond, message), await run(respond, message)] == ["again", "posted"]
    [conversation] = outside.dify.conversations.values()
    assert len(conversation.messages) == 1
    assert len(outside.chatwoot.conversation(7).answers()) == (step == "respond")


async def test_post_that_chatwoot_refused_is_repeated(outside: Outside) -> None:
    """Chatwoot said 500 and did nothing: the answer is posted in the second attempt."""
    [message] = await receive(outside, "Hello")
    await run(ask, message)
    outside.chatwoot.faults.add(Fault("POST", "/messages", 500))
    assert [await run(respond, message), await run(respond, message)] == ["again", "posted"]
    assert len(outside.chatwoot.conversation(7).answers()) == 1


async def test_forgotten_conversation_starts_anew(outside: Outside) -> None:
    """A conversation that Dify no longer knows is followed by a new one, whose id is stored."""
    first, second = await receive(outside, "Hello", "again")
    await run(ask, first)
    outside.dify.forget(*outside.dify.conversations)
    assert await run(ask, second) == "answered"
    assert await rows("SELECT dify_conversation_id FROM dialogue") == [(*outside.dify.conversations,)]


async def test_conversation_that_replaced_a_forgotten_one_is_found_again(outside: Outside) -> None:
    """An answer that was lost together with the new conversation's id is found in that conversation."""
    first, second = await receive(outside, "Hello", "again")
    await run(ask, first)
    outside.dify.forget(*outside.dify.conversations)
    outside.dify.faults.add(Fault(*ASK, 500, every=2, too_late=True))  # the first one answers 404
    assert [await run(ask, second), await run(ask, second)] == ["again", "answered"]
    [conversation] = outside.dify.conversations.values()
    assert [message.query for message in conversation.messages] == ["again"]
    assert await rows("SELECT dify_conversation_id FROM dialogue") == [(conversation.id,)]


@pytest.mark.parametrize("answer", ["", " \n"])
async def test_empty_answer_posts_nothing(outside: Outside, answer: str) -> None:
    """Where Dify has nothing to say, the message is done."""
    [message] = await receive(outside, "Hello")
    await run(ask, message)
    await write(f"UPDATE message SET answer = '{answer}'")
    assert await run(respond, message) == "posted"
    assert outside.chatwoot.conversation(7).answers() == []


@pytest.mark.parametrize(("status", "notes"), [("pending", 1), ("open", 0)])
async def test_failure_for_good_hands_over(outside: Outside, status: str, notes: int) -> None:
    """A human gets the conversation: opened, with a note if it was pending, and the customer is told, once."""
    [message] = await receive(outside, "Hello", status=status)
    outside.dify.faults.add(Fault(*ASK, 400))
    assert await run(ask, message) == "failed"
    assert await states() == ["failed"]
    assert await dispatched() == [(HAND_OVER, str(message), "tell 7")]
    outside.chatwoot.faults.add(Fault("POST", "/messages", 502, times=2, too_late=True))
    while await run(hand_over, message) == "again":
        pass
    conversation = outside.chatwoot.conversation(7)
    assert (conversation.status, len(conversation.notes()), len(conversation.answers())) == ("open", notes, 1)
    assert await states() == ["handed_over"]
    assert await rows("SELECT status FROM dialogue") == [("open",)]


@pytest.mark.parametrize("status", ["pending", "open"])
async def test_messages_that_wait_are_handed_over_as_well(outside: Outside, status: str) -> None:
    """After a hand-over nothing that came before it is asked, posted or handed over again; what comes later is."""
    failing, answered, failed, waiting, later = await receive(outside, *"abcde", status=status)
    outside.dify.faults.add(Fault(*ASK, 400))
    assert [await run(ask, failing), await run(ask, answered)] == ["failed", "answered"]
    outside.dify.faults.add(Fault(*ASK, 400))
    assert await run(ask, failed) == "failed"
    assert await run(hand_over, failing) == "handed_over"
    told, tasks = list(outside.chatwoot.conversation(7).messages), await dispatched()
    assert [await run(respond, answered), await run(hand_over, failed), await run(ask, waiting)] == ["handed_over"] * 3
    assert (outside.chatwoot.conversation(7).messages, await dispatched()) == (told, tasks)
    [conversation] = outside.dify.conversations.values()
    assert [message.query for message in conversation.messages] == ["b"]
    await write(f"UPDATE message SET created_at = now() WHERE id = {later}")
    assert [await run(ask, later), await run(respond, later)] == ["answered", "posted"]
    assert outside.chatwoot.conversation(7).answers()[-1] == "You said: e"


async def test_answer_comes_too_late(outside: Outside, configure: Configure) -> None:
    """What Dify answers is not posted into a conversation that has become a human's meanwhile."""
    configure(ALLOWED_CONVERSATION_STATUSES="pending")
    [message] = await receive(outside, "Hello")
    assert await run(ask, message) == "answered"
    outside.chatwoot.conversation(7).status = "open"
    assert await run(respond, message) == "handed_over"
    assert outside.chatwoot.conversation(7).answers() == []


@pytest.mark.parametrize("status", ["open", "resolved"])
async def test_failure_comes_too_late(outside: Outside, configure: Configure, status: str) -> None:
    """Nor does the bot tell of its failure there, or open again what an agent has resolved."""
    configure(ALLOWED_CONVERSATION_STATUSES="pending")
    [message] = await receive(outside, "Hello")
    outside.dify.faults.add(Fault(*ASK, 400))
    assert await run(ask, message) == "failed"
    outside.chatwoot.conversation(7).status = status
    assert await run(hand_over, message) == "handed_over"
    assert (outside.chatwoot.conversation(7).status, outside.chatwoot.conversation(7).messages) == (status, [])


async def test_hand_over_by_a_key_that_may_not_read(outside: Outside, configure: Configure) -> None:
    """The conversation is handed over all the same."""
    configure(ALLOWED_CONVERSATION_STATUSES="pending")
    [message] = await receive(outside, "Hello")
    outside.dify.faults.add(Fault(*ASK, 400))
    assert await run(ask, message) == "failed"
    outside.chatwoot.faults.add(Fault("GET", "/conversations/7", 401))
    assert await run(hand_over, message) == "handed_over"
    assert outside.chatwoot.conversation(7).status == "open"


@pytest.mark.parametrize(("status", "allowed"), [("open", "pending"), ("resolved", "open,pending")])
async def test_workflow_that_sets_the_status(
    outside: Outside, client: httpx.AsyncClient, configure: Configure, status: str, allowed: str
) -> None:
    """What Dify's workflow answers when it has itself opened or closed the conversation is posted.

    What waits then is left to the human of an open conversation; a closed one has none.
    """
    configure(ALLOWED_CONVERSATION_STATUSES=allowed)
    closing, waiting = await receive(outside, "Thanks, that is all", "one more")

    answer_at_once = Dify.ask

    async def set_status_and_answer(dify: Dify, question: Question) -> Answer:
        response = await client.post("/api/v1/toggle-status/7", json={"status": status})
        assert response.status_code == 200
        return await answer_at_once(dify, question)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Dify, "ask", set_status_and_answer)
        assert await run(ask, closing) == "answered"
    assert await run(respond, closing) == "posted"
    assert outside.chatwoot.conversation(7).answers() == ["You said: Thanks, that is all"]
    # Whoever has opened it sees what waits; in a closed one nobody does.
    expected = "handed_over" if status == "open" else "posted"
    assert [await run(ask, waiting), await run(respond, waiting)] == ["answered", expected]
    assert outside.chatwoot.conversation(7).status == status


async def test_failure_in_a_conversation_that_a_workflow_closed(
    outside: Outside, client: httpx.AsyncClient, configure: Configure
) -> None:
    """A message that waited there is handed to a human all the same."""
    [waiting] = await receive(outside, "one more")
    await write("UPDATE message SET attempts = 0")
    assert (await client.post("/api/v1/toggle-status/7", json={"status": "resolved"})).status_code == 200
    outside.dify.faults.add(Fault(*ASK, 400))
    assert [await run(ask, waiting), await run(hand_over, waiting)] == ["failed", "handed_over"]
    assert outside.chatwoot.conversation(7).status == "open"


@pytest.mark.parametrize(
    ("event", "state"),
    [
        ({"event": "error", "status": 400, "code": "provider_quota_exceeded"}, "failed"),
        ({"event": "error", "status": 400, "code": "invalid_param"}, "failed"),
        ({"event": "error", "status": 400, "code": "completion_request_error"}, "again"),
        ({"event": "error", "status": 500, "code": "internal_server_error"}, "again"),
        ({"event": "error"}, "again"),
        ({"event": "workflow_paused"}, "failed"),
    ],
    ids=str,
)
async def test_stream_that_ends_otherwise(
    outside: Outside, configure: Configure, event: dict[str, object], state: str
) -> None:
    """An error in the middle of a stream counts as the same error at its beginning; nobody can answer a pause."""
    configure(DIFY_RESPONSE_MODE="streaming")
    [message] = await receive(outside, "Hello")
    outside.dify.last_event = event
    assert await run(ask, message) == state


async def test_workflow_that_pauses(outside: Outside) -> None:
    """A blocking answer that is none is handed over, too."""
    [message] = await receive(outside, "Hello")
    outside.dify.last_event = {"event": "workflow_paused"}
    assert await run(ask, message) == "failed"


@pytest.mark.parametrize("error", [Busy("Dify", "answered 429", 3.0), StillAnswering("Dify", "has no answer yet")])
def test_errors_travel_between_processes(error: OutsideError) -> None:
    """The pool of a worker pickles what its tasks raise."""
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), copy.retry_after) == (type(error), str(error), error.retry_after)


async def test_accounts_do_not_share_a_memory(outside: Outside, configure: Configure) -> None:
    """A conversation's number is its account's only."""
    users = set()
    for account in ("1", "2"):
        configure(CHATWOOT_ACCOUNT_ID=account)
        users.add(dify_user(7))
    assert len(users) == 2


async def test_retries_end(outside: Outside) -> None:
    """After CELERY_TASK_MAX_RETRIES more attempts Dify's failure is for good."""
    [message] = await receive(outside, "Hello")
    outside.dify.faults.add(Fault(*ASK, 500, times=1000))
    assert [await run(ask, message) for _ in range(4)] == ["again"] * 3 + ["failed"]
    assert len(await dispatched()) == 1


async def test_hand_over_is_not_given_up(outside: Outside) -> None:
    """It is tried until Chatwoot is back; what will not pass fails the task, to be retried by hand."""
    [message] = await receive(outside, "Hello")
    outside.dify.faults.add(Fault(*ASK, 400))
    await run(ask, message)
    outside.chatwoot.faults.add(Fault("POST", "", 500, times=30))  # each attempt is three calls
    assert [await run(hand_over, message) for _ in range(10)] == ["again"] * 10
    for broken in (Fault("POST", "", 404, 3, headers=PROXY), Fault("POST", "", 200, 3, headers=UNREADABLE)):
        outside.chatwoot.faults.add(broken)
        assert await run(hand_over, message) == "again"
    outside.chatwoot.faults.add(Fault("POST", "", 401))
    async with db.transaction():
        with pytest.raises(Rejected):
            await hand_over(message)
    assert await run(hand_over, message) == "handed_over"


async def test_hand_over_of_a_conversation_that_is_deleted(outside: Outside) -> None:
    """Chatwoot has nothing to open any more."""
    [message] = await receive(outside, "Hello")
    outside.dify.faults.add(Fault(*ASK, 400))
    await run(ask, message)
    del outside.chatwoot.conversations[7]
    assert await run(hand_over, message) == "undeliverable"


@pytest.mark.parametrize(("attempts", "pause"), [(0, 5.0), (2, 20.0), (5, 160.0), (6, 300.0), (2000, 300.0)])
@pytest.mark.parametrize("hangs", [False, True])
async def test_pauses_of_a_hand_over(
    outside: Outside, configure: Configure, monkeypatch: pytest.MonkeyPatch, attempts: int, pause: float, hangs: bool
) -> None:
    """A Chatwoot that breaks or hangs is tried again, however often it was: later each time, up to five minutes."""
    pauses = []

    def retry(*, exc: Exception, countdown: float) -> Retry:
        pauses.append(countdown)
        return Retry(exc=exc)

    configure(CELERY_RETRY_COUNTDOWN="5", CELERY_TASK_SOFT_TIME_LIMIT="0.3" if hangs else None)
    monkeypatch.setattr(handle_dify_error, "retry", retry)
    [message] = await receive(outside, "Hello")
    await write(f"UPDATE message SET attempts = {attempts}")
    outside.chatwoot.faults.add(Fault("POST", "", 500, times=3, delay=0.5 if hangs else 0.0))
    with pytest.raises(Retry):
        await run(hand_over, message)
    assert pauses == [pause]
    assert await rows("SELECT attempts FROM message") == [(attempts + 1,)]


@pytest.mark.parametrize("path", ["/toggle_status", "/messages"])
async def test_conversation_that_is_gone_ends_the_hand_over(outside: Outside, path: str) -> None:
    """It may also be deleted while it is handed over."""
    [message] = await receive(outside, "Hello")
    outside.chatwoot.faults.add(Fault("POST", path, 404))
    assert await run(hand_over, message) == "undeliverable"


async def test_answer_that_chatwoot_does_not_take(outside: Outside) -> None:
    """An answer that can't be posted hands the conversation over."""
    [message] = await receive(outside, "Hello")
    await run(ask, message)
    outside.chatwoot.faults.add(Fault("POST", "/messages", 422))
    assert await run(respond, message) == "failed"
    assert (await dispatched())[-1] == (HAND_OVER, str(message), "tell 7")


async def test_worker_that_dies_over_a_message_each_time(outside: Outside) -> None:
    """A message over which its worker died four times is given up."""
    [message] = await receive(outside, "Hello")
    await write("UPDATE message SET attempts = 4")
    assert await run(ask, message) == "failed"
    assert outside.dify.conversations == {}


async def test_unforeseen_exception_is_an_attempt(outside: Outside, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug of ours is tried again too, and in the end a human gets the message."""
    [message] = await receive(outside, "Hello")
    with monkeypatch.context() as patch:
        patch.setattr(steps, "Question", None)
        for _ in range(3):
            with pytest.raises(TypeError):
                await run(ask, message)
        assert await run(ask, message) == "failed"


async def test_answer_that_takes_too_long_is_an_attempt(outside: Outside, configure: Configure) -> None:
    """After CELERY_TASK_SOFT_TIME_LIMIT an attempt ends, and is followed by another."""
    configure(CELERY_TASK_SOFT_TIME_LIMIT="0.2", HTTPX_READ_TIMEOUT="60")
    [message] = await receive(outside, "Hello")
    outside.dify.answering.clear()
    with pytest.raises(TimeoutError):
        await run(ask, message)
    outside.dify.answering.set()
    await until_answered(outside)
    assert await run(ask, message) == "answered"


async def test_worker_that_died_while_dify_answered(outside: Outside) -> None:
    """The attempt that follows does not ask again, and waits for the answer to come."""
    [message] = await receive(outside, "Hello")
    outside.dify.answering.clear()
    died = asyncio.create_task(run(ask, message))
    await outside.dify.asked.wait()
    died.cancel()
    await asyncio.gather(died, return_exceptions=True)
    assert await run(ask, message) == "again"
    outside.dify.answering.set()
    await until_answered(outside)
    assert await run(ask, message) == "answered"
    [conversation] = outside.dify.conversations.values()
    assert len(conversation.messages) == 1


async def ask_in_vain(outside: Outside, status: int) -> tuple[int, DifyConversation]:
    """Have a question answered when nobody listens any more; returns the message and Dify's conversation."""
    [message] = await receive(outside, "Hello")
    outside.dify.faults.add(Fault(*ASK, status, too_late=True))
    assert await run(ask, message) == "again"
    [conversation] = outside.dify.conversations.values()
    return message, conversation


async def test_question_that_dify_failed_over_is_asked_again(outside: Outside) -> None:
    """At once, whatever of an answer Dify has kept."""
    message, conversation = await ask_in_vain(outside, 500)
    conversation.messages[0].answer, conversation.messages[0].status = "You sa", "error"
    assert await run(ask, message) == "answered"
    assert await rows("SELECT answer FROM message") == [("You said: Hello",)]


async def test_answer_that_never_comes_is_asked_for_again(outside: Outside) -> None:
    """While Dify may still answer, its answer is waited for; one that died is asked again in the same conversation."""
    message, conversation = await ask_in_vain(outside, 504)
    conversation.messages[0].answer = ""
    assert [await run(ask, message) for _ in range(6)] == ["again"] * 6
    assert len(conversation.messages) == 1
    await write("UPDATE message SET created_at = created_at - interval '5 minutes'")
    conversation.messages[0].created_at -= 300
    assert await run(ask, message) == "answered"
    assert [*outside.dify.conversations.values()] == [conversation]
    assert len(conversation.messages) == 2


async def test_slow_answer_is_waited_for(outside: Outside) -> None:
    """However often a proxy gives up before Dify does, the question is asked once."""
    message, conversation = await ask_in_vain(outside, 504)
    late, conversation.messages[0].answer = conversation.messages[0].answer, ""
    assert [await run(ask, message) for _ in range(6)] == ["again"] * 6
    conversation.messages[0].answer = late
    assert await run(ask, message) == "answered"
    assert len(conversation.messages) == 1


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
    assert await dispatched() == [(DELETE, "7", "ask 7")]


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


async def test_old_deliveries_are_forgotten(outside: Outside) -> None:
    """The ids of deliveries are kept for a week."""
    async with db.transaction():
        assert await dialogues.is_new_delivery("old", "message_created")
        assert await dialogues.is_new_delivery("new", "message_created")
    await write("UPDATE webhook_delivery SET received_at = now() - interval '8 days' WHERE delivery_id = 'old'")
    await asyncio.to_thread(forget_old_deliveries)
    assert await rows("SELECT delivery_id FROM webhook_delivery") == [("new",)]


async def test_attempts_are_counted_for_each_step(outside: Outside) -> None:
    """A question that was answered in the last attempt leaves its answer as many."""
    [message] = await receive(outside, "Hello")
    outside.dify.faults.add(Fault(*ASK, 500, times=3))
    assert [await run(ask, message) for _ in range(4)] == ["again"] * 3 + ["answered"]
    assert await run(respond, message) == "posted"
