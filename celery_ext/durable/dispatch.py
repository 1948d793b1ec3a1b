"""A call of a task becomes a row of the transaction around it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from celery_ext.dispatch import check_arguments, inherited_options, refuse_durable_options, send_on_commit
from celery_ext.durable import outbox
from celery_ext.durable.row import check_accepted, new_row
from celery_ext.errors import DurableDispatchUnsupported
from fastapi_chatdify_db.database import Database
from fastapi_chatdify_db.exceptions import OutsideUnitOfWork
from fastapi_chatdify_db.nesting import current_unit

if TYPE_CHECKING:
    from celery_ext.task import Task


def store(
    task: Task,
    args: Sequence[object],
    kwargs: Mapping[str, object],
    *,
    countdown: float | None,
    eta: datetime | None,
    expires: float | datetime | None,
    ordering_key: str | None,
    idempotency_key: str | None,
    options: Mapping[str, Any],
) -> str:
    """Store a call of ``task`` with what the unit of work around it commits; returns the task's id.

    Raises:
        TypeError: The task does not take these arguments, or ``task_id``, ``on_error`` or a misspelt key is an option.
        OutsideUnitOfWork: There is no unit on the task's database here.
        ArgumentsNotSerializable: The arguments are no JSON, an option is nothing to store, or no time, or no worker
            would take the message.
        DurableDispatchUnsupported: The database is not PostgreSQL, or the task has no session or runs in batches.
    """
    engines = task.database.engines
    unit = current_unit(engines)
    if unit is None:
        raise OutsideUnitOfWork(
            f"{task.name} can only be stored with a transaction: "
            f"async with {task.database.name}.transaction(): ... (or sync_transaction), a request or a task"
        )
    _refuse_unsupported(task)
    check_arguments(task, args, kwargs)
    _refuse_options(task, options)
    check_accepted(task, options)
    row = new_row(
        task,
        args,
        kwargs,
        countdown=countdown,
        eta=eta,
        expires=task.expires if expires is None else expires,
        ordering_key=ordering_key,
        idempotency_key=idempotency_key,
        options={**inherited_options(task), **options},
    )
    if task.app.conf.task_always_eager:  # where there is no worker there is no relay
        return send_on_commit(task, args, kwargs, "raise", {**options, "task_id": row.id})
    outbox.add(unit.session_of_writes(engines), row)
    return row.id


def _refuse_unsupported(task: Task) -> None:
    check_dialect(task.database)
    why = None
    if not task.db_session:
        why = "has db_session=False, and its end is marked in the session it lacks"
    elif callable(task.Strategy):
        why = "takes its messages together (celery-batches), and a row is done by a run of its own"
    if why is not None:
        raise DurableDispatchUnsupported(f"{task.name} {why}; write {task.name}.delay_on_commit(...)")


def check_dialect(database: Database) -> None:
    """Refuse a database that cannot keep durable tasks.

    Raises:
        DurableDispatchUnsupported: It is not PostgreSQL.
    """
    if database.sync_engine.dialect.name != "postgresql":
        raise DurableDispatchUnsupported("durable dispatch needs PostgreSQL; write task.delay_on_commit(...)")


def _refuse_options(task: Task, options: Mapping[str, Any]) -> None:
    refuse_durable_options(task, options, "{}=...")
    if "task_id" in options:
        raise TypeError(f"{task.name} has its row's id for task_id; to store it once, write idempotency_key=...")
    if "on_error" in options:
        raise TypeError(f"{task.name} is stored, and sent until the broker takes it; leave out on_error=...")
