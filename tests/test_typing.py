"""The public interface is typed, exactly."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def check(*files: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mypy", "--strict", "--no-incremental", "--config-file=", *map(str, files)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=HERE.parent)


def test_users_file_is_strictly_typed() -> None:
    """A file that uses every public name passes ``mypy --strict``; no ``Any`` leaks out of a session."""
    result = check(HERE / "typed_user.py")
    assert result.returncode == 0, result.stdout


def test_type_errors_are_found(tmp_path: Path) -> None:
    """And a wrong use of the same names does not."""
    wrong = tmp_path / "wrong.py"
    wrong.write_text(
        "from fastapi_chatdify_db import db, get_sync_session\n"
        "db.session.no_such_method()\n"
        "db.sync_session.execute(1)\n"
        "async def f() -> None:\n"
        "    with db.transaction() as session: ...\n"
        "    async with get_sync_session() as session: ...\n"
    )
    assert set(re.findall(r":(\d+): error", check(wrong).stdout)) == {"2", "3", "5", "6"}
