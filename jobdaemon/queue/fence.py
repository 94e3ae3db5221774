"""
The fence, as a pure decision: what a transition may still do, given the row as it is under lock.

An attempt's token lives in its job's row from the claim until the next one. Rescue and redrive forget it; an attempt's own end
keeps it, so that after a lost COMMIT reply "ended, and my token" means "it was I".
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import timedelta

from jobdaemon.domain.expand import writes_when_dead
from jobdaemon.domain.job import Job, JobStatus
from jobdaemon.domain.outcome import End, Transition, Verdict
from jobdaemon.domain.write import CallAccepted, CallEnded


@dataclass(frozen=True, slots=True)
class HeldJob:
    """A job's row under lock."""

    status: str
    token: int | None
    abort_requested: bool


@dataclass(frozen=True, slots=True)
class Ruling:
    """
    What to do about one transition.

    Attributes:
        commit: the transition whose writes apply, or None; of an ended order's only what it notes of its calls.
        status: the job's new status, or None to leave the job alone.
        recorded_outcome: what ``attempts`` says of it, or None for a success.
    """

    verdict: Verdict
    job: Job
    commit: Transition | None = None
    status: JobStatus | None = None
    attempts_spent: int = 0
    deaths: int = 0
    delay: timedelta | None = None
    recorded_outcome: str | None = None
    seconds: float = 0.0
    error_kind: str | None = None
    error: str | None = None
    ran_by: int | None = None


_STATUS = {
    End.SUCCEEDED: JobStatus.SUCCEEDED,
    End.RETRY: JobStatus.TODO,
    End.SNOOZE: JobStatus.TODO,
    End.HANDED_BACK: JobStatus.TODO,
    End.INTERRUPTED: JobStatus.TODO,
    End.MOVED: JobStatus.TODO,
    End.FAILED: JobStatus.FAILED,
}
_SPENDS_AN_ATTEMPT = {End.SUCCEEDED, End.RETRY, End.FAILED}


def rule(transition: Transition, held: HeldJob | None, *, order_has_ended: bool, has_beaten: bool = False) -> Ruling:
    """
    Decide about one transition.

    Args:
        held: the job's row, locked; None when it is gone.
        order_has_ended: its order is completed, partial, failed, cancelled or gone.
        has_beaten: the daemon that runs it has beaten since another one found it lost.
    """
    job, end = transition.job, transition.end
    if held is None or held.token != job.token:
        return Ruling(Verdict.LEASE_LOST, job)
    if held.status != JobStatus.DOING:
        # Only the holder of the token can have ended the job and left the token in place: our earlier try did commit.
        return Ruling(Verdict.LEASE_LOST if end is End.CHECKPOINT else Verdict.ACCEPTED, job)
    if has_beaten:
        return Ruling(Verdict.LEASE_LOST, job)
    # What became of a call is true whatever became of its order: the id of a task that is to be stopped has to be known.
    notes = replace(transition, writes=tuple(write for write in transition.writes if isinstance(write, CallAccepted | CallEnded)))
    # The upload of its last image may end an order before the generate attempt that made it has ended: that attempt succeeded.
    has_nothing_to_drop = end is End.SUCCEEDED and notes.writes == transition.writes and not held.abort_requested
    if order_has_ended and not job.outlives_its_order and not has_nothing_to_drop:
        commit = notes if notes.writes else None
        if end is End.CHECKPOINT:
            return Ruling(Verdict.ORDER_ENDED, job, commit=commit)
        return replace(_end(transition, JobStatus.ABORTED, Verdict.ORDER_ENDED, "cancelled", writes=False), commit=commit)
    if end is End.CHECKPOINT:
        return Ruling(Verdict.ACCEPTED, job, commit=transition)
    if held.abort_requested and _STATUS[end] is JobStatus.TODO:
        # Somebody asked procrastinate to abort this one job; what would run again ends instead.
        aborted = replace(transition, writes=writes_when_dead(job, "the job was aborted"))
        return _end(aborted, JobStatus.ABORTED, Verdict.ACCEPTED, "cancelled", writes=True)
    outcome = None if end is End.SUCCEEDED else end.value
    return _end(transition, _STATUS[end], Verdict.ACCEPTED, outcome, writes=True)


def _end(transition: Transition, status: JobStatus, verdict: Verdict, outcome: str | None, *, writes: bool) -> Ruling:
    return Ruling(
        verdict,
        transition.job,
        commit=transition if writes else None,
        status=status,
        attempts_spent=1 if transition.end in _SPENDS_AN_ATTEMPT else 0,
        deaths=1 if transition.end is End.INTERRUPTED else 0,
        delay=transition.delay if status is JobStatus.TODO else None,
        recorded_outcome=outcome,
        seconds=transition.seconds,
        error_kind=transition.error_kind,
        error=transition.error,
        ran_by=transition.ran_by,
    )
