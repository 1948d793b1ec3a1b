"""SQLite does everything that is not PostgreSQL's own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from fastapi import FastAPI, HTTPException
from sqlalchemy import select
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import DeclarativeBase, Mapped, MappedAsDataclass, mapped_column

from fastapi_chatdify_db import Database, DatabaseSettings
from tests.serving import serve


class NotesBase(MappedAsDataclass, DeclarativeBase):
    pass


class Note(NotesBase):
    __tablename__ = "note"

    id: Mapped[int] = mapped_column(primary_key=True, init=False)
    text: Mapped[str]


@pytest.fixture(params=["file", "memory"])
async def notes(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Database]:
    path = tmp_path / "notes.db" if request.param == "file" else ":memory:"
    notes = Database("notes", settings=DatabaseSettings(database_url=f"sqlite:///{path}"), base=NotesBase)
    yield notes
    await notes.dispose()


async def texts(notes: Database) -> list[str]:
    async with notes.transaction() as session:
        return list(await session.scalars(select(Note.text).order_by(Note.text)))


async def test_requests_commit_and_roll_back(notes: Database) -> None:
    """The lifespan creates the tables, a success is kept and an error is not."""
    app = FastAPI()
    notes.init_app(app)

    @app.post("/{status}")
    async def handler(status: int) -> list[str]:
        notes.session.add(Note(str(status)))
        await notes.session.flush()
        if status >= 400:
            raise HTTPException(status)
        return list(await notes.session.scalars(select(Note.text)))

    async with serve(app) as client:
        assert (await client.post("/200")).json() == ["200"]
        assert (await client.post("/409")).status_code == 409
        assert (await client.post("/201")).json() == ["200", "201"]


async def test_savepoints_and_callbacks(notes: Database) -> None:
    """A savepoint's rollback takes its rows and its callbacks."""
    await notes.create_tables()
    ran: list[str] = []
    async with notes.transaction() as session:
        session.add(Note("kept"))
        notes.on_commit(lambda: ran.append("kept"))
        savepoint = await session.begin_nested()
        session.add(Note("dropped"))
        await session.flush()
        notes.on_commit(lambda: ran.append("dropped"))
        await savepoint.rollback()
    assert ran == ["kept"]
    assert await texts(notes) == ["kept"]


async def test_memory_is_shared_by_name(tmp_path: Path) -> None:
    """Both sessions see one database in memory when the URL has SQLite's shared cache."""
    url = f"sqlite:///file:{tmp_path.name}?mode=memory&cache=shared&uri=true"
    notes = Database(settings=DatabaseSettings(database_url=url), base=NotesBase)
    await notes.create_tables()
    with notes.sync_transaction() as session:
        session.add(Note("seen"))
    assert await texts(notes) == ["seen"]
    await notes.dispose()


async def test_def_endpoints(tmp_path: Path) -> None:
    """``sync_session`` follows the same rule, in the file that the asynchronous session sees."""
    notes = Database(settings=DatabaseSettings(database_url=f"sqlite:///{tmp_path}/notes.db"), base=NotesBase)
    app = FastAPI()
    notes.init_app(app)

    @app.post("/{status}")
    def handler(status: int) -> None:
        notes.sync_session.add(Note(str(status)))
        notes.sync_session.flush()
        if status >= 400:
            raise HTTPException(status)

    async with serve(app) as client:
        statuses = [(await client.post(f"/{status}")).status_code for status in (200, 409, 500)]
    assert statuses == [200, 409, 500]
    assert await texts(notes) == ["200"]
    await notes.dispose()


async def test_transaction_rolls_back_on_an_exception(notes: Database) -> None:
    """What the block wrote, and the callbacks that it registered, are dropped; the exception goes on."""
    await notes.create_tables()
    ran: list[str] = []

    async def fail() -> None:
        async with notes.transaction() as session:
            session.add(Note("dropped"))
            await session.flush()
            notes.on_commit(lambda: ran.append("dropped"))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail()
    assert (ran, await texts(notes)) == ([], [])


async def test_tables_come_and_go(notes: Database) -> None:
    """``create_tables`` may be called again and keeps the rows; ``drop_tables`` takes them."""
    await notes.create_tables()
    async with notes.transaction() as session:
        session.add(Note("kept"))
    await notes.create_tables()
    assert await texts(notes) == ["kept"]
    await notes.drop_tables()
    with pytest.raises(OperationalError, match="no such table"):
        await texts(notes)


async def test_sync_sessions(tmp_path: Path) -> None:
    """The synchronous engine uses the same file, and the same savepoints."""
    notes = Database(settings=DatabaseSettings(database_url=f"sqlite:///{tmp_path}/notes.db"), base=NotesBase)
    await notes.create_tables()

    ran: list[str] = []

    def work() -> None:
        with notes.sync_transaction() as session:
            session.add(Note("kept"))
            notes.on_commit(lambda: ran.append("kept"))
            savepoint = session.begin_nested()
            session.add(Note("dropped"))
            session.flush()
            notes.on_commit(lambda: ran.append("dropped"))
            savepoint.rollback()

    def fail() -> None:
        with notes.sync_transaction() as session:
            session.add(Note("dropped"))
            session.flush()
            raise ZeroDivisionError

    await asyncio.to_thread(work)
    with pytest.raises(ZeroDivisionError):
        await asyncio.to_thread(fail)
    assert (ran, await texts(notes)) == (["kept"], ["kept"])
    await notes.drop_tables()
    await notes.dispose()
