"""The tasks of the tests, a module for each theme."""

from __future__ import annotations

from tests.worker.tasks import callbacks as callbacks
from tests.worker.tasks import cut_off as cut_off
from tests.worker.tasks import dispatching as dispatching
from tests.worker.tasks import failed_statements as failed_statements
from tests.worker.tasks import interrupted as interrupted
from tests.worker.tasks import outcomes as outcomes
from tests.worker.tasks import own_call as own_call
from tests.worker.tasks import retried as retried
from tests.worker.tasks import surroundings as surroundings
