"""The public interface is typed, exactly."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).parent


Check = Callable[[Path], "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def check(tmp_path_factory: pytest.TempPathFactory) -> Check:
    """Runs ``mypy --strict`` on a file, without the project's configuration."""
    cache = tmp_path_factory.mktemp("mypy")  # SQLAlchemy is read once for all the tests
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", f"--cache-dir={cache}"]

    def run(file: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, str(file)], capture_output=True, text=True, check=False, cwd=HERE.parent)

    return run


@pytest.mark.parametrize("file", ["typed_user.py", "typed_tasks.py"])
def test_users_file_is_strictly_typed(check: Check, file: str) -> None:
    """A file that uses every public name passes ``mypy --strict``; no ``Any`` leaks out of a session."""
    result = check(HERE / file)
    assert result.returncode == 0, result.stdout


def test_type_errors_are_found(check: Check, tmp_path: Path) -> None:
    """And a wrong use of the same names does not."""
    wrong = tmp_path / "wrong.py"
    wrong.write_text(
        "from fastapi_chatdify_db import DatabaseSettings, db, get_sync_session\n"
        "db.session.no_such_method()\n"
        "db.sync_session.execute(1)\n"
        "async def f() -> None:\n"
        "    with db.transaction() as session: ...\n"
        "    async with get_sync_session() as session: ...\n"
        "    db.release().no_such_method()\n"
        "db.on_commit(lambda argument: None)\n"
        "DatabaseSettings(db_pool_size='ten')\n"
    )
    assert set(re.findall(r":(\d+): error", check(wrong).stdout)) == {"2", "3", "5", "6", "7", "8", "9"}
