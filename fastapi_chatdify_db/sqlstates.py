"""What PostgreSQL's error codes say: https://www.postgresql.org/docs/current/errcodes-appendix.html."""

from __future__ import annotations

from typing import Final

# serialization_failure and deadlock_detected:
# https://www.postgresql.org/docs/current/mvcc-serialization-failure-handling.html
_WORTH_ANOTHER_TRY: Final = {"40001", "40P01"}
_IN_FAILED_TRANSACTION: Final = "25P02"
_READ_ONLY: Final = "25006"
# query_canceled (statement_timeout) and lock_not_available (lock_timeout)
_TIMED_OUT: Final = {"57014", "55P03"}


def sqlstate(error: BaseException | None) -> str | None:
    """PostgreSQL's code of a driver's error; None for one of the driver's own."""
    return getattr(error, "pgcode", None) or getattr(error, "sqlstate", None)


def asks_to_retry(error: BaseException | None) -> bool:
    """Whether PostgreSQL says, by a driver's error, that the transaction may well succeed when it is run again."""
    return sqlstate(error) in _WORTH_ANOTHER_TRY


def was_given_up(error: BaseException | None) -> bool:
    """Whether a driver's error says that the transaction has failed already, by an earlier error."""
    return sqlstate(error) == _IN_FAILED_TRANSACTION


def timed_out(error: BaseException | None) -> bool:
    """Whether a driver's error says that a time limit for statements or locks has passed, or somebody cancelled."""
    return sqlstate(error) in _TIMED_OUT


def is_read_only(error: BaseException | None) -> bool:
    """Whether a driver's error says that the transaction, perhaps the whole server, takes no writes."""
    return sqlstate(error) == _READ_ONLY
