"""Every statement of durable dispatch, named after what it does."""

from __future__ import annotations

from typing import Final

from sqlalchemy import text

CHANNEL: Final = "durable_task"
"""The channel that relays listen to: one notification for each transaction that left something to send."""

LISTEN: Final = text(f"LISTEN {CHANNEL}")

_NOTIFY: Final = f"pg_notify('{CHANNEL}', '')"
NOTIFY: Final = text(f"SELECT {_NOTIFY}")

# Sets the limit, unless the settings or the server have a shorter one.
LIMIT: Final = text(
    """
    SELECT set_config('statement_timeout', :limit, false)
    WHERE CAST(current_setting('statement_timeout') AS interval) NOT BETWEEN '1 ms' AND CAST(:limit AS interval)
    """
)

# A key's rows are numbered, and looked for, by one transaction at a time: so their numbers have the order of the
# commits, and none slips in unseen between "this one is done" and "which one is next".
LOCK_KEYS: Final = text(
    """SELECT pg_advisory_xact_lock(hashtextextended(key, 20)) FROM unnest(CAST(:keys AS text[])) AS key"""
)

# It reads nothing, so that SERIALIZABLE transactions with such rows have nothing in common.
ADD: Final = text(
    """
    INSERT INTO durable_task (id, name, arguments, options, due_at, ring_at, expires_at)
    SELECT new.id, new.name, new.arguments, new.options, due.at, due.at,
           clock_timestamp() + make_interval(secs => new.expires_in)
    FROM json_to_recordset(CAST(:rows AS json)) AS new(
        id text, name text, arguments text, options text, due_in float8, expires_in float8)
    CROSS JOIN LATERAL (SELECT clock_timestamp() + make_interval(secs => new.due_in) AS at) AS due
    ON CONFLICT (id) DO NOTHING  -- an idempotency key that was used
    """
)

# Only the first row of a key is ever due; the others wait at infinity for the one before them.
ADD_IN_ORDER: Final = text(
    """
    INSERT INTO durable_task (id, name, arguments, options, ordering_key, due_at, ring_at, expires_at)
    SELECT new.id, new.name, new.arguments, new.options, new.ordering_key, due.at,
           CASE WHEN new.follows OR EXISTS (
               SELECT FROM durable_task AS earlier
               WHERE earlier.ordering_key = new.ordering_key AND earlier.status = 'pending'
           ) THEN 'infinity' ELSE due.at END,
           clock_timestamp() + make_interval(secs => new.expires_in)
    FROM (
        SELECT given.*, bool_or(stored.id IS NULL) OVER (
                   PARTITION BY given.ordering_key ORDER BY number ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING
               ) AS follows
        FROM json_to_recordset(CAST(:rows AS json)) AS given(
            number int, id text, name text, arguments text, options text, ordering_key text, due_in float8,
            expires_in float8)
        LEFT JOIN durable_task AS stored ON stored.id = given.id  -- an idempotency key that was used: nothing is added
    ) AS new
    CROSS JOIN LATERAL (SELECT clock_timestamp() + make_interval(secs => new.due_in) AS at) AS due
    ORDER BY new.number
    ON CONFLICT (id) DO NOTHING
    """
)

# The row lock is the lease: the worker holds it until its transaction ends, and PostgreSQL frees it when the worker
# dies. A task that ended its transaction half way holds an advisory lock instead; whether there is one is asked
# after the row is locked, hence the subqueries.
HOLD_LEASE: Final = text("SELECT pg_try_advisory_lock(hashtextextended(:id, 21))")
FREE_LEASE: Final = text("SELECT pg_advisory_unlock(hashtextextended(:id, 21))")
# The server would end an idle lease while its task is at work. PostgreSQL before 14 does not know the setting.
KEEP_IDLE: Final = text(
    """
    SELECT set_config('idle_session_timeout', '0', false) WHERE current_setting('idle_session_timeout', true) <> '0'
    """
)
_NO_LEASE: Final = """CASE WHEN pg_try_advisory_lock(hashtextextended(id, 21))
                THEN pg_advisory_unlock(hashtextextended(id, 21)) ELSE false END"""

BEGIN: Final = text(
    f"""
    SELECT retries, ordering_key, coalesce(expires_at < clock_timestamp(), false) AS expired,
           {_NO_LEASE} AS free
    FROM (
        SELECT id, retries, ordering_key, expires_at FROM durable_task AS this
        WHERE id = :id AND status = 'pending' AND due_at <= clock_timestamp() AND ring_at < 'infinity'
            AND NOT EXISTS (  -- a REPEATABLE READ transaction may have added this one without seeing its predecessor
                SELECT FROM durable_task AS earlier
                WHERE earlier.ordering_key = this.ordering_key AND earlier.seq < this.seq
                    AND earlier.status = 'pending' AND earlier.ring_at < 'infinity'
            )
        FOR UPDATE SKIP LOCKED
    ) AS locked
    """
)

FINISH: Final = text(
    """
    UPDATE durable_task SET status = :status, error = :error, finished_at = clock_timestamp()
    WHERE id = :id AND status = 'pending'
    RETURNING id
    """
)

# A row may stay locked by the task's own first session, whose end a silent network has kept from the server.
LIMIT_LOCKS: Final = text("SELECT set_config('lock_timeout', '10s', true)")

KEY_OF_PENDING: Final = text("SELECT ordering_key FROM durable_task WHERE id = :id AND status = 'pending'")

CANCEL: Final = text(
    f"""
    UPDATE durable_task SET status = 'cancelled', finished_at = clock_timestamp()
    WHERE id IN (
        SELECT id FROM (
            SELECT id FROM durable_task WHERE id = :id AND status = 'pending' FOR UPDATE SKIP LOCKED
        ) AS locked
        WHERE {_NO_LEASE}
    )
    RETURNING id
    """
)

# After a second, then two, four, ...: what interrupts a task may do so each time. A task that is not due was not
# interrupted: it was put off, and only the answer to that COMMIT was lost.
RING_SOON: Final = text(
    """
    UPDATE durable_task
    SET error = :error, ring_at = clock_timestamp() + make_interval(secs => power(2, greatest(least(rings, 10) - 1, 0)))
    WHERE id IN (
        SELECT id FROM durable_task
        WHERE id = :id AND status = 'pending' AND due_at <= clock_timestamp() AND ring_at < 'infinity'
        FOR UPDATE SKIP LOCKED
    )
    RETURNING id
    """
)

RING_NEXT_OF_KEY: Final = text(
    f"""
    UPDATE durable_task SET ring_at = due_at
    WHERE ring_at = 'infinity' AND status = 'pending' AND id = (
        SELECT id FROM durable_task WHERE ordering_key = :key AND status = 'pending' ORDER BY seq LIMIT 1
    ) AND NOT EXISTS (
        SELECT FROM durable_task WHERE ordering_key = :key AND status = 'pending' AND ring_at < 'infinity'
    )
    RETURNING {_NOTIFY}
    """
)

# Heads of keys that nobody rang: their predecessor ended under a snapshot that did not show them, or long ago. They are
# found first, once, whatever the planner believes of a table that has just grown.
RING_FORGOTTEN: Final = text(
    """
    WITH head AS MATERIALIZED (
        SELECT id, ordering_key FROM (
            SELECT DISTINCT ON (ordering_key) id, ordering_key, ring_at FROM durable_task
            WHERE status = 'pending' AND ordering_key IS NOT NULL ORDER BY ordering_key, seq
        ) AS first
        WHERE ring_at = 'infinity'
    )
    UPDATE durable_task AS task SET ring_at = due_at
    FROM head
    WHERE task.id = head.id AND task.status = 'pending' AND task.ring_at = 'infinity'
    AND NOT EXISTS (
        SELECT FROM durable_task AS begun
        WHERE begun.ordering_key = head.ordering_key AND begun.status = 'pending' AND begun.ring_at < 'infinity'
    )
    """
)

OPTIONS: Final = text("SELECT options FROM durable_task WHERE id = :id")

RETRY: Final = text(
    f"""
    UPDATE durable_task
    SET retries = :retries, arguments = :arguments, error = :error, rings = 0,
        options = coalesce(CAST(:options AS text), options),
        due_at = clock_timestamp() + make_interval(secs => :due_in),
        ring_at = clock_timestamp() + make_interval(secs => :due_in)
    WHERE id = :id AND status = 'pending'
    RETURNING {_NOTIFY}
    """
)

# Marked before it is sent: a worker that is faster than this transaction would find the row locked. Rows whose worker
# is running are locked, and skipped, or leased, and looked at again after the grace time: if the worker has died by
# then, they are sent. Compared with statement_timestamp(), since no index serves a volatile function.
CLAIM: Final = text(
    f"""
    WITH due AS (
        SELECT id FROM durable_task WHERE status = 'pending' AND ring_at <= statement_timestamp()
        ORDER BY ring_at LIMIT :batch FOR UPDATE SKIP LOCKED
    ), asked AS (
        SELECT id, {_NO_LEASE} AS free FROM due
    ), put_off AS (
        UPDATE durable_task AS task
        SET rings = CASE WHEN free THEN rings + 1 ELSE rings END,
            ring_at = clock_timestamp()
                + make_interval(secs => :grace * CASE WHEN free THEN power(2, least(rings, 6)) ELSE 1 END)
        FROM asked WHERE task.id = asked.id
        RETURNING task.id, task.name, task.arguments, task.options, task.retries, task.rings, free
    )
    SELECT id, name, arguments, options, retries, rings FROM put_off WHERE free
    """
)

UNCLAIM: Final = text(
    """
    UPDATE durable_task SET rings = greatest(rings - 1, 0), ring_at = clock_timestamp()
    WHERE id IN (
        SELECT id FROM durable_task WHERE id = ANY(:ids) AND status = 'pending' AND ring_at < 'infinity'
        FOR UPDATE SKIP LOCKED
    )
    """
)

# A row that is due by now and was not claimed is locked by its worker.
SECONDS_UNTIL_NEXT: Final = text(
    """
    SELECT extract(epoch FROM ring_at - clock_timestamp()) FROM durable_task
    WHERE status = 'pending' AND ring_at > statement_timestamp() AND ring_at < 'infinity' ORDER BY ring_at LIMIT 1
    """
)

# In the same round trip: what comes next in the transaction waits no longer for whoever has locked the table.
TABLE: Final = text("SELECT to_regclass('durable_task'), set_config('lock_timeout', '500ms', true)")

# No more than :most rows are counted of either kind, or, where that is NULL, all.
FIGURES: Final = text(
    """
    WITH pending AS (
        SELECT rings, due_at FROM durable_task WHERE status = 'pending' ORDER BY ring_at LIMIT CAST(:most AS bigint)
    ), failed AS (
        SELECT FROM durable_task WHERE status = 'failed' LIMIT CAST(:most AS bigint)
    )
    SELECT count(*) AS pending,
           count(*) FILTER (WHERE rings > 0) AS sent,
           count(*) FILTER (WHERE rings > 1) AS rerung,
           (SELECT count(*) FROM failed) AS failed,
           extract(epoch FROM clock_timestamp() - min(due_at) FILTER (WHERE due_at <= clock_timestamp()))
               AS oldest_pending_age
    FROM pending
    """
)

FAILED: Final = text(
    """
    SELECT id, name, ordering_key, retries, error, finished_at FROM durable_task
    WHERE status = 'failed' ORDER BY finished_at DESC LIMIT :limit
    """
)

# Tasks with an ordering key wait until the key's task under way has ended, and come next.
RETRY_FAILED: Final = text(
    f"""
    UPDATE durable_task
    SET status = 'pending', retries = 0, rings = 0, finished_at = NULL, due_at = clock_timestamp(),
        ring_at = CASE WHEN ordering_key IS NULL THEN clock_timestamp() ELSE 'infinity' END
    WHERE status = 'failed' AND (CAST(:id AS text) IS NULL OR id = :id)
    RETURNING ordering_key, {_NOTIFY}
    """
)

PRUNE: Final = text(
    """
    DELETE FROM durable_task WHERE id IN (
        SELECT id FROM durable_task
        WHERE status IN ('done', 'cancelled') AND finished_at < clock_timestamp() - make_interval(days => :days)
        LIMIT :batch
    )
    RETURNING id
    """
)

_WAITING: Final = (LOCK_KEYS, ADD, ADD_IN_ORDER, FINISH, RETRY, OPTIONS, RING_NEXT_OF_KEY)
# Their text up to the first parameter, which each driver writes in its own way.
_WAITING_TEXTS: Final = tuple(str(each).partition(":")[0] for each in _WAITING)


def waits_for_others(statement: str | None) -> bool:
    """Whether a statement, as a driver was given it, may wait until another session has committed.

    Many tasks may share an ordering key (``LOCK_KEYS``) or an idempotency key (``ADD``, ``ADD_IN_ORDER``). Those that
    end a task wait for whoever has locked the table, e.g. a migration, or its row.
    """
    return statement is not None and statement.startswith(_WAITING_TEXTS)
