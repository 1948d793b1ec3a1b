"""A machine without PostgreSQL has one all the same, out of a wheel."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from pathlib import Path

import psycopg2
import pytest

from fastapi_chatdify_db.embedded import embedded_postgres
from tests.serving import free_socket

ROOT = Path(__file__).parent.parent


async def test_server_lives_as_long_as_its_block(tmp_path: Path) -> None:
    """Inside the block it answers; its data are there again in the next one; afterwards nobody answers."""

    def once(statement: str) -> object:
        with embedded_postgres(tmp_path / "data") as url:
            connection = psycopg2.connect(url)
            connection.autocommit = True
            cursor = connection.cursor()
            cursor.execute(statement)
            answer = cursor.fetchone() if cursor.description else None
            connection.close()
        with pytest.raises(psycopg2.OperationalError):
            psycopg2.connect(url)
        return answer

    await asyncio.to_thread(once, "CREATE TABLE kept AS SELECT 42 AS number")
    assert await asyncio.to_thread(once, "SELECT number FROM kept") == (42,)


def run_tests(**environment: str) -> subprocess.CompletedProcess[str]:
    """What ``make test`` runs, on a few tests, with these variables."""
    everything = {name: value for name, value in os.environ.items() if name != "DATABASE_URL"} | environment
    command = [sys.executable, "-m", "pytest", "tests/test_rollback.py", "-p", "no:cacheprovider"]
    return subprocess.run(command, cwd=ROOT, env=everything, capture_output=True, text=True, check=False)


def test_tests_run_without_a_server_on_localhost() -> None:
    """Where nobody answers on localhost's port the tests run, all of them, on the embedded one."""
    with free_socket() as listener:
        port = str(listener.getsockname()[1])
    run = run_tests(PGPORT=port)
    assert run.returncode == 0, run.stdout
    assert "PostgreSQL: embedded" in run.stdout
    assert re.search(r"^=+ \d+ passed in", run.stdout, re.MULTILINE), run.stdout  # and none is skipped


@pytest.mark.parametrize("url", ["postgresql://user:s3cr3t@127.0.0.1:{port}/name", "sqlite:///s3cr3t.db"])
def test_unusable_database_url_is_an_error(url: str) -> None:
    """A DATABASE_URL that cannot be used is neither skipped nor replaced by another server."""
    with free_socket() as listener:
        port = listener.getsockname()[1]
    run = run_tests(DATABASE_URL=url.format(port=port))
    assert run.returncode != 0
    assert "DATABASE_URL" in run.stderr
    assert "s3cr3t" not in run.stdout + run.stderr
    assert "passed" not in run.stdout
