"""
One attempt as a pipeline: find the stage, run it under its timeout, turn what happened into a transition, commit it, tidy up.

Whatever a stage raises ends its own attempt and nothing else. Nothing here writes but the committer.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TypeAlias

from jobdaemon.domain.expand import writes_when_dead
from jobdaemon.domain.fallback import Move, Settle
from jobdaemon.domain.job import Job, provider_of
from jobdaemon.domain.outcome import Done, End, Transition, Verdict
from jobdaemon.domain.retry import RetryPolicy, after_error
from jobdaemon.domain.write import Write
from jobdaemon.errors import LeaseLostError, OrderEndedError, PermanentError, RetryableError
from jobdaemon.events import CheckpointCommitted, Events, JobFinished, JobStarted, LeaseLost, Outcome, ProviderChanged
from jobdaemon.ports import Stage
from jobdaemon.queue.committer import Committer
from jobdaemon.queue.solitude import NotNowError, Solitude

#: Gives the slot away; what it returns is done as soon as whoever takes it has noted a call, or it is known that nobody does.
LeaveSlot: TypeAlias = Callable[[], asyncio.Future[None]]

#: The next call of a slot goes first: decoding and keeping what the last one made would hold it up on a busy machine, and a
#: provider's time is dearer. But what is paid for waits no longer than this.
_NEXT_FIRST_S = 0.2

_OUTCOMES: Mapping[End, Outcome] = {
    End.SUCCEEDED: "succeeded",
    End.RETRY: "retry",
    End.SNOOZE: "snooze",
    End.HANDED_BACK: "handed_back",
    End.MOVED: "moved",
    End.FAILED: "failed",
}


@dataclass(frozen=True, slots=True)
class AttemptRules:
    """
    How attempts of one queue run and what follows when they fail.

    Attributes:
        is_abortable: whether an attempt is stopped in the middle when its order is cancelled; one that is not runs out, so that
            it can tidy up what it made.
        is_paid: whether its calls cost money: it is stopped when this daemon cannot be sure of its lease.
    """

    run_timeout: timedelta
    retry: RetryPolicy
    is_abortable: bool = True
    is_paid: bool = False


class RunningAttempt:
    """What a stage sees of its attempt (ports.Attempt)."""

    def __init__(
        self,
        job: Job,
        committer: Committer,
        events: Events,
        *,
        attempts: int,
        leave_slot: LeaveSlot | None = None,
        on_noted: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
            attempts: how many the job gets.
            leave_slot: None where the attempt has none to leave.
            on_noted: called when a checkpoint is committed.
        """
        self._on_noted = on_noted
        self._leave_slot = leave_slot
        self._job = job
        self._committer = committer
        self._events = events
        self._attempts = attempts
        self.instead: Callable[[], Move | Settle | None] = lambda: None

    @property
    def job(self) -> Job:
        """The claimed job."""
        return self._job

    @property
    def is_spent(self) -> bool:
        """Whether all attempts of the job are spent: this one only settles what they left behind."""
        return self._job.attempts >= self._attempts

    def if_given_up(self, instead: Callable[[], Move | Settle | None]) -> None:
        """What to do with the job rather than give it up, should this attempt fail and be the last."""
        self.instead = instead

    async def free_slot(self) -> None:
        """Another job may take the slot; this one goes on when that one's call is noted, or nobody takes it, or soon."""
        if self._leave_slot is not None:
            await asyncio.wait({self._leave_slot()}, timeout=_NEXT_FIRST_S)

    async def checkpoint(self, *writes: Write) -> None:
        """Commit *writes* now; LeaseLostError when the job is not ours to work on any more, OrderEndedError for its order."""
        verdict = await self._committer.commit(Transition(self._job, End.CHECKPOINT, writes=writes))
        if verdict is Verdict.ORDER_ENDED:
            raise OrderEndedError(f"job {self._job.id}: its order has ended")
        if verdict is not Verdict.ACCEPTED:
            raise LeaseLostError(f"job {self._job.id}: {verdict.value}")
        self._on_noted()
        self._events.emit(CheckpointCommitted(job_id=self._job.id))


class AttemptRunner:
    """Runs attempts; shared by all teams of a daemon."""

    def __init__(
        self,
        stages: Mapping[str, Stage],
        committer: Committer,
        events: Events,
        *,
        discard: Callable[[tuple[str, ...]], Awaitable[None]],
        is_sure: Callable[[], bool] = lambda: True,
        solitude: Solitude | None = None,
    ) -> None:
        """
        Args:
            stages: task name -> stage; a job of an unknown task is a dead letter, not a crash.
            discard: deletes artifacts that nobody needs any more; must not raise.
            is_sure: whether the lease of what this daemon runs holds beyond doubt.
            solitude: lets a suspect run alone; shared with whoever claims.
        """
        self._stages = stages
        self._committer = committer
        self._events = events
        self._discard = discard
        self._is_sure = is_sure
        self._solitude = Solitude(events) if solitude is None else solitude

    async def run(
        self,
        job: Job,
        rules: AttemptRules,
        *,
        leave_slot: LeaveSlot | None = None,
        on_noted: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Run one attempt to its committed end.

        A cancellation while the stage runs hands the job back unspent; one while the end is being committed is obeyed after it.

        Args:
            leave_slot: called when the attempt goes on without its slot.
            on_noted: called when a checkpoint of it is committed.
        """
        attempts = rules.retry.attempts
        attempt = RunningAttempt(job, self._committer, self._events, attempts=attempts, leave_slot=leave_slot, on_noted=on_noted)
        with ExitStack() as company:
            await self._run(attempt, rules, company)

    async def _run(self, attempt: RunningAttempt, rules: AttemptRules, company: ExitStack) -> None:
        job = attempt.job
        loop = asyncio.get_running_loop()
        started = loop.time()
        self._events.emit(JobStarted(job_id=job.id, queue=job.queue, task=job.task, attempt=job.attempt, order_id=job.order_id))
        done = Done()
        try:
            await self._solitude.join(job)
            company.callback(self._solitude.leave, job)
            done = await self._run_stage(attempt, rules)
            transition = Transition(job, End.SUCCEEDED, writes=done.writes)
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                transition = Transition(job, End.HANDED_BACK, error=str(next(iter(error.args), "the daemon stopped")))
            else:
                # Nobody cancelled this attempt: something inside the stage did. Handed back, it would run for ever.
                transition = _after_error(attempt, RetryableError("the stage cancelled itself"), rules)
        except (LeaseLostError, NotNowError) as error:
            # The end is committed all the same: the fence drops what is lost, and ends the job of a cancelled order.
            transition = Transition(job, End.HANDED_BACK, error=str(error))
        except Exception as error:  # noqa: BLE001 - whatever a stage raises ends its own attempt and nothing else
            transition = _after_error(attempt, error, rules)
        seconds = loop.time() - started
        verdict = await self._commit(replace(transition, seconds=seconds))
        self._report(transition, verdict, seconds)
        unneeded = {Verdict.ACCEPTED: done.obsolete, Verdict.ORDER_ENDED: done.created}.get(verdict, ())
        if unneeded:
            await self._discard(unneeded)

    async def _commit(self, transition: Transition) -> Verdict:
        commit = asyncio.ensure_future(self._committer.commit(transition))
        try:
            return await asyncio.shield(commit)
        except asyncio.CancelledError:
            # The grace is over while the end is on its way: the end comes first. A second cancellation gets through.
            return await commit

    async def _run_stage(self, attempt: RunningAttempt, rules: AttemptRules) -> Done:
        job = attempt.job
        stage = self._stages.get(job.task)
        if stage is None:
            raise PermanentError(f"no stage knows the task {job.task}")
        if rules.is_paid and not self._is_sure():
            # The process stood still while the claim's answer was on its way.
            raise LeaseLostError("the lease may have lapsed before the attempt began")
        limit = asyncio.timeout(rules.run_timeout.total_seconds())
        try:
            async with limit:
                return await stage.run(attempt)
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise RetryableError(f"the attempt did not finish within {rules.run_timeout.total_seconds():g} s") from error

    def _report(self, transition: Transition, verdict: Verdict, seconds: float) -> None:
        job = transition.job
        if verdict is Verdict.LEASE_LOST:
            self._events.emit(LeaseLost(job_id=job.id))
            return
        outcome: Outcome = "cancelled" if verdict is Verdict.ORDER_ENDED else _OUTCOMES[transition.end]
        self._events.emit(
            JobFinished(
                job_id=job.id, queue=job.queue, outcome=outcome, seconds=seconds, error=transition.error, order_id=job.order_id
            )
        )
        if verdict is Verdict.ACCEPTED and transition.move is not None and job.order_id is not None:
            was, provider = provider_of(job.queue), transition.move.provider
            self._events.emit(ProviderChanged(job.order_id, job.id, was, provider, reason=transition.error))


def _after_error(attempt: RunningAttempt, error: Exception, rules: AttemptRules) -> Transition:
    job = attempt.job
    return after_error(
        job,
        error,
        rules.retry,
        jitter=random.random(),
        dead=lambda reason: writes_when_dead(job, reason),
        instead=attempt.instead,
    )
