"""SQLite does everything that is not PostgreSQL's own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from fastapi import FastAPI, HTTPException
from sqlalchemy import select
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


async def test_sync_sessions(tmp_path: Path) -> None:
    """The synchronous engine uses the same file, and the same savepoints."""
    notes = Database(settings=DatabaseSettings(database_url=f"sqlite:///{tmp_path}/notes.db"), base=NotesBase)
    await notes.create_tables()

    def work() -> None:
        with notes.sync_transaction() as session:
            session.add(Note("kept"))
            savepoint = session.begin_nested()
            session.add(Note("dropped"))
            session.flush()
            savepoint.rollback()

    await asyncio.to_thread(work)
    assert await texts(notes) == ["kept"]
    await notes.drop_tables()
    await notes.dispose()
