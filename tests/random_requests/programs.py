"""What a random request does: its dependencies, its handler, its body and its background task."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count
from typing import Final, Literal

from hypothesis import strategies as st

TAKEN: Final = 100
"""How many names are taken: whoever adds a row of such a name fails at the COMMIT."""


@dataclass(frozen=True)
class Within:
    """Steps in a savepoint or in a ``transaction()`` of their own; a failure is handled around it."""

    kind: Literal["savepoint", "block"]
    steps: Steps
    fails: Literal["no", "by an exception", "by a statement"]


Step = Within | Literal["add", "add one that is taken", "flush", "read", "on_commit", "rollback_only", "release"]
Steps = tuple[Step, ...]


@dataclass(frozen=True)
class Dependency:
    """One with ``yield`` within a ``transaction()``; what it adds to its session."""

    is_async: bool
    scope: Literal["function", "request"]
    before: Steps
    after: Steps


@dataclass(frozen=True)
class Handler:
    """An ``async def`` endpoint or a ``def`` one."""

    is_async: bool
    steps: Steps
    ending: Literal["200", "404", "exception"]


@dataclass(frozen=True)
class Program:
    """A request's."""

    dependencies: tuple[Dependency, ...]
    handler: Handler
    body: Steps | None
    """What a streaming body does, or None for a body that is sent at once."""
    body_fails: bool
    background: Steps
    background_fails: bool


class Names:
    """The names of the rows and callbacks of one program, in the order in which they are asked for."""

    def __init__(self) -> None:
        self._free, self._taken = count(), count()

    def free(self) -> str:
        """One that nobody has."""
        return f"free {next(self._free):02}"

    def taken(self) -> str:
        """One that a row has; never the same again, or two transactions of a request would wait for each other."""
        return f"taken {next(self._taken):02}"


def _several(steps: st.SearchStrategy[Step], most: int) -> st.SearchStrategy[Steps]:
    return st.lists(steps, max_size=most).map(tuple)


def _steps(*only_async: Step) -> st.SearchStrategy[Steps]:
    # Most of them succeed: after a failure there is little to see.
    anywhere = _any_of("add", "add", "add", "add one that is taken", "flush", "read", "on_commit", "rollback_only")
    in_transaction = anywhere | _any_of(*only_async) if only_async else anywhere
    fails = st.sampled_from(["no", "no", "by an exception", "by a statement"])
    within = st.deferred(lambda: savepoint | block)
    savepoint = st.builds(Within, st.just("savepoint"), _several(anywhere | within, 3), fails)
    block = st.builds(Within, st.just("block"), _several(in_transaction | within, 3), fails)
    return _several(in_transaction | within, 4)


def _any_of(*steps: Step) -> st.SearchStrategy[Step]:
    return st.sampled_from(steps)


def _dependencies(is_async: bool, *rows: Step) -> st.SearchStrategy[Dependency]:
    steps = _several(_any_of(*rows), 2)
    return st.builds(Dependency, st.just(is_async), st.sampled_from(["function", "request"]), steps, steps)


def _programs(handler_is_async: bool) -> st.SearchStrategy[Program]:
    # The COMMIT that fails is the first one: a def handler's session, in the unit of an async def dependency, has
    # committed before that of the dependency, and is not undone.
    harmless: tuple[Step, ...] = ("add", "add", "add")
    any_rows: tuple[Step, ...] = (*harmless, "add one that is taken")
    dependencies = _dependencies(True, *(any_rows if handler_is_async else harmless)) | _dependencies(False, *any_rows)
    return st.builds(
        Program,
        dependencies=st.lists(dependencies, max_size=3).map(tuple),
        handler=st.builds(
            Handler,
            st.just(handler_is_async),
            _steps("release") if handler_is_async else _steps(),
            st.sampled_from(["200", "200", "200", "404", "exception"]),
        ),
        body=st.none() | _steps("release"),
        body_fails=st.booleans(),
        background=_steps("release"),
        background_fails=st.booleans(),
    )


PROGRAMS: Final = _programs(True) | _programs(False)
