"""A durable task's message in the worker: whether its task runs, and what becomes of the row."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from celery.app.task import Context
from celery.exceptions import Ignore, Reject, Retry
from sqlalchemy import Row, event
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session
from sqlalchemy.util import await_only

from celery_ext.durable import lease, outbox, statements
from celery_ext.durable.failures import is_transient
from celery_ext.durable.row import HEADER, check_accepted, due_of, seconds_until, serialize, with_options
from celery_ext.portable import as_text
from celery_ext.soft_limit import soft_limit_held_back
from fastapi_chatdify_db.async_unit_of_work import run_to_completion
from fastapi_chatdify_db.exceptions import AfterCommitError
from fastapi_chatdify_db.refused_commits import prepare_commit
from fastapi_chatdify_db.surroundings import in_event_loop

if TYPE_CHECKING:
    from celery_ext.task import Task

logger: Final = logging.getLogger(__name__)


class Dropped(Ignore):
    """The message is a duplicate: its row is done, not due, or being worked on elsewhere."""


class Delivery:
    """One delivery of a durable task, from the lock on its row to the mark that it is done.

    Parameters:
        task: What is to run.
        task_id: The id of its row.
        request: What is executed.
    """

    def __init__(self, task: Task, task_id: str, request: Context) -> None:
        self._task = task
        self._request = request
        self.task_id = task_id
        self._begun = self._finishing = self._leased = False
        self._ordering_key: str | None = None
        self._retry: dict[str, Any] = {}
        """The row's values for the next attempt; empty when there is none."""
        self._retry_options: dict[str, Any] = {}
        """Its options besides the time."""

    @classmethod
    def of(cls, task: Task, task_id: str, request: Context) -> Delivery | None:
        """The delivery that a task's request belongs to; None for a task that is not durable."""
        return cls(task, task_id, request) if vars(request).get(HEADER) == task_id else None

    def begin(self, session: Session) -> None:
        """Lock the row, as the first statement of the body's transaction.

        Raises:
            Dropped: There is no row to run now.
        """
        row = self._lock(session)
        if row is None:
            raise Dropped
        self._begun = True
        if row.expired:
            raise Ignore("expired")
        self._request.retries = row.retries  # the row's count outlives crashes, a message's does not
        event.listen(session, "before_commit", self._keep_lease)

    def finish(self, session: Session) -> None:
        """Mark the row done, or due again after a ``retry(throw=False)``; the last statement of the body's transaction.

        Raises:
            Dropped: It was done by another worker, or cancelled, after this one had lost its lease.
        """
        self._finishing = True
        prepare_commit(session)  # or the mark would fail where the COMMIT should, with an error that names no cause
        if not self._succeed(session):
            logger.warning("task %s[%s] was ended elsewhere, and is rolled back", self._task.name, self.task_id)
            raise Dropped

    def finish_without_effects(self) -> None:
        """``finish`` for a body that succeeded but rolled back its own transaction."""
        with self._task.database.sync_transaction() as session:
            session.execute(statements.LIMIT_LOCKS)
            self._succeed(session)

    def retry_later(self, args: Sequence[object], kwargs: Mapping[str, object], options: dict[str, Any]) -> None:
        """Note the next attempt, for the end of this one; the relay will send it."""
        name, retries = self._task.name, options.pop("retries", 0)
        due = due_of(name, options.pop("countdown", None), options.pop("eta", None))
        arguments = serialize(name, [list(args), dict(kwargs)])
        serialize(name, options)  # raises now if one cannot be stored
        check_accepted(self._task, options)
        self._retry = {"arguments": arguments, "retries": retries, "due_in": seconds_until(due)}
        self._retry_options = options

    def record_end(self, error: BaseException) -> BaseException:
        """Record how the body ended, after its rollback; returns what to tell Celery.

        A failure of the database or the worker rather than of the task is no end: the row stays, and will be run again.
        """
        if isinstance(error, Dropped) or _is_redelivered(error):  # the row belongs to another delivery
            return error
        # If nothing can be stored, the relay rings the row again anyway. NotImplementedError: a cold shutdown came now.
        with suppress(DBAPIError, PoolTimeout, NotImplementedError), self._task.database.sync_transaction() as session:
            session.execute(statements.LIMIT_LOCKS)
            if self._begun and not is_transient(error):
                recorded = self._record(session, error)
                self.close()  # until the COMMIT the row is locked; after it, the next attempt may come at once
                if recorded or isinstance(error, AfterCommitError):
                    return error
                name, kind = self._task.name, type(error).__name__
                logger.warning("task %s[%s] had ended already, and does not end in %s", name, self.task_id, kind)
                return Dropped()
            rung = session.execute(statements.RING_SOON, {"id": self.task_id, "error": as_text(error)}).one_or_none()
            if rung is None and isinstance(error, AfterCommitError):
                return error
        logger.warning(
            "task %s[%s] will be run again, unless its end is stored: %s",
            self._task.name,
            self.task_id,
            type(error).__name__,
        )
        return Dropped()

    def record_early_end(self, error: Exception) -> None:
        """Record how a task ended whose body did not run in its unit: in ``before_start``, or past ``Task.run``."""
        if is_transient(error) or _is_redelivered(error):
            return
        with self._task.database.sync_transaction() as session:
            if self._lock(session) is not None:
                self._record(session, error)

    def close(self) -> None:
        """Give up the lease if this delivery took it; a duplicate's may belong to another thread."""
        if self._leased:
            self._leased = False
            lease.free(self._task.database, self.task_id)

    def _lock(self, session: Session) -> Row[Any] | None:
        """The row, locked for this delivery; None if there is none to run now."""
        row = session.execute(statements.BEGIN, {"id": self.task_id}).one_or_none()
        if row is None or not row.free:
            return None
        self._ordering_key = row.ordering_key
        return row

    def _record(self, session: Session, error: BaseException) -> bool:
        """Store what the task has ended with; False when its row was ended before."""
        if isinstance(error, Retry) and self._retry:
            return self._put_off(session, as_text(error.exc))
        return self._end_row(session, "cancelled" if isinstance(error, Ignore | Reject) else "failed", as_text(error))

    def _succeed(self, session: Session) -> bool:
        return self._put_off(session, None) if self._retry else self._end_row(session, "done", None)

    def _put_off(self, session: Session, error: str | None) -> bool:
        """Make the row due again for the next attempt; False when it was ended before."""
        values = {**self._retry, "id": self.task_id, "error": error, "options": None}
        if self._retry_options:
            stored = session.scalar(statements.OPTIONS, {"id": self.task_id})
            values["options"] = with_options(self._task.name, stored, self._retry_options)
        return session.execute(statements.RETRY, values).one_or_none() is not None

    def _end_row(self, session: Session, status: str, error: str | None) -> bool:
        """End the row, and let the next one of its key begin; False when it was ended before."""
        if self._ordering_key is not None:
            # Together with the keys of the tasks that it stores, in one order; else two tasks could deadlock.
            session.execute(statements.LOCK_KEYS, {"keys": sorted({self._ordering_key, *outbox.keys(session)})})
        values = {"id": self.task_id, "status": status, "error": error}
        ended = session.execute(statements.FINISH, values).one_or_none()
        if self._ordering_key is not None:
            session.execute(statements.RING_NEXT_OF_KEY, {"key": self._ordering_key})
        return ended is not None

    def _keep_lease(self, session: Session) -> None:
        if self._finishing or session.in_nested_transaction():
            return
        if in_event_loop():  # not to block the loop's other tasks
            await_only(run_to_completion(asyncio.to_thread(self._take_lease)))
        else:
            self._take_lease()

    def _take_lease(self) -> None:
        with soft_limit_held_back:  # or nobody would give up a lock that was taken
            if not lease.hold(self._task.database, self.task_id):
                raise Dropped
            self._leased = True


def _is_redelivered(error: BaseException) -> bool:
    """Whether the task rejected its message so that the broker delivers it again."""
    return isinstance(error, Reject) and bool(error.requeue)  # type: ignore[attr-defined]  # missing in the stubs
