"""The event loop of ``async def`` tasks: one per worker process, in a thread of its own.

A task that runs another one eagerly (``apply()``, or any call under ``task_always_eager``) blocks its loop, so the
other one gets a second loop, and so on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, wait
from contextlib import suppress
from threading import Lock, Thread
from typing import Any, TypeVar

from celery.exceptions import SoftTimeLimitExceeded

from celery_ext import greenlets
from celery_ext.errors import AsyncTaskNotSupported, TaskCancelled
from fastapi_chatdify_db.forks import in_forked_child

T = TypeVar("T")


class _LoopThread:
    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = Thread(target=self.loop.run_forever, name="celery_ext.event_loop", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


_lock = Lock()
_running: list[_LoopThread] = []
"""The process's loop, then the one for tasks that a task on the first runs eagerly, ..."""


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on the process's loop, with the context variables of the calling thread, and wait for it.

    An exception in the waiting thread, such as a time limit's, cancels the coroutine and is raised once that has ended.
    That of a soft time limit or a cold shutdown is not raised if the coroutine returns nevertheless: it has committed.

    Raises:
        AsyncTaskNotSupported: The process runs on greenlets, all of which an event loop would block.
        TaskCancelled: The coroutine was cancelled from inside.
        BaseException: What the coroutine raised.
    """
    try:
        loop = _free_loop()
    except AsyncTaskNotSupported:
        coroutine.close()
        raise
    outcome: Future[T] = Future()
    tasks: list[asyncio.Task[Any]] = []

    def end(task: asyncio.Task[Any]) -> None:
        coroutine.close()  # one cancelled before its first step would warn that it was never awaited
        _copy_outcome(task, outcome)

    def start() -> None:
        tasks.append(loop.create_task(_contain_exits(coroutine, outcome)))
        tasks[0].add_done_callback(end)

    def cancel() -> None:
        if not tasks:  # the exception came before ``start`` was scheduled
            start()
        tasks[0].cancel()

    try:
        loop.call_soon_threadsafe(start)
        return outcome.result()
    except BaseException as error:
        if not outcome.done():
            loop.call_soon_threadsafe(cancel)
            _wait_out(outcome)
        if isinstance(error, Exception) and outcome.exception() is None:
            return outcome.result()  # what the coroutine did is committed
        raise


def _wait_out(outcome: Future[Any]) -> None:
    """Wait until the coroutine has ended: Celery repeats a soft limit at a warm shutdown, perhaps in the COMMIT."""
    while not outcome.done():
        with suppress(SoftTimeLimitExceeded):
            wait([outcome])


def stop(last: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """End the process's loops, after running ``last`` on each; a later ``run`` makes a new one."""
    global _running
    with _lock:
        stopping, _running = _running, []
    for each in stopping:
        asyncio.run_coroutine_threadsafe(last(), each.loop).result()
        each.stop()


async def _contain_exits(coroutine: Coroutine[Any, Any, T], outcome: Future[T]) -> Any:
    try:
        return await coroutine
    except (SystemExit, KeyboardInterrupt) as error:  # asyncio would end the loop, and every later task with it
        outcome.set_exception(error)
        return None


def _copy_outcome(task: asyncio.Task[Any], outcome: Future[T]) -> None:
    if outcome.done():
        return
    if task.cancelled():
        # Celery takes a BaseException for the end of the worker.
        outcome.set_exception(TaskCancelled("the coroutine was cancelled; to end a task quietly raise Ignore()"))
    elif (error := task.exception()) is not None:
        outcome.set_exception(error)
    else:
        outcome.set_result(task.result())


def _free_loop() -> asyncio.AbstractEventLoop:
    if greenlets.replace_threads():
        raise AsyncTaskNotSupported("async def tasks need the pool prefork, threads or solo; on greenlets write def")
    try:
        here = asyncio.get_running_loop()
    except RuntimeError:
        here = None
    with _lock:
        free = next((at + 1 for at, each in enumerate(_running) if each.loop is here), 0)
        if free == len(_running):
            _running.append(_LoopThread())
        return _running[free].loop


@in_forked_child
def _forget_parents_loops() -> None:
    global _lock, _running
    _lock, _running = Lock(), []
