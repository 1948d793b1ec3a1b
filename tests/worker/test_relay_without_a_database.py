"""What a relay, and its command line, say when something is not there."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from pathlib import Path
from typing import NoReturn

import pytest
from celery import Celery

import celery_ext
from celery_ext.durable.relay import relaying
from fastapi_chatdify_db import Database, DatabaseSettings
from tests.conftest import with_parameter

SECRET = "s3cr3t"


def test_pauses_grow(database_url: str, caplog: pytest.LogCaptureFixture) -> None:
    """A relay that was started before the tables exist asks for them less and less often, and says what to do."""
    app = Celery(broker="memory://", set_as_current=False)
    url = with_parameter(database_url, "options", "-csearch_path=pg_temp")
    database = Database(settings=DatabaseSettings(database_url=url))
    celery_ext.init_app(app, db=database)
    caplog.set_level(logging.WARNING, logger="celery_ext.durable.relay")
    with relaying(app, database):
        while "relay pauses (3)" not in caplog.text:
            assert caplog.text.count("relay pauses (1)") <= 1
    assert (
        "relay pauses (3): there is no table durable_task here; create the tables, or run the migration" in caplog.text
    )
    database.engines.dispose_sync()
    app.close()


def test_broker_of_an_unknown_kind() -> None:
    """An application that relays itself does not start, instead of storing what nobody sends."""
    app = Celery(broker="carrier-pigeon://", set_as_current=False)
    with pytest.raises(KeyError, match="carrier-pigeon"), relaying(app, Database()):
        pass


def test_database_without_durable_tasks_has_nothing_to_relay(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An application that relays on PostgreSQL runs on SQLite too, e.g. in its tests."""
    app = Celery(broker="memory://", set_as_current=False)
    threads = threading.active_count()
    with relaying(app, Database(settings=DatabaseSettings(database_url=f"sqlite:///{tmp_path / 'database'}"))):
        assert threading.active_count() == threads
    assert caplog.messages == []


def test_relay_goes_on_after_an_unforeseen_error(database_url: str, caplog: pytest.LogCaptureFixture) -> None:
    """It says what happened, and tries again later."""

    class Failing(Database):
        @property
        def sync_engine(self) -> NoReturn:
            raise ZeroDivisionError("unforeseen")

    app = Celery(broker="memory://", set_as_current=False)
    with relaying(app, Failing()):
        while "relay pauses (2): ZeroDivisionError: unforeseen" not in caplog.text:
            pass
    assert "Traceback" in caplog.text
    app.close()


def command(directory: Path, *arguments: str, url: str) -> str:
    """What the command line says when it fails."""
    line = [sys.executable, "-m", "celery_ext.relay", *arguments]
    environment = {"DATABASE_URL": url, "PYTHONPATH": str(Path.cwd())}
    done = subprocess.run(line, cwd=directory, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode
    return done.stdout + done.stderr


def status(directory: Path, module: str, url: str = f"postgresql://user:{SECRET}@127.0.0.1:1/name") -> str:
    """What it says of an application; by default one whose database is not there."""
    (directory / "worker.py").write_text(module)
    return command(directory, "-A", "worker", "status", url=url)


def test_database_that_is_not_there(tmp_path: Path) -> None:
    """One line says so, without the password."""
    said = status(tmp_path, "import celery, celery_ext\n\napp = celery.Celery()\ncelery_ext.init_app(app)\n")
    assert said.startswith("the database cannot be asked: ")
    assert "refused" in said
    assert said.count("\n") == 1
    assert SECRET not in said


def test_application_that_init_app_has_not_seen(tmp_path: Path) -> None:
    """The error says what to write."""
    said = status(tmp_path, "import celery\n\napp = celery.Celery()\n")
    assert "call celery_ext.init_app(app)" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("subcommand", ["run", "status"])
def test_database_that_keeps_no_durable_tasks(tmp_path: Path, subcommand: str) -> None:
    """One line says what is needed, instead of a relay's pauses for ever."""
    (tmp_path / "worker.py").write_text(
        "import celery, celery_ext\n\napp = celery.Celery()\ncelery_ext.init_app(app)\n"
    )
    said = command(tmp_path, "-A", "worker", subcommand, url=f"sqlite:///{tmp_path}/db")
    assert said == "durable dispatch needs PostgreSQL; write task.delay_on_commit(...)\n"


def test_tables_that_are_not_there(tmp_path: Path, database_url: str) -> None:
    """One line says what is missing."""
    module = "import celery, celery_ext\n\napp = celery.Celery()\ncelery_ext.init_app(app)\n"
    said = status(tmp_path, module, url=with_parameter(database_url, "options", "-csearch_path=pg_temp"))
    assert said.startswith("there is no table durable_task here; create the tables")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("nowhere", "ModuleNotFoundError: No module named 'nowhere'"),
        ("worker", "AttributeError"),
        ("worker:missing", "AttributeError: module 'worker' has no attribute 'missing'"),
        ("worker.missing", "ModuleNotFoundError: No module named 'worker.missing'"),
    ],
)
def test_application_that_cannot_be_imported(tmp_path: Path, name: str, error: str) -> None:
    """One line names it."""
    (tmp_path / "worker.py").touch()
    said = command(tmp_path, "-A", name, "status", url="postgresql://127.0.0.1:1/name")
    assert said.startswith(f"{name} cannot be imported: {error}")
    assert said.count("\n") == 1


def test_application_that_is_none(tmp_path: Path) -> None:
    """One line says what was found in its place."""
    (tmp_path / "worker.py").write_text("app = 3\n")
    said = command(tmp_path, "-A", "worker:app", "status", url="postgresql://127.0.0.1:1/name")
    assert said == "worker:app is no Celery application, but 3\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ("prune", "--days", "-1"),
        ("prune", "--days", "36501"),
        ("failed", "--limit", "-1"),
        ("run", "--grace", "0"),
        ("run", "--grace", "86401"),
        ("run", "--grace", "nan"),
    ],
)
def test_numbers_out_of_range(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    """They would be the future, an error of the database, or a message a second for each row until it is done."""
    (tmp_path / "worker.py").write_text("import celery\n\napp = celery.Celery()\n")
    said = command(tmp_path, "-A", "worker", *arguments, url="postgresql://127.0.0.1:1/name")
    assert f"Invalid value for '{arguments[1]}'" in said
