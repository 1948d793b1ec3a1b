"""What the bot cannot answer, or may not, is left to a human, who is told."""

from __future__ import annotations

import httpx
import pytest
from celery.exceptions import Retry

from example_app.clients.chatwoot import Chatwoot, Conversation, PerhapsRefused
from example_app.clients.dify import Answer, Dify, Question
from example_app.clients.http import TRIES, Rejected
from example_app.fakes.faults import Fault
from example_app.tasks import handle_dify_error
from fastapi_chatdify_db import db
from tests.example_app.conftest import Configure, Outside, rows, write
from tests.example_app.stepping import ASK, Step, ask, dispatched, hand_over, receive, respond, run, states

PROXY = {"Content-Type": "text/plain"}


@pytest.mark.parametrize(("status", "notes"), [("pending", 1), ("open", 0)])
async def test_failure_for_good_hands_over(outside: Outside, status: str, notes: int) -> None:
    """A human gets the conversation: opened, with a note if it was pending, and the customer is told, once."""
    [message] = await receive(outside, "Hello", status=status)
    outside.dify.faults.add(Fault(*ASK, 400))
    assert await run(ask, message) == "failed"
    assert await states() == ["failed"]
    assert await dispatched() == [(handle_dify_error.name, str(message), "tell 7")]
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


async def test_answer_that_was_posted_before_a_human_came(outside: Outside, configure: Configure) -> None:
    """An answer that Chatwoot took, and whose response was lost, is not called withheld."""
    configure(ALLOWED_CONVERSATION_STATUSES="pending")
    [message] = await receive(outside, "Hello")
    await run(ask, message)
    outside.chatwoot.faults.add(Fault("POST", "/messages", 502, too_late=True))
    assert await run(respond, message) == "again"
    outside.chatwoot.conversation(7).status = "open"
    assert await run(respond, message) == "posted"
    assert outside.chatwoot.conversation(7).answers() == ["You said: Hello"]


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
    """The conversation is handed over all the same: a first attempt has nothing to look for."""
    configure(ALLOWED_CONVERSATION_STATUSES="pending")
    [message] = await receive(outside, "Hello")
    outside.dify.faults.add(Fault(*ASK, 400))
    assert await run(ask, message) == "failed"
    for path in ("/conversations/7", "/messages"):
        outside.chatwoot.faults.add(Fault("GET", path, 401, times=100))
    assert await run(hand_over, message) == "handed_over"
    conversation = outside.chatwoot.conversation(7)
    assert (conversation.status, len(conversation.notes()), len(conversation.answers())) == ("open", 1, 1)


async def test_hand_over_that_goes_on(outside: Outside, configure: Configure) -> None:
    """A conversation that an earlier attempt has opened is no human's yet: everybody is told all the same."""
    configure(ALLOWED_CONVERSATION_STATUSES="pending")
    [message] = await receive(outside, "Hello")
    outside.chatwoot.faults.add(Fault("POST", "/messages", 500))
    assert await run(hand_over, message) == "again"
    conversation = outside.chatwoot.conversation(7)
    assert (conversation.status, conversation.messages) == ("open", [])
    assert await run(hand_over, message) == "handed_over"
    assert (len(conversation.notes()), len(conversation.answers())) == (1, 1)


@pytest.mark.parametrize("status", ["open", "resolved"])
async def test_hand_over_whose_first_attempt_could_not_look(
    outside: Outside, configure: Configure, status: str
) -> None:
    """What an agent opens or closes in the meantime stays so, and the customer is told nothing."""
    configure(ALLOWED_CONVERSATION_STATUSES="pending")
    [message] = await receive(outside, "Hello")
    outside.chatwoot.faults.add(Fault("GET", "/conversations/7", 500, times=TRIES))
    assert await run(hand_over, message) == "again"
    outside.chatwoot.conversation(7).status = status
    assert await run(hand_over, message) == "handed_over"
    assert (outside.chatwoot.conversation(7).status, outside.chatwoot.conversation(7).messages) == (status, [])


async def test_hand_over_without_words(outside: Outside, configure: Configure) -> None:
    """Where the settings have nothing to say, the conversation is opened, and nothing is posted."""
    configure(BOT_ERROR_MESSAGE_INTERNAL="", BOT_CONVERSATION_OPENED_MESSAGE_EXTERNAL="")
    [message] = await receive(outside, "Hello")
    assert await run(hand_over, message) == "handed_over"
    assert (outside.chatwoot.conversation(7).status, outside.chatwoot.conversation(7).messages) == ("open", [])


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


@pytest.mark.parametrize("status", ["resolved", "snoozed"])
@pytest.mark.parametrize(("fault", "step", "state"), [(None, respond, "posted"), (400, hand_over, "handed_over")])
async def test_message_that_waits_for_chatwoot_while_a_workflow_closes_the_conversation(
    outside: Outside, client: httpx.AsyncClient, fault: int | None, step: Step, state: str, status: str
) -> None:
    """The next message's workflow may do so before: no human sees there what was not posted."""
    [message] = await receive(outside, "Hello")
    if fault:
        outside.dify.faults.add(Fault(*ASK, fault))
    await run(ask, message)
    assert (await client.post("/api/v1/toggle-status/7", json={"status": status})).status_code == 200
    assert await run(step, message) == state
    assert len(outside.chatwoot.conversation(7).answers()) == 1


async def test_workflow_that_closes_the_conversation_in_the_middle_of_an_attempt(
    outside: Outside, client: httpx.AsyncClient
) -> None:
    """An answer that is about to be posted then is no more withheld than one that waits."""
    [message] = await receive(outside, "Hello")
    await run(ask, message)
    read = Chatwoot.conversation

    async def close_and_read(chatwoot: Chatwoot, conversation_id: int | str) -> Conversation:
        patch.undo()
        assert (await client.post("/api/v1/toggle-status/7", json={"status": "resolved"})).status_code == 200
        return await read(chatwoot, conversation_id)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Chatwoot, "conversation", close_and_read)
        assert await run(respond, message) == "posted"


async def test_workflow_that_closes_the_conversation_without_being_told_so(
    outside: Outside, client: httpx.AsyncClient
) -> None:
    """When Chatwoot's responses are lost, the status is noted all the same."""
    [message] = await receive(outside, "Hello")
    await run(ask, message)
    outside.chatwoot.faults.add(Fault("POST", "/toggle_status", 502, times=3, too_late=True))
    assert (await client.post("/api/v1/toggle-status/7", json={"status": "resolved"})).status_code == 502
    assert outside.chatwoot.conversation(7).status == "resolved"
    assert await run(respond, message) == "posted"


async def test_status_of_another_conversation(outside: Outside, client: httpx.AsyncClient) -> None:
    """What a workflow sets is noted with the messages of its own conversation that are under way."""
    answered, _ = await receive(outside, "Hello", "again")
    assert [await run(ask, answered), await run(respond, answered)] == ["answered", "posted"]
    outside.chatwoot.conversation(8)
    for conversation, noted in ((8, [None, None]), (7, [None, "resolved"])):
        response = await client.post(f"/api/v1/toggle-status/{conversation}", json={"status": "resolved"})
        assert response.status_code == 200
        assert await rows("SELECT workflow_status FROM message ORDER BY id") == [(status,) for status in noted]


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


async def test_hand_over_is_not_given_up(outside: Outside) -> None:
    """It is tried until Chatwoot is back; what will not pass fails the task, to be retried by hand."""
    [message] = await receive(outside, "Hello")
    outside.dify.faults.add(Fault(*ASK, 400))
    await run(ask, message)
    outside.chatwoot.faults.add(Fault("POST", "", 500, times=30))  # each attempt is three calls
    assert [await run(hand_over, message) for _ in range(10)] == ["again"] * 10
    outside.chatwoot.faults.add(Fault("POST", "", 404, 3, headers=PROXY))
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
    """An answer that is refused in each attempt hands the conversation over."""
    [message] = await receive(outside, "Hello")
    await run(ask, message)
    outside.chatwoot.faults.add(Fault("POST", "/messages", 422, times=4))
    assert [await run(respond, message) for _ in range(4)] == ["again"] * 3 + ["failed"]
    assert (await dispatched())[-1] == (handle_dify_error.name, str(message), "tell 7")
    assert await run(hand_over, message) == "handed_over"
    assert len(outside.chatwoot.conversation(7).answers()) == 1


async def test_hand_over_that_chatwoot_does_not_take(outside: Outside) -> None:
    """It does not open the conversation for ever: after as many attempts as an answer has, its task fails."""
    [message] = await receive(outside, "Hello")
    outside.chatwoot.faults.add(Fault("POST", "/messages", 422, times=4))
    assert [await run(hand_over, message) for _ in range(3)] == ["again"] * 3
    async with db.transaction():
        with pytest.raises(PerhapsRefused):
            await hand_over(message)
    assert outside.chatwoot.conversation(7).status == "open"
