"""The demo's conversation: five messages go all the way, and each step is printed as it happens."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from asyncio.subprocess import Process
from contextlib import AsyncExitStack
from typing import Final

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from sqlalchemy import func, select, text

from example_app.db import db
from example_app.db.models import FINISHED, Message
from example_app.demo.stack import Stack
from example_app.fakes.faults import Fault

CONVERSATION: Final = 7
TIME_LIMIT: Final = 60.0
"""Seconds for each answer."""

_MESSAGES: Final = (
    ("Hello, is anybody there?", None),
    ("Where is my parcel?", Fault("POST", "/chat-messages", 429, times=2, headers={"Retry-After": "1"})),
    ("It was due yesterday.", None),
    ("Is the [bold]blue[/bold] one still to be had?", None),
    ("Thank you!", Fault("POST", "/messages", 502, too_late=True)),
)
_COMMENTS: Final = {
    1: "Dify answers 429, Retry-After: 1, twice: asked again a second later",
    2: "kill -9 of the worker while Dify answers: another one finds the answer, 10 s after the task was sent",
    3: "Dify has forgotten the conversation: it begins anew",
    4: "Chatwoot takes the answer and says 502: it is there, so it is not posted twice",
}


async def tell(stack: Stack, console: Console, workers: AsyncExitStack) -> None:
    """Send the messages, print what becomes of them, then the database's rows.

    Parameters:
        workers: Where workers are started, and ended by whoever owns it.

    Raises:
        ExceptionGroup: Of a TimeoutError: an answer did not arrive within ``TIME_LIMIT`` seconds.
    """
    worker = await workers.enter_async_context(stack.worker())
    for number, (content, fault) in enumerate(_MESSAGES):
        if comment := _COMMENTS.get(number):
            console.print(f"  [yellow]fault[/]     {comment}")
        if fault is not None:
            (stack.chatwoot if fault.path == "/messages" else stack.dify).faults.add(fault)
        if number == 3:
            for conversation in list(stack.dify.conversations):
                stack.dify.forget(conversation)
        async with asyncio.TaskGroup() as group:  # so that no worker is started when the demo is already ending
            if number == 2:
                group.create_task(_replace(stack, worker, workers))
            await _exchange(stack, console, content, number)
    await _show_rows(console)


async def _replace(stack: Stack, worker: Process, workers: AsyncExitStack) -> None:
    stack.dify.asked.clear()
    stack.dify.answering.clear()
    await stack.dify.asked.wait()
    os.killpg(worker.pid, signal.SIGKILL)
    stack.dify.answering.set()
    await workers.enter_async_context(stack.worker("another"))


async def _exchange(stack: Stack, console: Console, content: str, answered: int) -> None:
    began = time.monotonic()
    console.print(f"  [cyan]customer[/]  {escape(content)}")
    response = await stack.chatwoot.say(CONVERSATION, content)
    elapsed = (time.monotonic() - began) * 1000
    console.print(f"  [dim]webhook   {response.status_code} {escape(response.text)} in {elapsed:.0f} ms[/]")
    answers = stack.chatwoot.conversation(CONVERSATION).answers
    async with asyncio.timeout(TIME_LIMIT):
        while len(answers()) <= answered:
            stack.chatwoot.posted.clear()
            await stack.chatwoot.posted.wait()
    console.print(f"  [green]answer[/]    {escape(answers()[-1])} [dim]after {time.monotonic() - began:.2f} s[/]\n")


async def _show_rows(console: Console) -> None:
    async with asyncio.timeout(TIME_LIMIT):
        while await _unfinished():  # Chatdify has posted the last answer, and is about to commit that
            await asyncio.sleep(0.1)
    columns = "id, chatwoot_conversation_id, dify_conversation_id, status"
    console.print(await _table("dialogue", f"SELECT {columns} FROM dialogue ORDER BY id"))
    columns = "id, dialogue_id, content, state, answer"
    console.print(await _table("message", f"SELECT {columns} FROM message ORDER BY id"))


async def _unfinished() -> int:
    async with db.transaction() as session:
        query = select(func.count()).select_from(Message).where(Message.state.not_in(FINISHED))
        return await session.scalar(query) or 0


async def _table(title: str, query: str) -> Table:
    async with db.transaction() as session:
        rows = await session.execute(text(query))
        table = Table(*rows.keys(), title=title, title_justify="left")
        for row in rows:
            table.add_row(*(escape(str(value)) for value in row))
    return table
