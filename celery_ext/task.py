"""The task class: every body in a unit of work, and sending that waits for the commit."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import celery

from celery_ext.body import put_in_unit
from celery_ext.dispatch import OnError, send_on_commit
from celery_ext.errors import portable
from celery_ext.execution import Execution
from fastapi_chatdify_db.database import Database
from fastapi_chatdify_db.database import db as default_database

if TYPE_CHECKING:
    _CeleryTask = celery.Task[..., Any]
else:
    _CeleryTask = celery.Task


class Task(_CeleryTask):
    """Celery's task, with a unit of work around its body.

    ``celery_ext.init_app`` gives what is here to every task of an application. Name the class as ``task_cls`` (or as
    ``base=`` of a shared task) for type checkers to know it::

        app = Celery("worker", task_cls=celery_ext.Task)
    """

    database: ClassVar[Database] = default_database
    """The database whose savepoints decide about ``delay_on_commit``; ``init_app`` sets it."""
    db_session: ClassVar[bool] = True
    """Whether the body has a unit of work: ``@app.task(db_session=False)``."""
    db_isolation_level: ClassVar[str | None] = None
    """The isolation level of the unit's transactions, e.g. ``"SERIALIZABLE"``; None is the server's default."""
    db_retry: ClassVar[bool] = False
    """Whether a serialization failure or deadlock retries the task, under its own retry policy."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the body in its unit of work; Celery's tracer calls this, and whoever calls the task as a function.

        Raises:
            StatementFailed: A statement or the commit failed, in a task that a worker runs.
        """
        put_in_unit(self)
        if Execution.beginning(self) is None:
            return super().__call__(*args, **kwargs)
        try:
            return self.run(*args, **kwargs)
        except Exception as error:
            raise portable(error)  # noqa: B904  # it has its cause, or hides it

    @cached_property
    def is_async(self) -> bool:
        """Whether the body is an ``async def``."""
        return inspect.iscoroutinefunction(inspect.unwrap(self.run))

    def delay_on_commit(self, *args: object, **kwargs: object) -> str:
        """Send the task once the unit of work around the call is committed; never after a rollback.

        Outside any unit it is sent at once. A broker that is down is logged.

        Returns:
            The id that the task will have.
        """
        return send_on_commit(self, args, kwargs, "log", {})

    def apply_async_on_commit(
        self,
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
        *,
        on_error: OnError = "log",
        **options: Any,  # as Celery's apply_async has them
    ) -> str:
        """``delay_on_commit`` with the options of ``apply_async``.

        Parameters:
            args: The task's positional arguments.
            kwargs: Its keyword arguments.
            on_error: What happens when the broker does not take it within ``broker_connection_timeout`` seconds:
                ``"log"`` an error, or ``"raise"`` to whoever ended the unit, although its commit stands.
            options: Celery's: ``countdown``, ``queue``, ``link``, ...

        Returns:
            The id that the task will have.

        Raises:
            DispatchFailed: With ``on_error="raise"``, where the unit ends; outside any unit, here.
        """
        return send_on_commit(self, args, kwargs or {}, on_error, options)
