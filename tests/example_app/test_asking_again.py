"""Each step is tried again as often as it takes, and does its work once."""

from __future__ import annotations

import asyncio
import pickle
import time

import pytest
from sqlalchemy.exc import ProgrammingError

from celery_ext.durable.delivery import Dropped
from example_app import steps
from example_app.clients.dify import Dify, StillAnswering
from example_app.clients.http import Busy, UpstreamError
from example_app.fakes.faults import Fault
from example_app.tasks import process_message_with_dify
from tests.example_app.conftest import Configure, Outside, rows, write
from tests.example_app.stepping import ASK, ask, ask_in_vain, dispatched, receive, respond, run, until_answered


@pytest.mark.parametrize("mode", ["blocking", "streaming"])
@pytest.mark.parametrize(
    ("status", "headers"),
    [(429, {"Retry-After": "0"}), (503, {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}), (500, {})],
)
async def test_passing_faults_are_retried(
    outside: Outside, configure: Configure, mode: str, status: int, headers: dict[str, str]
) -> None:
    """After a 429, 503 or 500 Dify is asked again, until it answers."""
    configure(DIFY_RESPONSE_MODE=mode)
    [message] = await receive(outside, "Hello")
    outside.dify.faults.add(Fault(*ASK, status, times=2, headers=headers))
    while await run(ask, message) != "answered":
        pass
    [conversation] = outside.dify.conversations.values()
    assert len(conversation.messages) == 1


@pytest.mark.parametrize("mode", ["blocking", "streaming"])
async def test_busy_dify_is_asked_three_times_in_an_attempt(outside: Outside, configure: Configure, mode: str) -> None:
    """What surely did nothing is tried again at once, and CELERY_TASK_MAX_RETRIES counts attempts in either mode."""
    configure(DIFY_RESPONSE_MODE=mode, CELERY_TASK_MAX_RETRIES="1")
    first, second = await receive(outside, "Hello", "again")
    outside.dify.faults.add(Fault(*ASK, 429, times=5))
    assert [await run(ask, first), await run(ask, first)] == ["again", "answered"]
    outside.dify.faults.add(Fault(*ASK, 429, times=6))
    assert [await run(ask, second), await run(ask, second)] == ["again", "failed"]
    assert outside.dify.faults.had == 11


async def test_lost_answer_is_found_again(outside: Outside) -> None:
    """Dify answered, and its answer did not arrive: it is looked up, not asked for again."""
    for message in await receive(outside, "Hello", "Hello"):
        outside.dify.faults.add(Fault(*ASK, 504, too_late=True, delay=1.5))
        assert [await run(ask, message), await run(ask, message)] == ["again", "answered"]
    [conversation] = outside.dify.conversations.values()
    assert [message.query for message in conversation.messages] == ["Hello", "Hello"]
    assert await rows("SELECT count(DISTINCT dify_message_id) FROM message") == [(2,)]
    assert await rows("SELECT answer FROM message") == [("You said: Hello",)] * 2


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


@pytest.mark.parametrize("error", [Busy("Dify", "answered 429", 3.0), StillAnswering("Dify", "has no answer yet")])
def test_errors_travel_between_processes(error: UpstreamError) -> None:
    """The pool of a worker pickles what its tasks raise."""
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), copy.retry_after) == (type(error), str(error), error.retry_after)


async def test_retries_end(outside: Outside) -> None:
    """After CELERY_TASK_MAX_RETRIES more attempts Dify's failure is for good."""
    [message] = await receive(outside, "Hello")
    outside.dify.faults.add(Fault(*ASK, 500, times=1000))
    assert [await run(ask, message) for _ in range(4)] == ["again"] * 3 + ["failed"]
    assert len(await dispatched()) == 1


async def test_worker_that_dies_over_a_message_each_time(outside: Outside) -> None:
    """A message over which its worker died four times is given up."""
    [message] = await receive(outside, "Hello")
    await write("UPDATE message SET attempts = 4")
    assert await run(ask, message) == "failed"
    assert outside.dify.conversations == {}


async def test_unforeseen_exception_is_an_attempt(
    outside: Outside, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A bug of ours is tried again too, and in the end a human gets the message; the log shows where it is."""
    [message] = await receive(outside, "Hello")
    with monkeypatch.context() as patch:
        patch.setattr(steps, "Question", None)
        for _ in range(3):
            with pytest.raises(TypeError):
                await run(ask, message)
        assert await run(ask, message) == "failed"
    assert [record.exc_info is not None for record in caplog.records if record.name == "chatdify"] == [True] * 4


async def test_lease_that_another_worker_took_within_a_step(
    outside: Outside, configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message is that worker's: its step is neither put off nor given up here."""

    async def drop(*_: object) -> None:
        raise Dropped

    configure(CELERY_TASK_MAX_RETRIES="0")
    monkeypatch.setattr(Dify, "ask", drop)
    [message] = await receive(outside, "Hello")
    with pytest.raises(Dropped):
        await run(ask, message)


async def test_database_that_fails_within_a_step(outside: Outside, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the worker's part that decides whether the task is run again: the step does not ask for it."""
    message, _ = await ask_in_vain(outside, 500)
    asked: list[object] = []
    monkeypatch.setattr(process_message_with_dify, "retry", lambda **options: asked.append(options))
    outside.dify.faults.add(Fault("GET", "/conversations", 500, delay=0.3))
    asking = asyncio.create_task(run(ask, message))
    async with asyncio.timeout(10):
        while outside.dify.faults.had < 2:
            await asyncio.sleep(0.01)
    await write("ALTER TABLE message RENAME dify_message_id TO renamed")
    with pytest.raises(ProgrammingError, match="dify_message_id"):
        await asking
    assert asked == []


async def test_answer_that_takes_too_long_is_an_attempt(
    outside: Outside, configure: Configure, caplog: pytest.LogCaptureFixture
) -> None:
    """After CELERY_TASK_SOFT_TIME_LIMIT an attempt ends, which is a line in the log, and is followed by another."""
    configure(CELERY_TASK_SOFT_TIME_LIMIT="0.2", HTTPX_READ_TIMEOUT="60")
    [message] = await receive(outside, "Hello")
    outside.dify.answering.clear()
    with pytest.raises(TimeoutError):
        await run(ask, message)
    assert [bool(record.exc_info) for record in caplog.records if record.name == "chatdify"] == [False]
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


async def test_question_that_dify_failed_over_is_asked_again(outside: Outside) -> None:
    """At once, whatever of an answer Dify has kept."""
    message, conversation = await ask_in_vain(outside, 500)
    conversation.messages[0].answer, conversation.messages[0].status = "You sa", "error"
    assert await run(ask, message) == "answered"
    assert await rows("SELECT answer FROM message") == [("You said: Hello",)]


@pytest.mark.parametrize("said", ["", "I am asking a colleague."])
async def test_workflow_that_pauses_when_nobody_listens(outside: Outside, said: str) -> None:
    """It waits for a human, whose answer never comes; what it said before is none."""
    message, conversation = await ask_in_vain(outside, 504)
    conversation.messages[0].answer, conversation.messages[0].status = said, "paused"
    assert await run(ask, message) == "failed"
    assert len(conversation.messages) == 1


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


@pytest.mark.parametrize("created_at", [time.time() + 3600, time.time() * 1000, 1e300], ids=["ahead", "ms", "endless"])
async def test_dify_whose_clock_is_wrong(outside: Outside, created_at: float) -> None:
    """A question from a time to come is not waited for until then: each look for its answer is an attempt."""
    message, conversation = await ask_in_vain(outside, 504)
    conversation.messages[0].answer, conversation.messages[0].created_at = "", created_at
    assert [await run(ask, message) for _ in range(3)] == ["again", "again", "failed"]
    assert len(conversation.messages) == 1


async def test_dify_whose_clock_is_a_little_ahead(outside: Outside) -> None:
    """Within a minute clocks may differ, and its answer is waited for."""
    message, conversation = await ask_in_vain(outside, 504)
    conversation.messages[0].answer = ""
    conversation.messages[0].created_at += 50
    assert [await run(ask, message) for _ in range(6)] == ["again"] * 6


async def test_attempts_are_counted_for_each_step(outside: Outside) -> None:
    """A question that was answered in the last attempt leaves its answer as many."""
    [message] = await receive(outside, "Hello")
    outside.dify.faults.add(Fault(*ASK, 500, times=3))
    assert [await run(ask, message) for _ in range(4)] == ["again"] * 3 + ["answered"]
    assert await run(respond, message) == "posted"
