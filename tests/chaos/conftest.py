"""A database for each run."""

from __future__ import annotations

from collections.abc import Iterator
from uuid import uuid4

import psycopg2
import pytest
from sqlalchemy import make_url


@pytest.fixture
def own_database(database_url: str) -> Iterator[str]:
    """The URL of a database for one test, all of whose sessions may be terminated."""
    name = f"chatdify_chaos_{uuid4().hex}"
    server = psycopg2.connect(database_url)
    server.autocommit = True
    try:
        with server.cursor() as cursor:
            cursor.execute(f"CREATE DATABASE {name}")
            yield make_url(database_url).set(database=name).render_as_string(hide_password=False)
            cursor.execute(f"DROP DATABASE {name} WITH (FORCE)")
    finally:
        server.close()
