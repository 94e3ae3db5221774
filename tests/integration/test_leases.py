"""Leases under delays: claims that are answered late, looks that are held up, rescues that come late, clocks that leap."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import psycopg
import pytest

from jobdaemon.domain.job import Job
from jobdaemon.domain.outcome import End, Transition, Verdict
from jobdaemon.errors import LeaseLostError
from jobdaemon.events import DatabaseBack, DatabaseLost, JobsRescued, JobStarted
from jobdaemon.ports import Attempt
from jobdaemon.queue import team
from jobdaemon.queue.store import PostgresJobStore
from tests.daemons import NO_POLL, QUICK, RunningDaemon, Stages, running_daemon, until
from tests.factories import Claimed, Jobs, Orders, Sql

LEASE = timedelta(seconds=15)
SHIFT = (
    "UPDATE jobdaemon.procrastinate_workers SET last_heartbeat = last_heartbeat + %(by)s::interval,"
    " steady_since = steady_since + %(by)s::interval"
)

#: A claim that waits for its queue's lock.
WAITS = (
    "SELECT FROM pg_stat_activity WHERE application_name = 'jobdaemon claim' AND datname = current_database()"
    " AND wait_event_type = 'Lock' AND wait_event = 'advisory'"
)


@dataclass(slots=True)
class Proxy:
    """
    Stands between a daemon and Postgres, and may keep jobs that Postgres gives to the daemon to itself for a while.

    Attributes:
        lets_through: whether answers to claims that brought jobs reach the daemon.
        asked: how often the daemon said something over a connection for claims.
        hung_up: how many connections for claims the daemon has closed.
    """

    lets_through: asyncio.Event = field(default_factory=asyncio.Event)
    asked: int = 0
    hung_up: int = 0

    async def serve(self, socket: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server_reader, server_writer = await asyncio.open_unix_connection(socket)
        is_claim = False

        async def ask() -> None:
            nonlocal is_claim
            while data := await reader.read(65536):
                is_claim |= b"jobdaemon claim" in data
                self.asked += is_claim
                server_writer.write(data)
            self.hung_up += is_claim
            server_writer.close()

        async def answer() -> None:
            while data := await server_reader.read(65536):
                if is_claim and b"jobdaemon." in data:
                    await self.lets_through.wait()
                writer.write(data)
            writer.close()

        try:
            await asyncio.gather(ask(), answer(), return_exceptions=True)
        finally:
            for each in (server_writer, writer):
                each.close()
                with suppress(OSError):
                    await each.wait_closed()


@asynccontextmanager
async def late_answers(url: str) -> AsyncIterator[tuple[Proxy, str]]:
    """A proxy that lets all through, and the URL of its Postgres."""
    real = parse_qs(urlsplit(url).query)["host"][0]
    folder = tempfile.mkdtemp(prefix="jobdaemon-test-")
    proxy = Proxy()
    proxy.lets_through.set()
    socket = ".s.PGSQL.5432"

    serving: set[asyncio.Future[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        conversation = asyncio.ensure_future(proxy.serve(f"{real}/{socket}", reader, writer))
        serving.add(conversation)
        await asyncio.wait([conversation])

    server = await asyncio.start_unix_server(serve, Path(folder) / socket)
    try:
        yield proxy, url.replace(real, folder)
    finally:
        proxy.lets_through.set()
        server.close()
        for conversation in serving:
            conversation.cancel()
        await asyncio.gather(*serving, return_exceptions=True)
        shutil.rmtree(folder)


@dataclass(slots=True)
class Calls:
    """
    Attempts of one task that last until they are told to end.

    Attributes:
        runs: job and token of each that began.
        is_over: set to let all end.
    """

    task: str = "jobdaemon.beautify"
    runs: list[tuple[int, int | None]] = field(default_factory=list)
    is_over: asyncio.Event = field(default_factory=asyncio.Event)

    async def gate(self, attempt: Attempt) -> None:
        """Wait, in attempts of this task."""
        if attempt.job.task == self.task:
            self.runs.append((attempt.job.id, attempt.job.token))
            await self.is_over.wait()


def rescues(*daemons: RunningDaemon) -> list[JobsRescued]:
    return [event for daemon in daemons for event in daemon.seen if isinstance(event, JobsRescued)]


# The answer to a claim


async def test_a_claim_answered_late_is_not_started_after_it_was_handed_back(
    engine_database: str, order_factory: Orders, sql: Sql
) -> None:
    """A job that its daemon handed back as a stray does not start when the claim's answer comes at last."""
    sql.execute("UPDATE jobdaemon.queues SET cluster_limit = 1 WHERE name = 'beautify'")
    engine, calls = replace(QUICK, lease=timedelta(seconds=60)), Calls()
    async with late_answers(engine_database) as (proxy, url), running_daemon(url, Stages(calls.gate), engine=engine) as slow:
        proxy.lets_through.clear()
        order_id = order_factory("Free")
        await until(lambda: order_factory.jobs(order_id)[0]["worker_id"] == slow.supervisor.daemon_id)
        async with running_daemon(engine_database, Stages(calls.gate), engine=engine):
            await until(lambda: len(calls.runs) == 1)
            asked = proxy.asked
            proxy.lets_through.set()
            await until(lambda: proxy.asked > asked)  # it goes on: that answer was read
            assert [event.daemon_id for event in rescues(slow)] == [slow.supervisor.daemon_id]
            calls.is_over.set()
            await until(lambda: order_factory.row(order_id)["status"] == "completed")
    assert len(calls.runs) == 1


async def test_a_claim_answered_late_runs_where_nobody_gave_it_up(engine_database: str, order_factory: Orders) -> None:
    """An answer that takes longer than usual, but not for two looks, is as good as any."""
    engine = replace(NO_POLL, heartbeat=timedelta(seconds=0.2))
    async with late_answers(engine_database) as (proxy, url), running_daemon(url, Stages(), engine=engine) as daemon:
        proxy.lets_through.clear()
        order_id = order_factory("Free")
        await until(lambda: order_factory.jobs(order_id)[0]["status"] == "doing")
        daemon.supervisor._upkeep.look()
        await asyncio.sleep(0.3)
        proxy.lets_through.set()
        await until(lambda: order_factory.row(order_id)["status"] == "completed")
        # On a slow machine another look may have come in between, and what is given up runs all the same: once.
        assert len(rescues(daemon)) <= 1
        assert [job["status"] for job in order_factory.jobs(order_id)].count("failed") == 0


async def test_a_stopping_daemon_starts_nothing_more(
    engine_database: str, job_factory: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A claim whose answer is still out when its team has finished is called off: others take its job up."""
    monkeypatch.setattr(team, "_LAST_COMMIT_S", 0.3)
    calls = Calls("jobdaemon.upload")
    async with late_answers(engine_database) as (proxy, url), running_daemon(url, Stages(calls.gate), engine=QUICK) as daemon:
        job_factory("upload")
        await until(lambda: len(calls.runs) == 1)
        proxy.lets_through.clear()
        late = job_factory("generate.local", "jobdaemon.upload")
        await until(lambda: job_factory.row(late)["status"] == "doing")
        daemon.supervisor.stop("SIGTERM")
        await asyncio.sleep(0.6)  # that team has finished; the other one has not
        proxy.lets_through.set()
        await until(lambda: proxy.hung_up > 0 or len(calls.runs) > 1)
        assert len(calls.runs) == 1


# The look for jobs that nobody runs


async def _two_daemons(store: PostgresJobStore, claimed_job_factory: Claimed, sql: Sql) -> tuple[int, int]:
    """One that looks, and one that runs a job; both have beaten for an hour."""
    await claimed_job_factory.beautify(plan="Free")
    looker = await store.register(host="looker", pid=1, version="0", queues={})
    for daemon in (looker, claimed_job_factory.daemon_id):
        await _beat(store, daemon)
    sql.execute("UPDATE jobdaemon.procrastinate_workers SET steady_since = now() - interval '1 hour'")
    return looker, claimed_job_factory.daemon_id


async def _beat(store: PostgresJobStore, daemon: int) -> None:
    assert await store.heartbeat(daemon, lease=LEASE, timeout=timedelta(seconds=5))


async def _found(store: PostgresJobStore, looker: int) -> list[int | None]:
    return [lost.owner for lost in (await store.lost_jobs(looker, [], lease=LEASE)).lost]


@pytest.mark.parametrize("leap", ["-1 minute", "-1 hour", "1 minute", "1 hour", "-8 seconds", "8 seconds"])
async def test_a_leap_of_the_clock_costs_nobody_a_job(
    store: PostgresJobStore, claimed_job_factory: Claimed, sql: Sql, leap: str
) -> None:
    """After the clock leapt either way, or all stood still, nothing is found lost, and a whole lease of beats comes first."""
    looker, worker = await _two_daemons(store, claimed_job_factory, sql)
    sql.execute(SHIFT, {"by": leap})
    assert await _found(store, looker) == []
    await _beat(store, looker)
    assert await _found(store, looker) == []
    [row] = sql.execute(
        "SELECT now() - steady_since < interval '10 seconds' AS is_new FROM jobdaemon.procrastinate_workers WHERE id = %s",
        [looker],
    ).fetchall()
    assert row["is_new"]
    assert worker


async def test_a_daemon_that_died_is_found_whatever_the_clock_did(
    store: PostgresJobStore, claimed_job_factory: Claimed, sql: Sql
) -> None:
    """A lease of beats after a leap, whoever has not beaten since is lost, also one whose last beat is an hour ahead."""
    looker, worker = await _two_daemons(store, claimed_job_factory, sql)
    for leap in ("1 hour", "-2 hours"):
        sql.execute(SHIFT, {"by": leap})
        await _beat(store, looker)
        sql.execute(
            "UPDATE jobdaemon.procrastinate_workers SET steady_since = steady_since - interval '16 seconds' WHERE id = %s",
            [looker],
        )
        assert await _found(store, looker) == [worker]


async def test_the_looker_itself_must_have_beaten_just_now(
    store: PostgresJobStore, claimed_job_factory: Claimed, sql: Sql
) -> None:
    """A dead daemon's job is found by a daemon that beats, not by one that has not for half a lease, or is not steady yet."""
    looker, worker = await _two_daemons(store, claimed_job_factory, sql)
    silent = "UPDATE jobdaemon.procrastinate_workers SET last_heartbeat = now() - %s::interval WHERE id = %s"
    sql.execute(silent, ["16 seconds", worker])
    assert await _found(store, looker) == [worker]
    sql.execute(silent, ["8 seconds", looker])
    assert await _found(store, looker) == []
    await _beat(store, looker)
    assert await _found(store, looker) == []  # that was a gap
    sql.execute("UPDATE jobdaemon.procrastinate_workers SET steady_since = now() - interval '16 seconds' WHERE id = %s", [looker])
    assert await _found(store, looker) == [worker]


async def test_a_beat_that_failed_is_a_gap(store: PostgresJobStore, claimed_job_factory: Claimed, sql: Sql) -> None:
    """After a beat that failed a daemon judges nobody before it has beaten for a whole lease, however short the outage was."""
    looker, worker = await _two_daemons(store, claimed_job_factory, sql)
    sql.execute("UPDATE jobdaemon.procrastinate_workers SET last_heartbeat = now() - interval '1 minute' WHERE id = %s", [worker])
    assert await _found(store, looker) == [worker]
    assert await store.heartbeat(looker, lease=LEASE, timeout=timedelta(seconds=5), is_steady=False)
    assert await _found(store, looker) == []
    await _beat(store, looker)
    assert await _found(store, looker) == []


async def test_a_daemon_says_when_a_beat_has_failed(engine_database: str, sql: Sql) -> None:
    """A daemon whose beat failed, in an outage much shorter than half a lease, is steady only since the next one."""
    steady = "SELECT extract(epoch FROM steady_since)::float8 AS at FROM jobdaemon.procrastinate_workers"
    engine = replace(QUICK, lease=timedelta(seconds=60))
    async with running_daemon(engine_database, Stages(), engine=engine) as daemon:
        [before] = sql.execute(steady).fetchall()
        lost, back = daemon.events.expect(DatabaseLost), daemon.events.expect(DatabaseBack)
        with psycopg.connect(engine_database) as locker:
            await asyncio.to_thread(locker.execute, "SELECT FROM jobdaemon.procrastinate_workers FOR NO KEY UPDATE")
            await lost.wait(10)
        await back.wait(10)
        [after] = sql.execute(steady).fetchall()
    assert after["at"] > before["at"] + QUICK.heartbeat.total_seconds() / 2


async def test_a_lease_that_is_longer_than_the_lookers_holds(
    store: PostgresJobStore, claimed_job_factory: Claimed, sql: Sql
) -> None:
    """Of two daemons with different settings, each is silent only after its own lease."""
    looker, worker = await _two_daemons(store, claimed_job_factory, sql)
    sql.execute(
        "UPDATE jobdaemon.procrastinate_workers SET lease = interval '1 minute', last_heartbeat = now() - interval '20 seconds'"
        " WHERE id = %s",
        [worker],
    )
    assert await _found(store, looker) == []


@pytest.mark.parametrize(
    ("steady_for", "other", "expected"),
    [(60, 5, 10), (60, 20, None), (5, 20, 10), (5, 2, 13), (12, 5, 10)],
    ids=[
        "another may lapse",
        "all lapsed are found",
        "is to be steady first",
        "lapses after that",
        "lapses, and is steady before",
    ],
)
async def test_a_look_tells_when_to_look_again(
    store: PostgresJobStore,
    claimed_job_factory: Claimed,
    sql: Sql,
    steady_for: int,
    other: int,
    expected: int | None,
) -> None:
    """A look may find more when a heartbeat lapses and the looker has beaten for a lease. Seconds ago; in seconds."""
    looker, worker = await _two_daemons(store, claimed_job_factory, sql)
    beaten = "UPDATE jobdaemon.procrastinate_workers SET last_heartbeat = now() - %s * interval '1 second' WHERE id = %s"
    sql.execute(beaten, [other, worker])
    sql.execute(
        "UPDATE jobdaemon.procrastinate_workers SET steady_since = now() - %s * interval '1 second' WHERE id = %s",
        [steady_for, looker],
    )
    lapse = (await store.lost_jobs(looker, [], lease=LEASE)).lapse
    assert (None if lapse is None else round(lapse.total_seconds())) == expected


@pytest.mark.parametrize("mishap", ["a lock", "a standstill"])
async def test_nobody_that_lives_is_rescued(engine_database: str, order_factory: Orders, sql: Sql, mishap: str) -> None:
    """Where beats and looks wait longer than a lease for a lock, or all daemons stand still, each keeps what it runs."""
    calls = Calls()
    stages = Stages(calls.gate)
    async with (
        running_daemon(engine_database, stages, team_size=1, engine=QUICK) as one,
        running_daemon(engine_database, stages, team_size=1, engine=QUICK) as other,
    ):
        orders = [order_factory("Free") for _ in range(2)]
        await until(lambda: len(calls.runs) == 2)
        await asyncio.sleep(1.5 * QUICK.lease.total_seconds())  # both are steady
        if mishap == "a lock":
            with psycopg.connect(engine_database) as locker:
                await asyncio.to_thread(locker.execute, "SELECT FROM jobdaemon.procrastinate_workers FOR NO KEY UPDATE")
                locker.execute("SAVEPOINT looks_wait")
                locker.execute("LOCK TABLE jobdaemon.procrastinate_workers IN ACCESS EXCLUSIVE MODE")
                await asyncio.sleep(2 * QUICK.lease.total_seconds())
                # Looks go on, beats do not yet.
                locker.execute("ROLLBACK TO looks_wait")
                await asyncio.sleep(0.5 * QUICK.lease.total_seconds())
        else:
            time.sleep(2 * QUICK.lease.total_seconds())  # noqa: ASYNC251 - both daemons are in this process
        await asyncio.sleep(0.5 * QUICK.lease.total_seconds())  # some looks
        assert rescues(one, other) == []
        calls.is_over.set()
        await until(lambda: {order_factory.row(order)["status"] for order in orders} == {"completed"})
    assert len(calls.runs) == 2
    deaths = sql.execute("SELECT DISTINCT deaths FROM jobdaemon.procrastinate_jobs").fetchall()
    assert deaths == [{"deaths": None}]


@pytest.mark.parametrize("end", [End.INTERRUPTED, End.FAILED])
async def test_a_rescue_comes_too_late_for_a_daemon_that_beats_again(
    store: PostgresJobStore, claimed_job_factory: Claimed, sql: Sql, end: End
) -> None:
    """What was found lost is its daemon's own again when that beats before the rescue is committed, be it the last one."""
    looker, worker = await _two_daemons(store, claimed_job_factory, sql)
    sql.execute("UPDATE jobdaemon.procrastinate_workers SET last_heartbeat = now() - interval '1 minute' WHERE id = %s", [worker])
    job, verdict = await _rescued(store, looker, end, meanwhile=_beat(store, worker))
    assert verdict is Verdict.LEASE_LOST
    [row] = claimed_job_factory.orders.jobs(job.order_id or 0)
    assert (row["status"], row["token"], row["deaths"]) == ("doing", job.token, None)
    sql.execute("UPDATE jobdaemon.procrastinate_workers SET last_heartbeat = now() - interval '1 minute' WHERE id = %s", [worker])
    assert (await _rescued(store, looker, end, meanwhile=asyncio.sleep(0)))[1] is Verdict.ACCEPTED


async def test_a_rescue_asks_no_clock(store: PostgresJobStore, claimed_job_factory: Claimed, sql: Sql) -> None:
    """A daemon that beat again, and was silent again until the rescue came, keeps what it runs until the next look."""
    looker, worker = await _two_daemons(store, claimed_job_factory, sql)
    silent = "UPDATE jobdaemon.procrastinate_workers SET last_heartbeat = now() - %s * interval '1 minute' WHERE id = %s"
    sql.execute(silent, [2, worker])

    async def beat_long_ago() -> None:
        sql.execute(silent, [1, worker])

    assert (await _rescued(store, looker, End.INTERRUPTED, meanwhile=beat_long_ago()))[1] is Verdict.LEASE_LOST


async def test_a_rescue_comes_too_late_for_jobs_that_came_along(
    store: PostgresJobStore, claimed_job_factory: Claimed, sql: Sql
) -> None:
    """A job without a daemon that was found lost is left alone when its daemon has taken it along meanwhile."""
    looker, worker = await _two_daemons(store, claimed_job_factory, sql)
    sql.execute("DELETE FROM jobdaemon.procrastinate_workers WHERE id = %s", [worker])
    again = await store.register(host="test", pid=3, version="0", queues={}, was=worker)
    [job] = [lost.job for lost in (await store.lost_jobs(looker, [], lease=LEASE)).lost]
    came_along = store.adopt_jobs(again, [job])
    assert (await _rescued(store, looker, End.INTERRUPTED, meanwhile=came_along))[1] is Verdict.LEASE_LOST


async def _rescued(store: PostgresJobStore, looker: int, end: End, *, meanwhile: Awaitable[None]) -> tuple[Job, Verdict]:
    """Find the one job that is lost; let something else happen; rescue it, so that it *end*s."""
    [lost] = (await store.lost_jobs(looker, [], lease=LEASE)).lost
    await meanwhile
    [verdict] = (await store.commit([Transition(lost.job, end, last_beat=lost.last_beat)], daemon_id=looker)).verdicts
    return lost.job, verdict


async def test_jobs_come_along_when_a_daemons_row_is_removed(engine_database: str, order_factory: Orders, sql: Sql) -> None:
    """Somebody removes a daemon's row: what it runs is its own under its new id, and another daemon leaves it alone."""
    calls = Calls()
    async with running_daemon(engine_database, Stages(calls.gate), engine=QUICK) as one:
        order_id = order_factory("Free")
        await until(lambda: len(calls.runs) == 1)
        async with running_daemon(engine_database, Stages(calls.gate), engine=QUICK) as other:
            await asyncio.sleep(1.5 * QUICK.lease.total_seconds())  # it is steady
            before = one.supervisor.daemon_id
            await asyncio.to_thread(sql.execute, "DELETE FROM jobdaemon.procrastinate_workers WHERE id = %s", [before])
            await until(lambda: order_factory.jobs(order_id)[0]["worker_id"] not in (None, before))
            assert order_factory.jobs(order_id)[0]["worker_id"] == one.supervisor.daemon_id
            await asyncio.sleep(2 * QUICK.lease.total_seconds())
            assert rescues(one, other) == []
            calls.is_over.set()
            await until(lambda: order_factory.row(order_id)["status"] == "completed")
    assert len(calls.runs) == 1


async def test_jobs_of_a_removed_daemon_that_is_gone_are_rescued(
    engine_database: str, claimed_job_factory: Claimed, sql: Sql
) -> None:
    """What has belonged to nobody for a whole lease is lost."""
    job = await claimed_job_factory.beautify(plan="Free")
    sql.execute("DELETE FROM jobdaemon.procrastinate_workers WHERE id = %s", [claimed_job_factory.daemon_id])
    async with running_daemon(engine_database, Stages(), engine=QUICK) as daemon:
        await daemon.events.wait_for(JobsRescued, timeout=20)
        await until(lambda: claimed_job_factory.orders.row(job.order_id or 0)["status"] == "completed")


# The claim


async def test_a_claim_under_a_lapsed_lease_is_refused(
    store: PostgresJobStore, daemon_id: int, job_factory: Jobs, sql: Sql
) -> None:
    """A worker that was silent for half its lease, or whose last beat is ahead of the clock, gets nothing before it beats."""
    job_id = job_factory("upload")
    await _beat(store, daemon_id)
    for leap in ("-8 seconds", "1 hour"):
        sql.execute(SHIFT, {"by": leap})
        with pytest.raises(LeaseLostError):
            await store.claim("upload", daemon_id, 1)
        assert job_factory.row(job_id)["status"] == "todo"
        await _beat(store, daemon_id)
    assert [job.id for job in await store.claim("upload", daemon_id, 1)] == [job_id]


async def test_a_new_daemon_has_a_lease_before_its_first_beat(store: PostgresJobStore, job_factory: Jobs, sql: Sql) -> None:
    """What registers and then stands still for half its lease has to beat before it claims, like any other."""
    daemon = await store.register(host="test", pid=1, version="0", queues={}, lease=LEASE)
    job_factory("upload")
    sql.execute("UPDATE jobdaemon.procrastinate_workers SET last_heartbeat = last_heartbeat - interval '8 seconds'")
    with pytest.raises(LeaseLostError):
        await store.claim("upload", daemon, 1)


async def _claimed_behind_the_lock(url: str, store: PostgresJobStore, daemon_id: int, sql: Sql) -> list[Job]:
    """Beat, claim while somebody holds the queue's lock, and let the lease lapse before that one lets go."""
    sql.execute("UPDATE jobdaemon.queues SET cluster_limit = 5 WHERE name = 'upload'")
    await store.heartbeat(daemon_id, lease=timedelta(seconds=60), timeout=timedelta(seconds=5))
    with psycopg.connect(url) as locker:
        locker.execute("SELECT pg_advisory_xact_lock(1784835684, (SELECT id FROM jobdaemon.queues WHERE name = 'upload'))")
        claim = asyncio.ensure_future(store.claim("upload", daemon_id, 1))
        await until(lambda: sql.execute(WAITS).fetchone() is not None)
        sql.execute(SHIFT, {"by": "-1 minute"})
    return await claim


async def test_the_lease_is_asked_for_after_the_lock(
    engine_database: str, store: PostgresJobStore, daemon_id: int, job_factory: Jobs, sql: Sql
) -> None:
    """A claim that waits for its queue's lock while its lease lapses is refused, though all was well when it was sent."""
    job_id = job_factory("upload")
    with pytest.raises(LeaseLostError):
        await _claimed_behind_the_lock(engine_database, store, daemon_id, sql)
    assert job_factory.row(job_id)["status"] == "todo"


async def test_asked_before_the_lock_a_lease_may_lapse_behind_it(
    engine_database: str, store: PostgresJobStore, daemon_id: int, job_factory: Jobs, sql: Sql
) -> None:
    """The test above sees the difference: a claim that asks before it waits gets the job."""
    job_id = job_factory("upload")
    [row] = sql.execute("SELECT pg_get_functiondef('jobdaemon.claim_jobs'::regproc) AS text").fetchall()
    asks, begins = "PERFORM require_lease(p_worker);", "BEGIN\n"
    assert row["text"].count(asks) == row["text"].count(begins) == 1
    sql.execute(row["text"].replace(asks, "").replace(begins, begins + asks).encode())
    assert [job.id for job in await _claimed_behind_the_lock(engine_database, store, daemon_id, sql)] == [job_id]


async def test_a_refused_claim_is_followed_by_a_beat(engine_database: str, job_factory: Jobs, sql: Sql) -> None:
    """A daemon whose lease has lapsed by the database's clock, though not by its own, beats and then claims, without a poll."""
    engine = replace(NO_POLL, heartbeat=timedelta(seconds=30))
    async with running_daemon(engine_database, Stages(), engine=engine) as daemon:
        started = daemon.events.expect(JobStarted)
        sql.execute(SHIFT, {"by": "-1 hour"})
        job_factory("upload", "jobdaemon.unknown")
        await started.wait(10)
        [row] = sql.execute(
            "SELECT clock_timestamp() - last_heartbeat < interval '1 minute' AS is_fresh FROM jobdaemon.procrastinate_workers"
        ).fetchall()
        assert row["is_fresh"]


# Orders that somebody holds


@asynccontextmanager
async def held(url: str, lock: str, *args: int) -> AsyncIterator[None]:
    """Somebody holds rows in an open transaction."""
    with psycopg.connect(url) as locker:
        await asyncio.to_thread(locker.execute, lock.encode(), args)  # a daemon of this process may have to let go first
        yield


HOLDS: dict[str, str] = {
    "order": "SELECT FROM jobdaemon.orders WHERE id = %s FOR UPDATE",
    "job": "SELECT FROM jobdaemon.procrastinate_jobs WHERE (args ->> 'order_id')::bigint = %s FOR UPDATE",
    "image": "SELECT FROM jobdaemon.images WHERE order_id = %s FOR UPDATE",
    "shared": "SELECT FROM jobdaemon.orders WHERE id = %s FOR SHARE",
}
#: As the foreign key of another table does, while a row that names the order is being inserted.
REFERENCE = "SELECT FROM jobdaemon.orders WHERE id = %s FOR KEY SHARE"


@pytest.mark.parametrize("what", HOLDS)
async def test_an_order_that_somebody_holds_holds_up_nothing_else(
    engine_database: str, order_factory: Orders, sql: Sql, what: str
) -> None:
    """While somebody holds one order, its jobs or images, all others are finished; then it is, in its first attempt."""
    calls = Calls("jobdaemon.upload")
    async with running_daemon(engine_database, Stages(calls.gate), team_size=4, engine=QUICK):
        first = order_factory("Free")
        await until(lambda: len(calls.runs) == 2)
        async with held(engine_database, HOLDS[what], first):
            calls.is_over.set()  # both uploads of the held order want to end
            others = [order_factory("Free") for _ in range(6)]
            await until(lambda: {order_factory.row(order)["status"] for order in others} == {"completed"}, timeout_s=10)
            assert order_factory.row(first)["status"] != "completed"
        await until(lambda: order_factory.row(first)["status"] == "completed")
    assert [row["attempts"] for row in order_factory.jobs(first)] == [1] * 4
    assert sql.execute("SELECT FROM jobdaemon.attempts").fetchall() == []


async def test_an_order_that_somebody_refers_to_goes_on(engine_database: str, order_factory: Orders) -> None:
    """A transaction that inserts rows of its own with a foreign key to an order holds nothing up, that order neither."""
    calls = Calls("jobdaemon.upload")
    async with running_daemon(engine_database, Stages(calls.gate), team_size=4, engine=QUICK):
        order = order_factory("Free")
        await until(lambda: len(calls.runs) == 2)
        async with held(engine_database, REFERENCE, order):
            calls.is_over.set()
            await until(lambda: order_factory.row(order)["status"] == "completed", timeout_s=10)


async def test_a_rescue_that_has_to_wait_does_not_stop_upkeep(
    engine_database: str, claimed_job_factory: Claimed, store: PostgresJobStore, sql: Sql
) -> None:
    """A dead daemon's job whose order somebody holds is rescued later; meanwhile other dead daemons' jobs are."""
    orders = claimed_job_factory.orders
    first = await claimed_job_factory.beautify(plan="Free")
    silent = "UPDATE jobdaemon.procrastinate_workers SET last_heartbeat = '-infinity' WHERE id = %s"
    sql.execute(silent, [claimed_job_factory.daemon_id])
    async with running_daemon(engine_database, Stages(), engine=QUICK) as daemon:
        async with held(engine_database, HOLDS["order"], first.order_id or 0):
            await until(lambda: any("holds" in getattr(event, "error", "") for event in daemon.seen))
            await asyncio.to_thread(sql.execute, "SELECT jobdaemon.pause_queue('beautify')")
            second = orders("Free")
            dead = await store.register(host="dead", pid=2, version="0", queues={})
            await asyncio.to_thread(
                sql.execute,
                "UPDATE jobdaemon.procrastinate_jobs SET status = 'doing', worker_id = %s, token = 999999"
                " WHERE args ->> 'order_id' = %s::text",
                [dead, str(second)],
            )
            await asyncio.to_thread(sql.execute, silent, [dead])
            await asyncio.to_thread(sql.execute, "SELECT jobdaemon.resume_queue('beautify')")
            await until(lambda: orders.row(second)["status"] == "completed")
            assert orders.row(first.order_id or 0)["status"] != "completed"
        await until(lambda: orders.row(first.order_id or 0)["status"] == "completed")
