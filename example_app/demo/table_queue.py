"""A queue that is a table of PostgreSQL: kombu's transport for SQLAlchemy, made fit for workers that fork."""

from __future__ import annotations

from typing import Any

from celery import Celery
from kombu.transport.sqlalchemy import Transport
from sqlalchemy import NullPool


def prepare(app: Celery[Any]) -> None:
    """Set an application up for such a queue, if its ``broker_url`` names one."""
    if str(app.conf.broker_url).startswith("sqla+"):
        # A pool would be inherited by the processes that a worker forks: two would use one connection.
        app.conf.broker_transport_options = {"poolclass": NullPool}
        # Seconds between two looks. As an option, the transport would hand it on to create_engine(), which refuses it.
        Transport.polling_interval = 0.05
