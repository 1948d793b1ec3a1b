"""``health_router`` tells a load balancer the truth, and an attacker nothing."""

from __future__ import annotations

import pytest
from fastapi import FastAPI
from sqlalchemy import text

from fastapi_chatdify_db import (
    Database,
    DatabaseSettings,
    NameTaken,
    create_health_router,
    db,
    health,
    health_router,
)
from tests.observing import Observer
from tests.serving import free_socket, serve


async def test_live_and_ready(tables: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process whose database answers is live and ready, and shows its pool."""
    monkeypatch.setattr(db, "figures", {})
    app = FastAPI()
    app.include_router(health_router)
    async with serve(app) as client:
        assert (await client.get("/health/live")).json() == {"status": "ok"}
        ready = await client.get("/health/ready")
    assert ready.status_code == 200
    assert ready.json() == {
        "status": "ok",
        "databases": {
            "db": {"status": "ok", "reason": None, "pool": {"size": 10, "in_use": 0, "overflow": 0}, "figures": {}}
        },
    }


async def test_unreachable_database_is_not_ready(tables: None, caplog: pytest.LogCaptureFixture) -> None:
    """503, be it one of several, with a reason that names neither host nor user; the process is live all the same."""
    with free_socket() as listener:
        port = listener.getsockname()[1]
    gone = Database("gone", settings=DatabaseSettings(database_url=f"postgresql://user:secret@127.0.0.1:{port}/x"))
    app = FastAPI()
    app.include_router(create_health_router(db, gone))
    async with serve(app) as client:
        assert (await client.get("/health/live")).status_code == 200
        ready = await client.get("/health/ready")
    assert (ready.status_code, ready.json()["status"]) == (503, "unavailable")
    assert ready.json()["databases"]["db"]["status"] == "ok"
    assert ready.json()["databases"]["gone"]["reason"] == "unavailable"
    assert "secret" not in ready.text
    assert "127.0.0.1" not in ready.text
    assert "database gone is not ready" in caplog.text
    assert "secret" not in caplog.text


async def test_database_that_went_away_is_not_ready(observer: Observer) -> None:
    """A pooled connection that nobody has tested is no answer."""
    trusting = Database("trusting", settings=DatabaseSettings(db_pool_pre_ping=False))
    app = FastAPI()
    app.include_router(create_health_router(trusting))
    async with serve(app) as client:
        assert (await client.get("/health/ready")).status_code == 200
        await observer.terminate_others()
        assert [(await client.get("/health/ready")).status_code for _ in range(2)] == [503, 200]
    await trusting.dispose()


@pytest.mark.parametrize("max_overflow", [0, -1], ids=["last connection", "no limit"])
async def test_silent_database_is_not_ready(tables: None, monkeypatch: pytest.MonkeyPatch, max_overflow: int) -> None:
    """A server that accepts and never answers is given up after the time limit."""
    monkeypatch.setattr(health, "TIME_LIMIT", 0.1)
    app = FastAPI()
    with free_socket() as listener:
        url = f"postgresql://user@127.0.0.1:{listener.getsockname()[1]}/x"
        settings = DatabaseSettings(database_url=url, db_pool_size=1, db_max_overflow=max_overflow)
        silent = Database("silent", settings=settings)
        app.include_router(create_health_router(silent))
        async with serve(app) as client:
            ready = await client.get("/health/ready")
    assert ready.status_code == 503
    assert ready.json()["databases"]["silent"]["reason"] == "no answer in time"


async def test_silent_database_within_the_driver_s_own_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason is the same if ``connect_timeout`` is the shorter one."""
    monkeypatch.setattr(health, "TIME_LIMIT", 60)
    app = FastAPI()
    with free_socket() as listener:
        url = f"postgresql://user@127.0.0.1:{listener.getsockname()[1]}/x?connect_timeout=1"
        app.include_router(create_health_router(Database("silent", settings=DatabaseSettings(database_url=url))))
        async with serve(app) as client:
            ready = await client.get("/health/ready")
    assert ready.json()["databases"]["silent"]["reason"] == "no answer in time"


async def test_exhausted_pool_is_not_ready(small_pool: Database) -> None:
    """Without a free connection there is nothing to answer with, which the figures show."""
    app = FastAPI()
    app.include_router(create_health_router(small_pool))
    async with serve(app) as client, small_pool.transaction() as one, small_pool.transaction() as two:
        await one.execute(text("SELECT 1"))
        await two.execute(text("SELECT 1"))
        ready = await client.get("/health/ready")
    assert ready.status_code == 503
    assert ready.json()["databases"]["small"] == {
        "status": "unavailable",
        "reason": "no free connection",
        "pool": {"size": 2, "in_use": 2, "overflow": 0},
        "figures": {},
    }


async def test_pool_that_is_waited_for_is_told_from_silence(tables: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a DB_POOL_TIMEOUT beyond the time limit too, as it is by default."""
    monkeypatch.setattr(health, "TIME_LIMIT", 0.1)
    patient = Database("patient", settings=DatabaseSettings(db_pool_size=1, db_max_overflow=0))
    app = FastAPI()
    app.include_router(create_health_router(patient))
    async with serve(app) as client, patient.transaction() as session:
        await session.execute(text("SELECT 1"))
        ready = await client.get("/health/ready")
    assert ready.json()["databases"]["patient"]["reason"] == "no free connection"
    await patient.dispose()


def test_databases_of_one_name_are_refused() -> None:
    """Only one of them would be shown, and the other's failure not."""
    with pytest.raises(NameTaken, match=r"called db; .*Database\('reports'\)"):
        create_health_router(db, Database())
