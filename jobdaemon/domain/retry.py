"""What follows a failed attempt: pure, given the error, the attempt's number, the policy and a random number."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta

from jobdaemon.domain.fallback import Move, Settle, may_help, moved_sentence
from jobdaemon.domain.job import SUSPECT_AFTER, Job, Task, provider_of
from jobdaemon.domain.outcome import End, Signal, Transition
from jobdaemon.domain.write import Write
from jobdaemon.errors import (
    BackendAwayError,
    DatabaseUnavailableError,
    JobdaemonError,
    KeyMissingError,
    KeyRefusedError,
    PermanentError,
    ProviderUnavailableError,
    PutOffError,
    RateLimitedError,
    RetryableError,
    StoreUnavailableError,
)

#: A worker that dies takes its jobs along, guilty or not: rests grow so that a poison job cannot keep a machine down, and only
#: this many deaths make a dead letter. After SUSPECT_AFTER of them the job runs alone, so the others are its own ...
MAX_DEATHS = 10
#: ... unless workers die anyway. So many signs of that within the window, and a death proves nothing: a worker that died in which
#: no suspect ran alone (two of them may be this job's own, from the time before it was one), or another suspect that died alone,
#: however often. Where every job kills, the jobs are not to blame.
STORM_DEATHS = 3
STORM_WINDOW = timedelta(hours=1)
#: What ``attempts`` calls the death of a worker in which a suspect ran alone, and any other.
DIED_ALONE, DIED = "DiedAlone", "WorkerDied"
_DEATH_REST = timedelta(seconds=1)
_DEATH_REST_CAP = timedelta(minutes=5)
#: A capacity signal that names no time.
_DEFAULT_SNOOZE = timedelta(seconds=1)
#: Of a job whose call only a daemon with another key can ask for.
_ELSEWHERE_REST = timedelta(seconds=5)
#: The longest rest of a job that is out of attempts and asks its provider what became of a call.
_SETTLE_CAP = timedelta(minutes=1)


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """
    Attributes:
        attempts: how many attempts a job gets.
        backoff: after the first failed attempt; doubles with each.
        cap: no backoff is longer, before jitter.
        jitter: the share by which a backoff may be shorter or longer, 0.0 to 1.0.
    """

    attempts: int
    backoff: timedelta
    cap: timedelta
    jitter: float


def backoff_after(attempt: int, policy: RetryPolicy, jitter: float) -> timedelta:
    """
    How long to wait after failed attempt number *attempt*.

    Args:
        attempt: counted from 1.
        jitter: a random number from 0.0 to 1.0; 0.5 is the middle.
    """
    doubled = policy.backoff * 2.0 ** min(attempt - 1, 32)
    return min(doubled, policy.cap) * (1 + policy.jitter * (2 * jitter - 1))


def after_error(
    job: Job,
    error: BaseException,
    policy: RetryPolicy,
    *,
    jitter: float,
    dead: Callable[[str], tuple[Write, ...]],
    instead: Callable[[], Move | Settle | None] = lambda: None,
) -> Transition:
    """
    The transition that follows *error*.

    Args:
        jitter: a random number from 0.0 to 1.0.
        dead: what to write when the job is given up on, from the reason.
        instead: what to do rather than give it up, where that may help.
    """
    kind = type(error).__name__
    reason = str(error) if isinstance(error, JobdaemonError) else f"{kind}: {error}"
    if isinstance(error, RateLimitedError):
        # Never sooner than asked; spread out, since what was refused together would come back together.
        delay = (error.retry_after or _DEFAULT_SNOOZE) * (1 + policy.jitter * abs(2 * jitter - 1))
        return Transition(
            job, End.SNOOZE, delay=delay, error_kind=kind, error=reason, signal=Signal.CAPACITY, retry_after=error.retry_after
        )
    if isinstance(error, KeyRefusedError) and job.key_alias is not None:
        # The key rests, not the job: another one may take it. Not at once, since the rest may not have been noted.
        delay = _DEFAULT_SNOOZE * (1 + policy.jitter * jitter)
        signal = Signal.MONEY if error.is_out_of_money else Signal.KEY
        return Transition(
            job, End.SNOOZE, delay=delay, error_kind=kind, error=reason, signal=signal, retry_after=error.retry_after
        )
    if isinstance(error, KeyMissingError):
        # Nobody's fault. Long enough that a daemon which has the key comes first.
        delay = _ELSEWHERE_REST * (1 + policy.jitter * jitter)
        return Transition(job, End.SNOOZE, delay=delay, error_kind=kind, error=reason, signal=Signal.ELSEWHERE)
    if isinstance(error, PutOffError):
        delay = (error.retry_after or _DEFAULT_SNOOZE) * (1 + policy.jitter * jitter)
        return Transition(job, End.SNOOZE, delay=delay, error_kind=kind, error=reason)
    if isinstance(error, DatabaseUnavailableError):
        # No fault of the job, and an outage may outlast all its attempts.
        return Transition(job, End.SNOOZE, delay=_DEFAULT_SNOOZE, error_kind=kind, error=reason)
    if isinstance(error, BackendAwayError):
        # Any photo would have met it. As after a first attempt; the queue's circuit makes the rests longer.
        delay = max(backoff_after(1, policy, jitter), error.retry_after or timedelta(0))
        return Transition(job, End.SNOOZE, delay=delay, error_kind=kind, error=reason, signal=Signal.OUTAGE)
    outage = Signal.OUTAGE if isinstance(error, ProviderUnavailableError | StoreUnavailableError) else None
    delay = backoff_after(job.attempt, policy, jitter)
    if isinstance(error, PermanentError) or job.attempt >= policy.attempts:
        step = instead() if may_help(error) else None
        if isinstance(step, Move):
            told = moved_sentence(provider_of(job.queue), step.provider, reason)
            return Transition(job, End.MOVED, writes=step.writes, error_kind=kind, error=told, signal=outage, move=step)
        if step is None:
            end = End.SUCCEEDED if job.is_best_effort else End.FAILED
            return Transition(job, end, writes=dead(reason), error_kind=kind, error=reason, signal=outage)
        longer = replace(policy, cap=max(policy.cap, _SETTLE_CAP))
        delay = backoff_after(job.attempt, longer, jitter)
    if isinstance(error, RetryableError) and error.retry_after is not None:
        delay = max(delay, error.retry_after)
    return Transition(job, End.RETRY, delay=delay, error_kind=kind, error=reason, signal=outage)


def after_death(job: Job, *, ran_alone: bool, other_deaths: int, dead: Callable[[str], tuple[Write, ...]]) -> Transition:
    """
    The transition of a job whose worker died while it ran: costs no attempt, since most jobs that die are innocent.

    Args:
        ran_alone: the worker ran nothing else when it died.
        other_deaths: signs, within STORM_WINDOW and without this worker, that workers die anyway.
        dead: what to write when the job is given up on, from the reason.
    """
    deaths = job.deaths + 1
    is_its_own = job.is_suspect and ran_alone
    kind = DIED_ALONE if is_its_own else DIED
    # A suspect would have a whole daemon to itself. Nobody waits for a prewarm: it is given up first, guilty or not.
    is_unwanted = job.task == Task.PREWARM and deaths >= SUSPECT_AFTER
    if is_unwanted or (deaths >= MAX_DEATHS and is_its_own and other_deaths < STORM_DEATHS):
        reason = f"{deaths} workers died while this job ran"
        return Transition(job, End.FAILED, writes=dead(reason), error_kind=kind, error=reason, frees_elsewhere=True)
    rest = None if deaths == 1 else min(_DEATH_REST * 2.0 ** min(deaths - 2, 32), _DEATH_REST_CAP)
    reason = "the worker died while this job ran" + " alone" * is_its_own
    return Transition(job, End.INTERRUPTED, delay=rest, error_kind=kind, error=reason, frees_elsewhere=True)
