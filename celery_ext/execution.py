"""One execution of a task: the unit of work of its body, then that of its handlers (``on_success``, ...)."""

from __future__ import annotations

import logging
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final

import celery
from celery.app.task import Context

from celery_ext import context
from celery_ext.durable.delivery import Delivery
from celery_ext.errors import BodyBypassed, DurableDispatchUnsupported
from fastapi_chatdify_db.async_unit_of_work import AsyncUnitOfWork
from fastapi_chatdify_db.nesting import innermost_unit
from fastapi_chatdify_db.unit_of_work import UnitOfWork

if TYPE_CHECKING:
    from celery_ext.task import Task

logger: Final = logging.getLogger(__name__)

_current: Final[ContextVar[Execution | None]] = ContextVar("celery_ext.execution", default=None)


class Execution:
    """From ``task_prerun`` to ``task_postrun``; the body's unit ends with the body, inside Celery's tracer.

    Parameters:
        task: What is executed.
        task_id: Its id.
    """

    _unit: UnitOfWork | None = None
    _begun = False
    _body_over = False

    def __init__(self, task: Task, task_id: str) -> None:
        self.task = task
        self._task_id = task_id
        self._outer = _current.get()
        self.request: Context = task.request
        self._leave_context = context.restore(self.request)
        self.delivery: Delivery | None = Delivery.of(task, task_id, self.request)
        if task.db_session:
            self._open_unit(AsyncUnitOfWork if task.is_async else UnitOfWork)
        _current.set(self)

    @classmethod
    def current(cls) -> Execution | None:
        """The execution that the running code is part of, or None."""
        return _current.get()

    @classmethod
    def of(cls, task: celery.Task[..., Any]) -> Execution | None:
        """The execution that the running code is part of, if it is one of ``task``."""
        execution = _current.get()
        # Not "is": New Relic's agent hands out proxies of tasks.
        return execution if execution is not None and execution.task == task else None

    @classmethod
    def beginning(cls, task: celery.Task[..., Any]) -> Execution | None:
        """The execution whose body ``task`` is about to run; None if the task is called as a function.

        Raises:
            DurableDispatchUnsupported: A durable task's body is run again; its row has the outcome of the first run.
        """
        if (execution := cls.of(task)) is None:
            return None
        if execution._body_over and execution.delivery is not None:
            raise DurableDispatchUnsupported(
                f"{task.name} is durable, and its body has ended; to try again, write autoretry_for=... or self.retry()"
            )
        return None if execution._begun else execution

    def begin(self) -> UnitOfWork | None:
        """Note that the body starts; returns the unit that it has to end, or None for a task without one."""
        self._begun = True
        return self._unit

    def body_ended(self) -> None:
        """Close the body's unit; handlers until ``task_postrun`` get another, or the same one if it is unused."""
        assert self._unit is not None
        self._body_over = True
        if not self._unit.untouched or self.task.is_async:
            self._unit.close()
            self._open_unit(UnitOfWork)

    def end(self, error: Exception | None, *, succeeded: bool) -> None:
        """At ``task_postrun``: commit what the handlers did.

        The task's state cannot change any more, so errors are logged.

        Parameters:
            error: What the task has ended with: a failure, or Celery's ``Retry``, ``Ignore`` or ``Reject``.
            succeeded: Whether it is a success to Celery.
        """
        _current.set(self._outer)
        try:
            if succeeded:
                error = self._find_bypass()
            if self._unit is not None:
                self._end_unit(self._unit)
            if self.delivery is not None and error is not None and not self._begun:
                self.delivery.record_early_end(error)
        except Exception:
            logger.exception("what the handlers of task %s[%s] wrote is lost", self.task.name, self._task_id)
        finally:
            if self._leave_context is not None:
                self._leave_context()
            if self.delivery is not None:
                self.delivery.close()

    def _open_unit(self, kind: type[UnitOfWork]) -> None:
        self._unit = kind(isolation_level=self.task.db_isolation_level)
        self._unit.task_id = self._task_id
        self._unit.open()

    def _find_bypass(self) -> BodyBypassed | None:
        """The error of a task that succeeded while its body did not run in the unit, and that lost something by it."""
        unused = self._unit is None or self._unit.untouched
        if self._begun or (unused and self.delivery is None):
            return None
        bypassed = BodyBypassed(
            f"task {self.task.name}[{self._task_id}] was rolled back: its body did not run in its unit of work, where "
            "the commit is; let its own __call__ call self.run() or super().__call__(), or raise Ignore()"
        )
        logger.error("%s", bypassed)
        return bypassed

    def _end_unit(self, unit: UnitOfWork) -> None:
        try:
            unit.finish(commit=self._begun)
        finally:
            unit.close()


def joinable_unit() -> UnitOfWork | None:
    """The unit that a task called as a function joins; None if it has to open its own.

    Celery calls error callbacks as functions between the body and ``task_postrun``; they do not join the handlers'.
    """
    unit, execution = innermost_unit(), _current.get()
    while execution is not None and execution._unit is not unit:
        execution = execution._outer
    return None if execution is not None and execution._body_over else unit
