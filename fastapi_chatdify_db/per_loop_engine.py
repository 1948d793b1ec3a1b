"""An ``AsyncEngine`` with a pool for each event loop that uses it."""

from __future__ import annotations

import asyncio
from asyncio import AbstractEventLoop
from threading import Lock
from weakref import ReferenceType, WeakKeyDictionary, ref

from anyio import from_thread
from sqlalchemy import Engine
from sqlalchemy.ext.asyncio import AsyncEngine

from fastapi_chatdify_db.closing import cut_off
from fastapi_chatdify_db.engine_beside import EngineBeside
from fastapi_chatdify_db.forks import forget_connections


class PerLoopAsyncEngine(AsyncEngine):
    """An ``AsyncEngine`` with a pool for each event loop that uses it.

    asyncpg's connections belong to the loop that opened them. One loop is the rule; a second one (another
    ``asyncio.run``, a test's loop, a thread with a loop of its own) gets connections of its own here instead of
    "attached to a different loop". ``sync_engine``, which everything in ``AsyncEngine`` goes through, is the running
    loop's.

    Where no loop runs, and none waits for the thread, it is the model: listeners added to it serve the loops to come.
    The first loop gets the model itself, and so shares a pool with engines that were derived from it before
    (``execution_options``).
    """

    def __init__(self, model: AsyncEngine) -> None:
        self._model = model.sync_engine
        self._owner: ReferenceType[AbstractEventLoop] | None = None
        """The loop that has the model itself."""
        self._lock = Lock()
        self._by_loop: WeakKeyDictionary[AbstractEventLoop, Engine] = WeakKeyDictionary()

    @property
    def sync_engine(self) -> Engine:  # type: ignore[override]  # SQLAlchemy has an attribute here
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            return self._of_thread()
        engine = self._by_loop.get(loop)
        return self._claim(loop) if engine is None else engine

    @property
    def _proxied(self) -> Engine:  # what AsyncEngine's pool, url, dialect ... are read from
        return self.sync_engine

    def forget_connections(self) -> None:
        """Drop every connection without closing it: they are another process's."""
        for engine in {self._model, *self._by_loop.values()}:
            forget_connections(engine)
        self._by_loop.clear()
        self._owner = None
        self._lock = Lock()

    def _of_thread(self) -> Engine:
        """For ``def`` dependencies that return ``db.session``: the engine of the loop that waits for this thread."""
        try:
            return from_thread.run_sync(lambda: self.sync_engine)
        except RuntimeError:  # no loop waits for it
            return self._model

    def _claim(self, loop: AbstractEventLoop) -> Engine:
        with self._lock:
            for other in [other for other in self._by_loop if other.is_closed()]:
                del self._by_loop[other]
                cut_off(other)
            owner = None if self._owner is None else self._owner()
            if owner is not None and not owner.is_closed():
                engine: Engine = EngineBeside(self._model)
            else:
                engine = self._model
                if self._owner is not None:
                    engine.dispose(close=False)  # its pool's connections are the closed loop's
                self._owner = ref(loop)
            self._by_loop[loop] = engine
            return engine
