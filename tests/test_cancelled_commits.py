"""A COMMIT on its way is waited for, however often the task is cancelled, and its callbacks run."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from typing import Any

import httpx
import pytest
from fastapi import Depends, FastAPI
from sqlalchemy import event, insert, select, text
from sqlalchemy.ext.asyncio import AsyncSession

from fastapi_chatdify_db import Database, DatabaseSettings, db
from tests.models import Item
from tests.observing import Observer


@pytest.fixture
async def slow_commits(observer: Observer) -> AsyncIterator[None]:
    """A COMMIT of new or changed items waits for a lock, which the observer holds."""
    await observer.connection.execute(
        """CREATE FUNCTION slowly() RETURNS trigger LANGUAGE plpgsql AS
           'BEGIN PERFORM pg_advisory_xact_lock(42); RETURN NULL; END';
           CREATE CONSTRAINT TRIGGER slow_commit AFTER INSERT OR UPDATE OR DELETE ON item INITIALLY DEFERRED
           FOR EACH ROW EXECUTE FUNCTION slowly();
           SELECT pg_advisory_lock(42)"""
    )
    yield
    await observer.connection.execute("SELECT pg_advisory_unlock_all(); DROP FUNCTION slowly() CASCADE")


async def cancel_during_commit(observer: Observer, work: Coroutine[Any, Any, None]) -> None:
    """Cancel the work over and over while its COMMIT waits, then let the COMMIT go on."""
    task = asyncio.create_task(work)
    await observer.until_somebody_waits_for_a_lock()
    for _ in range(3):
        task.cancel()
        await asyncio.sleep(0)
    await asyncio.wait([task], timeout=0.1)  # for PostgreSQL to hear of it, if it was told
    assert not task.done()
    await observer.connection.execute("SELECT pg_advisory_unlock(42)")
    with pytest.raises(asyncio.CancelledError):
        await task


async def add(session: AsyncSession) -> None:
    session.add(Item("new"))


async def add_after_a_read(session: AsyncSession) -> None:
    await session.scalars(select(Item))
    session.add(Item("new"))


async def flush(session: AsyncSession) -> None:
    session.add(Item("new"))
    await session.flush()


async def execute(session: AsyncSession) -> None:
    await session.execute(insert(Item).values(name="new"))


async def execute_many(session: AsyncSession) -> None:
    await session.execute(insert(Item), [{"name": "new"}])


async def execute_text(session: AsyncSession) -> None:
    await session.execute(text("INSERT INTO item (name) VALUES ('new')"))


async def execute_in_savepoint(session: AsyncSession) -> None:
    async with session.begin_nested():
        await session.execute(text("INSERT INTO item (name) VALUES ('new')"))


async def execute_on_the_connection(session: AsyncSession) -> None:
    await (await session.connection()).exec_driver_sql("INSERT INTO item (name) VALUES ('new')")


async def change(session: AsyncSession) -> None:
    (await session.scalars(select(Item))).one().name = "new"


async def delete(session: AsyncSession) -> None:
    await session.delete((await session.scalars(select(Item))).one())


async def add_in_a_hook(session: AsyncSession) -> None:
    await session.scalars(select(Item))
    event.listen(session.sync_session, "before_commit", lambda sync_session: sync_session.add(Item("new")))


Write = Callable[[AsyncSession], Awaitable[None]]
ADDING: list[Write] = [
    *(add, add_after_a_read, add_in_a_hook, flush),
    *(execute, execute_many, execute_text, execute_in_savepoint, execute_on_the_connection),
]
WRITES = [*((write, ["new", "old"]) for write in ADDING), (change, ["new"]), (delete, [])]


@pytest.mark.parametrize(("write", "expected"), WRITES, ids=lambda value: getattr(value, "__name__", ""))
@pytest.mark.parametrize(("lazy", "ping"), [(True, True), (False, True), (False, False)], ids=["lazy", "eager", "bare"])
async def test_cancellation_during_the_commit_waits_for_its_answer(
    observer: Observer,
    slow_commits: None,
    write: Write,
    expected: list[str],
    lazy: bool,
    ping: bool,
) -> None:
    """A COMMIT on its way is not abandoned, whatever it is that it writes."""
    database = Database(settings=DatabaseSettings(db_lazy_begin=lazy, db_pool_pre_ping=ping))
    await observer.connection.execute("SET session_replication_role = replica; INSERT INTO item (name) VALUES ('old')")

    async def work() -> None:
        async with database.transaction() as session:
            await write(session)

    await cancel_during_commit(observer, work())
    assert await observer.names() == expected
    assert await observer.in_transaction() == 0
    await database.dispose()


async def test_callbacks_of_a_commit_that_is_cancelled_run(observer: Observer, slow_commits: None) -> None:
    """Who waits for the COMMIT's answer acts on it too."""
    ran: list[str] = []

    async def work() -> None:
        async with db.transaction() as session:
            session.add(Item("committed"))
            db.on_commit(lambda: ran.append("callback"))

    await cancel_during_commit(observer, work())
    assert await observer.names() == ["committed"]
    assert ran == ["callback"]


async def test_commit_of_a_def_dependency(app: FastAPI, observer: Observer, slow_commits: None) -> None:
    """Its block's COMMIT is in a thread, and is waited for like any other; then comes the request's own."""
    ran: list[str] = []

    def add_in_block() -> Iterator[None]:
        with db.sync_transaction() as session:
            db.on_commit(lambda: ran.append("callback"))
            session.add(Item("committed"))
            yield

    @app.get("/", dependencies=[Depends(add_in_block)])
    async def answer() -> None:
        db.session.add(Item("request"))

    async def work() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            await client.get("/")

    await cancel_during_commit(observer, work())
    assert await observer.names() == ["committed", "request"]
    assert ran == ["callback"]


async def test_cancelled_commit_that_fails(observer: Observer, caplog: pytest.LogCaptureFixture) -> None:
    """Whoever was cancelled hears of the cancellation; the log has the error."""

    async def work() -> None:
        async with db.transaction() as session:
            session.add(Item("taken"))

    async with observer.connection.transaction():
        await observer.connection.execute("INSERT INTO item (name) VALUES ('taken')")
        working = asyncio.create_task(work())
        await observer.until_somebody_waits_for_a_lock()
        working.cancel()
        await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError):
        await working
    assert "the end of a cancelled unit of work failed" in caplog.text
    assert "IntegrityError" in caplog.text
