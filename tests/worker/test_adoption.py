"""Every task of an application has a unit of work, whatever it is made of and whenever."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import celery
import pytest
from celery import Celery, shared_task
from sqlalchemy import text

import celery_ext
from celery_ext.binding import database_of
from fastapi_chatdify_db import Database, db
from tests.forking import in_a_new_process
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


def test_base_with_a_mixin(app: Any) -> None:
    """What a class has besides Celery's stays, before ours or after it."""
    before, after = (type(name, (), {name: True}) for name in ("before", "after"))
    mixed = type("Mixed", (before, celery.Task, after), {})
    task: Any = app.task(base=mixed, shared=False)(insert)
    assert task.before
    assert task.delay_on_commit
    assert task.after


def decorated(app: Any, body: Any, base: Any, options: dict[str, Any]) -> Any:
    return app.task(base=base and base(), shared=False, lazy=False, **options)(body)


def lazily_decorated(app: Any, body: Any, base: Any, options: dict[str, Any]) -> Any:
    return app.task(base=base and base(), shared=False, **options)(body)


def registered(app: Any, body: Any, base: Any, options: dict[str, Any]) -> Any:
    made = type("Made", (base() if base else celery.Task,), {"name": "made", "run": staticmethod(body)})
    return app.register_task(made(), **options)


@pytest.mark.parametrize("base", [None, base_of_the_users])
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("make", [decorated, lazily_decorated, registered])
def test_failure_after_the_commit_is_not_retried(
    app: Any, empty_tables: Observer, base: Any, before: bool, make: Callable[..., Any]
) -> None:
    """``autoretry_for`` takes the classes that it leaves alone when a task is made, from our class, too."""
    ran: list[str] = []

    def fails(error: type[Exception]) -> None:
        ran.append(error.__name__)
        raise error("once or twice")

    options = {"autoretry_for": (Exception,), "retry_kwargs": {"max_retries": 1, "countdown": 0}}
    if before:
        app = Celery("early", broker="memory://", backend="cache+memory://", set_as_current=False)
        task = make(app, fails, base, options)
        celery_ext.init_app(app)
        app.finalize()
    else:
        task = make(app, fails, base, options)
    for error in (celery_ext.DispatchFailed, LookupError):
        with pytest.raises(error):
            task.apply((error,)).get()
    assert ran == ["DispatchFailed", "LookupError", "LookupError"]


def test_task_that_ran_before(empty_tables: Observer) -> None:
    """It is adopted once: its errors are still made fit for a result."""
    app: Any = Celery("ran", broker="memory://", backend="cache+memory://", task_cls=celery_ext.Task)

    @app.task(shared=False, autoretry_for=(KeyError,))  # type: ignore[untyped-decorator]
    def select(what: str) -> None:
        db.sync_session.execute(text(f"SELECT {what}"))

    select("1")
    celery_ext.init_app(app)
    assert isinstance(select.apply(("1 / 0",)).result, celery_ext.StatementFailed)
    app.close()


@pytest.mark.parametrize("finalized", [False, True])
async def test_task_that_was_there_before(empty_tables: Observer, finalized: bool) -> None:
    """A task that was made before ``init_app``, of an application that is finalized or not, has a unit of work, too."""
    app: Any = Celery("early", broker="memory://", backend="cache+memory://", set_as_current=False)
    early = app.task(base=base_of_the_users(), shared=False, lazy=False)(insert)
    if finalized:
        app.finalize()
    celery_ext.init_app(app)
    app.finalize()
    early.apply(("early",)).get()
    assert await empty_tables.names() == ["early"]
    app.close()


@pytest.mark.parametrize("kind", ["decorated", "registered"])
async def test_class_that_calls_its_body_itself(app: Any, empty_tables: Observer, kind: str) -> None:
    """Its own ``__call__`` need not know of ours."""
    app.finalize()

    class ByItself(class_of_the_users()):  # type: ignore[misc]
        def __call__(self, name: str) -> None:
            self.run(name)

    task = app.register_task(ByItself) if kind == "registered" else app.task(base=ByItself, shared=False)(insert)
    task.apply(("x",)).get()
    assert await empty_tables.names() == ["x"]


def test_init_app_again(app: Any) -> None:
    """The last database counts, for tasks that are made later too."""
    celery_ext.init_app(app, db=other)
    assert app.task(base=base_of_the_users(), shared=False)(insert).database is other
    celery_ext.init_app(app)  # for a relay, say: no reason to take another one
    assert database_of(app) is other


def test_shared_task_in_a_thread(database_url: str) -> None:
    """Celery's current application is a thread's own; yet the task belongs to ours there, too, not to a default one."""
    code = """
from threading import Thread
from celery import Celery, shared_task
import celery_ext

@shared_task(base=celery_ext.Task)
def shared(): ...

hidden = Celery("hidden", set_as_current=False)
celery_ext.init_app(hidden)
app = Celery("ours")
celery_ext.init_app(app)
celery_ext.init_app(Celery("later"))
found = []
thread = Thread(target=lambda: found.append(shared.app))
thread.start()
thread.join()
assert found == [app], found
"""
    in_a_new_process(code, DATABASE_URL=database_url)


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
