"""The demo's worker: Chatdify's, whose queue may be a table of the demo's PostgreSQL."""

from __future__ import annotations

from example_app.demo import table_queue
from example_app.worker import app

table_queue.prepare(app)
