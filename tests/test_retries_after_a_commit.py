"""``retries=`` runs no request again of which something is committed already."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import suppress
from itertools import count

import httpx
import pytest
from fastapi import Depends, FastAPI, HTTPException
from sqlalchemy import select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from fastapi_chatdify_db import AfterCommitError, DBSessionMiddleware, db
from tests.failing import ASKS_TO_RETRY
from tests.models import Counter, Item
from tests.observing import Observer
from tests.serving import serve


async def test_request_that_committed_a_block_is_not_run_again(observer: Observer) -> None:
    """It would write the block's rows a second time."""
    app = FastAPI()
    app.add_middleware(DBSessionMiddleware, retries=2)

    @app.post("/async")
    async def audit() -> None:
        async with db.transaction() as outer, db.transaction() as session:
            session.add(Item("audited"))
            await outer.execute(text("SELECT 1"))
        await db.session.execute(text(ASKS_TO_RETRY))

    @app.post("/def")
    def audit_in_a_thread() -> None:
        with db.sync_transaction() as session:
            session.add(Item("audited in a thread"))
        db.sync_session.execute(text(ASKS_TO_RETRY))

    async with serve(app) as client:
        assert [(await client.post(path)).status_code for path in ("/async", "/def")] == [500, 500]
    assert await observer.names() == ["audited", "audited in a thread"]


async def test_request_that_committed_another_one_is_not_run_again(observer: Observer) -> None:
    """A handler asks an application in its own process, whose unit is not of this one: its rows are there."""
    inner, app, numbers = FastAPI(), FastAPI(), count()
    inner.add_middleware(DBSessionMiddleware)
    app.add_middleware(DBSessionMiddleware, retries=2)

    @inner.post("/")
    async def insert() -> None:
        db.session.add(Item(f"inner {next(numbers)}"))

    @app.post("/")
    async def handler() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(inner), base_url="http://inner") as client:
            assert (await client.post("/")).status_code == 200
        await db.session.execute(text(ASKS_TO_RETRY))

    async with serve(app) as client:
        assert (await client.post("/")).status_code == 500
    assert await observer.names() == ["inner 0"]


@pytest.mark.parametrize(
    "path", ["/release", "/callback", "/own", "/own-def", "/own-then-read", "/own-detached", "/cursor"]
)
async def test_what_is_committed_is_not_done_again(counter: Observer, path: str) -> None:
    """Once a part of the request's work stays, its failure is an error and not another run."""
    app = FastAPI()
    app.add_middleware(DBSessionMiddleware, retries=2)
    runs: list[str] = []

    @app.post("/release")
    async def release() -> None:
        runs.append("release")
        db.session.add(Item(f"run {len(runs)}"))
        await db.release()
        await db.session.execute(text(ASKS_TO_RETRY))

    @app.post("/own")
    async def own() -> None:
        runs.append("own")
        db.session.add(Item(f"run {len(runs)}"))
        await db.session.commit()
        await db.session.execute(text(ASKS_TO_RETRY))

    @app.post("/own-then-read")
    async def own_then_read() -> None:
        runs.append("own, then a read")
        db.session.add(Item(f"run {len(runs)}"))
        await db.session.commit()
        await db.session.scalars(select(Item))
        await db.session.commit()
        await db.session.execute(text(ASKS_TO_RETRY))

    @app.post("/own-detached")
    def own_detached() -> None:
        runs.append("own, detached")
        db.sync_session.connection().detach()
        db.sync_session.add(Item(f"run {len(runs)}"))
        db.sync_session.commit()
        db.sync_session.execute(text(ASKS_TO_RETRY))

    @app.post("/cursor")
    def cursor() -> None:
        runs.append("cursor")
        statement = f"INSERT INTO item (name) VALUES ('run {len(runs)}')"
        db.sync_session.connection().connection.cursor().execute(statement)
        db.sync_session.commit()
        db.sync_session.execute(text(ASKS_TO_RETRY))

    @app.post("/own-def")
    def own_def() -> None:
        runs.append("own-def")
        db.sync_session.add(Item(f"run {len(runs)}"))
        db.sync_session.commit()
        db.sync_session.execute(text(ASKS_TO_RETRY))

    @app.post("/callback")
    async def callback() -> None:
        runs.append("callback")
        db.session.add(Item(f"run {len(runs)}"))
        with suppress(DBAPIError):
            async with db.session.begin_nested():
                await db.session.execute(text(ASKS_TO_RETRY))
        db.on_commit(fail)

    def fail() -> None:
        raise AfterCommitError

    async with serve(app) as client:
        assert (await client.post(path)).status_code == 500
    assert await counter.names() == ["run 1"]


async def test_dependency_that_committed_in_its_block(observer: Observer) -> None:
    """While the block is open, and after one around it has ended before it, as a dependency of a function does."""
    app, numbers = FastAPI(), count()
    app.add_middleware(DBSessionMiddleware, retries=2)

    async def commit(what: str) -> None:
        async with db.transaction() as session:
            session.add(Item(f"{what} {next(numbers)}"))

    async def block() -> AsyncIterator[None]:
        async with db.transaction():
            yield

    async def committing_block() -> AsyncIterator[None]:
        async with db.transaction():
            await commit("before")
            yield

    async def block_with_a_log() -> AsyncIterator[None]:
        async with db.transaction():
            try:
                yield
            except DBAPIError:
                await commit("log")
                raise

    @app.post("/open", dependencies=[Depends(committing_block)])
    async def answer() -> None:
        with suppress(DBAPIError):
            await db.session.execute(text(ASKS_TO_RETRY))
        raise HTTPException(503)

    @app.post("/log", dependencies=[Depends(block, scope="function"), Depends(block_with_a_log)])
    async def fail() -> None:
        await db.session.execute(text(ASKS_TO_RETRY))

    async with serve(app) as client:
        assert [(await client.post(path)).status_code for path in ("/open", "/log")] == [503, 500]
    assert await observer.names() == ["before 0", "log 1"]


async def test_savepoint_is_no_commit(observer: Observer) -> None:
    """What was written in it is rolled back with the request, which is run again."""
    app = FastAPI()
    app.add_middleware(DBSessionMiddleware, retries=1)
    runs = 0

    @app.post("/")
    async def write() -> None:
        nonlocal runs
        runs += 1
        async with db.session.begin_nested():
            db.session.add(Item(f"run {runs}"))
        if runs == 1:
            await db.session.execute(text(ASKS_TO_RETRY))

    async with serve(app) as client:
        assert (await client.post("/")).status_code == 200
    assert await observer.names() == ["run 2"]


@pytest.mark.parametrize("path", ["/own", "/own-def"])
@pytest.mark.parametrize("level", ["READ COMMITTED", "SERIALIZABLE"])
async def test_commit_of_reads_leaves_nothing_behind(counter: Observer, path: str, level: str) -> None:
    """So a request that ended a transaction of reads itself is run again like any other."""
    app = FastAPI()
    app.add_middleware(DBSessionMiddleware, retries=2)
    runs: list[str] = []

    def read_and_commit(session: Session) -> None:
        runs.append(path)
        session.connection(execution_options={"isolation_level": level})
        session.get_one(Counter, 1)
        session.commit()
        if len(runs) == 1:
            session.execute(text(ASKS_TO_RETRY))

    @app.post("/own")
    async def own() -> None:
        await db.session.run_sync(read_and_commit)

    @app.post("/own-def")
    def own_def() -> None:
        read_and_commit(db.sync_session)

    async with serve(app) as client:
        assert (await client.post(path)).status_code == 200
    assert len(runs) == 2
