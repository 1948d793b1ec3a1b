"""What durable dispatch costs: ``python -m benchmarks.durable``."""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psycopg2.extensions
from celery import Celery
from kombu import Queue
from sqlalchemy import make_url

from benchmarks.run import execute, scratch_database
from benchmarks.servers import HERE, OURS, SERVER_CORE, Contender, pin, rate, serving, wait_for_answer

DISPATCHING = Contender("durable", "dispatching", "dispatching", ("--editable", ".[fastapi,relay]", "celery[redis]"))
BROKERS = {"redis": "redis://127.0.0.1:6379/10", "rabbitmq": "amqp://guest:guest@127.0.0.1:5672//"}
TABLES = (
    "CREATE TABLE benchmark_entry (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, name text NOT NULL)",
    "CREATE TABLE benchmark_started (number int PRIMARY KEY, at float8 NOT NULL)",
)
ADD = """INSERT INTO durable_task (id, name, arguments, options, due_at, ring_at, status, finished_at)
         SELECT '{kind}-' || n, 'dispatching.start', '[[' || n || '], {{}}]', '{{"headers": {{"durable": true}}}}',
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


def requests(environment: dict[str, str], rounds: int) -> float:
    """Requests with one durable dispatch, as a ratio to the same with plain ``delay`` after the commit."""
    ratios = []
    with serving(DISPATCHING, environment) as port:
        wait_for_answer(port, "/durable", b"null")
        for path in ("/durable", "/delay"):
            rate(port, path, 1, 0)
        for turn in range(rounds):
            order = ("/durable", "/delay") if turn % 2 else ("/delay", "/durable")
            rates = {path: rate(port, path, 3, 0) for path in order}
            ratios.append(rates["/durable"] / rates["/delay"])
    return statistics.median(ratios)


def relayed(environment: dict[str, str], database: psycopg2.extensions.connection, count: int = 20_000) -> float:
    """Rows that a relay sends per second."""
    cursor = database.cursor()
    cursor.execute("TRUNCATE durable_task")
    with running("celery_ext.relay", "-A", "dispatching:celery_app", "run", environment=environment):
        cursor.execute(ADD.format(kind="warm", status="pending", count=1) + "; NOTIFY durable_task")
        wait(lambda: scalar(database, "SELECT count(*) FROM durable_task WHERE rings > 0") == 1)
        cursor.execute(ADD.format(kind="row", status="pending", count=count))
        started = time.perf_counter()
        cursor.execute("NOTIFY durable_task")
        # The last batch is marked before it is sent; one batch more tells that it was.
        wait(lambda: scalar(database, "SELECT count(*) FROM durable_task WHERE rings > 0") == count + 1)
        return count / (time.perf_counter() - started)


def latencies(environment: dict[str, str], database: psycopg2.extensions.connection, count: int = 300) -> list[float]:
    """Seconds from a commit to the start of its task, nothing else being there to do."""
    cursor = database.cursor()
    cursor.execute("TRUNCATE durable_task")
    worker = ("celery", "-A", "dispatching:celery_app", "worker", "-c", "1", "-l", "ERROR", "--without-gossip")
    relay = ("celery_ext.relay", "-A", "dispatching:celery_app", "run")
    committed = {}
    with running(*worker, environment=environment), running(*relay, environment=environment):
        for number in range(1, count + 21):
            cursor.execute(
                ADD.format(kind=f"n{number}", status="pending", count=1).replace("|| n ||", f"|| {number} ||")
                + "; NOTIFY durable_task"
            )
            committed[number] = time.time()
            wait(lambda: scalar(database, "SELECT max(number) FROM benchmark_started") == number)  # noqa: B023
    cursor.execute("SELECT number, at FROM benchmark_started")
    return sorted(at - committed[number] for number, at in cursor.fetchall() if number > 20)


def scan(database: psycopg2.extensions.connection) -> float:
    """Milliseconds to find and claim 500 of 5,000 pending rows."""
    from celery_ext.durable.statements import CLAIM

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


def main() -> None:
    """Measure and report; with ``--check``, fail when a target is missed."""
    parser = argparse.ArgumentParser(prog="benchmarks.durable", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--broker", choices=BROKERS, default="rabbitmq")
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    broker = BROKERS[arguments.broker]
    assert OURS.name
    reached = []

    def report(what: str, value: float, wanted: str, ok: bool) -> None:
        reached.append(ok)
        print(f"{what}: {value:.2f}, wanted {wanted}{'' if ok else '  NOT REACHED'}", flush=True)

    with scratch_database() as url:
        plain = make_url(url).set(drivername="postgresql").render_as_string(False)
        execute(plain, *TABLES)
        environment = {
            "BENCHMARK_URL": url,
            "BENCHMARK_BROKER": broker,
            "DATABASE_URL": plain,
            "DB_POOL_SIZE": "10",
            "DB_MAX_OVERFLOW": "20",
            "PYTHONPATH": str(HERE.parent),
        }
        purge(broker)
        ratio = requests(environment, arguments.rounds)
        report("requests with a durable dispatch, as a ratio to delay after the commit", ratio, ">= 0.8", ratio >= 0.8)
        database = psycopg2.connect(plain)
        database.autocommit = True
        pin(os.getpid(), SERVER_CORE)
        rows = relayed(environment, database)
        report(f"rows relayed to {arguments.broker} per second", rows, ">= 2000", rows >= 2000)
        purge(broker)
        seconds = latencies(environment, database)
        p50, p99 = (seconds[int(len(seconds) * part)] * 1000 for part in (0.5, 0.99))
        report("commit to start when idle, p50 in ms", p50, "< 20", p50 < 20)
        report("commit to start when idle, p99 in ms", p99, "< 200", p99 < 200)
        without, with_million = scans(database)
        report(
            f"claim 500 rows, ms without done rows {without:.2f}, with a million {with_million:.2f}; ratio",
            with_million / without,
            "<= 1.5",
            with_million / without <= 1.5,
        )
        database.close()
        purge(broker)
    sys.exit(0 if all(reached) or not arguments.check else 1)


if __name__ == "__main__":
    main()
