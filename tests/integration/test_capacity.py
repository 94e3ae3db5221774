"""Limits that follow the provider: the adaptive limit, rests that were asked for, and circuits, with daemons at work."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jobdaemon.db import DatabaseAddress
from jobdaemon.domain.capacity import Circuit, QueueState, capacity
from jobdaemon.domain.job import Job, Task
from jobdaemon.domain.outcome import End, Signal, Transition
from jobdaemon.errors import ProviderUnavailableError, RateLimitedError
from jobdaemon.ports import Attempt
from jobdaemon.queue.store import PostgresJobStore
from tests.daemons import NO_POLL, Stages, running_daemon, until
from tests.effort import examples
from tests.factories import RULES, Jobs, Row, Sql

QUEUE = "generate.local"
HASTY = replace(RULES, retry=replace(RULES.retry, attempts=50, backoff=timedelta(seconds=0.05), cap=timedelta(seconds=0.1)))


@dataclass(slots=True)
class FakeProvider:
    """
    Bears *limit* calls at once, each *seconds* long, and refuses the rest at once; a gate for Stages.

    Attributes:
        error: answered instead, while set.
        calls: (when by the loop's clock, whether it was accepted), of every call.
        peak: the most calls that were open at once since it was last set back.
        hold: accepted calls stay open until it is set, while there is one.
    """

    limit: int
    seconds: float
    error: Callable[[], Exception] | None = None
    refusal: RateLimitedError = field(default_factory=lambda: RateLimitedError("too many calls at once"))
    calls: list[tuple[float, bool]] = field(default_factory=list)
    open: int = 0
    peak: int = 0
    hold: asyncio.Event | None = None

    async def __call__(self, attempt: Attempt) -> None:
        """One call."""
        if attempt.job.task != Task.GENERATE:
            return
        now = asyncio.get_running_loop().time()
        self.peak = max(self.peak, self.open + 1)
        if self.error is not None:
            self.calls.append((now, False))
            raise self.error()
        if self.open >= self.limit:
            self.calls.append((now, False))
            raise self.refusal
        self.calls.append((now, True))
        self.open += 1
        try:
            await asyncio.sleep(self.seconds)
            if self.hold is not None:
                await self.hold.wait()
        finally:
            self.open -= 1

    def count(self, since: float, until: float, *, accepted: bool) -> int:
        """Calls of a stretch of time."""
        return sum(is_accepted is accepted and since <= when < until for when, is_accepted in self.calls)


def fill(sql: Sql, jobs: int) -> None:
    """Insert generate jobs that make no image."""
    sql.execute(
        "INSERT INTO jobdaemon.procrastinate_jobs (queue_name, task_name, priority, args)"
        ' SELECT %s, %s, 0, \'{"order_id": null, "images": []}\'::jsonb FROM generate_series(1, %s)',
        [QUEUE, Task.GENERATE, jobs],
    )


def queue(sql: Sql) -> Row:
    """The queue's row."""
    row = sql.execute("SELECT * FROM jobdaemon.queues WHERE name = %s", [QUEUE]).fetchone()
    assert row is not None
    return row


@pytest.mark.slow
@pytest.mark.timeout(150)
async def test_a_provider_that_shrinks_and_grows_is_followed(engine_database: str, sql: Sql) -> None:
    """From 10 calls to 2 under 5 % are refused after 10 s; back at 10, 95 % of the possible within 30 s; no attempt spent."""
    fill(sql, 3000)
    provider = FakeProvider(limit=10, seconds=0.5)
    stages = Stages(gate=provider)
    now = asyncio.get_running_loop().time
    async with running_daemon(engine_database, stages, team_size=5), running_daemon(engine_database, stages, team_size=5):
        await asyncio.sleep(1)
        began = now()
        await asyncio.sleep(10)
        # What this machine does with no limit in the way: the time between two calls of a slot counts too.
        possible = provider.count(began, now(), accepted=True)
        assert provider.count(0, now(), accepted=False) == 0
        provider.limit, dropped = 2, now()
        await asyncio.sleep(10)
        first = provider.count(dropped, now(), accepted=False)
        settled = now()
        await asyncio.sleep(30)
        refused, accepted = (provider.count(settled, now(), accepted=kind) for kind in (False, True))
        possible_then = possible * 3 * 2 / 10
        provider.limit, back = 10, now()
        await until(lambda: provider.open >= 10, timeout_s=45)
        reached = now() - back
        await asyncio.sleep(max(30 - reached, 0))
        full = now()
        await asyncio.sleep(10)
        after = provider.count(full, now(), accepted=True)
        late = provider.count(full, now(), accepted=False)
    share = refused / (refused + accepted)
    print(  # noqa: T201 - the figures are what this test is for
        f"\nrefused {first} in the first 10 s, then {share:.1%} of calls ({accepted / possible_then:.0%} of the possible done);"
        f" 10 open again after {reached:.1f} s; {after / possible:.1%} of the possible from 30 s on, {late} refused"
    )
    assert share < 0.05
    assert accepted >= 0.9 * possible_then
    assert after >= 0.95 * possible
    row = sql.execute("SELECT max(attempts) AS most FROM jobdaemon.procrastinate_jobs WHERE status = 'succeeded'").fetchone()
    assert row == {"most": 1}


def ended(job: Job, signal: Signal | None = None, retry_after: timedelta | None = None) -> Transition:
    """The end of an attempt: a success, or one that met a signal."""
    if signal is None:
        return Transition(job, End.SUCCEEDED)
    end = End.SNOOZE if signal is Signal.CAPACITY else End.RETRY
    return Transition(job, end, delay=timedelta(hours=1), signal=signal, retry_after=retry_after)


async def test_one_burst_of_refusals_counts_once(store: PostgresJobStore, daemon_id: int, sql: Sql) -> None:
    """Of ten calls started at once eight are refused, in two commits: the limit is two, exact over every daemon's claims."""
    fill(sql, 20)
    jobs = await store.claim(QUEUE, daemon_id, 10)
    await store.commit([ended(job, Signal.CAPACITY) for job in jobs[:3]], daemon_id=daemon_id)
    assert queue(sql)["adaptive_limit"] == 7
    await store.commit([ended(job, Signal.CAPACITY) for job in jobs[3:8]], daemon_id=daemon_id)
    assert queue(sql)["adaptive_limit"] == 2
    assert await store.claim(QUEUE, daemon_id, 10) == []
    await store.commit([ended(job) for job in jobs[8:]], daemon_id=daemon_id)
    assert len(await store.claim(QUEUE, daemon_id, 10)) == 2


async def test_daemons_lower_one_limit(engine_database: str, daemon_id: int, sql: Sql) -> None:
    """Daemons whose attempts are refused at the same moment do not undo each other's decisions, and none waits for ever."""
    fill(sql, 64)
    stores = [PostgresJobStore(DatabaseAddress(engine_database)) for _ in range(4)]
    try:
        jobs = [await one.claim(QUEUE, daemon_id, 16) for one in stores]
        await asyncio.gather(
            *(
                one.commit([ended(job, Signal.CAPACITY)], daemon_id=daemon_id)
                for one, mine in zip(stores, jobs, strict=True)
                for job in mine[:15]
            )
        )
        assert queue(sql)["adaptive_limit"] == 4
    finally:
        for one in stores:
            await one.close()


async def test_an_operator_in_the_middle_of_a_change_holds_no_commit_up(
    store: PostgresJobStore, daemon_id: int, sql: Sql
) -> None:
    """While somebody's open transaction holds the queue's row, ends are committed all the same; the next signal counts."""
    fill(sql, 3)
    first, second, _ = await store.claim(QUEUE, daemon_id, 3)
    with sql.transaction():
        sql.execute("UPDATE jobdaemon.queues SET fair_share = 3 WHERE name = %s", [QUEUE])
        async with asyncio.timeout(60):
            await store.commit([ended(first, Signal.CAPACITY)], daemon_id=daemon_id)
    assert queue(sql)["adaptive_limit"] is None
    await store.commit([ended(second, Signal.CAPACITY)], daemon_id=daemon_id)
    assert queue(sql)["adaptive_limit"] == 1


async def test_no_trouble_costs_nothing(store: PostgresJobStore, daemon_id: int, sql: Sql) -> None:
    """Successes of a queue that never met a signal leave no row behind and change none."""
    fill(sql, 3)
    before = queue(sql)
    await store.commit([ended(job) for job in await store.claim(QUEUE, daemon_id, 3)], daemon_id=daemon_id)
    assert queue(sql) == before
    assert sql.execute("SELECT count(*) AS n FROM jobdaemon.queue_steering").fetchone() == {"n": 0}


async def test_a_wished_wait_holds_the_queue_and_ends_by_itself(engine_database: str, sql: Sql) -> None:
    """Retry-After stops the whole queue; it goes on when that is over, without a poll and without a notification."""
    provider = FakeProvider(limit=1, seconds=0.5, refusal=RateLimitedError("slow down", retry_after=timedelta(seconds=1.5)))
    async with running_daemon(engine_database, Stages(gate=provider), engine=NO_POLL, team_size=2):
        fill(sql, 6)
        await until(lambda: len(provider.calls) >= 4)
    refused_at = next(at for at, is_accepted in provider.calls if not is_accepted)
    later = [at - refused_at for at, _ in provider.calls if at > refused_at + 0.1]
    assert 1.4 <= later[0] < 2.5


async def test_a_circuit_opens_probes_and_closes(engine_database: str, sql: Sql) -> None:
    """With the provider down calls stop; one at a time tries, over two daemons; when one succeeds all work goes on at once."""
    sql.execute(
        "UPDATE jobdaemon.queues SET circuit_after = 4, circuit_rest = '0.3 seconds', circuit_rest_cap = '0.6 seconds'"
        " WHERE name = %s",
        [QUEUE],
    )
    provider = FakeProvider(limit=99, seconds=0.05, error=lambda: ProviderUnavailableError("the provider is down"))
    stages = Stages(gate=provider)
    now = asyncio.get_running_loop().time
    async with (
        running_daemon(engine_database, stages, engine=NO_POLL, rules=HASTY, team_size=4),
        running_daemon(engine_database, stages, engine=NO_POLL, rules=HASTY, team_size=4),
    ):
        fill(sql, 100)
        await until(lambda: queue(sql)["circuit"] == "open")
        opened, burst = now(), len(provider.calls)
        await until(lambda: len(provider.calls) >= burst + 4)
        assert now() - opened > 1.0  # rests of about 0.3, 0.6, 0.6 seconds lie between them
        assert burst <= 4 + 8  # what eight slots had begun
        provider.error, provider.peak = None, 0
        await until(lambda: queue(sql)["circuit"] == "closed")
        provider.hold = asyncio.Event()
        await until(lambda: provider.peak == 8)
        provider.hold.set()
        unfinished = "SELECT FROM jobdaemon.procrastinate_jobs WHERE status IN ('todo', 'doing') LIMIT 1"
        await until(lambda: sql.execute(unfinished).fetchone() is None)


async def test_one_probe_over_all_daemons(engine_database: str, daemon_id: int, sql: Sql) -> None:
    """Of many claims at once on a queue whose circuit may be tried, one gets one job; what ran before does not count."""
    fill(sql, 20)
    stores = [PostgresJobStore(DatabaseAddress(engine_database)) for _ in range(4)]
    try:
        jobs = await stores[0].claim(QUEUE, daemon_id, 8)
        await stores[0].commit([ended(job, Signal.OUTAGE) for job in jobs[:5]], daemon_id=daemon_id)
        assert queue(sql)["circuit"] == "open"
        assert await stores[0].claim(QUEUE, daemon_id, 5) == []
        sql.execute("UPDATE jobdaemon.queues SET circuit_until = now() WHERE name = %s", [QUEUE])
        claims = await asyncio.gather(*(one.claim(QUEUE, daemon_id, 5) for one in stores))
        [probe] = [job for claim in claims for job in claim]
        assert queue(sql)["circuit"] == "probing"
        # Three that were claimed before it opened end well: they say nothing of now.
        await stores[0].commit([ended(job) for job in jobs[5:]], daemon_id=daemon_id)
        assert queue(sql)["circuit"] == "probing"
        await stores[1].queue_rows([QUEUE], 0)  # as a daemon does when it hears that the queue changed
        await stores[1].commit([ended(probe)], daemon_id=daemon_id)
        assert queue(sql)["circuit"] == "closed"
    finally:
        for one in stores:
            await one.close()


async def test_what_an_operator_sets_by_hand_is_followed(store: PostgresJobStore, daemon_id: int, sql: Sql) -> None:
    """An adaptive limit, or an open circuit, that came from an operator is left by the same rules as any other."""
    fill(sql, 10)
    sql.execute("UPDATE jobdaemon.queues SET adaptive_limit = 1, circuit = 'open' WHERE name = %s", [QUEUE])
    await store.queue_rows([QUEUE], 0)
    [probe] = await store.claim(QUEUE, daemon_id, 5)
    await store.commit([ended(probe)], daemon_id=daemon_id)
    row = queue(sql)
    assert (row["circuit"], row["adaptive_limit"]) == ("closed", 1)
    steering = sql.execute("SELECT successes FROM jobdaemon.queue_steering").fetchone()
    assert steering == {"successes": 1}


moments = st.none() | st.sampled_from([-3600, -1, 3600]).map(lambda s: datetime.now(UTC) + timedelta(seconds=s))
rows = st.builds(
    QueueState,
    limit=st.none() | st.integers(0, 6),
    rested_until=moments,
    circuit=st.sampled_from(Circuit),
    circuit_until=moments,
    circuit_token=st.integers(0, 10),
)


@settings(max_examples=examples(150), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows, st.lists(st.integers(1, 12), max_size=7), st.integers(0, 8), st.none() | st.integers(0, 6), st.booleans())
def test_the_claim_decides_as_the_model_does(
    job_factory: Jobs, state: QueueState, running: list[int], asked: int, cluster_limit: int | None, paused: bool
) -> None:
    """SQL's queue_capacity says what domain.capacity says, whatever the row and whatever runs."""
    sql = job_factory.sql
    with sql.transaction(force_rollback=True):
        sql.execute(
            "INSERT INTO jobdaemon.procrastinate_jobs (queue_name, task_name, args, status, token)"
            " SELECT %s, 'x', '{}', 'doing', token FROM unnest(%s::bigint[]) AS token",
            [QUEUE, running],
        )
        sql.execute(
            "UPDATE jobdaemon.queues SET adaptive_limit = %s, rested_until = %s, circuit = %s, circuit_until = %s,"
            " circuit_token = %s, cluster_limit = %s, paused = %s WHERE name = %s",
            [
                state.limit,
                state.rested_until,
                state.circuit.value,
                state.circuit_until,
                state.circuit_token,
                cluster_limit,
                paused,
                QUEUE,
            ],
        )
        row = sql.execute(
            "SELECT jobdaemon.queue_capacity(q, %s) AS got, clock_timestamp() AS now FROM jobdaemon.queues q WHERE name = %s",
            [asked, QUEUE],
        ).fetchone()
    assert row is not None
    probes = sum(token > state.circuit_token for token in running)
    expected = capacity(
        state, asked, running=len(running), probes=probes, cluster_limit=cluster_limit, paused=paused, now=row["now"]
    )
    assert row["got"] == expected
