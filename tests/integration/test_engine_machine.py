"""
The engine's SQL and store under random steps, held equal to a reference after each: what docs/model.md promises, on a real
database. Mistakes put into the functions of a scratch database must be found by the same machine.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import ClassVar

import psycopg
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test
from psycopg.rows import dict_row

from jobdaemon.db import DatabaseAddress
from jobdaemon.domain.job import Job
from jobdaemon.domain.outcome import End, Transition, Verdict
from jobdaemon.domain.retry import after_death
from jobdaemon.queue.store import LostJob, PostgresJobStore
from tests.factories import SOURCE, Row, Sql, generated

QUEUE = "generate.local"
LEASE = timedelta(minutes=1)
MOST_JOBS = 10
numbers = st.integers(0, 11)
LIMITS = st.sampled_from([1, 2, 3, 4, 0, None])
ENDS = [End.CHECKPOINT, End.SUCCEEDED, End.HANDED_BACK, End.RETRY]


@dataclass(slots=True)
class Bench:
    """A database, the store on it, and a look from outside; shared by all runs of a machine."""

    url: str
    sql: Sql
    store: PostgresJobStore
    runner: asyncio.Runner

    def clear(self) -> list[int]:
        """No order, no job, no limit; returns the ids of three fresh daemons."""
        self.sql.execute(
            "TRUNCATE jobdaemon.orders, jobdaemon.images, jobdaemon.attempts, jobdaemon.procrastinate_jobs,"
            " jobdaemon.procrastinate_workers CASCADE"
        )
        self.sql.execute("UPDATE jobdaemon.queues SET cluster_limit = NULL WHERE name = %s", [QUEUE])
        return [
            self.runner.run(self.store.register(host="test", pid=number, version="0", queues={QUEUE: 3})) for number in range(3)
        ]

    def add_job(self) -> tuple[int, int]:
        """An order of one image that waits to be generated; its id and its job's."""
        row = self.sql.execute("SELECT order_id FROM jobdaemon.enqueue_order('Free', %s, images => 1)", [SOURCE]).fetchone()
        assert row is not None
        job = self.sql.execute(
            "UPDATE jobdaemon.procrastinate_jobs SET queue_name = %s, task_name = 'jobdaemon.generate',"
            """ args = args || '{"images": [1]}' WHERE args ->> 'order_id' = %s::text RETURNING id""",
            [QUEUE, str(row["order_id"])],
        ).fetchone()
        assert job is not None
        return row["order_id"], job["id"]

    def overlapping_claims(self, claims: Sequence[tuple[int, int]]) -> tuple[list[int], list[Job]]:
        """Two claims (daemon id, how many); the second begins while the first has not committed. What each got."""
        (first, first_asked), (second, second_asked) = claims

        async def overlap() -> tuple[list[int], list[Job]]:
            with psycopg.connect(self.url) as other:
                rows = other.execute("SELECT id FROM jobdaemon.claim_jobs(%s, %s, %s)", [QUEUE, first, first_asked]).fetchall()
                claim = asyncio.ensure_future(self.store.claim(QUEUE, second, second_asked))
                while not claim.done() and not self._somebody_waits():  # noqa: ASYNC110 - a lock gives no signal
                    await asyncio.sleep(0.001)
                other.commit()
                return sorted(row[0] for row in rows), await claim

        return self.runner.run(overlap())

    def _somebody_waits(self) -> bool:
        return bool(self.sql.execute("SELECT FROM pg_locks WHERE NOT granted AND locktype = 'advisory'").fetchall())


@dataclass(slots=True)
class RefJob:
    """What a job should be."""

    order_id: int
    status: str = "todo"
    token: int | None = None
    worker: int | None = None
    image: str = "pending"
    is_cancelled: bool = False
    has_left: bool = False  # it runs, and holds no slot
    is_forfeit: bool = False  # its daemon is silent beyond its lease


@dataclass(slots=True)
class Reference:
    """What the tables should hold, told in plain Python."""

    limit: int | None = None
    jobs: dict[int, RefJob] = field(default_factory=dict)
    unsuccessful: int = 0  # ends recorded in attempts

    def next_jobs(self, asked: int) -> list[int]:
        """What a claim should get: the oldest ready jobs, no more than the limit allows."""
        running = sum(job.status == "doing" and not job.has_left for job in self.jobs.values())
        most = asked if self.limit is None else min(asked, max(self.limit - running, 0))
        return sorted(job_id for job_id, job in self.jobs.items() if job.status == "todo")[:most]

    def claimed(self, job_id: int, worker: int, token: int | None) -> None:
        """The job runs under this worker."""
        job = self.jobs[job_id]
        assert job.status == "todo", "a job was claimed that does not wait"
        job.status, job.worker, job.token, job.is_forfeit, job.has_left = "doing", worker, token, False, False

    def committed(self, transition: Transition, *, is_late: bool) -> Verdict:
        """Apply what should apply, where *is_late* not a rescue; the verdict that should come."""
        job, end = self.jobs[transition.job.id], transition.end
        if job.token != transition.job.token:
            return Verdict.LEASE_LOST
        if job.status != "doing":
            return Verdict.LEASE_LOST if end is End.CHECKPOINT else Verdict.ACCEPTED
        if is_late:
            return Verdict.LEASE_LOST
        if end is End.INTERRUPTED:
            assert job.is_forfeit, "a job was taken from a daemon that beats"
        if end is End.CHECKPOINT:
            if job.is_cancelled:
                return Verdict.ORDER_ENDED
            job.image = "generated"
            return Verdict.ACCEPTED
        if job.is_cancelled:
            job.status = "aborted"
        else:
            job.status = "succeeded" if end is End.SUCCEEDED else "todo"
        self.unsuccessful += job.status != "succeeded"
        if job.status == "todo":
            job.worker = None
        if end is End.INTERRUPTED:
            job.token = None
        return Verdict.ORDER_ENDED if job.is_cancelled else Verdict.ACCEPTED


class EngineMachine(RuleBasedStateMachine):
    """Daemons that claim, work, fall silent, are rescued, and send things twice."""

    bench: ClassVar[Bench]

    def __init__(self) -> None:
        super().__init__()
        self.run_ = self.bench.runner.run
        self.daemons = self.bench.clear()
        self.silent: set[int] = set()
        self.reference = Reference()
        self.claimed: list[Job] = []  # every claim ever made, whatever became of it
        self.sent: list[Transition] = []
        self.found: list[LostJob] = []  # by looks, not rescued yet

    @initialize(jobs=st.integers(4, 8), limit=LIMITS)
    def begin(self, jobs: int, limit: int | None) -> None:
        for _ in range(jobs):
            self.add_job()
        self.resize(limit)

    @precondition(lambda self: len(self.reference.jobs) < MOST_JOBS)
    @rule()
    def add_job(self) -> None:
        order_id, job_id = self.bench.add_job()
        self.reference.jobs[job_id] = RefJob(order_id)

    @rule(limit=LIMITS)
    def resize(self, limit: int | None) -> None:
        self.bench.sql.execute("UPDATE jobdaemon.queues SET cluster_limit = %s WHERE name = %s", [limit, QUEUE])
        self.reference.limit = limit

    # Claims

    @rule(number=numbers, asked=st.integers(1, 3))
    def claim(self, number: int, asked: int) -> None:
        daemon = self._beaten(number)
        expected = self.reference.next_jobs(asked)
        self._note_claim(daemon, self.run_(self.bench.store.claim(QUEUE, daemon, asked)), expected)

    @rule(number=numbers, asked=st.integers(1, 3), other_asked=st.integers(1, 3))
    def claim_together(self, number: int, asked: int, other_asked: int) -> None:
        """The second begins before the first has committed, and must count what that one took."""
        first, second = self._beaten(number), self._beaten(number + 1)
        expected = self.reference.next_jobs(asked)
        got, jobs = self.bench.overlapping_claims([(first, asked), (second, other_asked)])
        assert got == expected
        rows = self._rows()
        for job_id in got:
            self.reference.claimed(job_id, first, rows[job_id]["token"])
            self.claimed.append(self._as_job(job_id, rows[job_id]["token"]))
        # It could not see what would be left; it takes what the limit allows of the rest.
        self._note_claim(second, jobs, self.reference.next_jobs(other_asked))

    def _beaten(self, number: int) -> int:
        """A daemon claims only under a fresh heartbeat."""
        self.beat(number)
        return self.daemons[number % 3]

    def _note_claim(self, daemon: int, jobs: list[Job], expected: list[int]) -> None:
        assert [job.id for job in jobs] == expected
        known = {job.token for job in self.claimed}
        for job in jobs:
            assert job.token is not None
            assert job.token not in known, "a token was handed out twice"
            self.reference.claimed(job.id, daemon, job.token)
        self.claimed += jobs

    def _as_job(self, job_id: int, token: int) -> Job:
        return Job(
            job_id,
            QUEUE,
            "jobdaemon.generate",
            300,
            {"order_id": self.reference.jobs[job_id].order_id, "images": [1]},
            token=token,
        )

    @precondition(lambda self: self.claimed)
    @rule(number=numbers, pick=st.integers(0, 40), asked=st.integers(0, 2), comes_back=st.booleans())
    def free_slot(self, number: int, pick: int, asked: int, comes_back: bool) -> None:
        """
        The provider has done its part, whatever became of the job since, and another may take its place at once; and if what was
        made could not be kept, the job waits again, to hold a slot once more when it is claimed.
        """
        daemon = self._beaten(number)
        job = self.claimed[-1 - pick % len(self.claimed)]
        row = self.reference.jobs[job.id]
        is_held = row.status == "doing" and row.token == job.token
        row.has_left |= is_held
        expected = self.reference.next_jobs(asked + is_held)
        claim = self.run_(self.bench.store.take_slots(QUEUE, daemon, asked, leaving=[job]))
        assert claim.freed == ({job.id} if is_held else set())
        self._note_claim(daemon, claim.jobs, expected)
        if comes_back:
            self._commit([Transition(job, End.RETRY, error="why")])

    # Commits

    @precondition(lambda self: self.claimed)
    @rule(picks=st.lists(st.tuples(st.integers(0, 40), st.sampled_from(ENDS)), min_size=1, max_size=3))
    def commit(self, picks: list[tuple[int, End]]) -> None:
        """A group of what attempts want committed: running ones, ended ones, and ones that lost their job."""
        group: dict[int, Transition] = {}
        for pick, end in picks:
            job = self.claimed[-1 - pick % len(self.claimed)]
            writes = (generated(job.order_id or 0, 1),) if end is End.CHECKPOINT else ()
            group.setdefault(job.id, Transition(job, end, writes=writes, error=None if end is End.SUCCEEDED else "why"))
        self._commit(list(group.values()))

    @precondition(lambda self: self.sent)
    @rule(pick=st.integers(0, 40))
    def send_again(self, pick: int) -> None:
        """The answer to a commit was lost."""
        self._commit([self.sent[-1 - pick % len(self.sent)]])

    def _commit(self, transitions: list[Transition]) -> None:
        beats = {job_id: row["beat"] for job_id, row in self._rows().items()}
        late = [t.last_beat not in (None, beats[t.job.id]) for t in transitions]
        committed = self.run_(self.bench.store.commit(transitions, daemon_id=None))
        assert committed.verdicts == [
            self.reference.committed(t, is_late=is_late) for t, is_late in zip(transitions, late, strict=True)
        ]
        self.sent += transitions

    # Silence and rescue

    @rule(number=numbers)
    def beat(self, number: int) -> None:
        daemon = self.daemons[number % 3]
        assert self.run_(self.bench.store.heartbeat(daemon, lease=LEASE, timeout=timedelta(seconds=5)))
        self.silent.discard(daemon)
        for job in self.reference.jobs.values():
            job.is_forfeit &= job.worker != daemon

    @precondition(lambda self: any(job.status == "doing" for job in self.reference.jobs.values()))
    @rule(number=numbers)
    def fall_silent(self, number: int) -> None:
        self._silence(number)

    def _silence(self, number: int) -> int:
        """A daemon that runs something was last heard of long ago; its id."""
        busy = sorted({job.worker or 0 for job in self.reference.jobs.values() if job.status == "doing"})
        daemon = busy[number % len(busy)]
        self.bench.sql.execute(
            "UPDATE jobdaemon.procrastinate_workers SET last_heartbeat = now() - interval '1 hour'"
            " WHERE id = %s AND last_heartbeat > now() - interval '1 minute'",
            [daemon],
        )
        self.silent.add(daemon)
        for job in self.reference.jobs.values():
            job.is_forfeit |= job.worker == daemon and job.status == "doing"
        return daemon

    @precondition(lambda self: any(job.status == "doing" for job in self.reference.jobs.values()))
    @rule(number=numbers, other=st.integers(1, 2), beats_again=st.booleans())
    def die(self, number: int, other: int, beats_again: bool) -> None:
        """All that a rescue takes, which steps drawn one by one rarely come to."""
        daemon = self._silence(number)
        looker = self.daemons.index(daemon) + other
        self.look(looker, is_steady=True, is_prompt=False)
        if beats_again:
            self.beat(self.daemons.index(daemon))
        self.rescue()

    @rule(number=numbers, is_steady=st.booleans(), is_prompt=st.booleans())
    def look(self, number: int, is_steady: bool, is_prompt: bool) -> None:
        """A look finds the jobs of silent daemons, and of none that beats; what it found is rescued now or later."""
        daemon = self._beaten(number)
        self.bench.sql.execute(
            "UPDATE jobdaemon.procrastinate_workers SET steady_since = now() - %s * interval '1 minute' WHERE id = %s",
            [1.1 if is_steady else 0.9, daemon],
        )
        mine = [job_id for job_id, job in self.reference.jobs.items() if job.worker == daemon and job.status == "doing"]
        lost = self.run_(self.bench.store.lost_jobs(daemon, mine, lease=LEASE)).lost
        assert {job.id for job, _, _ in lost} == {
            job_id
            for job_id, job in self.reference.jobs.items()
            if is_steady and job.status == "doing" and job.worker in self.silent
        }
        self.found += lost
        if is_prompt:
            self.rescue()

    @precondition(lambda self: self.found)
    @rule()
    def rescue(self) -> None:
        found, self.found = {lost.job.id: lost for lost in self.found}, []
        if found:
            self._commit(
                [
                    replace(after_death(job, ran_alone=False, other_deaths=0, dead=lambda _: ()), last_beat=last_beat)
                    for job, _, last_beat in found.values()
                ]
            )
            # A second death would rest the job: let it in at once.
            self.bench.sql.execute("UPDATE jobdaemon.procrastinate_jobs SET scheduled_at = NULL WHERE status = 'todo'")

    @precondition(lambda self: sum(job.status == "todo" for job in self.reference.jobs.values()) > 2)
    @rule(pick=st.integers(0, MOST_JOBS))
    def cancel(self, pick: int) -> None:
        job = list(self.reference.jobs.values())[pick % len(self.reference.jobs)]
        self.bench.sql.execute("SELECT jobdaemon.cancel_order(%s)", [job.order_id])
        job.is_cancelled, job.image = True, "cancelled"
        if job.status == "todo":
            job.status = "cancelled"

    # What must hold after each step

    @invariant()
    def tables_are_as_they_should_be(self) -> None:
        rows = self._rows()
        for job_id, job in self.reference.jobs.items():
            row = rows[job_id]
            assert (row["status"], row["token"], row["image"]) == (job.status, job.token, job.image)
            if job.status in ("todo", "doing"):
                assert row["worker_id"] == job.worker
        [count] = self.bench.sql.execute("SELECT count(*) AS n FROM jobdaemon.attempts").fetchall()
        assert count["n"] == self.reference.unsuccessful, "an end was recorded twice, or not at all"

    def _rows(self) -> dict[int, Row]:
        rows = self.bench.sql.execute(
            "SELECT j.id, j.status::text, j.token, j.worker_id, i.status AS image,"
            " coalesce(extract(epoch FROM w.last_heartbeat)::text, '') AS beat"
            " FROM jobdaemon.procrastinate_jobs j LEFT JOIN jobdaemon.procrastinate_workers w ON w.id = j.worker_id"
            " JOIN jobdaemon.images i ON i.order_id = (j.args ->> 'order_id')::bigint AND i.index = 1"
        ).fetchall()
        return {row["id"]: row for row in rows}


@pytest.fixture
def bench(engine_database: str, patient_locks: None) -> Iterator[Bench]:
    """A database of the test's own."""
    with (
        asyncio.Runner() as runner,
        psycopg.connect(engine_database, autocommit=True, row_factory=dict_row) as sql,
    ):
        bench = Bench(engine_database, sql, PostgresJobStore(DatabaseAddress(engine_database)), runner)
        yield bench
        runner.run(bench.store.close())


def drive(bench: Bench, *, runs: int) -> None:
    """Run the machine so many times; the steps are the same each time, so that a mistake alone makes the difference."""
    profile = settings(
        max_examples=runs,
        stateful_step_count=30,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        report_multiple_bugs=False,
        print_blob=False,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(type("Machine", (EngineMachine,), {"bench": bench}), settings=profile)


def test_the_engine_does_what_the_reference_says(bench: Bench) -> None:
    """Claims, commits, rescues and cancellations in random order leave the tables as the promises demand."""
    drive(bench, runs=25)


MISTAKES = {
    "no lock": ("claim_jobs", "PERFORM pg_advisory_xact_lock(1784835684, v_queue.id);", ""),
    "one token for all": ("claim_jobs", "nextval('attempt_token_seq')", "7"),
    "no limit": ("queue_capacity", "p_queue.cluster_limit - v_running", "p_queue.cluster_limit"),
    "slots free for ever": ("queue_capacity", "(j.released_token = j.token) IS NOT TRUE", "j.released_token IS NULL"),
    "slots freed by silence": (
        "queue_capacity",
        "j.status = 'doing'",
        "j.status = 'doing' AND j.worker_id IN (SELECT w.id FROM procrastinate_workers w WHERE w.last_heartbeat > now() - LEASE)",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_machine_finds_mistakes(bench: Bench, mistake: str) -> None:
    """A function of this database that does less than it should is found out."""
    function, text, instead = MISTAKES[mistake]
    [row] = bench.sql.execute(
        "SELECT pg_get_functiondef(p.oid) AS text FROM pg_proc p"
        " WHERE p.proname = %s AND p.pronamespace = 'jobdaemon'::regnamespace",
        [function],
    ).fetchall()
    assert text in row["text"]
    bench.sql.execute(row["text"].replace(text, instead).replace("LEASE", "interval '1 minute'").encode())
    with pytest.raises(AssertionError):
        drive(bench, runs=60)
