"""The settings of one database, read from the environment."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final, Self

from pydantic import BeforeValidator, Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic.functional_validators import ModelWrapValidatorHandler
from pydantic_core import PydanticUseDefault, from_json
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict
from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

from fastapi_chatdify_db.exceptions import InvalidSettings


def _port(value: object) -> object:
    """The number in ``POSTGRES_PORT=tcp://10.43.0.7:5432``, as Kubernetes sets it; empty, as from Compose, the default.

    Every pod is given such variables for the Services of its namespace:
    https://kubernetes.io/docs/concepts/services-networking/service/#environment-variables
    """
    if value == "":
        raise PydanticUseDefault
    return value.rpartition(":")[2] if isinstance(value, str) and value.startswith("tcp://") else value


def _engine_options(value: object) -> object:
    """The options in a variable's JSON, or as they are; empty means none, and other settings come first."""
    if value == "":
        raise PydanticUseDefault
    options = from_json(value) if isinstance(value, str) else value
    if not isinstance(options, dict):
        return options
    if decided := sorted({*options, *(options.get("execution_options") or ())} & {*_DECIDED}):
        raise ValueError(
            f"other settings decide about {', '.join(decided)}; write DB_POOL_SIZE, DB_ECHO, ..., or in DATABASE_URL "
            "?sslmode=require, ?options=-c%20default_transaction_isolation%3Dserializable, ..."
        )
    return options


# Not SecretStr: type checkers would refuse the plain str that every caller has.
Secret = Annotated[str | None, Field(repr=False)]
Port = Annotated[int, BeforeValidator(_port), Field(ge=1, le=65535)]
# PostgreSQL takes its time-outs in milliseconds, up to the greatest integer of 32 bits.
Seconds = Annotated[float, Field(ge=0, le=2_147_483, allow_inf_nan=False)]

_DECIDED: Final = (
    *("async_creator", "connect_args", "creator", "echo", "hide_parameters", "isolation_level", "max_overflow"),
    *("module", "pool", "pool_pre_ping", "pool_recycle", "pool_reset_on_return", "pool_size", "pool_timeout"),
    "poolclass",
)
"""Arguments of ``create_engine`` that are another setting's, or with which units of work would not be what they are."""

SEVERAL_HOSTS: Final = (
    "name several hosts in the query, as both drivers understand it: "
    "postgresql://user:password@/name?host=one:5432&host=two:5432"
)


class DatabaseSettings(BaseSettings):
    """Where one database is and how its connections are kept; each field is the environment variable of its name.

    Parameters:
        database_url: PostgreSQL or SQLite URL, whatever driver it names. Without it the ``postgres_*`` fields count.
        postgres_host: Host name, IP address, or the directory of a unix socket.
        postgres_port: TCP port.
        postgres_user: Role to connect as.
        postgres_password: Its password.
        postgres_db: Name of the database.
        db_pool_size: Connections that a pool keeps open (one pool per engine, process and event loop).
        db_max_overflow: Connections that a pool may open beyond that under load.
        db_pool_timeout: Seconds to wait for a free connection; then a request is answered 503.
        db_pool_recycle: Seconds after which a connection is replaced at its next checkout; -1 for never.
        db_pool_pre_ping: Whether a dead connection is replaced instead of failing the first statement on it.
        db_ping_after: Seconds that a connection was idle after which it is tested at its checkout.
        db_lazy_begin: Whether plain reads at READ COMMITTED need no transaction; the first other statement begins it.
        db_echo: Whether to log every statement, with its parameters.
        db_statement_timeout: Seconds until PostgreSQL cancels a statement; 0 leaves the server's own setting.
        db_idle_in_transaction_timeout: Seconds until PostgreSQL ends a session that idles in a transaction; 0 likewise.
        db_application_name: The name in ``pg_stat_activity``.
        db_pgbouncer: Whether a PgBouncer in transaction mode stands between; prepared statements are then not reused.
        db_startup_timeout: Seconds that the lifespan waits for the database.
        db_engine_options: Further arguments of SQLAlchemy's ``create_engine`` for both engines: ``json_serializer``.

    Raises:
        InvalidSettings: A value cannot be used. One line, which names the variable and never shows its value.
    """

    # Values never appear in errors: one of them is a password, another holds one.
    model_config: ClassVar[SettingsConfigDict] = SettingsConfigDict(
        extra="forbid", frozen=True, hide_input_in_errors=True
    )

    database_url: Secret = None
    postgres_host: str = "localhost"
    postgres_port: Port = 5432
    postgres_user: str = "postgres"
    postgres_password: Secret = None
    postgres_db: str = "postgres"
    db_pool_size: Annotated[int, Field(ge=1)] = 10
    db_max_overflow: Annotated[int, Field(ge=-1)] = 20
    db_pool_timeout: Seconds = 30.0
    db_pool_recycle: Annotated[int, Field(ge=-1)] = 1800
    db_pool_pre_ping: bool = True
    db_ping_after: Seconds = 1.0
    db_lazy_begin: bool = True
    db_echo: bool = False
    db_statement_timeout: Seconds = 0.0
    db_idle_in_transaction_timeout: Seconds = 0.0
    db_application_name: str = "fastapi_chatdify_db"
    db_pgbouncer: bool = False
    db_startup_timeout: Seconds = 30.0
    db_engine_options: Annotated[dict[str, Any], NoDecode, BeforeValidator(_engine_options), Field(repr=False)] = {}

    @field_validator("postgres_port", mode="before")
    @classmethod
    def _ignore_beside_a_url(cls, value: object, info: ValidationInfo) -> object:
        # It may be somebody else's, in a form of theirs: libpq's 5432,5433, Kubernetes' udp://10.43.0.7:5432.
        return cls.model_fields["postgres_port"].default if info.data.get("database_url") else value

    @field_validator("database_url", "postgres_password")
    @classmethod
    def _empty_is_none(cls, value: str | None) -> str | None:
        return value or None  # a compose file's ${DATABASE_URL:-} sets nothing

    @model_validator(mode="wrap")
    @classmethod
    def _report_in_one_line(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return handler(data)
        except ValidationError as error:
            # An error of a subclass's model validator has an empty loc.
            problems = [": ".join([*(str(part).upper() for part in e["loc"][:1]), e["msg"]]) for e in error.errors()]
        raise InvalidSettings("; ".join(problems))

    if not TYPE_CHECKING:  # type checkers refuse such arguments themselves, by the fields

        def __init__(self, /, *positional: object, **values: Any) -> None:
            if positional:  # the first would be pydantic-settings' _case_sensitive: another database, without a word
                raise InvalidSettings("settings have names; write: DatabaseSettings(database_url=...)")
            super().__init__(**values)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in type(self).model_fields:  # pydantic's error would show the value
            raise InvalidSettings(f"settings do not change; make others: db.settings = DatabaseSettings({name}=...)")
        super().__setattr__(name, value)

    def __hash__(self) -> int:
        return hash(tuple(value for value in self.__dict__.values() if isinstance(value, Hashable)))

    def make_same_engines_as(self, other: DatabaseSettings) -> bool:
        """Whether all fields that engines are made from are equal; what an application's subclass adds may differ."""
        # The other fields make the URL, or count for nothing beside DATABASE_URL.
        fields = {name for name in DatabaseSettings.model_fields if name.startswith("db_")}
        return self.url() == other.url() and self.model_dump(include=fields) == other.model_dump(include=fields)

    def url(self) -> URL:
        """The URL as it was given, or as the ``postgres_*`` fields make it.

        Raises:
            InvalidSettings: ``DATABASE_URL`` is not a URL.
        """
        if self.database_url is None:
            return URL.create(
                "postgresql",
                username=self.postgres_user,
                password=self.postgres_password,
                host=self.postgres_host,
                port=self.postgres_port,
                database=self.postgres_db,
            )
        try:
            url = _without_open_password(make_url(self.database_url))
        except (ArgumentError, ValueError):
            pass  # SQLAlchemy's message repeats the URL, password and all; so would the exception's context.
        else:
            is_cut = self.database_url.count("@") > 1 or (url.username is None and "@" in (url.database or ""))
            if is_cut and url.get_backend_name() != "sqlite":  # messages would show the rest of a password as the host
                raise InvalidSettings("DATABASE_URL: but for the @ before the host, write @ as %40, / as %2F, ? as %3F")
            return url
        if "," in self.database_url.partition("?")[0].rpartition("@")[2]:
            raise InvalidSettings(f"DATABASE_URL: {SEVERAL_HOSTS}")
        raise InvalidSettings("DATABASE_URL: not a URL; write e.g. postgresql://user:password@localhost:5432/name")


def _without_open_password(url: URL) -> URL:
    """Move a password out of the query, where libpq takes it too but a repr shows it, into its own place."""
    if passwords := url.normalized_query.get("password"):
        return url.set(password=passwords[-1]).difference_update_query(["password"])
    return url
