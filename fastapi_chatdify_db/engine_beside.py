"""Connections outside an engine's pool, which are made and followed as those in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine.base import OptionEngine
from sqlalchemy.pool import ConnectionPoolEntry, Pool


class EngineBeside(OptionEngine):
    """An engine's dialect, options and listeners on a pool of its own.

    Parameters:
        model: The engine.
    """

    pool: Pool = None  # type: ignore[assignment]  # an attribute in place of OptionEngine's property

    def __init__(self, model: Engine) -> None:
        self.pool = model.pool.recreate()
        super().__init__(model, {})


def connect_beside(engine: Engine, on_connect: Callable[[Any, ConnectionPoolEntry], None] | None = None) -> Connection:
    """A connection in AUTOCOMMIT that the engine's pool neither counts nor ever gets.

    Parameters:
        engine: The engine.
        on_connect: Told of the driver's connection before anything is asked on it.
    """
    beside = EngineBeside(engine)
    if on_connect is not None:
        event.listen(beside.pool, "connect", on_connect, insert=True)
    connection = beside.connect().execution_options(isolation_level="AUTOCOMMIT")
    connection.detach()  # from the pool: when it is given back, it is closed
    return connection
