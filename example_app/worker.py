"""The Celery application: ``celery -A example_app.worker worker --beat``."""

from __future__ import annotations

from typing import Any

from celery import Celery
from celery.signals import setup_logging, worker_init

import celery_ext
from example_app import logs
from example_app.db import db
from example_app.settings import get_settings
from fastapi_chatdify_db import InvalidSettings


def _configuration() -> dict[str, Any]:
    settings = get_settings()
    return {
        "broker_url": settings.broker_url,
        "result_backend": settings.result_backend,
        # Nobody reads a result. With results, Celery would need the backend whenever a task is sent.
        "task_ignore_result": True,
        "task_default_queue": settings.celery_task_default_queue,
        "broker_connection_retry_on_startup": True,
        "worker_concurrency": settings.celery_worker_concurrency,
        "worker_max_tasks_per_child": settings.celery_task_max_tasks_per_child,
        "worker_prefetch_multiplier": settings.celery_worker_prefetch_multiplier,
        "task_time_limit": settings.celery_task_time_limit,
        "timezone": "UTC",
        "beat_schedule": {
            "forget": {"task": "chatdify.forget_old_deliveries", "schedule": 3600.0},
        },
    }


app = Celery("chatdify", task_cls=celery_ext.Task, include=["example_app.tasks"])
app.add_defaults(_configuration)  # called at the first use: importing this module reads no setting
celery_ext.init_app(app, db=db)


@setup_logging.connect
def _set_up_logging(**_: object) -> None:
    logs.configure(get_settings())


@worker_init.connect
def _require_secrets(**_: object) -> None:
    try:
        get_settings().require_secrets()
    except InvalidSettings as error:
        raise SystemExit(str(error)) from None  # Celery would log any other exception, and start
