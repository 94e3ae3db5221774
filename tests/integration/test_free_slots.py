"""Slots of limits that are free before their attempts end: the provider has done its part, and what it made is being kept."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import pytest

from jobdaemon.domain.job import Job, Task
from jobdaemon.domain.outcome import End, Transition
from jobdaemon.errors import LeaseLostError, PermanentError
from jobdaemon.ports import Attempt
from jobdaemon.queue.store import PostgresJobStore
from jobdaemon.queue.team import Team
from tests.daemons import NO_POLL, Stages, running_daemon, until
from tests.factories import Row, Sql

QUEUE = "generate.local"


def fill(sql: Sql, jobs: int, customer: str = "") -> None:
    """Insert generate jobs that make no image."""
    sql.execute(
        "INSERT INTO jobdaemon.procrastinate_jobs (queue_name, task_name, priority, args) SELECT %s, %s, 0,"
        " jsonb_build_object('order_id', NULL, 'images', '[]'::jsonb, 'customer', %s::text) FROM generate_series(1, %s)",
        [QUEUE, Task.GENERATE, customer, jobs],
    )


def limit(sql: Sql, **columns: int) -> None:
    """Set limits of the queue."""
    for column, value in columns.items():
        sql.execute(f"UPDATE jobdaemon.queues SET {column} = %s WHERE name = %s".encode(), [value, QUEUE])


def depth(sql: Sql) -> Row:
    """The queue's row of queue_depth."""
    row = sql.execute("SELECT * FROM jobdaemon.queue_depth WHERE queue = %s", [QUEUE]).fetchone()
    assert row is not None
    return row


@dataclass(slots=True)
class Calls:
    """A gate for Stages: calls that end when the test says so, and attempts that go on after them until the test says so."""

    started: list[int] = field(default_factory=list)
    over: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(0))
    kept: asyncio.Event = field(default_factory=asyncio.Event)

    async def __call__(self, attempt: Attempt) -> None:
        self.started.append(attempt.job.id)
        await self.over.acquire()
        await attempt.free_slot()
        await self.kept.wait()

    def end(self, count: int) -> None:
        """So many calls are over, or will be as soon as they have started."""
        for _ in range(count):
            self.over.release()

    async def are(self, count: int) -> None:
        """Wait until so many have started."""
        await until(lambda: len(self.started) == count, timeout_s=10)


async def nothing_happens() -> None:
    """What must not come gives no signal: as long as a free slot may stay free, four times over."""
    await asyncio.sleep(0.2)


async def free_slots(store: PostgresJobStore, daemon_id: int, jobs: list[Job]) -> set[int]:
    """As a claim that takes nothing in their place; ids of those that left."""
    return set((await store.take_slots(QUEUE, daemon_id, 0, leaving=jobs, room=0)).freed)


@asynccontextmanager
async def at_work(url: str, calls: Calls, *, team_size: int) -> AsyncIterator[Team]:
    """The team of a daemon whose attempts are *calls*, let go at the end."""
    async with running_daemon(url, Stages(gate=calls), engine=NO_POLL, team_size=team_size) as daemon:
        try:
            yield daemon.supervisor._teams[QUEUE]
        finally:
            calls.end(100)
            calls.kept.set()


async def test_the_next_call_starts_while_the_last_one_s_images_are_kept(engine_database: str, sql: Sql) -> None:
    """Under a limit of two, two more calls start when the first two are over, though neither attempt has ended."""
    fill(sql, 6)
    limit(sql, cluster_limit=2)
    calls = Calls()
    async with at_work(engine_database, calls, team_size=3):
        await calls.are(2)
        await nothing_happens()
        assert len(calls.started) == 2
        calls.end(2)
        await calls.are(4)
        shown = depth(sql)
        assert (shown["running"], shown["finishing"], shown["ready"]) == (2, 2, 2)
        calls.end(4)
        await calls.are(6)
        calls.kept.set()
        await until(lambda: depth(sql)["finishing"] == 0 and depth(sql)["running"] == 0)
    [row] = sql.execute("SELECT count(*) AS n FROM jobdaemon.procrastinate_jobs WHERE status = 'succeeded'").fetchall()
    assert row["n"] == 6


async def test_what_is_being_kept_is_never_more_than_the_team(engine_database: str, sql: Sql) -> None:
    """A slow store holds the next calls back in the end: a team of two runs four attempts at most."""
    fill(sql, 9)
    calls = Calls()
    calls.end(9)
    async with at_work(engine_database, calls, team_size=2):
        await calls.are(4)
        await nothing_happens()
        assert len(calls.started) == 4
        calls.kept.set()
        await calls.are(9)


async def test_a_slot_that_this_team_would_not_use_is_kept_to_the_end(engine_database: str, sql: Sql) -> None:
    """A paused team frees nothing: its end tells the others, as always."""
    fill(sql, 2)
    limit(sql, cluster_limit=1)
    calls = Calls()
    async with at_work(engine_database, calls, team_size=1) as team:
        await calls.are(1)
        await asyncio.to_thread(sql.execute, "SELECT jobdaemon.pause_queue(%s)", [QUEUE])
        await until(lambda: team.size == 0)
        calls.end(1)
        await nothing_happens()
        shown = depth(sql)
        assert (shown["running"], shown["finishing"]) == (1, 0)
        await asyncio.to_thread(sql.execute, "SELECT jobdaemon.resume_queue(%s)", [QUEUE])
        await calls.are(2)


async def test_a_team_that_became_smaller_frees_no_slot_for_nobody(engine_database: str, sql: Sql) -> None:
    """Where more run than the team has slots now, a call that is over frees none of the cluster's: nobody here would use it."""
    fill(sql, 4)
    limit(sql, cluster_limit=3)
    calls = Calls()
    async with at_work(engine_database, calls, team_size=3) as team:
        await calls.are(3)
        await asyncio.to_thread(sql.execute, "SELECT jobdaemon.resize_queue(%s, team_size => 2)", [QUEUE])
        await until(lambda: team.size == 2)
        calls.end(1)
        await nothing_happens()
        shown = depth(sql)
        assert (shown["running"], shown["finishing"]) == (3, 0)
        calls.end(1)
        await calls.are(4)


async def test_what_was_paid_for_is_kept_though_the_daemon_is_cut_short(engine_database: str, sql: Sql) -> None:
    """An attempt whose call is over ends well; one whose call is open is handed back."""
    fill(sql, 2)
    limit(sql, cluster_limit=1)
    calls = Calls()
    async with running_daemon(engine_database, Stages(gate=calls), engine=NO_POLL, team_size=1) as running:
        await calls.are(1)
        calls.end(1)
        await calls.are(2)
        running.supervisor.stop("the test says so")
        running.supervisor.stop("at once")
        await until(lambda: depth(sql)["running"] == 0)  # the open call is handed back, and the other not
        calls.kept.set()
    rows = sql.execute("SELECT id, status::text FROM jobdaemon.procrastinate_jobs ORDER BY id").fetchall()
    assert [(row["id"], row["status"]) for row in rows] == [(calls.started[0], "succeeded"), (calls.started[1], "todo")]


@pytest.mark.parametrize("how", ["notes its call", "fails", "is not there"])
async def test_what_a_call_made_is_kept_when_the_next_call_is_noted(
    engine_database: str, sql: Sql, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """The next call of a slot goes first; where it ends without one, or nobody takes the slot, there is nothing to wait for."""
    monkeypatch.setattr("jobdaemon.queue.attempt._NEXT_FIRST_S", 60)
    fill(sql, 1 if how == "is not there" else 2)
    limit(sql, cluster_limit=1)
    begun: list[int] = []
    kept, goes_on, over = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def gate(attempt: Attempt) -> None:
        begun.append(attempt.job.id)
        if len(begun) == 1:
            await attempt.free_slot()
            kept.set()
            return
        await goes_on.wait()
        if how == "fails":
            raise PermanentError("why")
        await attempt.checkpoint()
        await over.wait()

    async with running_daemon(engine_database, Stages(gate=gate), engine=NO_POLL, team_size=1):
        if how != "is not there":
            await until(lambda: len(begun) == 2)
            await nothing_happens()
            assert not kept.is_set()
            goes_on.set()
        async with asyncio.timeout(10):
            await kept.wait()
        over.set()


async def test_what_a_call_made_waits_for_no_next_call_of_a_paused_team(
    engine_database: str, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nobody here would take the slot it is not left, and there is nothing to wait for."""
    monkeypatch.setattr("jobdaemon.queue.attempt._NEXT_FIRST_S", 60)
    fill(sql, 2)
    calls = Calls()
    calls.kept.set()
    async with at_work(engine_database, calls, team_size=1) as team:
        await calls.are(1)
        await asyncio.to_thread(sql.execute, "SELECT jobdaemon.pause_queue(%s)", [QUEUE])
        await until(lambda: team.size == 0)
        calls.end(1)
        await until(lambda: team.running == 0, timeout_s=20)


async def test_what_was_paid_for_is_kept_though_its_slot_could_not_be_left(engine_database: str, sql: Sql) -> None:
    """Where a claim that is held up leaves the slot to the attempt's end, its call is over all the same: it is not cut short."""
    fill(sql, 1)
    limit(sql, cluster_limit=1)
    calls = Calls()
    async with running_daemon(engine_database, Stages(gate=calls), engine=NO_POLL, team_size=2) as running:
        team = running.supervisor._teams[QUEUE]
        await calls.are(1)
        with sql.transaction():
            held = "SELECT pg_advisory_xact_lock(1784835684, id) FROM jobdaemon.queues WHERE name = %s"
            await asyncio.to_thread(sql.execute, held, [QUEUE])
            calls.end(1)
            await until(lambda: bool(team._leaving))
            await until(lambda: not team._leaving)
        running.supervisor.stop("the test says so")
        running.supervisor.stop("at once")
        await nothing_happens()
        calls.kept.set()
    [row] = sql.execute("SELECT status::text FROM jobdaemon.procrastinate_jobs").fetchall()
    assert row["status"] == "succeeded"


async def test_nothing_piles_up_behind_a_call_that_is_long_in_coming(
    engine_database: str, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one attempt prepares its call others come and go: a team remembers none that has ended."""
    monkeypatch.setattr("jobdaemon.queue.attempt._NEXT_FIRST_S", 0.001)
    fill(sql, 31)
    begun: list[int] = []
    prepared = asyncio.Event()

    async def gate(attempt: Attempt) -> None:
        begun.append(attempt.job.id)
        if len(begun) == 1:
            await prepared.wait()
        await attempt.free_slot()

    async with running_daemon(engine_database, Stages(gate=gate), engine=NO_POLL, team_size=2) as running:
        team = running.supervisor._teams[QUEUE]
        await until(lambda: len(begun) == 31 and team.running == 1)
        assert len(team._gone) <= 1
        prepared.set()


async def test_a_claim_that_fails_frees_nothing(store: PostgresJobStore, daemon_id: int, sql: Sql) -> None:
    """What leaves and what takes its place are one transaction: under a lapsed lease nobody has the slot but who had it."""
    limit(sql, cluster_limit=1)
    fill(sql, 2)
    [first] = await store.claim(QUEUE, daemon_id, 5)
    beat = "UPDATE jobdaemon.procrastinate_workers SET lease = '1 minute', last_heartbeat = now() - %s::interval"
    sql.execute(beat, ["1 hour"])
    with pytest.raises(LeaseLostError):
        await store.take_slots(QUEUE, daemon_id, 0, leaving=[first])
    assert depth(sql)["running"] == 1
    sql.execute(beat, ["0"])
    claim = await store.take_slots(QUEUE, daemon_id, 0, leaving=[first])
    assert claim.freed == {first.id}
    assert len(claim.jobs) == 1


async def test_a_slot_that_could_not_be_left_is_not_taken(store: PostgresJobStore, daemon_id: int, sql: Sql) -> None:
    """A job that was handed back meanwhile frees nothing: nobody starts in its place, whatever the team has counted on."""
    fill(sql, 3)
    [first] = await store.claim(QUEUE, daemon_id, 1)
    await store.commit([Transition(first, End.HANDED_BACK, error="why")], daemon_id=daemon_id)
    claim = await store.take_slots(QUEUE, daemon_id, 0, leaving=[first])
    assert not claim.freed
    assert claim.jobs == []
    assert len((await store.take_slots(QUEUE, daemon_id, 1, leaving=[first], room=5)).jobs) == 1


async def test_a_freed_slot_of_a_key_and_of_a_share_is_anothers(store: PostgresJobStore, daemon_id: int, sql: Sql) -> None:
    """Whatever limits a queue counts what holds a slot: its key's concurrency and its customer's fair share too."""
    sql.execute("INSERT INTO jobdaemon.provider_keys (provider, alias, concurrency) VALUES ('local', 'a', 1)")
    fill(sql, 3)
    [first] = (await store.take_slots(QUEUE, daemon_id, 3, ["a"])).jobs
    assert (await store.take_slots(QUEUE, daemon_id, 3, ["a"])).jobs == []
    assert await free_slots(store, daemon_id, [first]) == {first.id}
    assert [row["running"] for row in sql.execute("SELECT running FROM jobdaemon.keys").fetchall()] == [0]
    assert len((await store.take_slots(QUEUE, daemon_id, 3, ["a"])).jobs) == 1

    sql.execute("DELETE FROM jobdaemon.procrastinate_jobs")
    limit(sql, fair_share=1)
    fill(sql, 2, "greedy")
    [greedy] = await store.claim(QUEUE, daemon_id, 1)
    fill(sql, 2, "modest")
    await free_slots(store, daemon_id, [greedy])
    assert [job.args["customer"] for job in await store.claim(QUEUE, daemon_id, 2)] == ["greedy", "modest"]


async def test_a_job_that_is_claimed_again_holds_a_slot_again(store: PostgresJobStore, daemon_id: int, sql: Sql) -> None:
    """What one attempt has freed is not free for the next one, and an attempt that lost its job frees nothing."""
    limit(sql, cluster_limit=1)
    fill(sql, 2)
    [first] = await store.claim(QUEUE, daemon_id, 5)
    await free_slots(store, daemon_id, [first])
    await store.commit([Transition(first, End.HANDED_BACK, error="why")], daemon_id=daemon_id)
    [again] = await store.claim(QUEUE, daemon_id, 5)
    assert again.id == first.id
    assert await free_slots(store, daemon_id, [first]) == set()
    assert await store.claim(QUEUE, daemon_id, 5) == []
    assert await free_slots(store, daemon_id, [again]) == {again.id}
    assert len(await store.claim(QUEUE, daemon_id, 5)) == 1


async def test_a_waiting_job_is_told_of_the_calls_alone(store: PostgresJobStore, daemon_id: int, sql: Sql) -> None:
    """Explain counts as the claim does: what is only being kept is in nobody's way."""
    limit(sql, cluster_limit=2)
    fill(sql, 4)
    jobs = await store.claim(QUEUE, daemon_id, 5)

    def told() -> list[Row]:
        return sql.execute(
            "SELECT e.reason, e.numbers FROM jobdaemon.procrastinate_jobs j"
            " CROSS JOIN LATERAL jobdaemon.explain_job(j.id) AS e WHERE j.status = 'todo' AND e.reason = 'cluster_limit'"
        ).fetchall()

    assert [row["numbers"] for row in told()] == [{"running": 2, "limit": 2}] * 2
    await free_slots(store, daemon_id, jobs)
    assert told() == []


async def test_a_row_that_somebody_holds_is_freed_by_its_end(engine_database: str, sql: Sql) -> None:
    """The claims of the other queues wait a second at most, and the attempt keeps its slot until it ends."""
    fill(sql, 2)
    limit(sql, cluster_limit=1)
    calls = Calls()
    async with at_work(engine_database, calls, team_size=2):
        await calls.are(1)
        with sql.transaction():
            await asyncio.to_thread(
                sql.execute, "SELECT FROM jobdaemon.procrastinate_jobs WHERE id = %s FOR UPDATE", [calls.started[0]]
            )
            calls.end(1)
            await asyncio.sleep(1.3)
            assert len(calls.started) == 1
        calls.kept.set()
        await calls.are(2)


async def test_jobs_of_a_daemon_that_died_after_its_calls_are_rescued(store: PostgresJobStore, daemon_id: int, sql: Sql) -> None:
    """A freed slot changes nothing of the lease: the look finds the job when its daemon has gone."""
    fill(sql, 1)
    jobs = await store.claim(QUEUE, daemon_id, 1)
    await free_slots(store, daemon_id, jobs)
    other = await store.register(host="test", pid=2, version="0", queues={QUEUE: 1})
    sql.execute("UPDATE jobdaemon.procrastinate_workers SET steady_since = now() - interval '1 hour' WHERE id = %s", [other])
    sql.execute(
        "UPDATE jobdaemon.procrastinate_workers SET last_heartbeat = now() - interval '1 hour' WHERE id = %s", [daemon_id]
    )
    found = (await store.lost_jobs(other, [], lease=timedelta(minutes=1))).lost
    assert [lost.job.id for lost in found] == [jobs[0].id]
