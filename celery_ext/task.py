"""The task class: every body in a unit of work, and sending that waits for the commit."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, TypeVar

import celery
from celery.app.task import Context
from celery.canvas import Signature
from celery.result import AsyncResult

from celery_ext.body import put_in_unit
from celery_ext.dispatch import OnError, refuse_durable_options, send_on_commit
from celery_ext.durable.dispatch import store
from celery_ext.errors import DurableDispatchUnsupported
from celery_ext.execution import Execution
from fastapi_chatdify_db.database import Database
from fastapi_chatdify_db.database import db as default_database
from fastapi_chatdify_db.exceptions import AfterCommitError

if TYPE_CHECKING:
    from celery_ext.durable.delivery import Delivery

    _CeleryTask = celery.Task[..., Any]
else:
    _CeleryTask = celery.Task


R = TypeVar("R")

_CELERY: Final = str(Path(celery.__file__).parent)


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

    dont_autoretry_for: ClassVar[tuple[type[Exception], ...]] = (AfterCommitError,)
    """Errors after the commit, when another run would do everything twice; a list of your own has to name them too."""
    runs_in_unit: bool = False
    """Whether ``put_in_unit`` has wrapped ``run``."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the body in its unit of work; called by Celery's tracer, or as a function.

        Raises:
            StatementFailed: A statement or the commit failed, in a task that a worker runs.
        """
        if not self.runs_in_unit:
            put_in_unit(self)
        # Celery's own __call__ pushes a request, which a worker's task has already.
        return super().__call__(*args, **kwargs) if Execution.beginning(self) is None else self.run(*args, **kwargs)

    @property
    def request(self) -> Context:
        """The running task's request. Celery keeps it by thread; on the event loop's, each coroutine finds its own."""
        if (request := self.request_stack.top) is not None:
            return request
        return super().request if (execution := Execution.of(self)) is None else execution.request

    @cached_property
    def is_async(self) -> bool:
        """Whether the body is an ``async def``."""
        return inspect.iscoroutinefunction(inspect.unwrap(self.run, stop=_is_user_code))

    def delay_on_commit(self, *args: object, **kwargs: object) -> str:
        """Send the task once the unit of work around the call is committed; never after a rollback.

        Outside any unit it is sent at once. A broker that is down is logged.

        Returns:
            The id that the task will have.

        Raises:
            TypeError: The task does not take these arguments.
            ArgumentsNotSerializable: The task's serializer does not carry them.
        """
        return self.apply_async_on_commit(args, kwargs)

    def apply_async_on_commit(
        self,
        args: Sequence[object] | None = None,
        kwargs: Mapping[str, object] | None = None,
        *,
        on_error: OnError = "log",
        **options: Any,  # as Celery's apply_async has them
    ) -> str:
        """``delay_on_commit`` with the options of ``apply_async``.

        Parameters:
            args: The task's positional arguments.
            kwargs: Its keyword arguments.
            on_error: What happens when the broker does not take the task within ``broker_connection_timeout`` seconds:
                ``"log"`` an error, or ``"raise"`` to whoever ended the unit, although its commit stands.
            options: Celery's: ``countdown``, ``queue``, ``link``, ...

        Returns:
            The id that the task will have.

        Raises:
            TypeError: The task does not take these arguments, ``on_error`` is unknown, or an option is
                ``apply_durably``'s.
            ArgumentsNotSerializable: The task's serializer does not carry the arguments.
            DispatchFailed: With ``on_error="raise"``, where the unit ends; outside any unit, here.
        """
        refuse_durable_options(self, options, "apply_durably(..., {}=...)")
        return send_on_commit(self, args or (), kwargs or {}, on_error, options)

    def delay_durably(self, *args: object, **kwargs: object) -> str:
        """Store the task as a row of the transaction around the call, for a relay to send; no crash or broker loses it.

        Returns:
            The id that the task will have.

        Raises:
            OutsideUnitOfWork: There is no transaction here.
            TypeError: The task does not take these arguments.
            ArgumentsNotSerializable: The arguments are no JSON.
            DurableDispatchUnsupported: The database is not PostgreSQL, or the task has no session or runs in batches.
        """
        return self.apply_durably(args, kwargs)

    def apply_durably(
        self,
        args: Sequence[object] | None = None,
        kwargs: Mapping[str, object] | None = None,
        *,
        countdown: float | None = None,
        eta: datetime | None = None,
        expires: float | datetime | None = None,
        ordering_key: str | None = None,
        idempotency_key: str | None = None,
        **options: Any,  # as Celery's apply_async has them
    ) -> str:
        """``delay_durably`` with options.

        Parameters:
            args: The task's positional arguments.
            kwargs: Its keyword arguments.
            countdown: Seconds from the commit until it may start.
            eta: Instead of ``countdown``, the moment from which it may start.
            expires: Seconds, or the moment, after which it is not started any more.
            ordering_key: At most 500 characters. Tasks of one key run one at a time, in the order in which their
                transactions committed.
            idempotency_key: The same key a second time stores nothing, and returns the first one's id.
            options: Celery's: ``queue``, ``priority``, ``link``, ``time_limit``, ...; but no ``task_id``.

        Returns:
            The id that the task will have.

        Raises:
            OutsideUnitOfWork: There is no transaction here.
            TypeError: The task does not take these arguments, or ``task_id``, ``on_error`` or a misspelt key is an
                option.
            ArgumentsNotSerializable: The arguments are no JSON, an option or a key cannot be stored or is no time, or
                no worker takes the ``serializer``.
            DurableDispatchUnsupported: The database is not PostgreSQL, or the task has no session or runs in batches.
        """
        return store(
            self,
            args or (),
            kwargs or {},
            countdown=countdown,
            eta=eta,
            expires=expires,
            ordering_key=ordering_key,
            idempotency_key=idempotency_key,
            options=options,
        )

    def apply_async(
        self, args: Any = None, kwargs: Any = None, task_id: str | None = None, *rest: Any, **options: Any
    ) -> AsyncResult[Any]:
        """Celery's; but where ``retry`` sends the next attempt of a durable task, note it in the task's row instead."""
        delivery = _delivery(self)
        if delivery is not None and task_id == delivery.task_id:
            delivery.retry_later(args or (), kwargs or {}, options)
            return self.AsyncResult(task_id)
        return super().apply_async(args, kwargs, task_id, *rest, **options)

    def signature_from_request(
        self, request: Any = None, args: Any = None, kwargs: Any = None, queue: str | None = None, **options: Any
    ) -> Signature[Any]:
        """Celery's, of the next attempt; a durable task's row has its options already, and takes only what is new."""
        signature = super().signature_from_request(request, args, kwargs, queue, **options)
        if (delivery := _delivery(self)) is not None:
            asked = options | ({"queue": queue} if queue else {})
            signature["options"] = asked | {"task_id": delivery.task_id}
        return signature

    def replace(self, sig: Signature[R]) -> R:
        """Celery's, which rolls back and ends this task; a durable task has to store its successor instead.

        Raises:
            DurableDispatchUnsupported: The task is durable.
        """
        if _delivery(self) is not None:
            raise DurableDispatchUnsupported(
                f"{self.name} is durable, and self.replace() would not be; write: other_task.delay_durably(...)"
            )
        return super().replace(sig)


def _delivery(task: Task) -> Delivery | None:
    """The running task's, if that is ``task`` and durable."""
    execution = Execution.of(task)
    return None if execution is None else execution.delivery


def _is_user_code(function: Any) -> bool:
    """Whether a function is none of Celery's wrappers (``autoretry_for``, ``pydantic=True``), which hide coroutines."""
    code = getattr(function, "__code__", None)
    return code is None or not code.co_filename.startswith(_CELERY)
