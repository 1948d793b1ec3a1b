"""What becomes of a program, by what docs/unit_of_work.md and docs/streaming_and_websockets.md say."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field

from tests.random_requests.programs import Dependency, Names, Program, Step, Steps, Within


@dataclass
class Outcome:
    """What the client was told, and what is kept."""

    status: int = 0
    is_complete: bool = False
    """Whether the client got the whole body."""
    kept: list[str] = field(default_factory=list)
    """The names of the rows that are there, and of the callbacks that ran."""


class Boom(Exception):
    """What the program raises."""


class Conflict(Exception):
    """A COMMIT failed, since a name was taken."""


@dataclass(eq=False)
class Unit:
    """A unit of work."""

    names: list[str] = field(default_factory=list)
    """Of the rows and callbacks that its next COMMIT keeps."""
    rollback_only: bool = False


class Foretelling:
    """A walk through a program, in the order in which FastAPI goes."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._names = Names()
        self._outcome = Outcome()
        self._request = Unit()
        self._open = [self._request]
        self._visible = [self._request]
        """Those of the open units in which ``db.session`` may be: it is in the last."""

    def outcome(self) -> Outcome:
        """What becomes of the program."""
        failure = 0
        try:
            self._go_through()
        except Boom:
            failure = 418
        except Conflict:
            failure = 409
        self._outcome.status = self._outcome.status or failure
        self._outcome.is_complete |= self._outcome.status == failure
        self._outcome.kept.sort()
        return self._outcome

    def _go_through(self) -> None:
        handler = self._program.handler
        with ExitStack() as until_the_end:
            with ExitStack() as until_the_response:
                for given in self._program.dependencies:
                    scope = until_the_response if given.scope == "function" else until_the_end
                    scope.enter_context(self._dependency(given))
                self._do(handler.steps)
                if handler.ending == "exception":
                    raise Boom
            self._end_all(commit=handler.ending == "200")
            self._outcome.status = int(handler.ending)
            if handler.ending == "200" and self._program.body is not None:
                self._do(self._program.body)
                if self._program.body_fails:
                    raise Boom
                self._end_all(commit=True)
            self._outcome.is_complete = True
            self._do(self._program.background)
            if self._program.background_fails:
                raise Boom
        self._end(self._request)

    @contextmanager
    def _dependency(self, given: Dependency) -> Iterator[None]:
        # Nobody but itself is in the block of a def dependency.
        with self._block(is_visible=given.is_async) as block:
            self._add(block, given.before)
            yield
            self._add(block, given.after)

    @contextmanager
    def _block(self, *, is_visible: bool = True) -> Iterator[Unit]:
        block = Unit()
        self._open.append(block)
        if is_visible:
            self._visible.append(block)
        try:
            yield block
            self._end(block)
        finally:
            self._open.remove(block)
            if is_visible:
                self._visible.remove(block)

    def _end_all(self, *, commit: bool) -> None:
        for unit in reversed(self._open):
            self._end(unit, commit=commit)
        self._request.rollback_only = False

    def _end(self, unit: Unit, *, commit: bool = True) -> None:
        names, unit.names = unit.names, []
        if commit and not unit.rollback_only:
            if any(name.startswith("taken") for name in names):
                raise Conflict
            self._outcome.kept += names

    def _do(self, steps: Steps) -> None:
        unit = self._visible[-1]
        for step in steps:
            match step:
                case Within("savepoint", inside, fails):
                    before = len(unit.names)
                    try:
                        self._do(inside)
                        self._fail(fails)
                    except Boom:
                        del unit.names[before:]
                case Within("block", inside, fails):
                    with suppress(Boom, Conflict), self._block():
                        self._do(inside)
                        self._fail(fails)
                case "release":
                    self._end(unit)
                case "rollback_only":
                    unit.rollback_only = True
                case _:
                    self._add(unit, [step])

    def _fail(self, fails: str) -> None:
        if fails == "by a statement":
            self._names.free()  # of a callback that is registered after it
        if fails != "no":
            raise Boom

    def _add(self, unit: Unit, steps: Steps | list[Step]) -> None:
        for step in steps:
            if step in ("add", "on_commit"):
                unit.names.append(self._names.free())
            elif step == "add one that is taken":
                unit.names.append(self._names.taken())
