"""Settings come from the documented variables, and a wrong one is named in one line."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from example_app.main import create_app
from example_app.settings import Settings, get_settings
from fastapi_chatdify_db import InvalidSettings
from tests.example_app.conftest import Configure

EXAMPLE = Path(__file__).parents[2] / ".env.example"


def names() -> dict[str, str]:
    """The environment variable of each setting."""
    return {name: str(field.validation_alias or name).upper() for name, field in Settings.model_fields.items()}


def test_example_file_has_every_setting_with_its_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """.env.example names exactly the settings there are; read as a .env file it changes none."""
    documented = re.findall(r"^# ([A-Z_]+)=", EXAMPLE.read_text(), re.MULTILINE)
    assert sorted(documented) == sorted(names().values())
    for variable in names().values():
        monkeypatch.delenv(variable, raising=False)
    given = tmp_path / "env"
    lines = re.findall(r"^# ([A-Z_]+=.+)$", EXAMPLE.read_text(), re.MULTILINE)
    given.write_text("\n".join(lines))
    assert Settings(_env_file=given) == Settings(_env_file=None)  # type: ignore[call-arg]  # pydantic-settings' own


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("ALLOWED_CONVERSATION_STATUSES", "open,closed"),
        ("DIFY_RESPONSE_MODE", "shouting"),
        ("CHATWOOT_API_URL", "app.chatwoot.com/api/v1"),
        ("CHATWOOT_API_URL", "https://"),
        ("DIFY_API_URL", "http://dify:8o/v1"),
        ("DIFY_API_URL", "http://[::1/v1"),
        ("DIFY_API_URL", "https://api.dify.ai"),
        ("CHATWOOT_API_URL", "https://app.chatwoot.com/"),
        ("ALLOWED_CONVERSATION_STATUSES", ","),
        ("ALLOWED_MESSAGE_TYPES", ","),
        ("HTTPX_READ_TIMEOUT", "0"),
        ("CELERY_WORKER_CONCURRENCY", "0"),
        ("SENTRY_TRACES_SAMPLE_RATE", "2"),
        ("REDIS_PORT", "0"),
        ("REDIS_PORT", "65536"),
        ("CELERY_TASK_MAX_TASKS_PER_CHILD", "0"),
        ("CELERY_TASK_MAX_RETRIES", "-1"),
        ("CELERY_RETRY_COUNTDOWN", "-1"),
        ("CHATWOOT_ACCOUNT_ID", "0"),
        ("TEAM_CACHE_TTL_HOURS", "-1"),
        ("CHATWOOT_API_URL", "ftp://app.chatwoot.com/api/v1"),
    ],
)
def test_wrong_value_is_named(configure: Configure, variable: str, value: str) -> None:
    """A value that cannot be used is an error of one line with the variable's name."""
    configure(**{variable: value})
    with pytest.raises(InvalidSettings, match=f"^{variable}") as raised:
        get_settings()
    assert "\n" not in str(raised.value)


def test_parts_of_the_database_url(configure: Configure) -> None:
    """Without DATABASE_URL, DB_HOST, DB_PORT and POSTGRES_* name the database."""
    configure(DATABASE_URL=None, DB_HOST="db", DB_PORT="5433", POSTGRES_USER="me", POSTGRES_PASSWORD="secret")
    url = get_settings().url().render_as_string(hide_password=False)
    assert url == "postgresql://me:secret@db:5433/chatdify"
    assert "secret" not in repr(get_settings())


@pytest.mark.parametrize("variable", ["DB_PORT", "POSTGRES_PORT"])
def test_ports_in_kubernetes(configure: Configure, variable: str) -> None:
    """Services named ``db`` (or ``postgres``) and ``redis`` put their addresses into variables of every pod."""
    configure(DATABASE_URL=None, DB_HOST="db", REDIS_HOST="redis", CELERY_BROKER_URL=None, REDIS_BROKER=None)
    configure(**{variable: "tcp://10.43.0.7:5433", "REDIS_PORT": "tcp://10.43.0.8:6380"})
    assert (get_settings().url().host, get_settings().url().port) == ("db", 5433)
    assert get_settings().broker_url == "redis://redis:6380/0"


def test_compose_makes_the_database_that_is_configured() -> None:
    """A user or database of one's own in .env is also the one that compose.yaml's PostgreSQL makes."""
    made = dict(re.findall(r"(POSTGRES_\w+): \$\{\1:-(\w+)\}", (EXAMPLE.parent / "compose.yaml").read_text()))
    defaults = {name: Settings.model_fields[name.lower()].default for name in ("POSTGRES_USER", "POSTGRES_DB")}
    assert made == defaults


def test_broker_defaults_to_redis(configure: Configure) -> None:
    """Redis' host and port, its two URLs, or Celery's own, in that order of precedence from the last."""
    configure(CELERY_BROKER_URL=None, CELERY_RESULT_BACKEND=None, REDIS_HOST="r", REDIS_PORT="1")
    assert (get_settings().broker_url, get_settings().result_backend) == ("redis://r:1/0", "redis://r:1/1")
    configure(REDIS_BROKER="redis://other/5", REDIS_BACKEND="redis://other/6")
    assert (get_settings().broker_url, get_settings().result_backend) == ("redis://other/5", "redis://other/6")
    configure(CELERY_BROKER_URL="amqp://rabbit", CELERY_RESULT_BACKEND="rpc://")
    assert (get_settings().broker_url, get_settings().result_backend) == ("amqp://rabbit", "rpc://")


@pytest.mark.parametrize(
    "name",
    ["DIFY_API_KEY", "CHATWOOT_API_KEY", "CHATWOOT_ADMIN_API_KEY", "CHATDIFY_API_TOKEN", "CHATWOOT_WEBHOOK_SECRET"],
)
def test_key_that_fits_no_header(configure: Configure, name: str) -> None:
    """What was pasted along with a key is an error that names the variable and not the key; white space is none."""
    configure(**{name: "app-s3cr\u200bt"})
    with pytest.raises(InvalidSettings, match=f"^{name}: ") as caught:
        get_settings()
    assert "s3cr" not in str(caught.value)
    configure(**{name: " app-s3cret\n"})
    assert getattr(get_settings(), name.lower()) == "app-s3cret"
    configure(**{name: " "})
    assert getattr(get_settings(), name.lower()) is None


def test_sentry_gets_no_secret(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the webhook's, of which older versions of Chatwoot send the URL, nor what variables and bodies hold."""
    sentry = ModuleType("sentry_sdk")
    told: dict[str, Any] = {}
    sentry.init = told.update  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sentry_sdk", sentry)
    configure(
        SENTRY_DSN="https://key@sentry.invalid/1", SENTRY_ENVIRONMENT="production", SENTRY_TRACES_SAMPLE_RATE="0.5"
    )
    create_app()
    assert told["max_request_body_size"] == "never"
    assert (told["include_local_variables"], told["send_default_pii"]) == (False, False)
    assert (told["dsn"], told["environment"]) == ("https://key@sentry.invalid/1", "production")
    assert told["traces_sample_rate"] == 0.5
    for hook in ("before_send", "before_send_transaction"):
        report = {"request": {"query_string": "secret=s3cr3t&a=b", "url": "http://x/y?a=b&secret=s3cr3t"}}
        assert told[hook](report, {}) == {"request": {"url": "http://x/y?***"}}
    assert told[hook]({}, {}) == {}


def test_sentry_needs_its_package(configure: Configure) -> None:
    """A DSN without the package is an error that says what to install."""
    configure(SENTRY_DSN="https://key@sentry.invalid/1")
    with pytest.raises(InvalidSettings, match="pip install sentry-sdk"):
        create_app()
