"""The contenders: which application each is, at which versions, in a virtual environment of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

HERE = Path(__file__).parent
DATABASE = ("sqlalchemy==2.1.9", "greenlet==3.5.6")
WEB = (*DATABASE, "fastapi==0.165.0", "starlette==1.10.0", "uvicorn[standard]==0.54.0", "asyncpg==0.32.0")
# fastapi-sqla 4.0.1 calls add_event_handler, which Starlette 1.0 removed; it holds asyncpg below 0.32
OLDER_WEB = (*DATABASE, "fastapi==0.141.1", "starlette==0.52.1", "uvicorn[standard]==0.54.0", "asyncpg==0.31.0")
SHOWN = ("sqlalchemy", "fastapi", "starlette", "uvicorn", "uvloop", "asyncpg", "celery")


@dataclass(frozen=True)
class Contender:
    """An application in ``contenders/``, and its virtual environment, named after the requirement that is its own."""

    name: str
    module: str
    environment: str
    requirements: tuple[str, ...]

    def python(self) -> str:
        """The interpreter of its virtual environment, which is made when it is missing or holds other versions."""
        directory = HERE / ".venvs" / self.environment
        interpreter, made = directory / "bin" / "python", directory / "made.json"
        if not made.exists() or json.loads(made.read_text()) != list(self.requirements):
            print(f"making the environment of {self.name}", flush=True)
            subprocess.run([sys.executable, "-m", "venv", "--clear", str(directory)], check=True)
            install = [str(interpreter), "-m", "pip", "install", "--quiet", *self.requirements]
            subprocess.run(install, check=True, cwd=HERE.parent)
            made.write_text(json.dumps(self.requirements))
        return str(interpreter)

    def versions(self) -> dict[str, str]:
        """What is measured: versions by package."""
        packages = (*SHOWN, self.environment)
        code = f"""
import json
from importlib.metadata import PackageNotFoundError, version
found = {{}}
for name in {packages!r}:
    try: found[name] = version(name)
    except PackageNotFoundError: pass
print(json.dumps(found))
"""
        output = subprocess.run([self.python(), "-c", code], capture_output=True, text=True, check=True).stdout
        found: dict[str, str] = json.loads(output)
        return found


def _here(name: str, module: str) -> Contender:
    return Contender(name, module, "fastapi_chatdify_db", (*WEB, "--editable", ".[fastapi]"))


def _peer(name: str, version: str, web: tuple[str, ...] = WEB, extra: str = "") -> Contender:
    module = f"{name.replace('-', '_')}_app"
    return Contender(name, module, name, (*web, f"{name}{extra}=={version}"))


OURS = _here("ours", "ours")
BARE = _here("no middleware", "bare")
SIX_LINE = _here("six-line, its defaults", "six_line")
SIX_LINE_BEST = _here("six-line, best settings", "six_line_best")
AUTOCOMMIT = _here("ORM in AUTOCOMMIT by hand", "autocommit")
CORE = _here("SQLAlchemy Core", "core")
RAW = _here("raw asyncpg", "raw_asyncpg")
FASTAPI_ASYNC = _peer("fastapi-async-sqlalchemy", "0.7.1.post3")
CONTEXT_ASYNC = _peer("context-async-sqlalchemy", "2.1.9")
CONTEXT_ASYNC_BEST = replace(
    CONTEXT_ASYNC, name="context-async-sqlalchemy, no ping", module="context_async_sqlalchemy_best"
)
FASTAPI_SQLA = _peer("fastapi-sqla", "4.0.1", OLDER_WEB, "[asyncpg]")
ADVANCED_ALCHEMY = _peer("advanced-alchemy", "1.12.0", extra="[fastapi]")
PEERS = (FASTAPI_ASYNC, CONTEXT_ASYNC, FASTAPI_SQLA, ADVANCED_ALCHEMY)
DISPATCHING = Contender(
    "durable dispatch", "dispatching", "dispatching", (*WEB, "celery[redis]==5.7.0", "--editable", ".[fastapi,relay]")
)
