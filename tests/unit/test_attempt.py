"""One attempt: whatever its stage does, exactly one end is committed and one event tells it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta

import pytest

from jobdaemon.domain.job import Job, Task
from jobdaemon.domain.outcome import Done, End, Transition, Verdict
from jobdaemon.domain.write import ImageFailed, OrderStarted
from jobdaemon.errors import (
    DatabaseUnavailableError,
    LeaseLostError,
    ProviderRefusedError,
    ProviderUnavailableError,
    RateLimitedError,
)
from jobdaemon.events import CheckpointCommitted, Event, Events, JobFinished, JobStarted, LeaseLost
from jobdaemon.ports import Attempt
from jobdaemon.queue.attempt import AttemptRules, AttemptRunner
from tests.factories import POLICY, RULES

JOB = Job(1, "upload", Task.UPLOAD, 0, {"order_id": 7, "image": 2}, token=5)
Work = Callable[[Attempt], Awaitable[Done]]


@dataclass(slots=True)
class Recorder:
    """What the runner needs of a committer: it records and answers."""

    verdict: Verdict = Verdict.ACCEPTED
    transitions: list[Transition] = field(default_factory=list)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    may_answer: asyncio.Event = field(default_factory=asyncio.Event)

    async def commit(self, transition: Transition) -> Verdict:
        self.transitions.append(transition)
        self.arrived.set()
        await self.may_answer.wait()
        return self.verdict


@dataclass(slots=True)
class Bench:
    """A runner with one stage, and what came of it."""

    committer: Recorder = field(default_factory=Recorder)
    seen: list[Event] = field(default_factory=list)
    discarded: list[str] = field(default_factory=list)

    def runner(self, work: Work, *, is_sure: bool = True) -> AttemptRunner:
        events = Events()
        events.subscribe(self.seen.append)

        @dataclass
        class OneStage:
            run: Work

        async def discard(keys: tuple[str, ...]) -> None:
            self.discarded += keys

        stages = {Task.UPLOAD: OneStage(work)}
        return AttemptRunner(stages, self.committer, events, discard=discard, is_sure=lambda: is_sure)  # type: ignore[arg-type]

    async def run(self, work: Work, job: Job = JOB, rules: AttemptRules = RULES) -> Transition:
        """Run one attempt to its end; returns the last transition."""
        self.committer.may_answer.set()
        await self.runner(work).run(job, rules)
        return self.committer.transitions[-1]


@pytest.fixture
def bench() -> Bench:
    """A fresh bench."""
    return Bench()


def _raises(error: BaseException) -> Work:
    async def work(attempt: Attempt) -> Done:
        raise error

    return work


async def test_success_commits_its_writes_and_then_tidies_up(bench: Bench) -> None:
    """A finished stage's writes are committed with the job's end; what is obsolete then goes."""

    async def work(attempt: Attempt) -> Done:
        await attempt.checkpoint(OrderStarted(7))
        return Done((OrderStarted(8),), ("work/x",))

    last = await bench.run(work)
    assert [transition.end for transition in bench.committer.transitions] == [End.CHECKPOINT, End.SUCCEEDED]
    assert last.writes == (OrderStarted(8),)
    assert bench.discarded == ["work/x"]
    assert [type(event) for event in bench.seen] == [JobStarted, CheckpointCommitted, JobFinished]


@pytest.mark.parametrize("verdict", [Verdict.LEASE_LOST, Verdict.ORDER_ENDED])
async def test_nothing_is_discarded_unless_the_end_was_accepted(bench: Bench, verdict: Verdict) -> None:
    """A result that was not recorded leaves everything in place for whoever has the job now."""
    bench.committer.verdict = verdict

    async def work(attempt: Attempt) -> Done:
        return Done((), ("work/x",))

    await bench.run(work)
    assert bench.discarded == []
    last = bench.seen[-1]
    assert isinstance(last, LeaseLost) if verdict is Verdict.LEASE_LOST else isinstance(last, JobFinished)


@pytest.mark.parametrize(
    ("error", "end"),
    [
        (ProviderUnavailableError("x"), End.RETRY),
        (RateLimitedError("x"), End.SNOOZE),
        (DatabaseUnavailableError("x"), End.SNOOZE),
        (ProviderRefusedError("x"), End.FAILED),
        (LeaseLostError("x"), End.HANDED_BACK),
        (RuntimeError("x"), End.RETRY),
        (TimeoutError("of the stage's own"), End.RETRY),
        (asyncio.CancelledError(), End.RETRY),
    ],
)
async def test_whatever_a_stage_raises_ends_its_attempt(bench: Bench, error: BaseException, end: End) -> None:
    """Each error has its end, none escapes; a stage that cancels itself is a failure, not a hand-back for ever."""
    last = await bench.run(_raises(error))
    assert last.end is end
    assert isinstance(bench.seen[-1], JobFinished)


async def test_the_last_attempt_takes_its_image_along(bench: Bench) -> None:
    """When the attempts are spent the dead letter's writes say what is lost, and why."""
    last = await bench.run(_raises(OSError("disk")), Job(1, "upload", Task.UPLOAD, 0, JOB.args, attempts=POLICY.attempts - 1))
    assert last.end is End.FAILED
    assert last.writes == (ImageFailed(7, 2, "OSError: disk", "generated"),)


async def test_an_unknown_task_is_a_dead_letter(bench: Bench) -> None:
    """A job that no stage knows fails at once, with the task's name."""
    last = await bench.run(_raises(AssertionError()), Job(1, "upload", "nobody.knows", 0))
    assert (last.end, last.error) == (End.FAILED, "no stage knows the task nobody.knows")


async def test_a_stage_that_hangs_is_stopped(bench: Bench) -> None:
    """The run timeout ends an attempt, retryably, with a sentence that names it."""

    async def work(attempt: Attempt) -> Done:
        await asyncio.Event().wait()
        raise AssertionError

    rules = AttemptRules(run_timeout=timedelta(milliseconds=20), retry=POLICY)
    last = await bench.run(work, rules=rules)
    assert (last.end, last.error) == (End.RETRY, "the attempt did not finish within 0.02 s")


async def test_a_cancelled_attempt_hands_its_job_back(bench: Bench) -> None:
    """A daemon that stops gives back what runs, unspent."""
    going = asyncio.Event()

    async def work(attempt: Attempt) -> Done:
        going.set()
        await asyncio.Event().wait()
        raise AssertionError

    bench.committer.may_answer.set()
    task = asyncio.ensure_future(bench.runner(work).run(JOB, RULES))
    await going.wait()
    task.cancel()
    await task
    assert [transition.end for transition in bench.committer.transitions] == [End.HANDED_BACK]


async def test_an_end_on_its_way_is_waited_for(bench: Bench) -> None:
    """The first cancellation does not lose a result that is being committed; the second gets through."""

    async def work(attempt: Attempt) -> Done:
        return Done()

    task = asyncio.ensure_future(bench.runner(work).run(JOB, RULES))
    await bench.committer.arrived.wait()
    task.cancel()
    bench.committer.may_answer.set()
    await task
    assert [transition.end for transition in bench.committer.transitions] == [End.SUCCEEDED]
    assert isinstance(bench.seen[-1], JobFinished)

    other = Bench()
    task = asyncio.ensure_future(other.runner(work).run(JOB, RULES))
    await other.committer.arrived.wait()
    for _ in range(2):
        task.cancel()
        await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("verdict", [Verdict.LEASE_LOST, Verdict.ORDER_ENDED])
async def test_a_refused_checkpoint_stops_the_stage(bench: Bench, verdict: Verdict) -> None:
    """A stage hears at its next checkpoint that its job is not its own any more."""
    bench.committer.verdict = verdict
    after: list[str] = []

    async def work(attempt: Attempt) -> Done:
        await attempt.checkpoint(OrderStarted(7))
        after.append("went on")
        return Done()

    last = await bench.run(work)
    assert after == []
    assert last.end is End.HANDED_BACK


@pytest.mark.parametrize("is_paid", [False, True])
async def test_a_paid_attempt_needs_a_lease_beyond_doubt(bench: Bench, is_paid: bool) -> None:
    """A claim whose answer came under a lease in doubt starts no paid call: its job is handed back; what is free runs."""
    runs: list[int] = []

    async def work(attempt: Attempt) -> Done:
        runs.append(attempt.job.id)
        return Done()

    bench.committer.may_answer.set()
    await bench.runner(work, is_sure=False).run(JOB, replace(RULES, is_paid=is_paid))
    assert [transition.end for transition in bench.committer.transitions] == [End.HANDED_BACK if is_paid else End.SUCCEEDED]
    assert runs == ([] if is_paid else [JOB.id])
