"""Tasks in any process: a forked one, one that is interrupted, one that goes on after its worker."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest
from celery import Celery
from celery.signals import worker_shutdown
from sqlalchemy import text

import celery_ext
from celery_ext import event_loop
from fastapi_chatdify_db import Database, DatabaseSettings
from tests.forking import in_a_new_process
from tests.observing import Observer


def test_fork_after_use() -> None:
    """A forked child has an event loop, and a thread that sends, of its own: its parent's do not run in it."""
    in_a_new_process(
        """
import signal
from celery_ext import event_loop
from celery_ext.sender import send_within
from tests.forking import fork_and_wait

async def nothing(): pass

def both():
    assert send_within(2, bool) is None
    event_loop.run(nothing())

def child():
    signal.alarm(5)
    both()

both()
assert fork_and_wait(child) == 0
"""
    )


def test_late_shared_task_of_two_applications() -> None:
    """Each application's task has that application's database, whatever base they share."""
    in_a_new_process(
        """
from celery import Celery, shared_task
import celery_ext
from fastapi_chatdify_db import Database

databases = {}
for name in ("a", "b"):
    app = Celery(name, broker="memory://", set_as_current=False)
    databases[app] = Database(name)
    celery_ext.init_app(app, db=databases[app])
    app.finalize()

@shared_task(base=celery_ext.Task, name="late")
def late(): ...

assert {app: app.tasks["late"].database for app in databases} == databases
"""
    )


def test_fork_while_the_broker_hangs() -> None:
    """The messages that its parent's threads wait with do not keep a forked child from sending its own."""
    in_a_new_process(
        """
import threading
from celery_ext.sender import send_within
from tests.forking import fork_and_wait

hang = threading.Event().wait
while "already" not in str(send_within(0.001, hang)): pass

def child():
    assert send_within(2, bool) is None

assert fork_and_wait(child) == 0
"""
    )


def test_gevent_that_patches_nothing() -> None:
    """A library that only imports it, or looks whether it is there, changes nothing."""
    in_a_new_process(
        """
import gevent.monkey
import psycopg2.extensions
from celery.signals import worker_init
from celery_ext import event_loop

async def answer(): return 42

worker_init.send(None)
assert psycopg2.extensions.get_wait_callback() is None
assert event_loop.run(answer()) == 42
"""
    )


def test_soft_limit_during_a_commit_within_a_commit() -> None:
    """It is held back until the outer one is done; and a handler of the application's own is left alone."""
    in_a_new_process(
        """
import os, signal
from billiard.pool import SIG_SOFT_TIMEOUT, soft_timeout_sighandler
from celery.exceptions import SoftTimeLimitExceeded
from celery_ext.soft_limit import soft_limit_held_back
from tests.forking import fork_and_wait

def pass_meanwhile():
    with soft_limit_held_back:
        with soft_limit_held_back:
            os.kill(os.getpid(), SIG_SOFT_TIMEOUT)
        steps.append("inner done")
    steps.append("outer done")

def child():
    signal.signal(SIG_SOFT_TIMEOUT, soft_timeout_sighandler)
    try:
        pass_meanwhile()
    except SoftTimeLimitExceeded:
        steps.append("limit")
    assert steps == ["inner done", "limit"], steps

steps = []
assert fork_and_wait(child) == 0
signal.signal(SIG_SOFT_TIMEOUT, lambda *_: steps.append("handled"))
pass_meanwhile()
assert steps == ["handled", "inner done", "outer done"], steps
"""
    )


def test_interrupt_that_a_coroutine_survives() -> None:
    """What ends the waiting thread, unlike a soft time limit, ends it although the coroutine has returned."""
    in_a_new_process(
        """
import asyncio, os, signal
from celery_ext import event_loop

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
ended = []

async def survive():
    os.kill(os.getpid(), signal.SIGINT)
    try:
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        ended.append("cancelled")

try:
    event_loop.run(survive())
except KeyboardInterrupt:
    ended.append("interrupted")
assert ended == ["cancelled", "interrupted"], ended
"""
    )


@pytest.mark.parametrize("scheduled", [True, False])
def test_interrupt_while_a_coroutine_is_scheduled(scheduled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A time limit can come at any instruction: the coroutine does not go on with nobody waiting for it."""
    loop = event_loop.run(_running_loop())
    schedule = loop.call_soon_threadsafe

    def interrupted(callback: Callable[[], object]) -> None:
        monkeypatch.undo()
        if scheduled:
            schedule(callback)
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "call_soon_threadsafe", interrupted)
    with pytest.raises(KeyboardInterrupt):
        event_loop.run(asyncio.Event().wait())

    assert asyncio.run_coroutine_threadsafe(_other_tasks(), loop).result() == 0


async def _running_loop() -> asyncio.AbstractEventLoop:
    return asyncio.get_running_loop()


async def _other_tasks() -> int:
    return len(asyncio.all_tasks()) - 1


@pytest.mark.parametrize("leave", ["SystemExit", "KeyboardInterrupt"])
def test_coroutine_that_leaves(leave: str) -> None:
    """What would end the loop, and every later task with it, ends the one that waits."""
    in_a_new_process(
        f"""
import asyncio, logging, signal
from celery_ext import event_loop

async def leaves(): raise {leave}
async def loop(): return asyncio.get_running_loop()

signal.alarm(10)
logged = []
logging.getLogger("asyncio").addFilter(logged.append)
before = event_loop.run(loop())
try:
    event_loop.run(leaves())
except {leave}:
    assert event_loop.run(loop()) is before
else:
    raise AssertionError
assert not logged
"""
    )


@pytest.mark.parametrize("kind", ["def", "async def"])
async def test_worker_in_a_process_that_goes_on(empty_tables: Observer, kind: str) -> None:
    """At its shutdown, as of ``celery.contrib.testing``'s, it closes its connections; tasks may be run after it."""
    own = Database("own", settings=DatabaseSettings(db_application_name="shut down"))
    app = Celery("shut down", backend="cache+memory://", set_as_current=False)
    celery_ext.init_app(app, db=own)

    @app.task(shared=False)
    def in_def() -> int:
        return int(own.sync_session.scalar(text("SELECT 42")) or 0)

    @app.task(shared=False)
    async def in_async() -> int:
        return int(await own.session.scalar(text("SELECT 42")))

    ask = in_def if kind == "def" else in_async
    for _ in range(2):
        assert ask.apply().get() == 42
        assert await empty_tables.connections("shut down") == 1
        await asyncio.to_thread(worker_shutdown.send, None)
        async with asyncio.timeout(10):
            await empty_tables.until_connections("shut down", 0)
        assert not [thread for thread in threading.enumerate() if thread.name == "celery_ext.event_loop"]
    app.close()


def test_worker_imports_no_web_framework() -> None:
    """Neither ``celery_ext`` nor a module of tasks brings FastAPI or Starlette along."""
    code = """
import sys, celery_ext
from celery import Celery
from fastapi_chatdify_db import Base, db, get_sync_session
app = Celery("worker", task_cls=celery_ext.Task)
celery_ext.init_app(app)
@app.task
def task() -> None: db.sync_session
app.finalize()
assert not {"fastapi", "starlette"} & set(sys.modules), sorted(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_soft_limit_that_is_repeated() -> None:
    """As at a warm shutdown: the coroutine, which may be in its COMMIT, is waited for all the same."""
    in_a_new_process(
        """
import asyncio, os, signal
from billiard.pool import SIG_SOFT_TIMEOUT, soft_timeout_sighandler
from celery_ext import event_loop

limits = []

def handle(*arguments):
    limits.append(1)
    soft_timeout_sighandler(*arguments)

async def until(number):
    os.kill(os.getpid(), SIG_SOFT_TIMEOUT)
    while len(limits) < number:
        await asyncio.sleep(0.01)

async def commits():
    try:
        await until(1)
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        await until(2)
        return "committed"

signal.alarm(10)
signal.signal(SIG_SOFT_TIMEOUT, handle)
assert event_loop.run(commits()) == "committed"
"""
    )


def test_soft_limit_during_a_commit_that_fails(database_url: str) -> None:
    """The task has failed: what passes meanwhile makes no success of it."""
    in_a_new_process(
        """
import os, signal
from billiard.pool import SIG_SOFT_TIMEOUT, soft_timeout_sighandler
from celery import Celery
from sqlalchemy import event, text
import celery_ext
from fastapi_chatdify_db import Database

def refuse(*_):
    os.kill(os.getpid(), SIG_SOFT_TIMEOUT)
    raise ValueError("refused")

signal.signal(SIG_SOFT_TIMEOUT, soft_timeout_sighandler)
app, db = Celery(set_as_current=False), Database()
celery_ext.init_app(app, db=db)

@app.task
def fails():
    db.sync_session.execute(text("SELECT 1"))
    event.listen(db.sync_session, "before_commit", refuse)

assert fails.apply().state == "FAILURE"
""",
        DATABASE_URL=database_url,
    )
