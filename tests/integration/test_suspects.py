"""Suspects: a job whose workers died twice runs alone, and only what it does alone, while others live, makes it a dead letter."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest

from jobdaemon.domain.job import SUSPECT_AFTER
from jobdaemon.domain.retry import DIED, DIED_ALONE, MAX_DEATHS, STORM_DEATHS
from jobdaemon.errors import ProviderRefusedError
from jobdaemon.events import JobFinished, JobIsolated, JobsRescued
from jobdaemon.ports import Attempt
from jobdaemon.queue.store import PostgresJobStore
from tests.daemons import NO_POLL, QUICK, Stages, running_daemon, until
from tests.factories import Claimed, Jobs, Sql


@dataclass(slots=True)
class Room:
    """Attempts that stay until they are let out; they then fail, since no order stands behind them."""

    inside: dict[int, asyncio.Event] = field(default_factory=dict)

    async def gate(self, attempt: Attempt) -> None:
        self.inside[attempt.job.id] = out = asyncio.Event()
        try:
            await out.wait()
        finally:
            del self.inside[attempt.job.id]
        raise ProviderRefusedError("the test is over")

    def let_out(self, *job_ids: int) -> None:
        for job_id in job_ids:
            self.inside[job_id].set()


def _suspect(sql: Sql, job_id: int, deaths: int = SUSPECT_AFTER) -> int:
    sql.execute("UPDATE jobdaemon.procrastinate_jobs SET deaths = %s WHERE id = %s", [deaths, job_id])
    return job_id


async def test_a_suspect_runs_alone(engine_database: str, job_factory: Jobs, sql: Sql) -> None:
    """A suspect waits until nothing else runs in its daemon, whatever the queue; nothing is claimed until it has ended."""
    room = Room()
    async with running_daemon(engine_database, Stages(room.gate), engine=NO_POLL) as daemon:
        first = job_factory("upload")
        await until(lambda: set(room.inside) == {first})
        isolated = daemon.events.expect(JobIsolated)
        await asyncio.to_thread(sql.execute, "SELECT jobdaemon.pause_queue('beautify')")
        suspect = _suspect(sql, job_factory("beautify", "jobdaemon.beautify"))
        await asyncio.to_thread(sql.execute, "SELECT jobdaemon.resume_queue('beautify')")
        assert (await isolated.wait(60)).job_id == suspect
        later = [job_factory("upload"), job_factory("generate.local", "jobdaemon.generate")]
        await asyncio.sleep(0.3)  # nothing must start
        assert set(room.inside) == {first}
        room.let_out(first)
        await until(lambda: set(room.inside) == {suspect})
        await asyncio.sleep(0.3)  # nothing must start beside it
        assert set(room.inside) == {suspect}
        room.let_out(suspect)
        await until(lambda: set(room.inside) == set(later))
        room.let_out(*later)


async def test_two_suspects_run_one_after_the_other(engine_database: str, job_factory: Jobs, sql: Sql) -> None:
    """Of two suspects of one claim the second is handed back unspent, and runs when the first has ended."""
    room = Room()
    sql.execute("SELECT jobdaemon.pause_queue('upload')")
    suspects = [_suspect(sql, job_factory("upload")) for _ in range(2)]
    async with running_daemon(engine_database, Stages(room.gate), engine=NO_POLL) as daemon:
        back = daemon.events.expect(JobFinished, lambda event: event.outcome == "handed_back")
        await asyncio.to_thread(sql.execute, "SELECT jobdaemon.resume_queue('upload')")
        second = (await back.wait(60)).job_id
        [first] = set(suspects) - {second}
        await until(lambda: set(room.inside) == {first})
        row = job_factory.row(second)
        assert (row["status"], row["attempts"], row["deaths"]) == ("todo", 0, SUSPECT_AFTER)
        room.let_out(first)
        await until(lambda: set(room.inside) == {second})
        room.let_out(second)


async def test_a_suspect_that_waits_can_be_handed_back(engine_database: str, job_factory: Jobs, sql: Sql) -> None:
    """A daemon that stops hands back the suspect that waited for its turn, and other daemons' doors stay open."""
    room = Room()
    async with running_daemon(engine_database, Stages(room.gate), engine=NO_POLL) as daemon:
        first = job_factory("upload")
        await until(lambda: set(room.inside) == {first})
        isolated = daemon.events.expect(JobIsolated)
        suspect = job_factory("upload")
        # it may have started before it was made a suspect
        await until(lambda: set(room.inside) == {first, suspect})
        room.let_out(suspect)
        await until(lambda: set(room.inside) == {first})
        await asyncio.to_thread(
            sql.execute,
            "UPDATE jobdaemon.procrastinate_jobs SET status = 'todo', deaths = %s, attempts = 0 WHERE id = %s",
            [SUSPECT_AFTER, suspect],
        )
        await isolated.wait(60)
    row = job_factory.row(suspect)
    assert (row["status"], row["attempts"], row["deaths"], row["worker_id"]) == ("todo", 0, SUSPECT_AFTER, None)


async def _die(store: PostgresJobStore, sql: Sql, *jobs: int, queue: str = "upload") -> int:
    """A daemon claims these jobs, the only ready ones, and falls silent; its id."""
    daemon_id = await store.register(host="dead", pid=1, version="0", queues={queue: 9})
    claimed = [job.id for job in await store.claim(queue, daemon_id, 9)]
    assert sorted(claimed) == sorted(jobs)
    sql.execute(
        "UPDATE jobdaemon.procrastinate_workers SET last_heartbeat = now() - interval '10 minutes' WHERE id = %s", [daemon_id]
    )
    return daemon_id


async def _rescued(engine_database: str, sql: Sql, count: int) -> None:
    """Let a daemon that works on nothing rescue them; paused queues keep it from running them."""
    sql.execute("UPDATE jobdaemon.queues SET paused = true")
    async with running_daemon(engine_database, Stages(), engine=QUICK) as daemon:
        rescued = 0
        while rescued < count:
            rescued += (await daemon.events.wait_for(JobsRescued, timeout=20)).count
    sql.execute("UPDATE jobdaemon.queues SET paused = false")


@pytest.mark.parametrize("storm", [STORM_DEATHS - 1, STORM_DEATHS])
async def test_a_lone_suspects_last_death_is_final_unless_workers_die_anyway(
    engine_database: str, store: PostgresJobStore, job_factory: Jobs, sql: Sql, storm: int
) -> None:
    """The tenth worker that died under it alone makes a dead letter; where three others died within the hour it only rests."""
    for _ in range(storm):
        await _die(store, sql)
    suspect = _suspect(sql, job_factory(), MAX_DEATHS - 1)
    dead = await _die(store, sql, suspect)
    await _rescued(engine_database, sql, 1)
    row = job_factory.row(suspect)
    assert (row["status"], row["deaths"], row["token"]) == (
        ("failed", MAX_DEATHS - 1, row["token"]) if storm < STORM_DEATHS else ("todo", MAX_DEATHS, None)
    )
    attempts = sql.execute("SELECT daemon_id, error_kind FROM jobdaemon.attempts WHERE job_id = %s", [suspect]).fetchall()
    assert attempts == [{"daemon_id": dead, "error_kind": DIED_ALONE}]


async def test_a_death_in_company_proves_nothing(
    engine_database: str, store: PostgresJobStore, job_factory: Jobs, sql: Sql
) -> None:
    """A suspect that only waited for its turn when its worker died is not given up on; each job's death names that worker."""
    suspect, other = _suspect(sql, job_factory(), MAX_DEATHS + 3), job_factory()
    dead = await _die(store, sql, suspect, other)
    await _rescued(engine_database, sql, 2)
    assert (job_factory.row(suspect)["status"], job_factory.row(other)["status"]) == ("todo", "todo")
    attempts = sql.execute("SELECT DISTINCT daemon_id, error_kind, outcome FROM jobdaemon.attempts").fetchall()
    assert attempts == [{"daemon_id": dead, "error_kind": DIED, "outcome": "interrupted"}]


async def test_what_speaks_for_a_storm(claimed_job_factory: Claimed, job_factory: Jobs, sql: Sql) -> None:
    """Signs are workers that died within the hour but no lone suspect's, and other suspects that died alone, each job once."""
    store = claimed_job_factory.store
    job_factory()
    [job] = await claimed_job_factory.claim("upload")
    seconds = "UPDATE jobdaemon.procrastinate_workers SET last_heartbeat = now() - %s * interval '1 second' WHERE id = %s"
    lease = NO_POLL.lease

    async def signs(worker: int | None = None) -> int:
        return await store.other_deaths(job, worker, lease=lease)

    def note(job_id: int, daemon_id: int, kind: str) -> None:
        sql.execute(
            "INSERT INTO jobdaemon.attempts (job_id, queue, attempt, daemon_id, outcome, error_kind)"
            " VALUES (%s, 'upload', 1, %s, 'interrupted', %s)",
            [job_id, daemon_id, kind],
        )

    assert await signs() == 0
    idle, lone, old, stopped = [await store.register(host="h", pid=1, version="0", queues={}) for _ in range(4)]
    for daemon_id, age_s in ((idle, 600), (lone, 600), (old, 7000), (stopped, 600)):
        sql.execute(seconds, [age_s, daemon_id])
    await store.set_daemon_status(stopped, "stopped")
    assert (await signs(), await signs(idle)) == (2, 1)
    note(job.id, lone, DIED_ALONE)
    assert await signs() == 1  # its own
    note(job.id + 1, lone, DIED_ALONE)
    note(job.id + 1, lone, DIED_ALONE)
    note(job.id + 2, lone, DIED)
    assert await signs() == 2
