"""What the documentation shows, works as shown."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from fastapi_chatdify_db import Base, db
from tests.serving import serve

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    pytest.param(code, id=f"{page.name}-{number}")
    for page in PAGES
    for number, code in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE))
]


@pytest.fixture
def clean_metadata() -> Iterator[None]:
    """The models of a page are gone after its test."""
    before = set(Base.metadata.tables)
    yield
    for name in set(Base.metadata.tables) - before:
        Base.metadata.remove(Base.metadata.tables[name])


@pytest.fixture
async def quickstart(clean_metadata: None) -> AsyncIterator[ModuleType]:
    """The README's quickstart as a module."""
    [code] = re.findall(r"<!-- quickstart -->\n```python\n(.*?)^```", PAGES[0].read_text(), re.DOTALL | re.MULTILINE)
    module = ModuleType("quickstart")
    sys.modules["quickstart"] = module
    exec(code, module.__dict__)
    yield module
    await db.drop_tables()
    await db.dispose()
    del sys.modules["quickstart"]


async def test_quickstart(quickstart: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """The README's application registers, refuses, lists, greets and reports its health."""
    async with serve(quickstart.app) as client:
        assert (await client.post("/users", params={"email": "a@example.org"})).status_code == 201
        assert "welcome, a@example.org" in capsys.readouterr().out
        assert (await client.post("/users", params={"email": "a@example.org"})).status_code == 500
        assert capsys.readouterr().out == ""
        await quickstart.import_users(["b@example.org"])
        assert sorted((await client.get("/users")).json()) == ["a@example.org", "b@example.org"]
        assert (await client.post("/users/1/greet")).status_code == 200
        assert (await client.post("/users/99/greet")).status_code == 404
        assert (await client.get("/health/ready")).status_code == 200


@pytest.mark.parametrize("code", BLOCKS)
def test_code_blocks_run(code: str) -> None:
    """Every block of Python in the documentation runs by itself."""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_links_lead_somewhere() -> None:
    """Every relative link of the documentation is a file."""
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
