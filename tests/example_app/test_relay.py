"""The relay's command line finds what the application has configured, wherever it is set."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from example_app.settings import Settings
from tests.observing import PATIENCE

ROOT = Path(__file__).parents[2]


@pytest.fixture
async def directory(tables: None, database_url: str, tmp_path: Path) -> Path:
    """A directory whose ``.env`` says where the database with the durable tasks is."""
    (tmp_path / ".env").write_text(f"DATABASE_URL={database_url}\nCELERY_BROKER_URL=memory://\n")
    return tmp_path


async def start(directory: Path, command: str) -> asyncio.subprocess.Process:
    """Start a command in that directory, with no setting in its environment."""
    names = {str(field.validation_alias or name).upper() for name, field in Settings.model_fields.items()}
    environment = {name: value for name, value in os.environ.items() if name not in names}
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "celery_ext.relay", "-A", "example_app.worker", command),
        cwd=directory,
        env=environment | {"PYTHONPATH": str(ROOT)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


async def test_run(directory: Path) -> None:
    """It starts, and ends when it is told to."""
    process = await start(directory, "run")
    assert process.stderr is not None
    async with asyncio.timeout(PATIENCE):
        assert await process.stderr.readline() == b"relay ready\n"
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0


async def test_log_is_the_applications(directory: Path) -> None:
    """A relay sets up its log as a worker does, so that Chatdify's has its own form, level and Sentry."""
    with (directory / ".env").open("a") as settings:
        settings.write("DATABASE_URL=postgresql://127.0.0.1:1/none\n")
    process = await start(directory, "run")
    assert process.stderr is not None
    async with asyncio.timeout(PATIENCE):
        while b" WARNING celery_ext.durable.relay: relay pauses (1)" not in await process.stderr.readline():
            assert not process.stderr.at_eof()
        process.send_signal(signal.SIGTERM)
        await process.communicate()


async def test_status(directory: Path) -> None:
    """It counts the rows of the application's database."""
    process = await start(directory, "status")
    output, errors = await process.communicate()
    assert output.split()[:2] == [b"pending", b"0"], errors


def test_worker_knows_the_database(directory: Path) -> None:
    """Also before its tasks are imported, as a script that asks for the figures finds it."""
    code = "from example_app import worker; from fastapi_chatdify_db import db; print(db.settings.db_application_name)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=directory, env=environment, capture_output=True, text=True, check=True
    )
    assert shown.stdout == "chatdify\n"
