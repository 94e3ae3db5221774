"""The views: their columns are a contract, their numbers are those of the tables."""

from __future__ import annotations

from datetime import timedelta

import pytest

from jobdaemon.domain.outcome import End, Transition
from tests.factories import Claimed, Jobs, Orders, Row, Sql

COLUMNS = {
    "queue_depth": "queue, ready, scheduled, running, failed, oldest_ready_seconds, paused, team_size, cluster_limit, "
    "adaptive_limit, circuit, finishing",
    "order_progress": "order_id, customer, plan, status, images_total, images_stored, images_failed, progress, created_at, "
    "first_image_at, finished_at, waiting_for",
    "keys": "provider, alias, running, concurrency, rate, daily_budget, spent_today, rested_until, rest_reason, paused",
}


@pytest.mark.parametrize("view", COLUMNS)
def test_columns_are_the_contract(sql: Sql, view: str) -> None:
    """The views have exactly the columns that design and documentation name."""
    cursor = sql.execute(f"SELECT * FROM jobdaemon.{view} LIMIT 0".encode())
    assert cursor.description is not None
    assert ", ".join(column.name for column in cursor.description) == COLUMNS[view]


def _depth(sql: Sql, queue: str) -> Row:
    row = sql.execute("SELECT * FROM jobdaemon.queue_depth WHERE queue = %s", [queue]).fetchone()
    assert row is not None
    return row


def test_queue_depth_counts_each_class(sql: Sql, job_factory: Jobs) -> None:
    """Ready, scheduled, running and failed are counted apart; an empty queue shows zeros and no age."""
    for status, delay in (("todo", None), ("todo", None), ("todo", timedelta(hours=1)), ("doing", None), ("failed", None)):
        job_id = job_factory(delay=delay)
        sql.execute("UPDATE jobdaemon.procrastinate_jobs SET status = %s WHERE id = %s", [status, job_id])
    depth = _depth(sql, "upload")
    assert [depth[name] for name in ("ready", "scheduled", "running", "failed")] == [2, 1, 1, 1]
    assert 0 <= depth["oldest_ready_seconds"] < 60
    empty = _depth(sql, "beautify")
    assert [empty[name] for name in ("ready", "scheduled", "running", "failed")] == [0, 0, 0, 0]
    assert empty["oldest_ready_seconds"] is None


def test_keys_show_today(sql: Sql, job_factory: Jobs) -> None:
    """Only running jobs count, only today's images, and only a rest that is not over."""
    sql.execute(
        "INSERT INTO jobdaemon.provider_keys (provider, alias, spent, spent_on, rested_until, rest_reason)"
        " SELECT 'local', alias, 7, (now() AT TIME ZONE 'UTC')::date - days, now() + interval '1 hour' * (1 - days), 'why'"
        " FROM (VALUES ('new', 0), ('old', 2)) AS k (alias, days)"
    )
    for status in ("doing", "doing", "todo", "succeeded"):
        job_id = job_factory("generate.local")
        sql.execute("UPDATE jobdaemon.procrastinate_jobs SET status = %s, key_alias = 'new' WHERE id = %s", [status, job_id])
    rows = sql.execute(
        "SELECT alias, running, spent_today, rest_reason, rested_until > now() AS rests FROM jobdaemon.keys ORDER BY 1"
    )
    assert rows.fetchall() == [
        {"alias": "new", "running": 2, "spent_today": 7, "rest_reason": "why", "rests": True},
        {"alias": "old", "running": 0, "spent_today": 0, "rest_reason": None, "rests": None},
    ]


def _waiting_for(sql: Sql, order_id: int) -> str | None:
    row = sql.execute("SELECT waiting_for FROM jobdaemon.order_progress WHERE order_id = %s", [order_id]).fetchone()
    assert row is not None
    return row["waiting_for"]  # type: ignore[no-any-return]


async def test_waiting_for_says_why(sql: Sql, order_factory: Orders, claimed_job_factory: Claimed) -> None:
    """An order says whether it waits for a slot, a pause, its time or a daemon; a running or ended one waits for nothing."""
    order_id = order_factory("Free")
    assert _waiting_for(sql, order_id) == "nothing is in its way: the next free worker of queue beautify takes it"
    sql.execute("UPDATE jobdaemon.procrastinate_workers SET last_heartbeat = now() - interval '1 hour'")
    assert _waiting_for(sql, order_id) == "no daemon serves queue beautify"
    sql.execute("SELECT jobdaemon.pause_queue('beautify')")
    assert _waiting_for(sql, order_id) == "queue beautify is paused"
    sql.execute("SELECT jobdaemon.resume_queue('beautify')")
    later = order_factory("Free", at="tomorrow")
    assert str(_waiting_for(sql, later)).startswith("it is scheduled to wait until ")
    sql.execute("UPDATE jobdaemon.procrastinate_workers SET last_heartbeat = now()")
    await claimed_job_factory.claim("beautify")
    assert _waiting_for(sql, order_id) is None
    sql.execute("SELECT jobdaemon.cancel_order(%s)", [later])
    assert _waiting_for(sql, later) is None


async def test_running_jobs_workers_and_failures(sql: Sql, claimed_job_factory: Claimed) -> None:
    """A running job shows its daemon and start; a failed attempt its reason; throughput and timings count what ended."""
    job = await claimed_job_factory.beautify(plan="Free")
    row = sql.execute("SELECT * FROM jobdaemon.running_jobs").fetchone()
    assert row is not None
    assert (row["job_id"], row["queue"], row["attempt"], row["host"]) == (job.id, "beautify", 1, "test")
    assert row["started_at"] is not None
    workers = sql.execute("SELECT daemon_id, status, running FROM jobdaemon.workers").fetchall()
    assert workers == [{"daemon_id": claimed_job_factory.daemon_id, "status": "running", "running": 1}]
    transition = Transition(job, End.RETRY, error="why", error_kind="Kind", seconds=1.5)
    await claimed_job_factory.store.commit([transition], daemon_id=claimed_job_factory.daemon_id)
    failure = sql.execute("SELECT * FROM jobdaemon.failures").fetchone()
    assert failure is not None
    assert (failure["error"], failure["error_kind"], failure["attempt"], failure["outcome"]) == ("why", "Kind", 1, "retry")
    await claimed_job_factory.store.promote()
    [again] = await claimed_job_factory.claim("beautify")
    await claimed_job_factory.store.commit([Transition(again, End.SUCCEEDED)], daemon_id=None)
    assert sql.execute("SELECT queue, succeeded, failed FROM jobdaemon.throughput").fetchall() == [
        {"queue": "beautify", "succeeded": 1, "failed": 0}
    ]
    timing = sql.execute("SELECT * FROM jobdaemon.stage_timings").fetchone()
    assert timing is not None
    assert timing["jobs"] == 1
    assert 0 <= timing["run_seconds_p50"] < 60


@pytest.mark.parametrize(
    ("lease", "said_nothing", "status"),
    [("5 minutes", "2 minutes", "running"), ("5 minutes", "6 minutes", "silent"), ("9 seconds", "10 seconds", "silent")],
)
async def test_a_daemons_own_lease_says_when_it_is_silent(
    sql: Sql, daemon_id: int, lease: str, said_nothing: str, status: str
) -> None:
    """A daemon is silent once its lease has lapsed, however long that is; what could run counts the slots of one that is not."""
    update = "UPDATE jobdaemon.procrastinate_workers SET lease = %s::interval, last_heartbeat = now() - %s::interval"
    sql.execute(update, [lease, said_nothing])
    workers = sql.execute("SELECT daemon_id, status FROM jobdaemon.workers").fetchall()
    assert workers == [{"daemon_id": daemon_id, "status": status}]
    if lease == "5 minutes":
        most = sql.execute("SELECT most FROM jobdaemon.lock_steering(ARRAY['upload'], ARRAY['upload'])").fetchall()
        assert most == [{"most": 1 if status == "running" else None}]
