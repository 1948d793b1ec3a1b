"""The errors of this package: named, and each says what to write instead."""

from __future__ import annotations

from typing import Any

from sqlalchemy.exc import DontWrapMixin, OperationalError


class ChatdifyDBError(Exception):
    """Base of every error that this package raises itself."""


class InvalidSettings(ChatdifyDBError):
    """An environment variable, or a value given in code, cannot be used; the message names it in one line."""


class NameTaken(ChatdifyDBError, ValueError):
    """Two databases of one health router have the same name, by which it tells them apart."""


class OutsideUnitOfWork(ChatdifyDBError):
    """A session was asked for where no unit of work is open."""


class NotInSyncUnit(OutsideUnitOfWork):
    """Something async was asked of a unit of work that was opened in synchronous code."""


class TransactionAborted(ChatdifyDBError):
    """A statement of the transaction had failed before the commit; PostgreSQL has rolled all of it back."""


class SessionInUse(ChatdifyDBError):
    """The commit came while another task or thread was in the middle of a statement of the same session."""


class DatabaseUnavailable(ChatdifyDBError, DontWrapMixin, OperationalError):
    """The database gives no connection: none within ``DB_STARTUP_TIMEOUT`` at the start, later none for a statement.

    A request that it ends is answered 503.

    Parameters:
        message: Which database, and what to do about it.
        orig: What the driver raised; None after a journey between processes.
    """

    code: str = ""  # SQLAlchemy's link would explain OperationalError

    def __init__(self, message: str, orig: BaseException | None = None) -> None:
        super().__init__(None, None, orig)  # type: ignore[arg-type]  # None is for pickle and JSON
        self.args = (message,)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self.args


class AfterCommitError(ChatdifyDBError):
    """Raised by an ``on_commit`` callback whose failure the caller shall see; what was committed stays committed.

    Any other exception of a callback is logged. This one is raised where the unit was committed, once the other
    callbacks have run: by ``db.transaction()``, by a task, or to the application's exception handlers.
    """
