"""The migrations make the models' tables, and the import paths of old go on working."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fastapi import FastAPI

from fastapi_chatdify_db import db
from tests.serving import serve

ROOT = Path(__file__).parents[2]


def alembic(database_url: str, *arguments: str) -> str:
    """Run Alembic on a database."""
    command = [sys.executable, "-m", "alembic", "-c", str(ROOT / "example_app" / "alembic.ini"), *arguments]
    environment = os.environ | {"DATABASE_URL": database_url}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd="/")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


def test_migrations_and_models_agree(own_database: str) -> None:
    """After ``upgrade head``, ``check`` finds no difference; down and up again works as well."""
    alembic(own_database, "upgrade", "head")
    assert "No new upgrade operations detected" in alembic(own_database, "check")
    alembic(own_database, "downgrade", "base")
    alembic(own_database, "upgrade", "head")


def test_new_import_paths() -> None:
    """The names stand where the migration guide looks for them."""
    module = importlib.import_module("example_app.db")
    assert module.Base.metadata.tables.keys() >= {"dialogue", "message", "webhook_delivery"}
    session = importlib.import_module("example_app.db.session")
    assert session.async_engine is db.async_engine
    assert session.sync_engine is db.sync_engine
    assert importlib.import_module("example_app.db.utils").create_db_tables
    with pytest.raises(AttributeError):
        _ = session.no_such_name


async def test_old_import_paths(tables: None) -> None:
    """``example_app.database`` has the old names, each of which warns with the new one."""
    database = importlib.import_module("example_app.database")
    app = FastAPI()

    @app.get("/")
    async def handler() -> bool:
        async for session in database.get_session():
            return session is db.session
        return False

    db.init_app(app)
    async with serve(app) as client:
        with pytest.warns(DeprecationWarning, match="import get_session"):
            assert (await client.get("/")).json() is True
    with pytest.warns(DeprecationWarning, match="import get_sync_session"), database.SessionLocal() as session:
        assert session.connection().closed is False
    with pytest.warns(DeprecationWarning, match=r"db\.sync_session"):
        next(database.get_db())
