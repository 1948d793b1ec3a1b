"""An application that does what a program says, on the real database."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, cast

from fastapi import BackgroundTasks, Depends, FastAPI, Response
from fastapi.responses import StreamingResponse
from sqlalchemy import null, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from fastapi_chatdify_db import DBSessionMiddleware, db
from tests.models import Item
from tests.random_requests.programs import Dependency, Names, Program, Step, Steps, Within


class Boom(Exception):
    """What a program raises, and the application answers."""


@dataclass
class Run:
    """A program on its way."""

    program: Program
    names: Names = field(default_factory=Names)
    called: list[str] = field(default_factory=list)
    """The names of the ``on_commit`` callbacks that ran."""

    def application(self) -> FastAPI:
        """The application, which does what the program says at ``/``."""
        app = FastAPI()
        app.add_middleware(DBSessionMiddleware)
        app.add_exception_handler(Boom, lambda *_: Response(status_code=418))
        app.add_exception_handler(IntegrityError, lambda *_: Response(status_code=409))
        handler = self._handler if self.program.handler.is_async else self._def_handler
        app.get("/", dependencies=[_dependency(each, self) for each in self.program.dependencies])(handler)
        return app

    async def _handler(self, background: BackgroundTasks) -> Response:
        await self._do(db.session, self.program.handler.steps)
        return self._response(background)

    def _def_handler(self, background: BackgroundTasks) -> Response:
        self._do_sync(db.sync_session, self.program.handler.steps)
        return self._response(background)

    def _response(self, background: BackgroundTasks) -> Response:
        background.add_task(self._background)
        if self.program.handler.ending == "exception":
            raise Boom
        if self.program.handler.ending == "404":
            return Response("not there", status_code=404, background=background)
        if self.program.body is None:
            return Response("a body", background=background)
        return StreamingResponse(self._body(self.program.body), background=background)

    async def _body(self, steps: Steps) -> AsyncGenerator[bytes]:
        yield b"a "
        await self._do(db.session, steps)
        if self.program.body_fails:
            raise Boom
        yield b"body"

    async def _background(self) -> None:
        await self._do(db.session, self.program.background)
        if self.program.background_fails:
            raise Boom

    async def _do(self, session: AsyncSession, steps: Steps) -> None:
        for step in steps:
            match step:
                case Within("savepoint", inside, fails):
                    with suppress(Boom, IntegrityError):
                        async with session.begin_nested():
                            await self._do(session, inside)
                            await self._fail(session, fails)
                case Within("block", inside, fails):
                    with suppress(Boom, IntegrityError):
                        async with db.transaction() as own:
                            await self._do(own, inside)
                            await self._fail(own, fails)
                case "flush":
                    await session.flush()
                case "read":
                    await session.scalars(select(Item.id))
                case "release":
                    await db.release()
                case _:
                    self.do_at_once(session, step)

    def _do_sync(self, session: Session, steps: Steps) -> None:
        for step in steps:
            match step:
                case Within("savepoint", inside, fails):
                    with suppress(Boom, IntegrityError), session.begin_nested():
                        self._do_sync(session, inside)
                        self._fail_sync(session, fails)
                case Within("block", inside, fails):
                    with suppress(Boom, IntegrityError), db.sync_transaction() as own:
                        self._do_sync(own, inside)
                        self._fail_sync(own, fails)
                case "flush":
                    session.flush()
                case "read":
                    session.scalars(select(Item.id))
                case _:
                    self.do_at_once(session, step)

    async def _fail(self, session: AsyncSession, fails: str) -> None:
        if fails == "by an exception":
            raise Boom
        if fails == "by a statement":
            session.add(Item(cast("str", null())))
            try:
                await session.flush()
            finally:
                self.do_at_once(session, "on_commit")

    def _fail_sync(self, session: Session, fails: str) -> None:
        if fails == "by an exception":
            raise Boom
        if fails == "by a statement":
            session.add(Item(cast("str", null())))
            try:
                session.flush()
            finally:
                self.do_at_once(session, "on_commit")

    def do_at_once(self, session: AsyncSession | Session, step: Step) -> None:
        """Take a step that waits for nothing."""
        match step:
            case "add":
                session.add(Item(self.names.free()))
            case "add one that is taken":
                session.add(Item(self.names.taken()))
            case "on_commit":
                name = self.names.free()
                db.on_commit(lambda: self.called.append(name))
            case "rollback_only":
                db.rollback_only()


def _dependency(given: Dependency, run: Run) -> Any:
    async def dependency() -> AsyncGenerator[None]:
        async with db.transaction() as session:
            for step in given.before:
                run.do_at_once(session, step)
            yield
            for step in given.after:
                run.do_at_once(session, step)

    def def_dependency() -> Generator[None]:
        with db.sync_transaction() as session:
            for step in given.before:
                run.do_at_once(session, step)
            yield
            for step in given.after:
                run.do_at_once(session, step)

    return Depends(dependency if given.is_async else def_dependency, scope=given.scope)
