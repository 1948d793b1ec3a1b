"""The demo's worker: Chatdify's, whose queue may be a table of the demo's PostgreSQL."""

from __future__ import annotations

from kombu.transport.sqlalchemy import Transport
from sqlalchemy import NullPool

from example_app.worker import app

if str(app.conf.broker_url).startswith("sqla+"):
    # A pool would be inherited by the processes that a worker forks: two would use one connection.
    app.conf.broker_transport_options = {"poolclass": NullPool}
    # Seconds between two looks. As an option, the transport would hand it on to create_engine(), which refuses it.
    Transport.polling_interval = 0.05
