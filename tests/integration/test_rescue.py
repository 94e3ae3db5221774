"""Heartbeat, rescue and recovery: what a dead, removed or cut-off daemon leaves is taken up, and costs nobody an attempt."""

from __future__ import annotations

import asyncio
import functools
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import psycopg
import pytest
from psycopg.rows import dict_row

from jobdaemon import schema
from jobdaemon.domain.outcome import End, Transition
from jobdaemon.domain.retry import MAX_DEATHS
from jobdaemon.embedded import EmbeddedPostgres
from jobdaemon.events import DatabaseBack, JobsRescued, JobStarted, OrderSettled, UpkeepFailed
from jobdaemon.ports import Attempt
from jobdaemon.queue.store import PostgresJobStore
from tests.daemons import NO_POLL, QUICK, Stages, running_daemon, until
from tests.factories import Claimed, Jobs, Orders, Sql
from tests.fixtures_engine import ensure_rows

LEASE = timedelta(minutes=1)


def _silence(sql: Sql, daemon_id: int) -> None:
    sql.execute(
        "UPDATE jobdaemon.procrastinate_workers SET last_heartbeat = now() - interval '1 hour' WHERE id = %s", [daemon_id]
    )


def _steady(sql: Sql, daemon_id: int) -> None:
    """This daemon has beaten for an hour: it may judge others."""
    sql.execute(
        "UPDATE jobdaemon.procrastinate_workers SET last_heartbeat = clock_timestamp(), steady_since = now() - interval '1 hour'"
        " WHERE id = %s",
        [daemon_id],
    )


async def test_only_silent_or_removed_workers_lose_their_jobs(
    store: PostgresJobStore, claimed_job_factory: Claimed, job_factory: Jobs, sql: Sql
) -> None:
    """A fresh heartbeat keeps its jobs; a stale or deleted row loses them; a queue that is not ours is left alone."""
    other = await store.register(host="other", pid=1, version="0", queues={})
    mine, lost = job_factory(), job_factory()
    claimed = [job.id for job in await claimed_job_factory.claim("upload", 1)]
    assert claimed == [mine]
    await store.claim("upload", other, 1)
    foreign = job_factory("mail", "send")
    sql.execute("UPDATE jobdaemon.procrastinate_jobs SET status = 'doing' WHERE id = %s", [foreign])
    observer = await store.register(host="observer", pid=2, version="0", queues={})

    async def lost_ids() -> list[int]:
        _steady(sql, observer)
        return [lost.job.id for lost in (await store.lost_jobs(observer, [], lease=LEASE)).lost]

    assert await lost_ids() == []
    _silence(sql, other)
    assert await lost_ids() == [lost]
    assert (await store.lost_jobs(observer, [], lease=None)).lost == []
    sql.execute("DELETE FROM jobdaemon.procrastinate_workers WHERE id = %s", [other])
    assert await lost_ids() == [lost]


async def test_dead_daemons_job_is_rescued_once_and_costs_nothing(
    engine_database: str, claimed_job_factory: Claimed, sql: Sql
) -> None:
    """Two daemons see the job of a silent third: one of them runs it, as its first attempt, with one death counted."""
    job = await claimed_job_factory.beautify(plan="Free")
    _silence(sql, claimed_job_factory.daemon_id)
    stages = Stages()
    async with (
        running_daemon(engine_database, stages, engine=QUICK) as one,
        running_daemon(engine_database, stages, engine=QUICK) as two,
    ):
        done = [asyncio.ensure_future(daemon.events.wait_for(OrderSettled, timeout=20)) for daemon in (one, two)]
        finished, pending = await asyncio.wait(done, return_when=asyncio.FIRST_COMPLETED)
        for task in (*finished, *pending):
            task.cancel()
        await asyncio.gather(*done, return_exceptions=True)
        rescues = [event for daemon in (one, two) for event in daemon.seen if isinstance(event, JobsRescued)]
    assert [(event.count, event.daemon_id) for event in rescues] == [(1, claimed_job_factory.daemon_id)]
    assert [run for run in stages.runs if run[0] == job.id] == [(job.id, 1)]
    [row, *_] = claimed_job_factory.orders.jobs(job.order_id or 0)
    assert (row["status"], row["attempts"], row["deaths"]) == ("succeeded", 1, 1)
    assert claimed_job_factory.orders.row(job.order_id or 0)["status"] == "completed"


async def test_no_rescue_before_a_whole_lease_of_own_beats(engine_database: str, claimed_job_factory: Claimed, sql: Sql) -> None:
    """A new daemon leaves others' jobs alone until it has beaten for a lease, and no longer, even without polls."""
    await claimed_job_factory.beautify(plan="Free")
    _silence(sql, claimed_job_factory.daemon_id)
    loop = asyncio.get_running_loop()
    async with running_daemon(engine_database, Stages(), engine=replace(QUICK, poll=NO_POLL.poll)) as daemon:
        began = loop.time()
        await daemon.events.wait_for(JobsRescued, timeout=20)
        assert QUICK.lease.total_seconds() * 0.8 <= loop.time() - began < 20  # the poll is a minute away


async def test_a_round_that_broke_off_is_done_again_before_the_lease_is_over(
    engine_database: str, claimed_job_factory: Claimed, sql: Sql
) -> None:
    """A round of upkeep that fails may have been the one that would have rescued: the next looks, long before poll and lease."""
    await claimed_job_factory.beautify(plan="Free")
    _silence(sql, claimed_job_factory.daemon_id)
    sql.execute("ALTER TABLE jobdaemon.procrastinate_jobs RENAME TO away")
    engine = replace(NO_POLL, lease=timedelta(seconds=20))
    async with running_daemon(engine_database, Stages(), engine=engine, team_size=0) as daemon:
        await until(lambda: any(isinstance(event, UpkeepFailed) and "upkeep" in event.error for event in daemon.seen))
        _steady(sql, daemon.supervisor.daemon_id)
        sql.execute("ALTER TABLE jobdaemon.away RENAME TO procrastinate_jobs")
        await daemon.events.wait_for(JobsRescued, timeout=15)  # it takes 4 s; without, 20


async def test_poison_is_a_dead_letter_after_so_many_deaths(claimed_job_factory: Claimed, sql: Sql) -> None:
    """Rests grow from death to death, no attempt is spent, and the last death fails the order with a reason."""
    from jobdaemon.domain.expand import writes_when_dead
    from jobdaemon.domain.retry import after_death

    store = claimed_job_factory.store
    job = await claimed_job_factory.beautify(plan="Free")
    order_id = job.order_id
    assert order_id is not None
    for death in range(1, MAX_DEATHS + 1):
        dead = functools.partial(writes_when_dead, job)
        transition = after_death(job, ran_alone=True, other_deaths=0, dead=dead)
        await store.commit([transition], daemon_id=None)
        if death < MAX_DEATHS:
            [row] = claimed_job_factory.orders.jobs(order_id)
            assert (row["status"], row["attempts"], row["deaths"]) == ("todo", 0, death)
            sql.execute("UPDATE jobdaemon.procrastinate_jobs SET scheduled_at = NULL")
            [job] = await claimed_job_factory.claim("beautify")
    order = claimed_job_factory.orders.row(order_id)
    assert (order["status"], order["error"]) == ("failed", f"{MAX_DEATHS} workers died while this job ran")
    assert claimed_job_factory.orders.jobs(order_id)[0]["status"] == "failed"


async def test_removed_daemon_registers_again_and_finishes_what_it_runs(
    engine_database: str, order_factory: Orders, sql: Sql
) -> None:
    """When somebody deletes its row a daemon registers anew, what it runs ends in peace, and it claims on."""
    going, may_go = asyncio.Event(), asyncio.Event()

    async def gate(attempt: Attempt) -> None:
        going.set()
        await may_go.wait()

    stages = Stages(gate)
    async with running_daemon(engine_database, stages, engine=QUICK) as daemon:
        before = daemon.supervisor.daemon_id
        first = order_factory("Free")
        async with asyncio.timeout(60):
            await going.wait()
        await asyncio.to_thread(sql.execute, "DELETE FROM jobdaemon.procrastinate_workers WHERE id = %s", [before])
        await until(lambda: daemon.supervisor.daemon_id != before)
        # longer than a lease: its own rescue must not take the job it runs
        await asyncio.sleep(1.5)
        settled = daemon.events.expect(OrderSettled, lambda event: event.order_id == first)
        may_go.set()
        assert (await settled.wait()).status == "completed"
    assert all(attempt == 1 for _, attempt in stages.runs)
    assert len(stages.runs) == len(set(stages.runs))


def _killed(sql: Sql, application: str) -> int:
    """Terminate a daemon's connections of one kind; how many there were."""
    row = sql.execute(
        "SELECT count(pg_terminate_backend(pid)) AS n FROM pg_stat_activity"
        " WHERE application_name LIKE %s AND datname = current_database()",
        [application],
    ).fetchone()
    assert row is not None
    return int(row["n"])


async def test_lost_listening_connection_comes_back(engine_database: str, order_factory: Orders, sql: Sql) -> None:
    """A LISTEN connection killed by the server is replaced at once, and work enqueued meanwhile is found without the poll."""
    stages = Stages()
    async with running_daemon(engine_database, stages, engine=NO_POLL) as daemon:
        for _ in range(3):
            done = daemon.events.expect(OrderSettled)
            await until(lambda: _killed(sql, "jobdaemon pulse") == 1)
            order_factory("Free")
            assert (await done.wait(60)).status == "completed"


async def test_every_connection_killed_in_the_middle_of_work(engine_database: str, order_factory: Orders, sql: Sql) -> None:
    """Backends killed again and again, whatever they are doing: every order completes and no attempt is spent."""
    stages = Stages()
    async with running_daemon(engine_database, stages, team_size=5, engine=QUICK):
        orders = [order_factory("Free") for _ in range(30)]
        for _ in range(15):
            _killed(sql, "jobdaemon %")
            await asyncio.sleep(0.1)  # let some work through between two kills
        # An order that was settled by a commit whose answer was lost tells nobody: look at the rows.
        await until(lambda: {order_factory.row(order_id)["status"] for order_id in orders} == {"completed"}, timeout_s=60)
    for order_id in orders:
        assert [image["status"] for image in order_factory.images(order_id)] == ["stored", "stored"]
        assert len(order_factory.jobs(order_id)) == 4
    failed = sql.execute("SELECT * FROM jobdaemon.attempts WHERE outcome IN ('retry', 'failed')").fetchall()
    assert failed == []


async def test_claim_whose_answer_was_lost_is_handed_back(engine_database: str, order_factory: Orders, sql: Sql) -> None:
    """A job that the database gave to a daemon that never heard of it is noticed by that daemon and run."""
    stages = Stages()
    async with running_daemon(engine_database, stages, engine=QUICK) as daemon:
        await asyncio.to_thread(sql.execute, "SELECT jobdaemon.pause_queue('beautify')")
        order_id = order_factory("Free")
        settled = daemon.events.expect(OrderSettled)
        await asyncio.to_thread(sql.execute, "UPDATE jobdaemon.queues SET paused = false")
        # in one statement with the unpausing a real claim could get it first: take it by hand in the daemon's name
        await asyncio.to_thread(
            sql.execute,
            "UPDATE jobdaemon.procrastinate_jobs SET status = 'doing', worker_id = %s, token = 999999"
            " WHERE args ->> 'order_id' = %s::text AND status = 'todo'",
            [daemon.supervisor.daemon_id, str(order_id)],
        )
        assert (await settled.wait(60)).status == "completed"


@pytest.fixture
def own_server() -> Iterator[tuple[EmbeddedPostgres, str]]:
    """A Postgres of the test's own, migrated, that may be stopped."""
    folder = Path(tempfile.mkdtemp(prefix="jobdaemon-test-"))
    folder.chmod(0o711)
    server = EmbeddedPostgres(folder, options={"fsync": "off"})
    url = server.acquire()
    try:
        schema.migrate(url)
        yield server, url
    finally:
        server.release()
        shutil.rmtree(folder, ignore_errors=True)


async def test_postgres_restarted_in_the_middle_of_work(own_server: tuple[EmbeddedPostgres, str]) -> None:
    """While Postgres is away the daemon waits, what runs ends and is committed when it is back, and nothing runs twice."""
    server, url = own_server
    await ensure_rows(url)
    going, may_go = asyncio.Event(), asyncio.Event()

    async def gate(attempt: Attempt) -> None:
        going.set()
        await may_go.wait()

    stages = Stages(gate)
    with psycopg.connect(url, autocommit=True, row_factory=dict_row) as sql:
        order_id = Orders(sql)("Free")
    async with running_daemon(url, stages, engine=QUICK) as daemon:
        async with asyncio.timeout(60):
            await going.wait()
        finished = daemon.events.expect(JobStarted)
        back = daemon.events.expect(DatabaseBack)
        await asyncio.to_thread(server.release)
        may_go.set()
        # longer than the lease: whoever is back first must not take everybody's jobs for abandoned
        await asyncio.sleep(1.5)
        settled = daemon.events.expect(OrderSettled)
        await asyncio.to_thread(server.acquire)
        await back.wait(60)
        await finished.wait(60)
        assert (await settled.wait(30)).status == "completed"
    with psycopg.connect(url, autocommit=True, row_factory=dict_row) as sql:
        rows = Orders(sql).jobs(order_id)
        assert [(row["status"], row["attempts"], row["deaths"]) for row in rows] == [("succeeded", 1, None)] * 4
    assert len(stages.runs) == len(set(stages.runs)) == 4


async def test_stop_hands_back_unspent(engine_database: str, order_factory: Orders) -> None:
    """A daemon that must go before its work is done hands it back at once: no attempt, no death, ready for the next."""
    going = asyncio.Event()

    async def gate(attempt: Attempt) -> None:
        going.set()
        await asyncio.Event().wait()

    order_id = order_factory("Free")
    async with running_daemon(engine_database, Stages(gate), engine=QUICK), asyncio.timeout(60):
        await going.wait()
    [row] = order_factory.jobs(order_id)
    assert (row["status"], row["attempts"], row["deaths"], row["worker_id"]) == ("todo", 0, None, None)
    assert row["scheduled_at"] is None


async def test_stop_waits_for_what_ends_within_the_grace(engine_database: str, order_factory: Orders) -> None:
    """The first signal only stops claiming: an attempt that ends within the grace is committed as a success."""
    going, may_go = asyncio.Event(), asyncio.Event()

    async def gate(attempt: Attempt) -> None:
        going.set()
        await may_go.wait()

    order_id = order_factory("Free")
    async with running_daemon(engine_database, Stages(gate), engine=QUICK) as daemon:
        async with asyncio.timeout(60):
            await going.wait()
        daemon.supervisor.stop("SIGTERM")
        may_go.set()
        async with asyncio.timeout(60):
            await daemon.task
    statuses = [row["status"] for row in order_factory.jobs(order_id)]
    assert statuses == ["succeeded", "todo"]


async def test_handed_back_twice_is_harmless(store: PostgresJobStore, claimed_job_factory: Claimed) -> None:
    """A hand-back whose answer was lost is sent again and changes nothing, even after somebody else claimed the job."""
    job = await claimed_job_factory.beautify(plan="Free")
    back = Transition(job, End.HANDED_BACK)
    await store.commit([back], daemon_id=None)
    [again] = await claimed_job_factory.claim("beautify")
    await store.commit([back], daemon_id=None)
    [row] = claimed_job_factory.orders.jobs(job.order_id or 0)
    assert (row["status"], row["token"]) == ("doing", again.token)


async def test_rows_of_daemons_that_are_long_gone_are_pruned(
    store: PostgresJobStore, claimed_job_factory: Claimed, sql: Sql
) -> None:
    """After a day of silence, stopped or dead; who runs a job, whom a failed attempt names, and who prunes, stays."""

    async def daemon(silent: str, status: str = "running") -> int:
        daemon_id = await store.register(host="box", pid=1, version="0", queues={})
        sql.execute(
            "UPDATE jobdaemon.daemons SET started_at = now() - interval '9 days', status = %s,"
            " stopped_at = CASE WHEN %s = 'stopped' THEN now() - %s::interval END WHERE id = %s",
            [status, status, silent, daemon_id],
        )
        beat = "'-infinity'" if status == "stopped" else "now() - %s::interval"
        parameters = [daemon_id] if status == "stopped" else [silent, daemon_id]
        sql.execute(f"UPDATE jobdaemon.procrastinate_workers SET last_heartbeat = {beat} WHERE id = %s".encode(), parameters)
        return daemon_id

    async def pruned(limit: int = 100) -> int:
        return await store.prune_daemons(observer, silence=timedelta(days=1), limit=limit)

    dead, stopped = await daemon("25 hours"), await daemon("25 hours", "stopped")
    removed = await daemon("25 hours")
    sql.execute("DELETE FROM jobdaemon.procrastinate_workers WHERE id = %s", [removed])
    lately = [await daemon("23 hours"), await daemon("23 hours", "stopped")]
    busy, named = await daemon("25 hours"), await daemon("25 hours")
    observer = await daemon("25 hours")
    job = await claimed_job_factory.beautify(plan="Free")
    sql.execute("UPDATE jobdaemon.procrastinate_jobs SET worker_id = %s WHERE id = %s", [busy, job.id])
    sql.execute(
        "INSERT INTO jobdaemon.attempts (job_id, queue, attempt, outcome, daemon_id) VALUES (%s, 'upload', 1, 'retry', %s)",
        [job.id, named],
    )
    kept = {*lately, busy, named, observer, claimed_job_factory.daemon_id}
    assert await pruned(limit=1) == 1
    assert await pruned() == 2
    rows = sql.execute("SELECT id FROM jobdaemon.daemons").fetchall()
    assert {row["id"] for row in rows} == kept
    assert not kept & {dead, stopped, removed}
    sql.execute("UPDATE jobdaemon.procrastinate_jobs SET status = 'succeeded' WHERE id = %s", [job.id])
    assert await pruned() == 1


async def test_a_running_daemon_prunes_the_others_and_writes_its_own_row_again(engine_database: str, sql: Sql) -> None:
    """One that stood still for days and lost its row comes back under its own id, with what it serves."""
    sql.execute("INSERT INTO jobdaemon.procrastinate_workers (last_heartbeat) VALUES (now() - interval '2 days')")
    sql.execute(
        "INSERT INTO jobdaemon.daemons (id, host, pid, version, queues, started_at)"
        " SELECT id, 'gone', 1, '0', '{}', now() - interval '3 days' FROM jobdaemon.procrastinate_workers"
    )

    def hosts_of(condition: str) -> int:
        return len(sql.execute(f"SELECT FROM jobdaemon.daemons WHERE {condition}".encode()).fetchall())

    async with running_daemon(engine_database, Stages(), engine=replace(QUICK, poll=timedelta(seconds=0.1))) as daemon:
        daemon_id = daemon.supervisor.daemon_id
        await until(lambda: hosts_of("host = 'gone'") == 0, timeout_s=20)
        before = sql.execute("SELECT host, pid, version, queues, keys, status FROM jobdaemon.daemons").fetchall()
        await asyncio.to_thread(sql.execute, "DELETE FROM jobdaemon.daemons")
        await until(lambda: hosts_of(f"id = {daemon_id}") == 1, timeout_s=20)
        assert sql.execute("SELECT host, pid, version, queues, keys, status FROM jobdaemon.daemons").fetchall() == before
        assert daemon.supervisor.daemon_id == daemon_id
