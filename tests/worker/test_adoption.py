"""Every task of an application has a unit of work, whatever it is made of and whenever."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import celery
import pytest
from celery import Celery, shared_task

import celery_ext
from celery_ext.binding import database_of
from fastapi_chatdify_db import Database, db
from tests.models import Item
from tests.observing import Observer

other = Database("other")


@pytest.fixture
def app() -> Iterator[Celery[Any]]:
    """One that nothing has finalized yet, as in a web process."""
    app = Celery("adoption", broker="memory://", backend="cache+memory://", set_as_current=False)
    app.conf.task_always_eager = True
    celery_ext.init_app(app)
    yield app
    app.close()


def base_of_the_users() -> Any:
    class Base(celery.Task):  # type: ignore[type-arg]
        pass

    return type("Derived", (Base,), {})


def insert(name: str) -> None:
    db.sync_session.add(Item(name))


def class_of_the_users() -> Any:
    return type("ByClass", (base_of_the_users(),), {"name": "by_class", "run": staticmethod(insert)})


def shared(app: Any) -> Any:
    share: Any = shared_task
    share(base=base_of_the_users(), name="shared insert")(insert)
    return app.tasks["shared insert"]


@pytest.mark.parametrize("finalized", [False, True])
@pytest.mark.parametrize("kind", ["decorated", "registered class", "registered object", "shared"])
async def test_bases_of_the_users(app: Any, empty_tables: Observer, kind: str, finalized: bool) -> None:
    """They are adopted when a task is made of them."""
    if finalized:
        app.finalize()
    task: Any = {
        "decorated": lambda: app.task(base=base_of_the_users(), shared=False)(insert),
        "registered class": lambda: app.register_task(class_of_the_users()),
        "registered object": lambda: app.register_task(class_of_the_users()()),
        "shared": lambda: shared(app),
    }[kind]()
    assert task.delay_on_commit(kind)
    task.delay(f"{kind} plainly").get()
    assert await empty_tables.names() == [kind, f"{kind} plainly"]


def test_base_beside_ours(app: Any) -> None:
    """A class that has both our base and one of Celery's keeps its order."""
    mixed = type("Mixed", (celery_ext.Task, base_of_the_users()), {})
    app.task(base=mixed, shared=False, name="mixed")(insert)
    app.task(base=base_of_the_users(), shared=False, name="not mixed")(insert)
    for name in ("mixed", "not mixed"):
        assert isinstance(app.tasks[name], celery_ext.Task)


def test_init_app_again(app: Any) -> None:
    """The last database counts, for tasks that are made later too."""
    celery_ext.init_app(app, db=other)
    assert app.task(base=base_of_the_users(), shared=False)(insert).database is other


def test_current_app(app: Any) -> None:
    """``celery.current_app`` is as good as the application behind it."""
    before: Any = celery.current_app
    before = before._get_current_object()
    app.set_current()
    try:
        celery_ext.init_app(celery.current_app, db=other)
        assert database_of(celery.current_app) is database_of(app) is other
    finally:
        before.set_current()
    assert app.task(shared=False, name="by the current app")(insert).database is other
