"""Behind a PgBouncer in transaction mode: with DB_PGBOUNCER no statement stays prepared on the server."""

from __future__ import annotations

import asyncio
import getpass
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg
import pytest
from fastapi import FastAPI
from sqlalchemy import URL, literal, make_url, select, text

from fastapi_chatdify_db import Database, DatabaseSettings, create_health_router
from tests.serving import free_socket, serve


@pytest.fixture
async def pgbouncer(database_url: str, tmp_path: Path) -> AsyncIterator[str]:
    """The URL of a PgBouncer in transaction mode with two connections to the database."""
    async with bouncing(make_url(database_url), tmp_path) as url:
        yield url


@asynccontextmanager
async def bouncing(url: URL, tmp_path: Path, options: str = "") -> AsyncIterator[str]:
    """Run one that passes on to ``url``, and yield its own."""
    program = shutil.which("pgbouncer")
    if program is None:
        pytest.skip("pgbouncer is not on the PATH: apt-get install pgbouncer")
    if url.host is None:
        pytest.skip("PgBouncer, which gives up root, may not enter the directory of the embedded PostgreSQL's socket")
    with free_socket() as listener:
        port = listener.getsockname()[1]
    places = {
        "host": url.host,
        "port": url.port,
        "user": url.username,
    }
    places |= {"dbname": url.database, "password": url.password}
    target = " ".join(f"{name}={value}" for name, value in places.items() if value)
    configuration = tmp_path / "pgbouncer.ini"
    configuration.write_text(
        f"""
[databases]
bounced = {target}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = any
pool_mode = transaction
default_pool_size = 2
{options}
log_connections = 0
log_disconnections = 0
{"user = nobody" if getpass.getuser() == "root" else ""}
"""
    )
    process = await asyncio.create_subprocess_exec(program, configuration, stderr=asyncio.subprocess.PIPE)
    assert process.stderr is not None
    try:
        log = ""
        while "process up" not in log:
            line = await process.stderr.readline()
            assert line, f"PgBouncer did not start: {log}"
            log += line.decode()
        yield f"postgresql://anyone@127.0.0.1:{port}/bounced"
    finally:
        if process.returncode is None:
            process.terminate()
        await process.communicate()


async def test_pgbouncer_mode_keeps_no_prepared_statement(database_url: str) -> None:
    """After the same statement ran several times, the server has no prepared statement left for it."""
    database = Database(settings=DatabaseSettings(database_url=database_url, db_pgbouncer=True))
    prepared = text("SELECT count(*) FROM pg_prepared_statements WHERE statement LIKE 'SELECT 4%'")
    async with database.transaction() as session:
        for _ in range(7):
            await session.execute(text("SELECT 42"))
        assert await session.scalar(prepared) == 0
    await database.dispose()
    plain = Database(settings=DatabaseSettings(database_url=database_url))
    async with plain.transaction() as session:
        await session.execute(text("SELECT 42"))
        assert await session.scalar(prepared) == 1
    await plain.dispose()


async def test_many_clients_share_two_connections_of_pgbouncer(pgbouncer: str) -> None:
    """In transaction mode statements of 20 clients do not meet, and none stays prepared on the server."""
    given = DatabaseSettings(database_url=pgbouncer, db_pgbouncer=True, db_pool_size=20, db_statement_timeout=5)
    database = Database(settings=given)
    own = text("SELECT CAST(:number AS int), pg_backend_pid()")
    backends: set[int] = set()

    async def client(number: int) -> None:
        for turn in range(number, 500, 20):
            async with database.transaction() as session:
                for _ in range(2):
                    answer, backend = (await session.execute(own, {"number": turn})).one()
                    assert answer == turn
                    backends.add(backend)

    async def client_without_transactions(number: int) -> None:
        async with database.async_engine.connect() as plain:
            connection = await plain.execution_options(isolation_level="AUTOCOMMIT")
            for turn in range(number, 100, 4):
                assert await connection.scalar(own, {"number": turn}) == turn

    def sync_client(number: int) -> None:
        for turn in range(number, 100, 4):
            with database.sync_transaction() as session:
                assert session.scalar(own, {"number": turn}) == turn
                assert session.scalar(text("SHOW statement_timeout")) == "5s"

    await asyncio.gather(
        *(client(number) for number in range(20)),
        *(client_without_transactions(number) for number in range(4)),
        *(asyncio.to_thread(sync_client, number) for number in range(4)),
    )
    assert len(backends) == 2
    left = text("SELECT pg_backend_pid(), count(*) FROM pg_prepared_statements")
    async with database.transaction() as one, database.transaction() as other:
        assert {tuple((await session.execute(left)).one()) for session in (one, other)} == {(b, 0) for b in backends}
    await database.dispose()


async def test_readers_that_wait_hold_none_of_pgbouncers_connections(pgbouncer: str) -> None:
    """More of them than it has connections read, wait for each other, and read on, with either driver."""
    database = Database(settings=DatabaseSettings(database_url=pgbouncer, db_pgbouncer=True))
    waiting = 6
    all_have_read = asyncio.Event()

    async def wait() -> None:
        nonlocal waiting
        waiting -= 1
        if not waiting:
            all_have_read.set()
        await all_have_read.wait()

    async def reader(number: int) -> None:
        async with database.transaction() as session:
            assert await session.scalar(select(literal(number))) == number
            await wait()
            assert await session.scalar(select(literal(-number))) == -number

    async def sync_reader(number: int) -> None:
        with database.sync_transaction() as session:
            assert await asyncio.to_thread(session.scalar, select(literal(number))) == number
            await wait()
            assert await asyncio.to_thread(session.scalar, select(literal(-number))) == -number

    async with asyncio.timeout(10):
        await asyncio.gather(*map(reader, range(3)), *map(sync_reader, range(3)))
    await database.dispose()


async def test_server_that_refuses_pgbouncer_is_a_503(
    own_database: str, database_url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """PgBouncer accepts our connections all the same, and ends each at its first statement."""
    own = make_url(own_database)
    server = await asyncpg.connect(database_url)
    async with bouncing(own, tmp_path, "query_wait_timeout = 1\nserver_login_retry = 1") as url:
        database = Database(settings=DatabaseSettings(database_url=url, db_pgbouncer=True))
        database_of_newcomers = Database(settings=database.settings)
        app = FastAPI()
        database.init_app(app)
        app.include_router(create_health_router(database))

        @app.get("/")
        async def answer() -> None:
            await database.session.execute(text("SELECT 42"))

        @app.get("/def")
        def answer_in_thread() -> None:
            database.sync_session.execute(text("SELECT 42"))

        @app.get("/first")
        def answer_on_the_first_connection() -> None:
            database_of_newcomers.sync_session.execute(text("SELECT 42"))

        async def ask() -> list[int]:
            return [(await client.get(path)).status_code for path in ("/", "/def", "/health/ready")]

        async with serve(app) as client:
            assert await ask() == [200, 200, 200]
            await server.execute(f"ALTER DATABASE {own.database} ALLOW_CONNECTIONS false")
            await server.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1", own.database
            )
            assert await ask() == [503, 503, 503]
            assert (await client.get("/first")).status_code == 503
            await server.execute(f"ALTER DATABASE {own.database} ALLOW_CONNECTIONS true")
            async with asyncio.timeout(30):
                while await ask() != [200, 200, 200]:
                    pass
    await server.close()
    assert "Traceback" not in caplog.text
