"""What a relay, and its command line, say when something is not there."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest
from celery import Celery

import celery_ext
from celery_ext.durable.relay import relaying
from fastapi_chatdify_db import Database, DatabaseSettings

SECRET = "s3cr3t"


def test_pauses_grow(database_url: str, caplog: pytest.LogCaptureFixture) -> None:
    """A relay that was started before the tables exist asks for them less and less often."""
    app = Celery(broker="memory://", set_as_current=False)
    database = Database(settings=DatabaseSettings(database_url=f"{database_url}?options=-csearch_path=pg_temp"))
    celery_ext.init_app(app, db=database)
    caplog.set_level(logging.WARNING, logger="celery_ext.durable.relay")
    with relaying(app, database):
        while "relay pauses (3)" not in caplog.text:
            assert caplog.text.count("relay pauses (1)") <= 1
    database.engines.dispose_sync()
    app.close()


def status(directory: Path, module: str) -> str:
    """What the command line says of an application whose database is not there."""
    (directory / "worker.py").write_text(module)
    command = [sys.executable, "-m", "celery_ext.relay", "-A", "worker", "status"]
    environment = {"DATABASE_URL": f"postgresql://user:{SECRET}@127.0.0.1:1/name", "PYTHONPATH": str(Path.cwd())}
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    return done.stdout + done.stderr


def test_command_line_shows_no_password(tmp_path: Path) -> None:
    """Whatever fails."""
    said = status(tmp_path, "import celery, celery_ext\n\napp = celery.Celery()\ncelery_ext.init_app(app)\n")
    assert "refused" in said
    assert SECRET not in said


def test_application_that_init_app_has_not_seen(tmp_path: Path) -> None:
    """The error says what to write."""
    assert "call celery_ext.init_app(app)" in status(tmp_path, "import celery\n\napp = celery.Celery()\n")
