"""The migrations make the models' tables, and the import paths of old go on working."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fastapi import FastAPI
from sqlalchemy import Engine, NullPool, create_engine, make_url

from celery_ext.durable.table import metadata as durable_tasks
from example_app.db import Base
from fastapi_chatdify_db import db
from tests.serving import serve

ROOT = Path(__file__).parents[2]


LATER_COLUMN = """
import sqlalchemy, celery_ext.durable.table as table
table.durable_task.append_column(sqlalchemy.Column("later", sqlalchemy.Text))
"""
CATALOG = """
SELECT table_name, concat_ws(' ', column_name, data_type, is_nullable, column_default, identity_generation,
                             col_description(table_name::regclass, ordinal_position))
FROM information_schema.columns WHERE table_schema = 'public'
UNION ALL SELECT tablename, indexdef FROM pg_indexes WHERE schemaname = 'public'
UNION ALL SELECT conrelid::regclass::text, conname || ' ' || pg_get_constraintdef(oid) FROM pg_constraint
WHERE connamespace = 'public'::regnamespace
"""
OUR_TABLES = ("dialogue", "message", "webhook_delivery")


def alembic(database_url: str, *commands: str, prelude: str = "") -> str:
    """Run Alembic's commands on a database, after ``prelude``; returns what was said, also of a failure."""
    config = str(ROOT / "example_app" / "alembic.ini")
    lines = [prelude, "from alembic.config import main"]
    lines += [f"main(argv={['-c', config, *command.split()]!r})" for command in commands]
    command = [sys.executable, "-c", "\n".join(lines)]
    environment = os.environ | {"DATABASE_URL": database_url, "PYTHONPATH": str(ROOT)}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd="/")
    return finished.stdout + finished.stderr


def catalog(engine: Engine) -> set[tuple[str, str]]:
    """The columns, indexes and constraints of the application's tables, as PostgreSQL has them."""
    with engine.connect() as connection:
        found = {(str(table), str(what)) for table, what in connection.exec_driver_sql(CATALOG)}
    return {(table, what) for table, what in found if table != "alembic_version"}


def test_migrations_make_what_the_models_say(own_database: str) -> None:
    """``upgrade head`` and the metadata make the same, to the last index; down leaves nothing."""
    engine = create_engine(make_url(own_database).set(drivername="postgresql+psycopg2"), poolclass=NullPool)
    assert "No new upgrade operations detected" in alembic(own_database, "upgrade head", "check")
    migrated = catalog(engine)
    alembic(own_database, "downgrade base")
    assert catalog(engine) == set()
    Base.metadata.create_all(engine, [Base.metadata.tables[name] for name in OUR_TABLES])
    durable_tasks.create_all(engine)
    assert migrated == catalog(engine)


def test_later_column_needs_a_migration(own_database: str) -> None:
    """The migrations make what they made when they were written, also of the package's durable tasks."""
    assert "'durable_task', Column('later'" in alembic(own_database, "upgrade head", "check", prelude=LATER_COLUMN)


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
