"""The values of the model, and small changes of them; see protocol.py."""

from __future__ import annotations

import itertools
from functools import cache
from typing import NamedTuple

from jobdaemon.domain.outcome import End, Verdict

#: In intervals: a daemon silent for more has lost its lease; one silent for more may neither claim nor judge others.
LEASE, TRUSTED = 2, 1
#: A daemon whose last heartbeat has failed.
UNSTEADY = -1
#: How a claim may hold the queue's lock.
ALONE, SHARED = "alone", "shared"
#: More than any number of jobs: a queue without a limit.
NO_LIMIT = 9
#: Whose job it is when it is nobody's, and when its daemon was started anew: the new one has another id.
NOBODY, GONE = -1, -2

# The promises

ABOVE_LIMIT = "a call started above the limit in force"
STORED_TWICE = "an image was stored twice"
UNFENCED = "an attempt wrote that does not hold the job's token"
TWICE = "a commit that was sent again was applied again"
AFTER_CANCEL = "something was written for a cancelled order"
TAKEN = "a job was taken from a daemon that lives and beats"
LOST = "a job can never end"

# Plain words, not enumerations: states are compared and sorted a million times.

# A job; whatever else its status may be, it has ended.
TODO, DOING = "todo", "doing"

# An attempt's phases.
LATE = "late"  # the claim's answer is still on its way
CLAIMED = "claimed"  # its call has not started
CALLING = "calling"
MADE = "made"  # there is an image to checkpoint
ENDING = "ending"  # only its end is to be committed
RETURNING = "returning"  # cut short: to be handed back
RESCUING = "rescuing"  # no attempt but the rescue of one, in the rescuer's committer
FORESTALLED = "forestalled"  # the same, and the daemon that it would take the job from has beaten since
RESCUES = (RESCUING, FORESTALLED)

# A daemon.
#: cut off: it goes on, but cannot reach the database, which the others can
ALIVE, CUT_OFF, FROZEN, DEAD = "alive", "cut off", "frozen", "dead"

COMMITS = {
    MADE: End.CHECKPOINT,
    ENDING: End.SUCCEEDED,
    RETURNING: End.HANDED_BACK,
    RESCUING: End.INTERRUPTED,
    FORESTALLED: End.INTERRUPTED,
}


class Attempt(NamedTuple):
    """
    What one daemon's memory holds of a job.

    Attributes:
        holds: whether the job's row still has its token.
        is_apart: its daemon was frozen or cut off beyond its lease since the claim: the referee does not judge its call.
        allowed: the highest limit that a claim from its own on has seen, until its call starts: the limit in force.
    """

    daemon: int
    phase: str
    holds: bool = True
    is_apart: bool = False
    allowed: int = 0


class Job(NamedTuple):
    """
    A job's row, its order's, and the attempts that were made of it.

    Attributes:
        is_cancelled: its order was.
        has_image: what it makes is recorded.
        is_forfeit: its daemon was frozen or cut off beyond its lease and has not beaten since: others may take it.
        claimed_ago: intervals since the claim; only kept where a timer releases slots.
        has_left: its row says that its call is over and its slot free.
    """

    status: str = TODO
    worker: int = NOBODY
    is_cancelled: bool = False
    has_image: bool = False
    is_forfeit: bool = False
    claimed_ago: int = 0
    has_left: bool = False
    attempts: tuple[Attempt, ...] = ()


class Claim(NamedTuple):
    """
    A claim between two of its steps; *stage* is "" when there is none.

    Attributes:
        stage: "asked": on its way to the database; "counted": it knows how many it may take.
        allowed: the limit it has seen.
        granted: how many jobs it may take.
        lock: how it holds the queue's lock: ALONE, SHARED with others that saw no limit, or "" for not at all.
    """

    stage: str = ""
    allowed: int = 0
    granted: int = 0
    lock: str = ""


NO_CLAIM = Claim()


class Daemon(NamedTuple):
    """
    Attributes:
        silence: intervals since its last heartbeat, LEASE + 1 at most; by the database's clock.
        steady: intervals since the first of its heartbeats without a gap, LEASE at most; by the same. UNSTEADY when it knows that
            a beat has failed since.
        is_looking: it was found fit to rescue, and its look is on its way to the database; only where that is asked before.
    """

    mode: str = ALIVE
    silence: int = 0
    steady: int = LEASE
    claim: Claim = NO_CLAIM
    is_looking: bool = False


class Mishaps(NamedTuple):
    """What may still happen, how many times; the explorer tries every moment for each."""

    crashes: int = 0
    restarts: int = 0
    freezes: int = 0
    cuts: int = 0
    outages: int = 0
    lost_answers: int = 0
    limit_changes: int = 0
    hand_backs: int = 0
    cancels: int = 0
    operators: int = 0
    leaps: int = 0
    held_claims: int = 0


class State(NamedTuple):
    """
    Attributes:
        is_up: whether the database can be reached.
        leaked: rows of a table of leases that nobody will delete; only where there is such a table.
    """

    jobs: tuple[Job, ...]
    daemons: tuple[Daemon, ...]
    limit: int
    left: Mishaps
    is_up: bool = True
    leaked: int = 0


def is_over(job: Job) -> bool:
    """Whether the job has ended for good."""
    return job.status not in (TODO, DOING)


@cache
def an_interval_later(daemon: Daemon, *, is_up: bool, is_late: bool) -> Daemon:
    if daemon.mode == ALIVE and is_up:
        later = beaten(daemon)
        return later if later.steady != daemon.steady else later._replace(steady=min(later.steady + 1, LEASE))
    silence = min(daemon.silence + 1, LEASE + 1)
    if (daemon.mode == FROZEN or is_late) and daemon.steady != UNSTEADY:
        return daemon._replace(silence=silence, steady=min(daemon.steady + 1, LEASE))
    return daemon._replace(silence=silence, steady=UNSTEADY)


def beaten(daemon: Daemon) -> Daemon:
    is_new = daemon.silence > TRUSTED or daemon.steady == UNSTEADY
    return daemon._replace(silence=0, steady=0 if is_new else daemon.steady)


def has_lapsed_alone(daemon: Daemon) -> bool:
    return daemon.mode in (FROZEN, CUT_OFF) and daemon.silence > LEASE


@cache
def forfeited(job: Job, number: int) -> Job:
    """Daemon *number* is frozen or cut off beyond its lease: its calls are apart, its jobs are for the taking."""
    is_forfeit = job.is_forfeit or (job.status == DOING and job.worker == number)
    attempts = tuple(
        attempt._replace(is_apart=True) if attempt.daemon == number and attempt.phase not in RESCUES else attempt
        for attempt in job.attempts
    )
    return job._replace(is_forfeit=is_forfeit, attempts=attempts)


@cache
def regained(job: Job, number: int) -> Job:
    """Daemon *number* beats: what nobody has taken meanwhile is its own."""
    if job.worker != number:
        return job
    attempts = tuple(attempt._replace(phase=FORESTALLED) if attempt.phase == RESCUING else attempt for attempt in job.attempts)
    return job._replace(is_forfeit=False, attempts=tuple(sorted(attempts)))


def without_late(job: Job, number: int) -> Job:
    """Daemon *number* will drop the answer to its claim of this job."""
    left = tuple(a for a in job.attempts if not (a.daemon == number and a.phase == LATE and a.holds))
    return job._replace(attempts=left)


def without_attempts(job: Job, number: int) -> Job:
    """Daemon *number* dies, and with it what it had in its memory."""
    return job._replace(attempts=tuple(attempt for attempt in job.attempts if attempt.daemon != number))


def with_limit_seen(jobs: tuple[Job, ...], limit: int) -> tuple[Job, ...]:
    """A claim has seen this limit: it is in force for calls that have not started."""
    return tuple(
        job._replace(
            attempts=tuple(
                attempt._replace(allowed=max(attempt.allowed, limit)) if attempt.phase in (LATE, CLAIMED) else attempt
                for attempt in job.attempts
            )
        )
        for job in jobs
    )


def seen_by(daemon: Daemon, limit: int) -> Daemon:
    claim = daemon.claim
    return daemon if claim.stage != "counted" else daemon._replace(claim=claim._replace(allowed=max(claim.allowed, limit)))


def in_phase(attempt: Attempt, phase: str) -> Attempt:
    return attempt._replace(phase=phase, allowed=0)


def and_attempt(job: Job, attempt: Attempt) -> Job:
    return job._replace(attempts=tuple(sorted((*job.attempts, attempt))))


def answered(job: Job, index: int, attempt: Attempt, verdict: Verdict) -> Job:
    """The daemon hears what became of its commit: a checkpoint is followed by an end, an end by nothing."""
    rest = job.attempts[:index] + job.attempts[index + 1 :]
    if attempt.phase != MADE or verdict is Verdict.LEASE_LOST:
        return job._replace(attempts=rest)
    phase = ENDING if verdict is Verdict.ACCEPTED else RETURNING
    return job._replace(attempts=tuple(sorted((*rest, job.attempts[index]._replace(phase=phase)))))


def with_daemon(state: State, number: int, daemon: Daemon) -> State:
    daemons = state.daemons
    return state._replace(daemons=(*daemons[:number], daemon, *daemons[number + 1 :]))


def with_job(state: State, place: int, job: Job) -> State:
    jobs = state.jobs
    return state._replace(jobs=(*jobs[:place], job, *jobs[place + 1 :]))


def with_attempt(state: State, place: int, index: int, attempt: Attempt) -> State:
    job = state.jobs[place]
    attempts = sorted((*job.attempts[:index], attempt, *job.attempts[index + 1 :]))
    return with_job(state, place, job._replace(attempts=tuple(attempts)))


def without_names(state: State) -> State:
    """
    One of the states that differ from this one by the numbers of daemons and jobs only: a claim takes any of the jobs that wait,
    so nothing depends on the numbers. Of a job that has ended it is forgotten how.
    """
    daemons, orders = _orders(state.daemons)
    jobs = min([sorted([_renamed(job, order) for job in state.jobs]) for order in orders])
    return State(tuple(jobs), daemons, state.limit, state.left, state.is_up, state.leaked)


@cache
def _orders(daemons: tuple[Daemon, ...]) -> tuple[tuple[Daemon, ...], list[tuple[int, ...]]]:
    """The daemons sorted, and the ways to get there: daemon number ``order[i]`` becomes number i."""
    wanted = tuple(sorted(daemons))
    every = itertools.permutations(range(len(daemons)))
    return wanted, [order for order in every if tuple(daemons[number] for number in order) == wanted]


@cache
def _renamed(job: Job, order: tuple[int, ...]) -> Job:
    attempts = tuple(sorted(attempt._replace(daemon=order.index(attempt.daemon)) for attempt in job.attempts))
    if is_over(job):
        return Job("succeeded", attempts=attempts)
    return job._replace(worker=order.index(job.worker) if job.worker >= 0 else job.worker, attempts=attempts)
