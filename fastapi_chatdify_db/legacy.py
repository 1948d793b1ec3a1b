"""The names that this layer's predecessor had. They work, and each warns with what to write instead."""

from __future__ import annotations

import warnings
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from fastapi_chatdify_db import session as _session
from fastapi_chatdify_db.database import db
from fastapi_chatdify_db.session_end import FollowedSession


def get_db() -> Iterator[Session]:
    """Deprecated dependency with a synchronous session, for handlers that call ``commit()`` themselves."""
    _deprecated("get_db", "from fastapi_chatdify_db import db, and db.sync_session")
    with _session.get_sync_session() as session:
        yield session


async def get_session() -> AsyncGenerator[AsyncSession]:
    """Deprecated spelling of ``session.get_session``."""
    _deprecated("get_session", "from fastapi_chatdify_db import get_session")
    async with asynccontextmanager(_session.get_session)() as session:
        yield session


def SessionLocal() -> Session:  # noqa: N802  # the name is what this module is for
    """Deprecated: a synchronous session of its own, for code that calls ``commit()`` and ``close()`` itself.

    ``with SessionLocal() as session`` commits at its end what was not committed yet, as ``get_sync_session`` does.
    """
    _deprecated("SessionLocal", "from fastapi_chatdify_db import get_sync_session")
    return _SelfCommittingSession(db.sync_engine, expire_on_commit=False)


class _SelfCommittingSession(FollowedSession):
    def close(self) -> None:
        Session.close(self)  # no warning: here the caller closes, and drops on purpose

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        try:
            if kind is None:
                self.commit()
            else:
                self.rollback()
        finally:
            self.close()


def _deprecated(old: str, instead: str) -> None:
    warnings.warn(f"fastapi_chatdify_db.legacy.{old} is deprecated; write: {instead}", DeprecationWarning, stacklevel=3)
