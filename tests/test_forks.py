"""A forked child has connections of its own, and leaves those of its parent alone."""

from __future__ import annotations

from tests.forking import in_a_new_process


def test_fork_after_use(database_url: str) -> None:
    """A forked child opens connections of its own and leaves the parent's, pooled or in use, alone."""
    in_a_new_process(
        """
import os
from sqlalchemy import text
from fastapi_chatdify_db import Database
from tests.forking import PID, backends, fork_and_wait

database = Database()
before = backends(database)

def child():
    for _ in range(3):
        assert not set(backends(database)) & set(before)

with database.sync_transaction() as session:
    in_use = session.execute(PID).scalar_one()
    assert fork_and_wait(child) == 0
    assert session.execute(PID).scalar_one() == in_use
assert backends(database)[1] in {before[1], in_use}
assert fork_and_wait(child) == 0
""",
        DATABASE_URL=database_url,
    )


def test_forked_child_may_end_like_any_process(database_url: str) -> None:
    """An interpreter's ordinary end, as a gunicorn worker's, closes none of the parent's connections."""
    in_a_new_process(
        """
import asyncio, os, sys
from fastapi_chatdify_db import Database
from tests.forking import PID

database = Database()
loop = asyncio.new_event_loop()

async def ask():
    async with database.transaction() as session:
        return (await session.execute(PID)).scalar_one()

def both():
    with database.sync_transaction() as session:
        return [loop.run_until_complete(ask()), session.execute(PID).scalar_one()]

before = both()
if (pid := os.fork()) == 0:
    sys.exit(0)
assert os.waitpid(pid, 0)[1] == 0
assert both() == before
loop.run_until_complete(database.dispose())
loop.close()
""",
        DATABASE_URL=database_url,
        DB_POOL_PRE_PING="false",
    )


def test_forked_child_may_collect_its_garbage(database_url: str) -> None:
    """Nor does that close a connection of the parent's, whichever of its loops has opened it."""
    in_a_new_process(
        """
import asyncio, gc, signal, warnings
from fastapi_chatdify_db import Database
from tests.forking import PID, fork_and_wait

warnings.simplefilter("ignore", ResourceWarning)  # as an error, it keeps asyncpg from closing what it warns of
signal.alarm(20)
database = Database()
loops = [asyncio.new_event_loop(), asyncio.new_event_loop()]

async def ask():  # outside any unit, which asyncio would keep with the connection's context
    async with database.async_engine.connect() as connection:
        return await connection.scalar(PID)

def everybody():
    with database.sync_transaction() as session:
        return [*(loop.run_until_complete(ask()) for loop in loops), session.execute(PID).scalar_one()]

before = everybody()
assert fork_and_wait(gc.collect) == 0
assert everybody() == before
for loop in loops:
    loop.run_until_complete(database.dispose())
    loop.close()
""",
        DATABASE_URL=database_url,
        DB_POOL_PRE_PING="false",
    )


def test_engine_derived_before_a_fork_shares_the_childs_pool(database_url: str) -> None:
    """Also if the parent's loop is still there, as an object that nobody runs in the child."""
    in_a_new_process(
        """
import asyncio
from fastapi_chatdify_db import Database
from tests.forking import PID, fork_and_wait

database = Database()
derived = database.async_engine.execution_options(isolation_level="SERIALIZABLE")
loop = asyncio.new_event_loop()

async def both():
    async with database.transaction() as session:
        pid = await session.scalar(PID)
    async with derived.connect() as connection:
        assert await connection.scalar(PID) == pid
    await database.dispose()

loop.run_until_complete(both())
assert fork_and_wait(lambda: asyncio.run(both())) == 0
loop.close()
""",
        DATABASE_URL=database_url,
    )


def test_fork_inside_a_running_loop(database_url: str) -> None:
    """Also the connections of the loop that is running in the parent survive its child."""
    in_a_new_process(
        """
import asyncio, os
from fastapi_chatdify_db import Database
from tests.forking import PID, fork_and_wait

database = Database()

async def main():
    async with database.transaction() as session:
        before = (await session.execute(PID)).scalar_one()

    def child():
        asyncio.events._set_running_loop(None)  # the fork happened inside the parent's
        async def ask():
            async with database.transaction() as session:
                return (await session.execute(PID)).scalar_one()
        assert asyncio.run(ask()) != before

    assert fork_and_wait(child) == 0
    async with database.transaction() as session:
        assert (await session.execute(PID)).scalar_one() == before
    await database.dispose()

asyncio.run(main())
""",
        DATABASE_URL=database_url,
    )


def test_listeners_stay_after_a_fork(database_url: str) -> None:
    """What an application prepares in its connections, is prepared in a child's too."""
    in_a_new_process(
        """
import os
from sqlalchemy import event
from fastapi_chatdify_db import Database
from tests.forking import backends, fork_and_wait

database = Database()
told = []
for engine in (database.async_engine.sync_engine, database.sync_engine):
    event.listen(engine, "connect", lambda connection, record: told.append(os.getpid()))

def child():
    backends(database)
    assert told == [os.getpid()] * 2, told

assert fork_and_wait(child) == 0
backends(database)
assert told == [os.getpid()] * 2, told
""",
        DATABASE_URL=database_url,
    )


def test_multiprocessing_fork(database_url: str) -> None:
    """``multiprocessing`` forks likewise, as gunicorn's preload and Celery's prefork do."""
    in_a_new_process(
        """
import multiprocessing
from fastapi_chatdify_db import Database
from tests.forking import backends

database = Database()
before = backends(database)

def child(queue):
    queue.put(backends(database))

context = multiprocessing.get_context("fork")
queue = context.SimpleQueue()
process = context.Process(target=child, args=(queue,))
process.start()
assert not set(queue.get()) & set(before)
process.join()
assert process.exitcode == 0
assert backends(database)[1] == before[1]
""",
        DATABASE_URL=database_url,
    )


def test_fork_inside_a_unit(database_url: str) -> None:
    """The unit is the parent's: its child, which would write into the parent's transaction, has to open another."""
    in_a_new_process(
        """
from fastapi_chatdify_db import Database, OutsideUnitOfWork
from tests.forking import PID, fork_and_wait

database = Database()

def child():
    try:
        database.sync_session
    except OutsideUnitOfWork:
        with database.sync_transaction() as session:
            assert session.execute(PID).scalar_one() != parents
    else:
        raise AssertionError("it has the parent's")

with database.sync_transaction() as session:
    parents = session.execute(PID).scalar_one()
    assert fork_and_wait(child) == 0
    assert database.sync_session.execute(PID).scalar_one() == parents
""",
        DATABASE_URL=database_url,
    )
