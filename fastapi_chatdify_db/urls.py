"""From the one URL of the settings to what each driver wants: URL and connect arguments for asyncpg and psycopg2."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import ceil
from typing import Any, Final
from urllib.parse import unquote, urlencode

from sqlalchemy import URL

from fastapi_chatdify_db.exceptions import InvalidSettings
from fastapi_chatdify_db.keepalive import LIBPQS
from fastapi_chatdify_db.settings import SEVERAL_HOSTS, DatabaseSettings

# Keywords of SQLAlchemy's asyncpg dialect and of asyncpg.connect(), which libpq would refuse.
_ASYNCPG_ONLY: Final = {
    "command_timeout",
    "max_cacheable_statement_size",
    "max_cached_statement_lifetime",
    "prepared_statement_cache_size",
    "statement_cache_size",
    "timeout",
}
# libpq's client-side parameters without a counterpart in asyncpg, which would send them to the server as settings.
_LIBPQ_ONLY: Final = {
    "channel_binding",
    "client_encoding",
    "fallback_application_name",
    "gssencmode",
    "keepalives",
    "keepalives_count",
    "keepalives_idle",
    "keepalives_interval",
    "load_balance_hosts",
    "sslcompression",
    "sslsni",
    "tcp_user_timeout",
}
_LEAST_CONNECT_TIMEOUT: Final = 2  # seconds; libpq raises a lower value to this
# What libpq can insist on and asyncpg cannot: to drop it would be less safe than the URL says.
_LIBPQ_DEMANDS: Final = ("channel_binding", "gssencmode", "requirepeer")


@dataclass(frozen=True)
class DriverTarget:
    """A URL for ``create_engine`` with the connect arguments that belong to it."""

    url: URL
    connect_args: dict[str, Any] = field(default_factory=dict, repr=False)


def async_target(settings: DatabaseSettings) -> DriverTarget:
    """URL and connect arguments for ``create_async_engine``: asyncpg for PostgreSQL, aiosqlite for SQLite.

    Raises:
        InvalidSettings: The URL is of another database, or asks for what asyncpg cannot do.
    """
    url = _normalized(settings.url())
    if url.get_backend_name() == "sqlite":
        return DriverTarget(url.set(drivername="sqlite+aiosqlite"))
    place, options = _split_query(url, settings)
    for name in _LIBPQ_DEMANDS:
        if options.get(name, "prefer") not in ("disable", "prefer"):
            raise InvalidSettings(f"DATABASE_URL: asyncpg cannot insist on {name}; remove it")
    connect_args: dict[str, Any] = {name: _number(name, options.pop(name)) for name in _ASYNCPG_ONLY if name in options}
    server_settings = {"application_name": options.pop("application_name"), **_timeouts_at_connect(settings)}
    seconds = _number("connect_timeout", options.pop("connect_timeout"))
    if seconds > 0:  # no limit in libpq otherwise
        connect_args.setdefault("timeout", seconds)
    # asyncpg reads libpq's TLS parameters itself, but only from a DSN; the rest it sends as server settings.
    dsn = urlencode({name: value for name, value in options.items() if name not in _LIBPQ_ONLY})
    if dsn:
        connect_args["dsn"] = f"postgresql://?{dsn}"
    connect_args["server_settings"] = server_settings
    if settings.db_pgbouncer:
        connect_args["statement_cache_size"] = 0
        connect_args["prepared_statement_cache_size"] = 0
        connect_args["prepared_statement_name_func"] = _no_name
    return DriverTarget(place.set(drivername="postgresql+asyncpg"), connect_args)


def sync_target(settings: DatabaseSettings) -> DriverTarget:
    """URL and connect arguments for ``create_engine``: psycopg2 for PostgreSQL, Python's own driver for SQLite.

    Raises:
        InvalidSettings: The URL is of another database.
    """
    url = _normalized(settings.url())
    if url.get_backend_name() == "sqlite":
        return DriverTarget(url.set(drivername="sqlite"))
    place, options = _split_query(url, settings)
    connect_args: dict[str, Any] = {
        **LIBPQS,
        **{name: value for name, value in options.items() if name not in _ASYNCPG_ONLY},
    }
    connect_args.setdefault("client_encoding", "utf8")  # as asyncpg's always is, whatever the role's
    timeouts = _timeouts_at_connect(settings)
    flags = [connect_args.get("options", ""), *(f"-c {name}={value}" for name, value in timeouts.items())]
    if options_flag := " ".join(filter(None, flags)):
        connect_args["options"] = options_flag
    return DriverTarget(place.set(drivername="postgresql+psycopg2"), connect_args)


def session_timeouts(settings: DatabaseSettings) -> dict[str, int]:
    """PostgreSQL's parameters for the time-outs that are set, in milliseconds."""
    seconds = {
        "statement_timeout": settings.db_statement_timeout,
        "idle_in_transaction_session_timeout": settings.db_idle_in_transaction_timeout,
    }
    return {name: max(1, round(value * 1000)) for name, value in seconds.items() if value}


def insists_on_writes(settings: DatabaseSettings) -> bool:
    """Whether the URL asks for a server that takes writes, and a new connection would lead to one."""
    # Behind PgBouncer, it would lead to the same server.
    attributes = settings.url().normalized_query.get("target_session_attrs", ("any",))
    return not settings.db_pgbouncer and attributes[-1] in ("read-write", "primary")


def _timeouts_at_connect(settings: DatabaseSettings) -> dict[str, str]:
    # PgBouncer refuses start-up parameters that it does not track; the engines set the time-outs another way then.
    return {} if settings.db_pgbouncer else {name: str(ms) for name, ms in session_timeouts(settings).items()}


def _normalized(url: URL) -> URL:
    backend = url.drivername.partition("+")[0]
    if backend not in ("postgres", "postgresql", "sqlite"):
        raise InvalidSettings(f"DATABASE_URL: {backend!r} is not supported; use postgresql:// or sqlite://")
    if url.port is not None and not 1 <= url.port <= 65535:
        raise InvalidSettings("DATABASE_URL: the port has to be between 1 and 65535")
    if url.host and "," in url.host:  # libpq's way, which asyncpg takes for one name
        raise InvalidSettings(f"DATABASE_URL: {SEVERAL_HOSTS}")
    if backend == "sqlite" and url.host:
        raise InvalidSettings("DATABASE_URL: a SQLite file has three slashes before its name: sqlite:///file.db")
    url = url.set(drivername="sqlite" if backend == "sqlite" else "postgresql")
    host = unquote(url.host) if url.host else ""
    if host.startswith("/"):  # a unix socket; both dialects take its directory from the query only
        query = {**url.query, "host": host} | ({"port": str(url.port)} if url.port else {})
        return URL.create(url.drivername, url.username, url.password, database=url.database, query=query)
    return url


def _split_query(url: URL, settings: DatabaseSettings) -> tuple[URL, dict[str, str]]:
    """The URL with nothing in its query but where the server is, and the rest of the query in libpq's spelling.

    Unless the query says otherwise, a connect may take as long as the wait for a free one (``db_pool_timeout``). The
    query's ``application_name`` yields to a ``db_application_name`` that was set.
    """
    place = {name: value for name, value in url.query.items() if name in ("host", "port")}
    options = {name: values[-1] for name, values in url.normalized_query.items() if name not in place}
    if "ssl" in options:  # asyncpg's own spelling of sslmode
        ssl = options.pop("ssl")
        options.setdefault("sslmode", {"true": "require", "false": "disable"}.get(ssl.lower(), ssl))
    options.pop("async_fallback", None)
    options.setdefault("connect_timeout", str(max(_LEAST_CONNECT_TIMEOUT, ceil(settings.db_pool_timeout))))
    if "application_name" not in options or "db_application_name" in settings.model_fields_set:
        options["application_name"] = settings.db_application_name
    return url.set(query=place), options


def _number(name: str, value: str) -> float:
    try:
        number = float(value)
        return int(number) if number.is_integer() else number
    except ValueError:
        pass  # its message, and the exception's context, would repeat the value
    raise InvalidSettings(f"DATABASE_URL: {name} has to be a number")


def _no_name() -> str:
    # Without its cache asyncpg parses an unnamed statement in the very message that executes it. A named one is closed
    # in the next transaction: by then PgBouncer may have moved on, and one more of them stays on the server.
    return ""
