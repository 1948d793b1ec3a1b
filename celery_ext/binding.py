"""``init_app``: adopts an application's task classes, connects signals, and closes connections at a process's end."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any, Final
from weakref import WeakKeyDictionary

import celery
from celery import Celery, _state, signals
from celery.local import Proxy
from celery.states import SUCCESS

from celery_ext import context, event_loop, greenlets
from celery_ext.body import put_in_unit
from celery_ext.durable.administration import health_figures
from celery_ext.durable.relay import relaying
from celery_ext.durable.table import metadata
from celery_ext.errors import NotInitialized
from celery_ext.execution import Execution
from celery_ext.task import Task
from fastapi_chatdify_db.database import Database
from fastapi_chatdify_db.database import db as default_database

_databases: Final[WeakKeyDictionary[Celery[Any], Database]] = WeakKeyDictionary()


def init_app(app: Celery[Any], *, db: Database | None = None, relay: bool = False) -> None:
    """Give every task of ``app`` a unit of work, whenever and however it is defined.

    Parameters:
        app: The Celery application, before its worker starts.
        db: The database whose savepoints decide about ``delay_on_commit``, and which keeps the durable tasks; a
            task's unit serves every database. None is the one of an earlier call, else the default one.
        relay: Whether this process, a web application, sends durable tasks itself, within the database's lifespan.

    Raises:
        TypeError: ``app`` is something else, e.g. a web application.
    """
    if not isinstance(app, Celery):
        name = (db or default_database).name
        raise TypeError(
            f"celery_ext.init_app() takes the Celery application, not {app!r}. For the web: {name}.init_app(app)"
        )
    app = _unproxied(app)
    is_new = app not in _databases
    db = db or _databases.get(app, default_database)
    _offer_as_default(app)
    _databases[app] = db
    if metadata not in db.metadatas:
        db.metadatas.append(metadata)
        db.figures["durable_tasks"] = health_figures
    if relay:
        db.services[app] = partial(relaying, app, db)
    _adopt(app.Task, db)
    if is_new:
        _adopt_later_tasks(app)
        app.on_after_finalize.connect(_adopt_present_tasks, weak=False)
    _adopt_present_tasks(app)


def _offer_as_default(app: Any) -> None:
    """Let threads without a current application, as a web server's, find this one in place of one of Celery's own."""
    if app.set_as_current and vars(_state)["default_app"] is None:
        app.set_default()


def database_of(app: Celery[Any]) -> Database:
    """The database that ``init_app`` was given.

    Raises:
        NotInitialized: It was not called.
    """
    try:
        return _databases[_unproxied(app)]
    except KeyError:
        raise NotInitialized(f"{app!r} has no database; call celery_ext.init_app(app) where it is made") from None


def _unproxied(app: Any) -> Any:
    """The application itself, also for ``celery.current_app``: no weak reference takes that proxy."""
    return app._get_current_object() if isinstance(app, Proxy) else app


def _adopt_later_tasks(app: Any) -> None:
    """Adopt the classes of tasks that are defined from now on. Celery has no signal for it, so wrap its two methods."""
    task_from_function, register_task = app._task_from_fun, app.register_task

    def _task_from_fun(fun: Any, name: str | None = None, base: Any = None, **options: Any) -> Any:
        if base is not None:
            _rebase(base)  # only: another application may share the base, so the database is set on the task's class
        task = task_from_function(fun, name, base, **options)
        _adopt(type(task), _databases[app])
        put_in_unit(task)
        return task

    def register(task: Any, **options: Any) -> Any:
        _adopt(task if inspect.isclass(task) else type(task), _databases[app])
        registered = register_task(task, **options)
        put_in_unit(registered)
        return registered

    app._task_from_fun, app.register_task = _task_from_fun, register


def _adopt_present_tasks(sender: Any, **_: object) -> None:
    """Adopt tasks made by Celery's own two methods, and have ``autoretry_for`` leave alone what our class does."""
    for task in sender._tasks.values():
        _adopt(type(task), _databases[sender])
        code = getattr(task.run, "__code__", None)
        names = () if code is None else code.co_freevars
        if "dont_autoretry_for" in names:  # the wrapper read it when the task was made
            cell = task.run.__closure__[names.index("dont_autoretry_for")]
            cell.cell_contents = cell.cell_contents or task.dont_autoretry_for
        put_in_unit(task)


def _adopt(task_class: Any, database: Database) -> None:
    _rebase(task_class)
    task_class.database = database


def _rebase(task_class: Any) -> None:
    """Make our class the base of whatever derives directly from Celery's, user-defined bases included."""
    if not issubclass(task_class, Task):
        for each in task_class.__mro__:
            if celery.Task in each.__bases__:
                each.__bases__ = tuple(Task if base is celery.Task else base for base in each.__bases__)


@signals.task_prerun.connect(weak=False)
def _begin_execution(task_id: str, task: celery.Task[..., Any], **_: object) -> None:
    if isinstance(task, Task):
        Execution(task, task_id)


@signals.task_postrun.connect(weak=False)
def _end_execution(task: celery.Task[..., Any], state: str, retval: object, **_: object) -> None:
    if (execution := Execution.of(task)) is not None:
        succeeded = state == SUCCESS  # there is no state at all when the worker leaves, or the start cannot be stored
        execution.end(retval if not succeeded and isinstance(retval, Exception) else None, succeeded=succeeded)


@signals.before_task_publish.connect(weak=False)
def _send_context(headers: dict[str, Any], **_: object) -> None:
    context.inject(headers)


@signals.worker_init.connect(weak=False)
def _let_psycopg2_yield(**_: object) -> None:
    if greenlets.replace_threads():
        greenlets.let_psycopg2_yield()


@signals.worker_process_shutdown.connect(weak=False)
@signals.worker_shutdown.connect(weak=False)
def _close_connections(**_: object) -> None:
    databases = set(_databases.values())

    async def dispose() -> None:
        for database in databases:
            await database.dispose()

    event_loop.stop(dispose)
    for database in databases:
        database.engines.dispose_sync()
