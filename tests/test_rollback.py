"""A client that was told no finds nothing changed."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi import BackgroundTasks, FastAPI, HTTPException, Response
from fastapi.responses import JSONResponse
from sqlalchemy.exc import TimeoutError as PoolTimeout

from fastapi_chatdify_db import DBSessionMiddleware, db
from tests.models import Item
from tests.observing import Observer
from tests.serving import serve


@pytest.fixture
def app() -> FastAPI:
    app = FastAPI()

    @app.post("/raised/{status}")
    async def raised(status: int) -> None:
        db.session.add(Item("raised"))
        await db.session.flush()
        raise HTTPException(status)

    @app.post("/returned/{status}")
    async def returned(status: int) -> Response:
        db.session.add(Item("returned"))
        await db.session.flush()
        return JSONResponse("said", status_code=status)

    @app.post("/def/{status}")
    def plain_def(status: int) -> Response:
        db.sync_session.add(Item("def"))
        db.sync_session.flush()
        return JSONResponse("said", status_code=status)

    @app.post("/unhandled")
    async def unhandled() -> None:
        db.session.add(Item("unhandled"))
        await db.session.flush()
        raise ZeroDivisionError

    @app.post("/rollback-only")
    async def rollback_only() -> str:
        db.session.add(Item("dry run"))
        await db.session.flush()
        db.rollback_only()
        return "tried"

    @app.post("/own-commit")
    async def own_commit() -> None:
        db.session.add(Item("kept"))
        await db.session.commit()
        db.session.add(Item("lost"))
        await db.session.flush()
        raise HTTPException(409)

    return app


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/raised/404", 404),
        ("/raised/422", 422),
        ("/returned/400", 400),
        ("/returned/503", 503),
        ("/def/404", 404),
        ("/unhandled", 500),
        ("/rollback-only", 200),
    ],
)
async def test_no_row_is_left(app: FastAPI, observer: Observer, path: str, status: int) -> None:
    """Errors, raised or returned, and a unit marked for rollback leave no row and no transaction."""
    app.add_middleware(DBSessionMiddleware)
    async with serve(app) as client:
        assert (await client.post(path)).status_code == status
        assert await observer.in_transaction() == 0
    assert await observer.names() == []


async def test_redirects_commit(app: FastAPI, observer: Observer) -> None:
    """Everything below 400 is a yes."""
    app.add_middleware(DBSessionMiddleware)
    async with serve(app) as client:
        assert (await client.post("/returned/303")).status_code == 303
    assert await observer.names() == ["returned"]


async def test_commit_on_decides_by_status(app: FastAPI, observer: Observer) -> None:
    """``commit_on`` replaces the rule, in both directions."""
    app.add_middleware(DBSessionMiddleware, commit_on=lambda status: status == 404)
    async with serve(app) as client:
        await client.post("/raised/404")
        await client.post("/returned/200")
    assert await observer.names() == ["raised"]


async def test_own_commit_stays(app: FastAPI, observer: Observer) -> None:
    """What a handler committed itself survives the error that follows."""
    app.add_middleware(DBSessionMiddleware)
    async with serve(app) as client:
        assert (await client.post("/own-commit")).status_code == 409
    assert await observer.names() == ["kept"]


async def test_rollback_only_is_for_one_request(app: FastAPI, observer: Observer) -> None:
    """The next request on the same connection commits again."""
    app.add_middleware(DBSessionMiddleware)
    async with serve(app) as client:
        await client.post("/rollback-only")
        await client.post("/returned/201")
    assert await observer.names() == ["returned"]


async def test_rollback_only_is_not_for_background_tasks(app: FastAPI, observer: Observer) -> None:
    """A dry run's background task has a transaction of its own, which commits."""
    app.add_middleware(DBSessionMiddleware)

    @app.post("/dry-run")
    async def dry_run(tasks: BackgroundTasks) -> None:
        db.session.add(Item("dry run"))
        db.rollback_only()

        async def background() -> None:
            db.session.add(Item("background"))

        tasks.add_task(background)

    async with serve(app) as client:
        assert (await client.post("/dry-run")).status_code == 200
    assert await observer.names() == ["background"]


async def test_exhausted_pool_keeps_nothing_whatever_its_status(app: FastAPI, observer: Observer) -> None:
    """``commit_on`` is asked about the response, not about what came before the failure."""
    app.add_middleware(DBSessionMiddleware, commit_on=lambda status: True)

    @app.post("/exhausted")
    async def exhausted() -> None:
        db.session.add(Item("lost"))
        await db.session.flush()
        raise PoolTimeout

    async with serve(app) as client:
        assert (await client.post("/exhausted")).status_code == 503
    assert await observer.names() == []


async def rule(status: int) -> bool:
    return status < 400


class Rule:
    async def __call__(self, status: int) -> bool:
        return await rule(status)


@pytest.mark.parametrize("commit_on", [rule, Rule(), {200, 201}])
async def test_rule_that_cannot_be_asked_is_refused_at_the_start(commit_on: Any) -> None:
    """Nobody awaits an ``async def`` rule, whose coroutine would be true for every status."""
    app = FastAPI()
    app.add_middleware(DBSessionMiddleware, commit_on=commit_on)
    with pytest.raises(TypeError, match="commit_on=lambda status: status < 400"):
        app.build_middleware_stack()
