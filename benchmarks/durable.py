"""What durable dispatch costs, and how fast its relay is."""

from __future__ import annotations

import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psycopg2
import psycopg2.extensions
from celery import Celery
from kombu import Queue
from sqlalchemy import URL

from benchmarks.databases import environment as shared_environment
from benchmarks.generators import generate
from benchmarks.peers import DISPATCHING, HERE
from benchmarks.results import Comparison, Figure, Measure
from benchmarks.servers import SERVER_CORE, pin, serving, wait_for_answer
from benchmarks.workloads import Workload
from celery_ext.durable.statements import CLAIM

NAME = "durable"
BROKERS = {"redis": "redis://127.0.0.1:6379/10", "rabbitmq": "amqp://guest:guest@127.0.0.1:5672//"}
DELAY = "plain delay after the commit"
RELAYED = 20_000  # rows
WARMED, STARTED = 20, 300  # tasks
ADD = """INSERT INTO durable_task (id, name, arguments, options, due_at, ring_at, status, finished_at)
         SELECT '{kind}-' || n, 'dispatching.start', '[[' || n || '], {{}}]',
                '{{"headers": {{"durable": "{kind}-' || n || '"}}}}',
                now(), now(), '{status}', CASE WHEN '{status}' = 'done' THEN now() END
         FROM generate_series(1, {count}) AS n"""


@contextmanager
def running(*arguments: str, environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A process of the benchmark's, on the servers' core."""
    process = subprocess.Popen(
        [DISPATCHING.python(), "-m", *arguments],
        cwd=HERE / "contenders",
        env=os.environ | environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


def purge(broker: str) -> None:
    """Leave no message behind."""
    with Celery("purge", broker=broker).connection_for_write() as connection:
        Queue("benchmark-dispatch").bind(connection.default_channel).delete()


def requests(environment: dict[str, str], rounds: int, seconds: int) -> Comparison:
    """Requests that insert and dispatch: durably, and with plain ``delay`` after the commit."""
    measures = {"/durable": Measure("ours"), "/delay": Measure(DELAY)}
    with serving(DISPATCHING, environment) as server:
        wait_for_answer(server.port, "/durable", b"null")
        workloads = {path: Workload(path, (path,), b"null", {}) for path in measures}
        for workload in workloads.values():
            generate(server.port, workload, 1)
        for turn in range(rounds):
            for path in ("/durable", "/delay") if turn % 2 else ("/delay", "/durable"):
                answered, took = generate(server.port, workloads[path], seconds)
                measures[path].rates.append(answered / took)
    return Comparison("dispatch", "requests", [*measures.values()], {DELAY: 0.8})


def relayed(environment: dict[str, str], database: psycopg2.extensions.connection) -> float:
    """Rows that a relay sends per second."""
    cursor = database.cursor()
    cursor.execute("TRUNCATE durable_task")
    with running("celery_ext.relay", "-A", "dispatching:celery_app", "run", environment=environment):
        cursor.execute(ADD.format(kind="warm", status="pending", count=1) + "; NOTIFY durable_task")
        wait(lambda: scalar(database, "SELECT count(*) FROM durable_task WHERE rings > 0") == 1)
        cursor.execute(ADD.format(kind="row", status="pending", count=RELAYED))
        started = time.perf_counter()
        cursor.execute("NOTIFY durable_task")
        # The last batch is marked before it is sent; one batch more tells that it was.
        wait(lambda: scalar(database, "SELECT count(*) FROM durable_task WHERE rings > 0") == RELAYED + 1)
        return RELAYED / (time.perf_counter() - started)


def latencies(environment: dict[str, str], database: psycopg2.extensions.connection) -> list[float]:
    """Seconds from a commit to the start of its task, nothing else being there to do."""
    cursor = database.cursor()
    cursor.execute("TRUNCATE durable_task")
    worker = ("celery", "-A", "dispatching:celery_app", "worker", "-c", "1", "-l", "ERROR", "--without-gossip")
    relay = ("celery_ext.relay", "-A", "dispatching:celery_app", "run")
    committed = {}
    with running(*worker, environment=environment), running(*relay, environment=environment):
        for number in range(1, WARMED + STARTED + 1):
            cursor.execute(
                ADD.format(kind=f"n{number}", status="pending", count=1).replace("|| n ||", f"|| {number} ||")
                + "; NOTIFY durable_task"
            )
            committed[number] = time.time()
            wait(lambda: scalar(database, "SELECT max(number) FROM benchmark_started") == number)  # noqa: B023
    cursor.execute("SELECT number, at FROM benchmark_started")
    return sorted(at - committed[number] for number, at in cursor.fetchall() if number > WARMED)


def scan(database: psycopg2.extensions.connection) -> float:
    """Milliseconds to find and claim 500 of 5,000 pending rows."""
    cursor = database.cursor()
    claim = CLAIM.text.replace(":batch", "500").replace(":grace", "10")
    times = []
    for _ in range(15):
        cursor.execute("BEGIN")
        started = time.perf_counter()
        cursor.execute(claim)
        times.append(time.perf_counter() - started)
        cursor.execute("ROLLBACK")
    return statistics.median(times) * 1000


def scans(database: psycopg2.extensions.connection) -> tuple[float, float]:
    """``scan`` without done rows, and with a million of them."""
    cursor = database.cursor()
    found = []
    for done in (0, 1_000_000):
        cursor.execute("TRUNCATE durable_task")
        cursor.execute(ADD.format(kind="done", status="done", count=done))
        cursor.execute(ADD.format(kind="row", status="pending", count=5000))
        cursor.execute("VACUUM ANALYZE durable_task")
        found.append(scan(database))
    return found[0], found[1]


def scalar(database: psycopg2.extensions.connection, query: str) -> object:
    """The one value of a query's one row."""
    cursor = database.cursor()
    cursor.execute(query)
    row = cursor.fetchone()
    return None if row is None else row[0]


def wait(condition: Callable[[], bool]) -> None:
    """Return when the condition holds; a minute at most."""
    deadline = time.monotonic() + 60
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError("it did not happen")
        time.sleep(0.002)


def measure(url: URL, broker: str, rounds: int, seconds: int) -> tuple[Comparison, list[Figure]]:
    """The ratio of the requests, and the figures of the relay."""
    environment = shared_environment(url) | {"BENCHMARK_BROKER": BROKERS[broker], "PYTHONPATH": str(HERE.parent)}
    purge(BROKERS[broker])
    comparison = requests(environment, rounds, seconds)
    database = psycopg2.connect(url.render_as_string(hide_password=False))
    database.autocommit = True
    pin(os.getpid(), SERVER_CORE)
    try:
        rows = relayed(environment, database)
        purge(BROKERS[broker])
        waited = latencies(environment, database)
        p50, p99 = (waited[int(len(waited) * part)] * 1000 for part in (0.5, 0.99))
        without, with_million = scans(database)
    finally:
        database.close()
        purge(BROKERS[broker])
    return comparison, [
        Figure(NAME, f"rows relayed to {broker} per second", rows, at_least=2000),
        Figure(NAME, "commit to start when idle, p50 in ms", p50, at_most=20),
        Figure(NAME, "commit to start when idle, p99 in ms", p99, at_most=200),
        Figure(NAME, "ms to claim 500 rows, no done rows there", without),
        Figure(NAME, "the same with a million done rows, as a ratio", with_million / without, at_most=1.5),
    ]
