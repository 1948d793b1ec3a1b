"""Every setting of Chatdify, read from the environment (and ``.env``) in this one place."""

from __future__ import annotations

from functools import lru_cache
from typing import Annotated, Final, Literal
from urllib.parse import urlsplit

import httpx
from pydantic import AfterValidator, Field, ValidationInfo, field_validator
from pydantic_settings import NoDecode, SettingsConfigDict

from fastapi_chatdify_db import DatabaseSettings, InvalidSettings
from fastapi_chatdify_db.settings import Port, Seconds, Secret


def _url(value: str) -> str:
    try:
        url = httpx.URL(value.strip())
    except httpx.InvalidURL:
        url = httpx.URL()
    if url.scheme not in ("http", "https") or not url.host:
        raise ValueError("write e.g. https://app.chatwoot.com/api/v1")
    return str(url)


Count = Annotated[int, Field(ge=0)]
URL = Annotated[str, AfterValidator(_url)]
PositiveSeconds = Annotated[float, Field(gt=0)]
_SECRETS: Final = ("chatdify_api_token", "chatwoot_webhook_secret", "chatwoot_api_key", "dify_api_key")
Status = Literal["open", "pending", "resolved", "snoozed"]
Direction = Literal["incoming", "outgoing"]


class Settings(DatabaseSettings):
    """The environment variables of the names below in upper case; those of ``DatabaseSettings`` besides.

    Parameters:
        environment: ``development`` runs without secrets; with any other value the web does not start without them.
        log_level: Of the root logger.
        db_pool_timeout: May pass twice, for a place in the pool or the test of an idle connection and for a connect.
            Chatwoot waits 5 seconds for a webhook's answer; it sends an agent bot's again after a 500, and not after
            no answer.
        api_base_url: Where Chatwoot and Dify reach this application; in development it answers under this name too.
        chatdify_api_token: The bearer token of the API.
        chatwoot_webhook_secret: Chatwoot's signing secret; older versions carry it in the webhook's URL.
        chatwoot_webhook_max_age: Seconds after which a signed webhook is refused.
        redis_host: Host of the default broker and result backend; the next three likewise.
        celery_broker_url: In place of ``redis_broker``.
        celery_result_backend: In place of ``redis_backend``.
        celery_task_default_queue: The queue of the tasks.
        celery_worker_concurrency: Processes of a worker.
        celery_task_time_limit: Seconds until a task's process is killed; without effect in a pool of threads.
        celery_task_soft_time_limit: Seconds until an attempt to ask or to post is cancelled, and made again; and until
            Dify, which has a question and no answer, is asked again.
        celery_task_max_retries: How often a failed attempt to ask or to post is made again. Within an attempt, a call
            that may safely be made again is tried three times.
        celery_task_max_tasks_per_child: Tasks until a worker's process is replaced.
        celery_worker_prefetch_multiplier: Messages that each process may reserve.
        celery_retry_countdown: Seconds until the first retry; the pauses double.
        dify_response_mode: Agent apps only stream.
        chatwoot_admin_api_key: Used to read, and to set labels; the ordinary key when missing.
        allowed_conversation_statuses: The bot answers in conversations of these statuses, separated by commas.
        allowed_message_types: The bot answers messages of these directions, separated by commas.
        enable_team_cache: Whether the teams' names are kept.
        team_cache_ttl_hours: Hours for which they are kept.
        httpx_connect_timeout: Seconds, as the next three; ``httpx_pool_timeout`` is the wait for a free connection.
        sentry_dsn: Where to report errors; needs ``sentry-sdk``.
        sentry_traces_sample_rate: Share of the requests and tasks that are traced.
        bot_error_message_internal: The private note for the agents.
        bot_conversation_opened_message_external: What the customer is told.
    """

    # Before 2.13, pydantic-settings does not heed the newer name of the last one, validate_by_name.
    model_config = SettingsConfigDict(env_file=".env", extra="ignore", populate_by_name=True)

    environment: str = "production"
    log_level: Literal["CRITICAL", "ERROR", "WARNING", "INFO", "DEBUG"] = "INFO"
    api_base_url: str = "http://localhost:8000/api/v1"
    chatdify_api_token: Secret = None
    chatwoot_webhook_secret: Secret = None
    chatwoot_webhook_max_age: PositiveSeconds = 300.0

    postgres_host: Annotated[str, Field(validation_alias="DB_HOST")] = "postgres"
    postgres_port: Annotated[Port, Field(validation_alias="DB_PORT")] = 5432
    postgres_db: str = "chatdify"
    db_application_name: str = "chatdify"
    db_pool_timeout: Seconds = 2.0

    redis_host: str = "redis"
    redis_port: Port = 6379
    redis_broker: Secret = None
    redis_backend: Secret = None
    celery_broker_url: Secret = None
    celery_result_backend: Secret = None
    celery_task_default_queue: str = "chatdify"
    celery_worker_concurrency: Annotated[int, Field(ge=1)] = 4
    celery_task_time_limit: PositiveSeconds = 300.0
    celery_task_soft_time_limit: PositiveSeconds = 240.0
    celery_task_max_retries: Count = 3
    celery_task_max_tasks_per_child: Annotated[int, Field(ge=1)] = 100
    celery_worker_prefetch_multiplier: Count = 1
    celery_retry_countdown: Annotated[float, Field(ge=0)] = 5.0

    dify_api_url: URL = "https://api.dify.ai/v1"
    dify_api_key: Secret = None
    dify_response_mode: Literal["blocking", "streaming"] = "blocking"

    chatwoot_api_url: URL = "https://app.chatwoot.com/api/v1"
    chatwoot_api_key: Secret = None
    chatwoot_admin_api_key: Secret = None
    chatwoot_account_id: Annotated[int, Field(ge=1)] = 1
    allowed_conversation_statuses: Annotated[tuple[Status, ...], NoDecode, Field(min_length=1)] = ("open", "pending")
    allowed_message_types: Annotated[tuple[Direction, ...], NoDecode, Field(min_length=1)] = ("incoming",)
    enable_team_cache: bool = False
    team_cache_ttl_hours: Annotated[float, Field(ge=0)] = 24.0

    httpx_connect_timeout: PositiveSeconds = 30.0
    httpx_read_timeout: PositiveSeconds = 120.0
    httpx_write_timeout: PositiveSeconds = 30.0
    httpx_pool_timeout: PositiveSeconds = 30.0

    sentry_dsn: Secret = None
    sentry_environment: str = "development"
    sentry_traces_sample_rate: Annotated[float, Field(ge=0, le=1)] = 0.1

    bot_error_message_internal: str = "Bot unexpectedly broke down, conversation moved to open status"
    bot_conversation_opened_message_external: str = (
        "Your conversation has been transferred to operators. Don't worry, they will contact you!"
    )

    @field_validator("allowed_conversation_statuses", "allowed_message_types", mode="before")
    @classmethod
    def _split_commas(cls, value: object) -> object:
        return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value

    @field_validator(
        "chatdify_api_token", "chatwoot_webhook_secret", "dify_api_key", "chatwoot_api_key", "chatwoot_admin_api_key"
    )
    @classmethod
    def _printable_ascii(cls, value: str | None) -> str | None:
        value = (value or "").strip() or None
        if value is not None and not (value.isascii() and value.isprintable()):
            raise ValueError("has to be printable ASCII; was something else pasted along?")
        return value

    @field_validator("chatwoot_api_url", "dify_api_url")
    @classmethod
    def _with_version(cls, value: str, info: ValidationInfo) -> str:
        default = str(cls.model_fields[info.field_name or ""].default)
        path = urlsplit(default).path
        if not value.rstrip("/").endswith(path):
            raise ValueError(f"has to end in {path}, as {default} does")
        return value

    @property
    def in_development(self) -> bool:
        """Whether secrets may be missing, and the tables are created at the start."""
        return self.environment == "development"

    @property
    def broker_url(self) -> str:
        """Where Celery's messages go."""
        return self.celery_broker_url or self.redis_broker or f"redis://{self.redis_host}:{self.redis_port}/0"

    @property
    def result_backend(self) -> str:
        """Where Celery's results are kept."""
        return self.celery_result_backend or self.redis_backend or f"redis://{self.redis_host}:{self.redis_port}/1"

    def require_secrets(self) -> None:
        """Check that the secrets which are needed outside development are there.

        Raises:
            InvalidSettings: Some are missing; the message names them.
        """
        missing = [name for name in _SECRETS if not getattr(self, name)]
        if missing and not self.in_development:
            names = " and ".join(name.upper() for name in missing)
            raise InvalidSettings(f"{names}: set it, or ENVIRONMENT=development for open doors on your own machine")


@lru_cache
def get_settings() -> Settings:
    """The process's settings, read at their first use.

    Raises:
        InvalidSettings: An environment variable cannot be used; the message names it.
    """
    return Settings()
