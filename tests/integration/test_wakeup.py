"""Wake-up: work starts by notification and by timer, never by waiting for the poll; and an idle daemon is quiet."""

from __future__ import annotations

import asyncio
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import psycopg
import pytest
from psycopg.rows import dict_row

from jobdaemon import schema
from jobdaemon.domain.retry import RetryPolicy
from jobdaemon.embedded import EmbeddedPostgres
from jobdaemon.errors import RateLimitedError, RetryableError
from jobdaemon.events import JobStarted, OrderSettled
from jobdaemon.ports import Attempt
from jobdaemon.queue.attempt import AttemptRules
from jobdaemon.queue.supervisor import EngineRules
from tests.daemons import NO_POLL, Stages, running_daemon, until
from tests.factories import Jobs, Orders, Sql
from tests.fixtures_engine import ensure_rows


async def test_an_enqueued_order_starts_at_once(engine_database: str, order_factory: Orders) -> None:
    """From before enqueue_order's COMMIT to the start of the beautify attempt nothing waits for the poll."""
    delays: list[float] = []
    async with running_daemon(engine_database, Stages(), engine=NO_POLL) as daemon:
        for _ in range(20):
            started = daemon.events.expect(JobStarted, lambda event: event.queue == "beautify")
            settled = daemon.events.expect(OrderSettled)
            began = time.monotonic()
            await asyncio.to_thread(order_factory, "Free")
            await started.wait()
            delays.append(time.monotonic() - began)
            await settled.wait()
    median_ms = statistics.median(delays) * 1000
    print(f"\nenqueue -> start: median {median_ms:.1f} ms, worst {max(delays) * 1000:.1f} ms")  # noqa: T201
    assert median_ms < 10_000  # 10 ms measured; whoever waits for the poll waits for a minute


@pytest.mark.parametrize("error", [RetryableError("once"), RateLimitedError("busy", retry_after=timedelta(seconds=0.5))])
async def test_a_due_retry_starts_by_timer(engine_database: str, order_factory: Orders, error: Exception) -> None:
    """A retry or a snooze starts when it falls due, with the poll a minute away."""
    failed = False

    async def gate(attempt: Attempt) -> None:
        nonlocal failed
        if not failed:
            failed = True
            raise error

    policy = RetryPolicy(attempts=3, backoff=timedelta(seconds=0.5), cap=timedelta(seconds=1), jitter=0.0)
    rules = AttemptRules(run_timeout=timedelta(seconds=10), retry=policy)
    async with running_daemon(engine_database, Stages(gate), engine=NO_POLL, rules=rules) as daemon:
        settled = daemon.events.expect(OrderSettled)
        starts: list[float] = []
        daemon.events.subscribe(lambda event: starts.append(time.monotonic()) if isinstance(event, JobStarted) else None)
        order_factory("Free")
        assert (await settled.wait(60)).status == "completed"
    waited = starts[1] - starts[0]
    print(f"\ndue after 0.5 s, started after {waited:.3f} s")  # noqa: T201
    assert 0.49 <= waited < 30  # the poll is a minute away


async def test_an_order_for_later_starts_by_timer(engine_database: str, order_factory: Orders, sql: Sql) -> None:
    """A job scheduled by another client arms the timer of a daemon that was asleep."""
    async with running_daemon(engine_database, Stages(), engine=NO_POLL) as daemon:
        first = daemon.events.expect(OrderSettled)
        order_factory("Free")
        await first.wait()
        settled = daemon.events.expect(OrderSettled)
        row = sql.execute("SELECT now() + interval '0.7 seconds' AS at").fetchone()
        assert row is not None
        order_factory("Free", at=row["at"])
        assert (await settled.wait(60)).status == "completed"


async def test_more_due_jobs_than_one_batch(engine_database: str, sql: Sql) -> None:
    """Thousands of jobs that fall due at once are all let in, not one batch per poll."""
    async with running_daemon(engine_database, Stages(), engine=NO_POLL, team_size=0):
        await asyncio.to_thread(
            sql.execute,
            "INSERT INTO jobdaemon.procrastinate_jobs (queue_name, task_name, scheduled_at)"
            " SELECT 'upload', 'x', now() + interval '0.3 seconds' FROM generate_series(1, 2500)",
        )
        waiting = "SELECT FROM jobdaemon.procrastinate_jobs WHERE scheduled_at IS NOT NULL LIMIT 1"
        await until(lambda: sql.execute(waiting).fetchone() is None)


async def test_operators_are_heard_without_the_poll(engine_database: str, order_factory: Orders, sql: Sql) -> None:
    """Pause, resize and resume reach a daemon whose poll is a minute away."""
    async with running_daemon(engine_database, Stages(), engine=NO_POLL) as daemon:
        await asyncio.to_thread(sql.execute, "SELECT jobdaemon.pause_queue('beautify')")
        order_factory("Free")
        with pytest.raises(TimeoutError):
            await daemon.events.wait_for(JobStarted, timeout=0.5)
        settled = daemon.events.expect(OrderSettled)
        await asyncio.to_thread(sql.execute, "SELECT jobdaemon.resize_queue('upload', team_size => 0)")
        await asyncio.to_thread(sql.execute, "SELECT jobdaemon.resume_queue('beautify')")
        with pytest.raises(TimeoutError):
            await settled.wait(1)
        settled = daemon.events.expect(OrderSettled)
        await asyncio.to_thread(sql.execute, "SELECT jobdaemon.resize_queue('upload', team_size => 1)")
        assert (await settled.wait(60)).status == "completed"


async def test_one_bad_job_holds_nobody_up(engine_database: str, job_factory: Jobs, order_factory: Orders) -> None:
    """Jobs with arguments that make no sense die as dead letters, and their slots serve the next."""
    bad = [
        job_factory("generate.local", "jobdaemon.generate", 999, args)
        for args in ({}, {"order_id": 1}, {"order_id": 10**6, "images": "x"}, {"order_id": None})
    ]
    bad += [job_factory("upload", "somebody.elses", 999, {"order_id": 2**70}), job_factory("beautify", "jobdaemon.beautify", 999)]
    policy = RetryPolicy(attempts=1, backoff=timedelta(0), cap=timedelta(0), jitter=0.0)
    rules = AttemptRules(run_timeout=timedelta(seconds=10), retry=policy)
    async with running_daemon(engine_database, Stages(), rules=rules, team_size=1) as daemon:
        settled = daemon.events.expect(OrderSettled)
        order_factory("Free")
        assert (await settled.wait(60)).status == "completed"
    assert {job_factory.row(job_id)["status"] for job_id in bad} <= {"failed", "aborted"}


@pytest.fixture
def counting_server() -> Iterator[str]:
    """A Postgres that counts statements, migrated."""
    folder = Path(tempfile.mkdtemp(prefix="jobdaemon-test-"))
    folder.chmod(0o711)
    options = {"fsync": "off", "shared_preload_libraries": "pg_stat_statements", "autovacuum": "off"}
    server = EmbeddedPostgres(folder, options=options)
    try:
        url = server.acquire()
        schema.migrate(url)
        yield url
    finally:
        server.release()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
async def test_an_idle_daemon_is_quiet(counting_server: str) -> None:
    """With the default settings and nothing to do, a daemon sends at most one statement a second."""
    await ensure_rows(counting_server)
    second = timedelta(seconds=1)
    engine = EngineRules(heartbeat=5 * second, lease=15 * second, poll=5 * second, stop_grace=second)
    with psycopg.connect(counting_server, autocommit=True, row_factory=dict_row) as sql:
        sql.execute("CREATE EXTENSION pg_stat_statements")
        async with running_daemon(counting_server, Stages(), engine=engine):
            await asyncio.sleep(2)
            sql.execute("SELECT pg_stat_statements_reset()")
            await asyncio.sleep(20)
            rows = sql.execute(
                "SELECT query, calls FROM pg_stat_statements WHERE query NOT LIKE '%pg_stat_statements%' AND toplevel"
            ).fetchall()
    calls = sum(row["calls"] for row in rows)
    print(f"\nidle: {calls / 20:.2f} statements/s: " + ", ".join(f"{row['calls']}x {row['query'][:40]}" for row in rows))  # noqa: T201
    assert 0 < calls <= 20
