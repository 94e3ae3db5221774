"""Plans that must not be spoiled: with tens of thousands of rows beside and behind, hot statements touch a handful of pages."""

from __future__ import annotations

import json
from collections.abc import Iterator
from operator import itemgetter
from typing import Any

import psycopg
import pytest
from psycopg.rows import dict_row

from jobdaemon.queue.sql import load
from tests.effort import IS_THOROUGH
from tests.factories import Orders, Sql

#: The plans are the same from some ten thousand rows on.
MANY = 100_000 if IS_THOROUGH else 25_000


@pytest.fixture(scope="module")
def crowded(postgres: Any, engine_template: str) -> Iterator[Sql]:
    """MANY ready jobs in another queue, as many scheduled in the same, and a tenth as many orders with jobs."""
    name = postgres.create_database(template=engine_template)
    with psycopg.connect(postgres.url(name), autocommit=True, row_factory=dict_row) as connection:
        connection.execute("ALTER TABLE jobdaemon.procrastinate_jobs DISABLE TRIGGER USER")
        for queue, when, args in (
            ("beautify", "NULL", "'{}'"),
            ("upload", "now() + (n + 3600) * interval '1 second'", "'{}'"),
            ("generate.local", "NULL", "jsonb_build_object('order_id', n / 10)"),
        ):
            connection.execute(
                f"INSERT INTO jobdaemon.procrastinate_jobs (queue_name, task_name, priority, scheduled_at, args)"
                f" SELECT '{queue}', 'jobdaemon.x', n % 3 * 100, {when}, {args} FROM generate_series(1, {MANY}) AS n".encode()
            )
        connection.execute("ALTER TABLE jobdaemon.procrastinate_jobs ENABLE TRIGGER USER")
        connection.execute(
            "INSERT INTO jobdaemon.procrastinate_jobs (queue_name, task_name)"
            " SELECT 'upload', 'jobdaemon.x' FROM generate_series(1, 500)"
        )
        # dead letters enough that the index of failed jobs alone would be a long way round
        connection.execute(
            "UPDATE jobdaemon.procrastinate_jobs SET status = 'failed' WHERE queue_name = 'generate.local' AND id % 5 = 0"
        )
        connection.execute("VACUUM ANALYZE jobdaemon.procrastinate_jobs")
        yield connection
    postgres.drop_database(name)


def _explain(sql: Sql, statement: str) -> tuple[str, int]:
    """The plan as text, and the shared buffers it touched."""
    row = sql.execute(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {statement}".encode()).fetchone()
    assert row is not None
    [document] = row["QUERY PLAN"]
    plan = document["Plan"]
    return json.dumps(plan), plan["Shared Hit Blocks"] + plan["Shared Read Blocks"]


CANDIDATES = """
    SELECT j.id, j.priority, j.lock FROM jobdaemon.procrastinate_jobs j
    WHERE j.queue_name = 'upload' AND j.status = 'todo' AND j.scheduled_at IS NULL
        AND (j.lock IS NULL OR NOT EXISTS (
            SELECT FROM jobdaemon.procrastinate_jobs d WHERE d.lock = j.lock AND d.status = 'doing'))
    ORDER BY j.priority DESC, (CASE WHEN j.task_name LIKE 'jobdaemon.%' THEN (j.args ->> 'order_id')::bigint END), j.id
    LIMIT 5"""


def test_claim_reads_its_own_index_in_order(crowded: Sql) -> None:
    """The claim's candidates come from jobs_ready_idx, without a sort, whatever else is in the table."""
    with crowded.transaction(force_rollback=True):
        plan, buffers = _explain(crowded, CANDIDATES + " FOR UPDATE OF j SKIP LOCKED")
    assert "jobs_ready_idx" in plan
    assert '"Sort"' not in plan
    assert buffers < 40


def test_running_jobs_are_counted_from_their_index(crowded: Sql) -> None:
    """The count behind a cluster limit reads jobs_running_idx only."""
    plan, buffers = _explain(
        crowded, "SELECT count(*) FROM jobdaemon.procrastinate_jobs j WHERE j.queue_name = 'upload' AND j.status = 'doing'"
    )
    assert "jobs_running_idx" in plan
    assert buffers < 20


def test_claims_stay_cheap(crowded: Sql) -> None:
    """Over 200 claims of the function itself none touches more than a few hundred pages."""
    with crowded.transaction(force_rollback=True):
        row = crowded.execute("SELECT * FROM jobdaemon.procrastinate_register_worker_v1()").fetchone()
        assert row is not None
        [worker] = row.values()
        claim = f"SELECT * FROM jobdaemon.claim_jobs('upload', {worker}, 1)"
        touched = sorted(_explain(crowded, claim)[1] for _ in range(200))
    assert touched[197] < 400, touched[-10:]
    assert touched[-1] < 2000, touched[-10:]


def test_promote_walks_the_due_times(crowded: Sql) -> None:
    """Nothing due costs a few pages, not a walk over what is scheduled."""
    crowded.execute("SELECT * FROM jobdaemon.promote_jobs(10)")  # a session's first call also reads the catalog
    _, buffers = _explain(crowded, "SELECT * FROM jobdaemon.promote_jobs(10)")
    assert buffers < 100
    plan, buffers = _explain(
        crowded,
        "SELECT j.scheduled_at FROM jobdaemon.procrastinate_jobs j JOIN jobdaemon.queues q ON q.name = j.queue_name"
        " WHERE j.status = 'todo' AND j.scheduled_at IS NOT NULL AND j.scheduled_at > now() ORDER BY j.scheduled_at LIMIT 1",
    )
    assert "jobs_scheduled_idx" in plan
    assert buffers < 20


@pytest.mark.parametrize("statuses", ["'todo', 'doing', 'failed'", "'todo', 'doing'", "'failed'"])
def test_from_an_order_to_its_jobs(crowded: Sql, statuses: str) -> None:
    """Cancel, redrive and progress find an order's jobs by jobs_order_idx."""
    plan, buffers = _explain(
        crowded,
        "SELECT id FROM jobdaemon.procrastinate_jobs j WHERE (j.args ->> 'order_id')::bigint = 77"
        f" AND j.task_name LIKE 'jobdaemon.%' AND j.status IN ({statuses})",
    )
    assert "jobs_order_idx" in plan
    assert buffers < 40


@pytest.mark.parametrize(
    ("queue", "limits", "keys"),
    [("upload", "", "NULL"), ("upload", "cluster_limit = 30000, ", "NULL"), ("generate.local", "", "'{a}'")],
)
def test_a_claim_that_was_planned_on_an_empty_table_stays_cheap(
    postgres: Any, engine_template: str, queue: str, limits: str, keys: str
) -> None:
    """A daemon's first claims find little, and its connection keeps their plans; then thousands of jobs come at once."""
    name = postgres.create_database(template=engine_template)
    with psycopg.connect(postgres.url(name), autocommit=True, row_factory=dict_row) as sql:
        sql.execute("ALTER TABLE jobdaemon.procrastinate_jobs SET (autovacuum_enabled = false)")
        sql.execute("INSERT INTO jobdaemon.provider_keys (provider, alias) VALUES ('local', 'a')")
        sql.execute(f"UPDATE jobdaemon.queues SET {limits} paused = false WHERE name = '{queue}'".encode())
        row = sql.execute("INSERT INTO jobdaemon.procrastinate_workers DEFAULT VALUES RETURNING id").fetchone()
        assert row is not None
        jobs = "SELECT %s, 'jobdaemon.x' FROM generate_series(1, %s)"
        insert = f"INSERT INTO jobdaemon.procrastinate_jobs (queue_name, task_name) {jobs}".encode()
        claim = f"SELECT id FROM jobdaemon.claim_jobs('{queue}', {row['id']}, 1, {keys})"
        for _ in range(12):
            sql.execute(insert, [queue, 1])
            assert len(sql.execute(claim.encode(), prepare=True).fetchall()) == 1
        sql.execute(insert, [queue, 100_000])
        _, new = _explain(sql, claim)
        sql.execute("ANALYZE jobdaemon.procrastinate_jobs")
        _, analysed = min((_explain(sql, claim) for _ in range(2)), key=itemgetter(1))  # the first one plans anew
    postgres.drop_database(name)
    # To go through all that is ready takes more than six hundred, to go through the table more than a thousand.
    assert max(new, analysed) < 300, (new, analysed)


def _between_two_calls(sql: Sql, statement: str) -> tuple[int, str]:
    """Ask *statement* of the running job of a fresh order; the order, and what was asked."""
    order_id = Orders(sql)("Free")
    row = sql.execute(
        "UPDATE jobdaemon.procrastinate_jobs SET status = 'doing', token = 1 WHERE args ->> 'order_id' = %s::text RETURNING id",
        [str(order_id)],
    ).fetchone()
    assert row is not None
    call = {"order_id": order_id, "job_id": row["id"], "batch": 1, "provider": "local", "images": [1]}
    literals = {
        "ids": f"ARRAY[{row['id']}]::bigint[]",
        "tokens": "ARRAY[1]::bigint[]",
        "orders": f"ARRAY[{order_id}]::bigint[]",
        "calls": f"'{json.dumps([call])}'",
    }
    asked = f"SELECT jobdaemon.{statement % literals} AS answer"
    answer = sql.execute(asked.encode(), prepare=True).fetchone()
    assert answer in ({"answer": [row["id"]]}, {"answer": True})
    sql.execute("UPDATE jobdaemon.provider_calls SET outcome = 'succeeded'")
    return order_id, asked


@pytest.mark.parametrize(
    "statement", ["leave_slots(%(ids)s, %(tokens)s)", "note_submits(%(orders)s, %(ids)s, %(tokens)s, %(calls)s)"]
)
def test_what_was_planned_on_empty_tables_between_two_calls_stays_cheap(
    postgres: Any, engine_template: str, statement: str
) -> None:
    """A daemon's first calls find small tables, and its connections keep those plans; then thousands of orders come at once."""
    name = postgres.create_database(template=engine_template)
    with psycopg.connect(postgres.url(name), autocommit=True, row_factory=dict_row) as sql:
        for table in ("procrastinate_jobs", "orders", "provider_calls"):
            sql.execute(f"ALTER TABLE jobdaemon.{table} SET (autovacuum_enabled = false)".encode())
        for _ in range(11):
            _between_two_calls(sql, statement)
        order_id, asked = _between_two_calls(sql, statement)
        sql.execute(
            "INSERT INTO jobdaemon.procrastinate_jobs (queue_name, task_name)"
            " SELECT 'upload', 'jobdaemon.x' FROM generate_series(1, 100000)"
        )
        sql.execute(
            "INSERT INTO jobdaemon.orders (plan, provider, source, priority, images_total, expires_at)"
            " SELECT 'Free', 'local', 'https://p.example/a.jpg', 1, 1, now() + interval '1 day' FROM generate_series(1, 20000)"
        )
        sql.execute(
            "INSERT INTO jobdaemon.provider_calls (order_id, job_id, batch, provider, outcome)"
            " SELECT %s, 1000000 + n, 1, 'local', 'succeeded' FROM generate_series(1, 50000) AS n",
            [order_id],
        )
        _, buffers = _explain(sql, asked)
    postgres.drop_database(name)
    # To go through the jobs takes more than a thousand.
    assert buffers < 300


def test_a_batch_is_loaded_from_a_large_order_in_one_go(postgres: Any, engine_template: str) -> None:
    """Also before the tables were analysed: its prompts are not looked up again for each image of the order."""
    name = postgres.create_database(template=engine_template)
    with psycopg.connect(postgres.url(name), autocommit=True, row_factory=dict_row) as sql:
        sql.execute("ALTER TABLE jobdaemon.images SET (autovacuum_enabled = false)")
        order_id = Orders(sql)("Free")
        sql.execute(
            "INSERT INTO jobdaemon.images (order_id, index, prompt) SELECT %s, n, 'p' || n / 5 FROM generate_series(3, 1000) n",
            [order_id],
        )
        sql.execute(f"PREPARE batch (bigint, bigint, bigint[]) AS {load('order_rows.sql')['batch']}".encode())
        _, buffers = _explain(sql, f"EXECUTE batch({order_id}, 1, '{{991, 992}}')")
    postgres.drop_database(name)
    assert buffers < 200


@pytest.mark.parametrize(
    ("statement", "most"),
    [
        # orders with their calls and attempts
        ("retire_orders(86400, 10)", 1600),
        # jobs and their events
        ("prune_jobs(0, 86400, 50)", 3000),
        # those that are needed are passed by
        ("sources_to_delete(86400, 2)", 1000),
        # orders with two images each
        ("remove_orders(86400, 10)", 1400),
    ],
)
def test_retention_costs_by_what_it_does(postgres: Any, engine_template: str, statement: str, most: int) -> None:
    """Planned on empty tables, then years of orders are there: its functions touch what they remove, not all there is."""
    name = postgres.create_database(template=engine_template)
    with psycopg.connect(postgres.url(name), autocommit=True, row_factory=dict_row) as sql:
        for table in ("procrastinate_jobs", "procrastinate_events", "orders", "images", "attempts", "idle_sources"):
            sql.execute(f"ALTER TABLE jobdaemon.{table} SET (autovacuum_enabled = false)".encode())
        sql.execute("ALTER TABLE jobdaemon.procrastinate_jobs DISABLE TRIGGER USER")
        for _ in range(12):
            sql.execute(f"SELECT jobdaemon.{statement}".encode(), prepare=True)
        sql.execute(
            "INSERT INTO jobdaemon.orders (plan, provider, source, priority, images_total, status, finished_at, retired_at,"
            " pruned_at, expires_at)"
            " SELECT 'Free', 'local', 'artifact:sources/' || right(digest, 2) || '/' || digest || '.jpg', 1, 2, 'completed',"
            " now() - interval '10 days', retired, retired, now() - interval '9 days'"
            " FROM (SELECT lpad(to_hex(n), 64, '0') AS digest, CASE WHEN n % 2 = 0 THEN now() END AS retired"
            f" FROM generate_series(1, {MANY}) AS n) AS x"
        )
        for table, rows in {
            "images (order_id, index, prompt)": "o.id, n, 'p' FROM jobdaemon.orders o, generate_series(1, 2) n",
            "idle_sources (source, idle_since)": "source, now() - interval '2 days' FROM jobdaemon.orders WHERE id % 100 < 2",
            "procrastinate_jobs (queue_name, task_name, status, args)": "'upload', 'jobdaemon.upload', 'succeeded',"
            " jsonb_build_object('order_id', o.id) FROM jobdaemon.orders o, generate_series(1, 3)",
            "procrastinate_events (job_id, type, at)": "j.id, 'deferred', now() - interval '10 days'"
            " FROM jobdaemon.procrastinate_jobs j",
        }.items():
            sql.execute(f"INSERT INTO jobdaemon.{table} SELECT {rows}".encode())
        sql.execute("ALTER TABLE jobdaemon.procrastinate_jobs ENABLE TRIGGER USER")
        with sql.transaction(force_rollback=True):
            _, new = _explain(sql, f"SELECT jobdaemon.{statement}")
        sql.execute("ANALYZE")
        with sql.transaction(force_rollback=True):
            _, analysed = _explain(sql, f"SELECT jobdaemon.{statement}")
    postgres.drop_database(name)
    assert max(new, analysed) < most, (new, analysed)
