"""What the documentation shows, works as shown."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import ModuleType

import pytest

import celery_ext
import fastapi_chatdify_db
from fastapi_chatdify_db import Base, ChatdifyDBError, db
from tests.serving import serve

ROOT = Path(__file__).parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "benchmarks/README.md", "example_app/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
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


def marked(page: str, mark: str) -> str:
    """The one block of code of a page that is marked so."""
    pattern = rf"<!-- {re.escape(mark)} -->\n```python[^\n]*\n(.*?)^```"
    [code] = re.findall(pattern, (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)
    return str(code)


@pytest.fixture
async def quickstart(clean_metadata: None) -> AsyncIterator[ModuleType]:
    """The README's quickstart as a module."""
    code = marked("README.md", "quickstart")
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


def test_every_error_is_documented() -> None:
    """docs/errors.md has a row for each, and none for what is not there."""
    public = [getattr(package, name) for package in (celery_ext, fastapi_chatdify_db) for name in package.__all__]
    errors = [each for each in public if isinstance(each, type) and issubclass(each, ChatdifyDBError)]
    rows = re.findall(r"^\| `(\w+)`", (ROOT / "docs" / "errors.md").read_text(), re.MULTILINE)
    assert sorted(["ChatdifyDBError", *rows]) == sorted(each.__name__ for each in errors)


def test_every_module_has_its_place() -> None:
    """docs/architecture.md names each module of both packages."""
    named = set(re.findall(r"`(?:\w+\.)*(\w+)`", (ROOT / "docs" / "architecture.md").read_text()))
    modules = {
        module.stem for package in ("fastapi_chatdify_db", "celery_ext") for module in (ROOT / package).rglob("*.py")
    }
    assert sorted(modules - named) == ["__init__"]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A directory with the README's quickstart as ``app.py``."""
    (tmp_path / "app.py").write_text(marked("README.md", "quickstart"))
    return tmp_path


def test_an_application_s_own_tests(project: Path) -> None:
    """The tests that the documentation shows pass, each with empty tables."""
    (project / "test_app.py").write_text(marked("docs/migrations_and_tests.md", "test_app.py"))
    pytest_ = [sys.executable, "-m", "pytest", "-p", "pytest_asyncio.plugin", "-o", "asyncio_mode=auto"]
    env = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # which takes longer than the tests
    ran = subprocess.run(pytest_, cwd=project, env=env, capture_output=True, text=True)
    assert "2 passed" in ran.stdout, ran.stdout


def test_migrations(project: Path) -> None:
    """Alembic with the documented ``env.py`` makes the tables, and then finds nothing that differs."""
    env = marked("docs/migrations_and_tests.md", "env.py")
    code = f"""
from pathlib import Path
from alembic import command
from alembic.config import Config
config = Config("alembic.ini")
command.init(config, "migrations")
Path("migrations/env.py").write_text({env!r})
command.revision(config, "first", autogenerate=True)
command.upgrade(config, "head")
command.check(config)
command.downgrade(config, "base")
"""
    ran = subprocess.run([sys.executable, "-c", code], cwd=project, capture_output=True, text=True)
    assert "No new upgrade operations detected" in ran.stdout, ran.stderr


def test_models(database_url: str) -> None:
    """The page about models stores an order, and loads orders in both ways."""
    use = """
import asyncio

async def main() -> None:
    await db.create_tables()
    async with db.transaction() as session:
        session.add(Customer("Ann"))
    async with db.transaction():
        assert await order("Ann", "tea") == 1
    async with db.transaction() as session:
        assert await all_orders() == {"Ann": ["tea"]}
        assert (await session.get(Customer, 1)).since
    await db.drop_tables()

asyncio.run(main())
"""
    subprocess.run([sys.executable, "-c", marked("docs/models.md", "models") + use], check=True, cwd=ROOT)


@pytest.mark.parametrize("code", BLOCKS)
def test_code_blocks_run(code: str) -> None:
    """Every block of Python in the documentation runs by itself."""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_links_lead_somewhere() -> None:
    """Every relative link of the documentation is a file, and a heading in it where the link names one."""
    for page in PAGES:
        for path, heading in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text()):
            target = page.parent / path if path else page
            assert target.exists(), f"{page.name}: {path}"
            assert not heading or heading in headings(target), f"{page.name}: {path}#{heading}"


def headings(page: Path) -> set[str]:
    """What GitHub calls the headings of a page in links."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
