"""A task call as a row: its serialized arguments and options, checked before anything is stored."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final
from uuid import NAMESPACE_OID, uuid5

from celery.exceptions import SoftTimeLimitExceeded
from celery.utils import uuid
from kombu.serialization import prepare_accept_content, registry  # type: ignore[attr-defined]  # not in the stubs
from kombu.utils.json import dumps, loads

from celery_ext.context import inject
from celery_ext.errors import ArgumentsNotSerializable

if TYPE_CHECKING:
    from celery_ext.task import Task

HEADER: Final = "durable"
"""The message header with the id of the task's row; another task's id is from a sender that passed its headers on."""
_LONGEST: Final = 3.2e9
"""Seconds: a hundred years, which PostgreSQL can add to its clock."""
_LONGEST_ORDERING_KEY: Final = 500
"""Characters: at most 2000 bytes, of the 2704 that PostgreSQL has room for in a row of an index."""
_MOMENTS: Final[dict[str, tuple[tuple[type, ...], str]]] = {
    "countdown": ((int, float), "seconds"),
    "eta": ((datetime,), "a datetime"),
    "expires": ((int, float, datetime), "seconds, or a datetime"),
}
"""The types that each time option may have, and how an error names them."""


@dataclass(frozen=True, slots=True)
class Row:
    """A durable task that is not stored yet.

    Parameters:
        due: From when it may start: a moment, or seconds from when it is stored.
        expires: Until when it must have started, likewise; None for never.
    """

    id: str
    name: str
    arguments: str
    options: str
    ordering_key: str | None
    due: float | datetime
    expires: float | datetime | None

    def columns(self) -> dict[str, object]:
        """The values to insert; times count from now, which may be a while after the call."""
        values = asdict(self)
        due, expires = values.pop("due"), values.pop("expires")
        expires_in = None if expires is None else seconds_until(expires)
        return values | {"due_in": seconds_until(due), "expires_in": expires_in}


def new_row(
    task: Task,
    args: Sequence[object],
    kwargs: Mapping[str, object],
    *,
    countdown: float | None,
    eta: datetime | None,
    expires: float | datetime | None,
    ordering_key: str | None,
    idempotency_key: str | None,
    options: Mapping[str, object],
) -> Row:
    """The row of one call of ``task``.

    Raises:
        ArgumentsNotSerializable: They are no JSON, as kombu extends it, or an option or a key is nothing to store.
    """
    due = due_of(task.name, countdown, eta)
    _check_moment(task.name, "expires", expires)
    _check_key(task.name, "ordering_key", ordering_key, _LONGEST_ORDERING_KEY)
    _check_key(task.name, "idempotency_key", idempotency_key)
    # An idempotency key makes the id: a second call knows the first one's id without asking the database.
    task_id = uuid() if idempotency_key is None else str(uuid5(NAMESPACE_OID, f"{task.name}\0{idempotency_key}"))
    headers = {**_mapping(options.get("headers")), HEADER: task_id}
    inject(headers)
    return Row(
        id=task_id,
        name=task.name,
        arguments=serialize(task.name, [list(args), dict(kwargs)]),
        options=serialize(task.name, {**options, "headers": headers}),
        ordering_key=ordering_key,
        due=due,
        expires=expires,
    )


def due_of(name: str, countdown: float | None, eta: datetime | None) -> float | datetime:
    """From when a task may start: a moment, or seconds from when it is stored.

    Raises:
        ArgumentsNotSerializable: An argument is no time.
    """
    _check_moment(name, "countdown", countdown)
    _check_moment(name, "eta", eta)
    return eta or countdown or 0.0


def with_options(name: str, stored: str, options: Mapping[str, object]) -> str:
    """A row's options, updated with others.

    Raises:
        ArgumentsNotSerializable: One is nothing to store.
    """
    before = deserialize(stored)
    headers = {**_mapping(before.get("headers")), **_mapping(options.get("headers"))}  # our own stay
    return serialize(name, {**before, **options, "headers": headers})


def serialize(name: str, value: object) -> str:
    """``value`` in kombu's JSON, which has dates, UUIDs and decimals too; read back once, as the relay will.

    Raises:
        ArgumentsNotSerializable: There is something in it that JSON does not carry.
    """
    try:
        written = str(dumps(value))
        deserialize(written)  # fails for a dictionary that looks like kombu's notation for e.g. a date
    except SoftTimeLimitExceeded:
        raise
    except Exception as error:  # whatever kombu's encoders and decoders raise
        raise ArgumentsNotSerializable(
            f"the arguments of {name} are no JSON ({error}); send ids, not objects"
        ) from error
    return written


def deserialize(value: str) -> Any:
    """The value that ``serialize`` wrote."""
    return loads(value)


def check_accepted(task: Task, options: Mapping[str, Any]) -> None:
    """Check that the application's workers accept the message's serializer.

    Raises:
        ArgumentsNotSerializable: They do not.
    """
    serializer = options.get("serializer") or task.serializer
    accepted = prepare_accept_content(task.app.conf.accept_content)
    if accepted is not None and registry.name_to_type.get(serializer) not in accepted:
        raise ArgumentsNotSerializable(
            f"{task.name} would be sent with serializer={serializer!r}, which its workers refuse; "
            "leave it out, or add it to the application's accept_content"
        )


def _check_moment(name: str, option: str, value: float | datetime | None) -> None:
    if value is None:
        return
    kinds, instead = _MOMENTS[option]
    is_kind = isinstance(value, kinds) and not isinstance(value, bool)
    if not (is_kind and abs(seconds_until(value)) <= _LONGEST):
        raise ArgumentsNotSerializable(f"{name} cannot be stored with {option}={value!r}; write {instead}")


def _check_key(name: str, option: str, key: object, longest: float = math.inf) -> None:
    if key is None or (isinstance(key, str) and len(key) <= longest and _is_storable(key)):
        return
    limit = "" if longest == math.inf else f" of at most {longest} characters"
    raise ArgumentsNotSerializable(
        f"{name} cannot be stored with {option}={reprlib.repr(key)}; write a string{limit}: {option}=str(...)"
    )


def _is_storable(text: str) -> bool:
    return "\0" not in text and text.encode(errors="ignore").decode() == text


def _mapping(value: object) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}


def seconds_until(moment: float | datetime) -> float:
    """Seconds from now; a number is returned as it is, and a moment without a time zone is in UTC."""
    if not isinstance(moment, datetime):
        return moment
    aware = moment if moment.tzinfo else moment.replace(tzinfo=UTC)  # as Celery reads it
    return (aware - datetime.now(UTC)).total_seconds()
