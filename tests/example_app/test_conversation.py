"""The way of a message through real processes: answered once, in order, whatever Dify does."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from dataclasses import replace
from pathlib import Path

import asyncpg
import httpx
import psutil

from example_app.demo.stack import Stack, chatdify
from example_app.fakes.faults import Fault
from example_app.steps import dify_user
from tests.serving import free_socket

Broker = tuple[str | None, str]

CONVERSATIONS = int(os.environ.get("CHATDIFY_TEST_CONVERSATIONS", "20"))
"""The full run has 200, and takes minutes."""


def quick(queue: str) -> dict[str, str]:
    """Settings under which failures take little time, and with a result backend that is away: nobody asks it."""
    return {
        "CELERY_RESULT_BACKEND": "redis://127.0.0.1:1/1",
        "CELERY_TASK_DEFAULT_QUEUE": queue,
        "CELERY_RETRY_COUNTDOWN": "0.1",
        "HTTPX_READ_TIMEOUT": "1",
        "CELERY_TASK_MAX_TASKS_PER_CHILD": "100000",
    }


async def until_answered(stack: Stack, numbers: dict[int, int], seconds: float) -> None:
    """Return when each of these conversations has that many answers."""
    async with asyncio.timeout(seconds):
        while any(len(stack.chatwoot.conversation(c).answers()) < number for c, number in numbers.items()):
            stack.chatwoot.posted.clear()
            await stack.chatwoot.posted.wait()


async def states(database_url: str) -> dict[str, int]:
    """How many messages are in which state."""
    connection = await asyncpg.connect(database_url)
    try:
        rows = await connection.fetch("SELECT state, count(*) FROM message GROUP BY state")
    finally:
        await connection.close()
    return {row["state"]: row["count"] for row in rows}


async def until_states(database_url: str, expected: dict[str, int]) -> None:
    """Return when the messages are in these states."""
    async with asyncio.timeout(60):
        while await states(database_url) != expected:
            await asyncio.sleep(0.05)


def connected(worker: int, port: int | None) -> psutil.Process:
    """The worker's process that is connected to this port."""
    [process] = [
        child
        for child in psutil.Process(worker).children()
        if any(connection.raddr and connection.raddr.port == port for connection in child.net_connections("tcp"))
    ]
    return process


async def test_five_messages_are_answered_in_order(own_database: str, broker: Broker, tmp_path: Path) -> None:
    """Messages that arrive while one is answered wait for their turn, in one Dify conversation of one user."""
    url, queue = broker
    async with chatdify(tmp_path, own_database, url, settings=quick(queue)) as stack, stack.web(), stack.worker():
        stack.dify.delay = 0.2
        said = [f"message {number}" for number in range(5)]
        for content in said:
            assert (await stack.chatwoot.say(7, content)).json()["status"] == "processing"
        await until_answered(stack, {7: 5}, 60)
        assert stack.chatwoot.conversation(7).answers() == [f"You said: {content}" for content in said]
        [conversation] = stack.dify.conversations.values()
        assert conversation.user == dify_user(7)
        assert [message.query for message in conversation.messages] == said
        await until_states(own_database, {"posted": 5})


async def test_many_conversations_with_faults(own_database: str, broker: Broker, tmp_path: Path) -> None:
    """With 429s, 500s, lost answers and forgotten conversations, rows, Chatwoot and Dify agree at the end."""
    url, queue = broker
    conversations, each = CONVERSATIONS, 5
    async with chatdify(tmp_path, own_database, url, settings=quick(queue)) as stack, stack.web(), stack.worker():
        ask = ("POST", "/chat-messages")
        stack.dify.faults.add(Fault(*ask, 429, times=1000, every=31, headers={"Retry-After": "0"}))
        stack.dify.faults.add(Fault(*ask, 500, times=1000, every=37))
        stack.dify.faults.add(Fault(*ask, 500, times=1000, every=41, too_late=True))
        stack.dify.faults.add(Fault(*ask, 504, times=1000, every=43, too_late=True, delay=1.2))
        stack.chatwoot.faults.add(Fault("POST", "/messages", 502, times=1000, every=47, too_late=True))

        async def talk(conversation: int) -> None:
            for number in range(each):
                await stack.chatwoot.say(conversation, f"{conversation}.{number}")

        async def forget() -> None:
            for conversation in random.Random(5).sample(range(1, conversations + 1), conversations // 10):
                await until_answered(stack, {conversation: 1}, 30 + 2 * conversations)
                for known in stack.dify.of_user(dify_user(conversation)):
                    stack.dify.forget(known.id)

        async with asyncio.TaskGroup() as group:
            group.create_task(forget())
            for conversation in range(1, conversations + 1):
                group.create_task(talk(conversation))
        everything = dict.fromkeys(range(1, conversations + 1), each)
        await until_answered(stack, everything, 30 + 2 * conversations)
        await until_states(own_database, {"posted": conversations * each})
        assert stack.dify.faults.had >= conversations * each // 15
        assert stack.chatwoot.faults.had >= conversations * each // 50
        for conversation in everything:
            said = [f"{conversation}.{number}" for number in range(each)]
            assert stack.chatwoot.conversation(conversation).answers() == [f"You said: {content}" for content in said]
            user = dify_user(conversation)
            known = [*(c for c in stack.dify.forgotten if c.user == user), *stack.dify.of_user(user)]
            assert len(stack.dify.of_user(user)) <= 1
            # A question whose answer was lost together with its conversation is asked again, in the next one.
            asked = [message.query for dify_conversation in known for message in dify_conversation.messages]
            assert list(dict.fromkeys(asked)) == said
            assert len(asked) - each <= len(known) - 1


async def test_worker_killed_in_the_middle_of_an_answer(own_database: str, broker: Broker, tmp_path: Path) -> None:
    """After kill -9 of the process that waits for Dify, the message is answered once, in the one conversation."""
    url, queue = broker
    async with chatdify(tmp_path, own_database, url, settings=quick(queue)) as stack, stack.web():
        stack.dify.answering.clear()  # a process that waits for its next task would take the pool's lock with it
        async with stack.worker() as worker:
            await stack.chatwoot.say(7, "Hello")
            await stack.chatwoot.say(7, "Hello again")
            await asyncio.wait_for(stack.dify.asked.wait(), 60)
            connected(worker.pid, httpx.URL(stack.dify_url).port).send_signal(signal.SIGKILL)
            stack.dify.answering.set()
            await until_answered(stack, {7: 2}, 120)
            await until_states(own_database, {"posted": 2})
        assert stack.chatwoot.conversation(7).answers() == ["You said: Hello", "You said: Hello again"]
        [conversation] = stack.dify.conversations.values()
        assert [message.query for message in conversation.messages] == ["Hello", "Hello again"]


async def test_all_of_a_worker_killed_in_the_middle_of_an_answer(
    own_database: str, broker: Broker, tmp_path: Path
) -> None:
    """After kill -9 of a worker with all its processes, another one answers, once."""
    url, queue = broker
    async with chatdify(tmp_path, own_database, url, settings=quick(queue)) as stack, stack.web():
        stack.dify.answering.clear()
        async with stack.worker() as worker:
            await stack.chatwoot.say(7, "Hello")
            await stack.chatwoot.say(7, "Hello again")
            await asyncio.wait_for(stack.dify.asked.wait(), 60)
            os.killpg(worker.pid, signal.SIGKILL)
            await worker.wait()
        stack.dify.answering.set()
        async with stack.worker("another"):
            await until_answered(stack, {7: 2}, 120)
            await until_states(own_database, {"posted": 2})
        assert stack.chatwoot.conversation(7).answers() == ["You said: Hello", "You said: Hello again"]
        [conversation] = stack.dify.conversations.values()
        assert [message.query for message in conversation.messages] == ["Hello", "Hello again"]


async def test_broker_that_does_not_answer(own_database: str, tmp_path: Path) -> None:
    """With a frozen broker the webhook is answered at once; the message is answered with the next one."""
    queue = f"frozen-{os.getpid()}"
    async with chatdify(tmp_path, own_database, settings=quick(queue)) as stack:
        with free_socket() as frozen:  # connects, and never says a word
            broker_url = f"redis://127.0.0.1:{frozen.getsockname()[1]}/0"
            with_frozen = replace(stack, environment={**stack.environment, "CELERY_BROKER_URL": broker_url})
            async with with_frozen.web():
                async with asyncio.timeout(5):
                    assert (await stack.chatwoot.say(7, "Hello")).json() == {"status": "processing"}
                assert await states(own_database) == {"received": 1}
        async with stack.web(), stack.worker():
            await until_answered(stack, {7: 1}, 60)
