"""The demo: PostgreSQL out of a wheel unless DATABASE_URL names one, the app on top, and what to try."""

from __future__ import annotations

import argparse
import tempfile
from contextlib import ExitStack
from pathlib import Path

import uvicorn

from example_app.main import app
from fastapi_chatdify_db import DatabaseSettings, db
from fastapi_chatdify_db.embedded import embedded_postgres

TO_TRY = """
  curl -i {url}/dialogues -H 'content-type: application/json' -d '{{"conversation": 7}}'   # 201, and the row is there
  curl -i {url}/dialogues -H 'content-type: application/json' -d '{{"conversation": 7}}'   # 409: it fails at COMMIT
  curl -i {url}/dialogues                                                                # the one dialogue
  curl -i -X POST {url}/dialogues/7/close                                                # a def endpoint
  curl -i {url}/health/ready                                                             # database and pool

  API documentation: {url}/docs        stop: Ctrl-C
"""


def main() -> None:
    """Serve until Ctrl-C."""
    parser = argparse.ArgumentParser(prog="example_app", description=__doc__)
    parser.add_argument("--port", type=int, default=8000)
    port: int = parser.parse_args().port
    with ExitStack() as resources:
        if DatabaseSettings().database_url is None:
            directory = resources.enter_context(tempfile.TemporaryDirectory())
            url = resources.enter_context(embedded_postgres(Path(directory) / "data"))
            db.settings = DatabaseSettings(database_url=url)
        print(f"PostgreSQL: {db.async_engine.url!r}")
        print(TO_TRY.format(url=f"http://127.0.0.1:{port}"), flush=True)
        uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")


if __name__ == "__main__":
    main()
