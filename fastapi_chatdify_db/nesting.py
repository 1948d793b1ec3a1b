"""Units of work within each other: which one the running code is in, and which are open within one."""

from __future__ import annotations

import asyncio
from contextvars import ContextVar
from typing import TYPE_CHECKING, Final

from sqlalchemy.engine import ExceptionContext

from fastapi_chatdify_db.forks import in_forked_child
from fastapi_chatdify_db.sqlstates import asks_to_retry

if TYPE_CHECKING:
    from fastapi_chatdify_db.engines import Engines
    from fastapi_chatdify_db.unit_of_work import UnitOfWork

current: Final[ContextVar[UnitOfWork | None]] = ContextVar("fastapi_chatdify_db.unit_of_work", default=None)
"""The unit that was opened last where the running code comes from; it may have ended."""


def innermost_unit() -> UnitOfWork | None:
    """The open unit of work around the running code, whichever database it is for, or None."""
    return first_open(current.get())


def current_unit(engines: Engines) -> UnitOfWork | None:
    """The open unit of work that the sessions of ``engines`` belong to here, or None."""
    unit = current.get()
    while unit is not None and (unit.closed or unit.only not in (None, engines)):
        unit = unit.outer
    return unit


def outlives_its_unit() -> bool:
    """Whether the running code was started in a unit of work, e.g. by ``asyncio.create_task``, that has ended."""
    return current.get() is not None and innermost_unit() is None


def units_inside(outer: UnitOfWork) -> list[UnitOfWork]:
    """The open units between the running code and ``outer``, the innermost first, and those suspended within them."""
    around: set[UnitOfWork] = set()
    unit = current.get()
    while unit is not None and unit is not outer:
        around.add(unit)
        unit = unit.outer
    if unit is not outer:  # the running code does not belong to it
        around.clear()
    found: list[UnitOfWork] = []
    for block in [*outer.inside]:  # a copy: threads may open and close some meanwhile
        if block in around or (block.is_suspended and first_open(block.outer) in (outer, *found)):
            found.append(block)
    return found[::-1]


def units_left_inside(outer: UnitOfWork) -> list[UnitOfWork]:
    """The units still open within one that has ended: the tasks of their generators have ended, or gone on without."""
    left: list[UnitOfWork] = []
    for block, task in [*outer.inside.items()]:
        if block.is_suspended:
            is_left = first_open(block.outer) in (None, *left)  # None: outer has ended
        else:
            is_left = task is not None and (task.done() or task is asyncio.current_task())
        if is_left:
            left.append(block)
    return left[::-1]


def note_retryable_error(context: ExceptionContext) -> None:
    """Note in the units around a statement that it failed with a serialization failure or deadlock, worth a retry."""
    if asks_to_retry(context.original_exception):
        unit = current.get()
        while unit is not None:
            unit.untouched, unit.asked_to_retry = False, True
            unit = unit.outer


def first_open(unit: UnitOfWork | None) -> UnitOfWork | None:
    """``unit``, or the innermost one around it that is still open."""
    while unit is not None and unit.closed:  # in another context, by a generator finalized there
        unit = unit.outer
    return unit


@in_forked_child
def _leave_parents_unit() -> None:
    current.set(None)
