"""
The engine's protocol as a model: lease, limit, fence and rescue, and whatever may happen to them. docs/model.md tells how its
parts map to the code and what it leaves out.

A :class:`State` is the database (one queue, its jobs, the daemons' heartbeats) and what each daemon has in its memory. A
:class:`World` says how large it is, what may go wrong how often, and by which :class:`Rules` the engine plays: the default is the
engine as it is built, every other value a mistake that somebody could make. :meth:`World.steps` lists what may happen next.

Two decisions are not modelled but called: the fence (``jobdaemon.queue.fence.rule``) and how many jobs may start
(``jobdaemon.domain.capacity.capacity``).

Time goes in intervals between heartbeats: when one passes, every daemon that lives, moves and reaches the database has beaten. A
token is never handed out twice, so of an attempt's token one thing matters: whether the job's row still has it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from typing import NamedTuple

from jobdaemon.domain.capacity import QueueState, capacity
from jobdaemon.domain.job import Job as RealJob
from jobdaemon.domain.job import Task
from jobdaemon.domain.outcome import End, Transition, Verdict
from jobdaemon.domain.write import OrderStarted
from jobdaemon.queue.fence import HeldJob, rule
from tests.model.explorer import Step
from tests.model.state import (
    ABOVE_LIMIT,
    AFTER_CANCEL,
    ALIVE,
    ALONE,
    CALLING,
    CLAIMED,
    COMMITS,
    CUT_OFF,
    DEAD,
    DOING,
    ENDING,
    FORESTALLED,
    FROZEN,
    GONE,
    LATE,
    LEASE,
    MADE,
    NO_CLAIM,
    NO_LIMIT,
    NOBODY,
    RESCUES,
    RESCUING,
    RETURNING,
    SHARED,
    STORED_TWICE,
    TAKEN,
    TODO,
    TRUSTED,
    TWICE,
    UNFENCED,
    Attempt,
    Claim,
    Daemon,
    Job,
    Mishaps,
    State,
    an_interval_later,
    and_attempt,
    answered,
    beaten,
    forfeited,
    has_lapsed_alone,
    in_phase,
    is_over,
    regained,
    seen_by,
    with_attempt,
    with_daemon,
    with_job,
    with_limit_seen,
    without_attempts,
    without_late,
)

#: When something is asked of the database.
IN, BEFORE, NEVER = "in the statement", "before it", "never"


@dataclass(frozen=True, slots=True)
class Rules:
    """
    How the engine plays. The defaults are the engine as it is built.

    Attributes:
        is_fenced: a commit applies only while the job's row has the attempt's token.
        fences_by_status: a commit of a job that does not run any more changes nothing.
        has_own_token: each claim has a token of its own; else the daemon's id is its token.
        guards_rows: a write applies only to a row that is still in the state it starts from.
        counts_under_lock: what runs is counted under the queue's lock, held until the claim has committed.
        shares_lock: claims that see no limit hold that lock together; else not at all.
        counts_jobs: what runs is counted in the jobs; else in a table of leases that the engine's own ends clear.
        frees_early: a slot may be free before the call of its attempt is over.
        mark_is_the_claims: that a slot is free is said of one claim; else of the job, whoever claims it.
        releases_by_timer: a slot is free once its claim is older than the lease, whatever its daemon does.
        asks_for_lease: when it is asked how long a daemon that wants jobs was silent: IN the claim itself, under the lock; BEFORE
            it is sent; NEVER.
        asks_for_steadiness: when it is asked whether a daemon that looks for dead ones has itself beaten without a gap for a
            whole lease: IN the look; BEFORE it is sent; NEVER.
        asks_again: a rescue applies only if the daemon has not beaten since the look.
        disowns_strays: a daemon that hands back a job which it does not know to run drops the claim's answer when that comes.
        outages_are_noticed: assumed: a heartbeat that is due while the database is away fails; else it is only late.
    """

    is_fenced: bool = True
    fences_by_status: bool = True
    has_own_token: bool = True
    guards_rows: bool = True
    counts_under_lock: bool = True
    shares_lock: bool = True
    counts_jobs: bool = True
    frees_early: bool = False
    mark_is_the_claims: bool = True
    releases_by_timer: bool = False
    asks_for_lease: str = IN
    asks_for_steadiness: str = IN
    asks_again: bool = True
    disowns_strays: bool = True
    outages_are_noticed: bool = True

    def lock(self, limit: int) -> str:
        """How a claim that has seen this limit holds the queue's lock."""
        if not self.counts_under_lock:
            return ""
        if limit != NO_LIMIT:
            return ALONE
        return SHARED if self.shares_lock else ""


AS_BUILT = Rules()
NO_MISHAPS = Mishaps()


@cache
def _may_start(asked: int, running: int, limit: int) -> int:
    """The engine's own decision."""
    cluster_limit = None if limit == NO_LIMIT else limit
    now = datetime(2026, 1, 1, tzinfo=UTC)
    return capacity(QueueState(), asked, running=running, probes=0, cluster_limit=cluster_limit, paused=False, now=now)


class Applied(NamedTuple):
    """What the fence says: whether the writes apply, and the job's new status ("" leaves it)."""

    verdict: Verdict
    writes: bool
    status: str


@cache
def _ruled(end: End, status: str, holds: bool, is_cancelled: bool, has_beaten: bool) -> Applied:
    """The engine's own decision."""
    job = RealJob(1, "generate.local", Task.GENERATE, 0, {"order_id": 7, "images": [1]}, token=5)
    transition = Transition(job, end, writes=(OrderStarted(7),) if end is End.CHECKPOINT else ())
    held = HeldJob(status, 5 if holds else 6, abort_requested=is_cancelled)
    ruling = rule(transition, held, order_has_ended=is_cancelled, has_beaten=has_beaten)
    writes = ruling.commit is not None and bool(ruling.commit.writes) and end is End.CHECKPOINT
    return Applied(ruling.verdict, writes, "" if ruling.status is None else str(ruling.status))


@dataclass(frozen=True)
class World:
    """
    How large the model is, what may happen to it, and by which rules it plays; see the module docstring.

    Attributes:
        leaves: attempts may go on without their slots once their calls are over.
    """

    daemons: int = 2
    jobs: int = 2
    slots: int = 2
    limits: tuple[int, ...] = (1,)
    mishaps: Mishaps = NO_MISHAPS
    rules: Rules = AS_BUILT
    leaves: bool = False

    def first(self) -> State:
        """All is well and all work waits; the first of the limits is in force."""
        return State((Job(),) * self.jobs, (Daemon(),) * self.daemons, self.limits[0], self.mishaps)

    @staticmethod
    def is_end(state: State) -> bool:
        """Whether all jobs have ended."""
        return all(map(is_over, state.jobs))

    def steps(self, state: State) -> Iterator[Step[State]]:
        """Everything that may happen next."""
        yield from self._time(state)
        yield from self._operators(state)
        for number, daemon in enumerate(state.daemons):
            if daemon.mode == ALIVE and state.is_up:
                yield from self._beats(state, number)
                yield from self._claim_begins(state, number)
                yield from self._looks(state, number)
            yield from self._falls(state, number) if daemon.mode == ALIVE else self._recovers(state, number)
            if daemon.claim.stage:
                yield from self._claim_goes_on(state, number)
        for place, job in enumerate(state.jobs):
            yield from self._strays(state, place)
            for index, attempt in enumerate(job.attempts):
                mode = state.daemons[attempt.daemon].mode
                if mode in (ALIVE, CUT_OFF):
                    yield from self._attempt_goes_on(state, place, index)
                if mode == ALIVE and state.is_up:
                    if self.leaves:
                        yield from self._slot_left(state, place, index)
                    yield from self._commits(state, place, index)

    # Time, and what stands still

    def _time(self, state: State) -> Iterator[Step[State]]:
        """An interval passes: jobdaemon/queue/heartbeat.py."""
        if any(daemon.claim.stage == "counted" for daemon in state.daemons):
            return  # one statement, nobody's round trip: it takes no time beside a lease
        is_late = not self.rules.outages_are_noticed
        daemons = tuple(an_interval_later(daemon, is_up=state.is_up, is_late=is_late) for daemon in state.daemons)
        jobs = state.jobs
        for number, daemon in enumerate(daemons):
            if has_lapsed_alone(daemon):
                jobs = tuple(forfeited(job, number) for job in jobs)
            elif daemon.silence == 0:
                jobs = tuple(regained(job, number) for job in jobs)
        if self.rules.releases_by_timer:
            jobs = tuple(
                job._replace(claimed_ago=min(job.claimed_ago + 1, LEASE + 1)) if job.status == DOING else job for job in jobs
            )
        later = state._replace(daemons=daemons, jobs=jobs)
        if later != state:
            silent = [f"d{number}" for number, daemon in enumerate(daemons) if daemon.silence > 0]
            yield Step(f"an interval passes; silent: {', '.join(silent) or 'nobody'}", later)

    def _beats(self, state: State, number: int) -> Iterator[Step[State]]:
        daemon = state.daemons[number]
        if daemon.silence > 0:
            jobs = tuple(regained(job, number) for job in state.jobs)
            yield Step(f"d{number} beats", with_daemon(state._replace(jobs=jobs), number, beaten(daemon)))

    def _falls(self, state: State, number: int) -> Iterator[Step[State]]:
        """SIGSTOP, a broken network, SIGKILL. The kernel closes a dead daemon's calls; its claim may still be carried out."""
        daemon, left = state.daemons[number], state.left
        if left.freezes:
            frozen = with_daemon(state, number, daemon._replace(mode=FROZEN))
            yield Step(f"d{number} is frozen", frozen._replace(left=left._replace(freezes=left.freezes - 1)))
        if left.cuts:
            cut_off = with_daemon(state, number, daemon._replace(mode=CUT_OFF))
            yield Step(f"d{number} is cut off", cut_off._replace(left=left._replace(cuts=left.cuts - 1)))
        if left.crashes:
            jobs = tuple(without_attempts(job, number) for job in state.jobs)
            after = state._replace(jobs=jobs, left=left._replace(crashes=left.crashes - 1))
            dead = daemon._replace(mode=DEAD, steady=0, is_looking=False)
            yield Step(f"d{number} is killed", with_daemon(after, number, dead._replace(claim=NO_CLAIM)))
            if daemon.claim.stage:
                yield Step(f"d{number} is killed, its claim goes on", with_daemon(after, number, dead))

    def _recovers(self, state: State, number: int) -> Iterator[Step[State]]:
        daemon, left = state.daemons[number], state.left
        if daemon.mode in (FROZEN, CUT_OFF):
            told = "goes on" if daemon.mode == FROZEN else "is no longer cut off"
            yield Step(f"d{number} {told}", with_daemon(state, number, daemon._replace(mode=ALIVE)))
        elif left.restarts and state.is_up and daemon.silence > LEASE and not daemon.claim.stage:
            # Its successor has a new id; what it left behind belongs to the old one.
            jobs = tuple(job._replace(worker=GONE) if job.worker == number else job for job in state.jobs)
            after = state._replace(jobs=jobs, left=left._replace(restarts=left.restarts - 1))
            yield Step(f"d{number} is started anew", with_daemon(after, number, Daemon(steady=0)))

    # Operators, customers and the database itself

    def _operators(self, state: State) -> Iterator[Step[State]]:
        left = state.left
        if state.is_up:
            if left.outages:
                daemons = tuple(daemon._replace(claim=NO_CLAIM) for daemon in state.daemons)
                away = state._replace(is_up=False, daemons=daemons, left=left._replace(outages=left.outages - 1))
                yield Step("the database goes away", away)
        else:
            yield Step("the database is back", state._replace(is_up=True))
            return
        if left.leaps:
            daemons = tuple(daemon._replace(silence=LEASE + 1, steady=LEASE) for daemon in state.daemons)
            yield Step("the clock leaps", state._replace(daemons=daemons, left=left._replace(leaps=left.leaps - 1)))
        if left.limit_changes:
            for limit in self.limits:
                if limit != state.limit:
                    changed = state._replace(limit=limit, left=left._replace(limit_changes=left.limit_changes - 1))
                    yield Step(f"the limit becomes {'none' if limit == NO_LIMIT else limit}", changed)
        for place, job in enumerate(state.jobs):
            if left.cancels and not is_over(job) and not job.is_cancelled:
                status = "cancelled" if job.status == TODO else job.status
                after = state._replace(left=left._replace(cancels=left.cancels - 1))
                yield Step(
                    f"the order of job {place} is cancelled",
                    with_job(after, place, job._replace(is_cancelled=True, status=status)),
                )
            if left.operators and job.status == DOING and not job.is_cancelled and self._is_dead(state, job.worker):
                # procrastinate's own retry: it knows nothing of ours.
                after = state._replace(left=left._replace(operators=left.operators - 1))
                if not self.rules.counts_jobs:
                    after = after._replace(leaked=after.leaked + 1)
                again = self._unmarked(job._replace(status=TODO, worker=NOBODY, is_forfeit=False))
                yield Step(f"an operator puts job {place} of a dead daemon back by stock means", with_job(after, place, again))

    # The claim: migrations 0012, 0017 and 0021, Team.run

    def _claim_begins(self, state: State, number: int) -> Iterator[Step[State]]:
        daemon = state.daemons[number]
        if daemon.claim.stage or (self.rules.asks_for_lease == BEFORE and daemon.silence > TRUSTED):
            return
        if self._free_slots(state, number) > 0 and any(job.status == TODO for job in state.jobs):
            asked = with_daemon(state, number, daemon._replace(claim=Claim("asked")))
            yield from self._claim_goes_on(asked, number)
            if left := state.left.held_claims:
                yield Step(f"d{number} asks for jobs", asked._replace(left=state.left._replace(held_claims=left - 1)))

    def _claim_goes_on(self, state: State, number: int) -> Iterator[Step[State]]:
        if not state.is_up:
            return
        if state.daemons[number].claim.stage == "asked":
            yield from self._claim_counts(state, number)
        else:
            yield from self._claim_commits(state, number)

    def _claim_counts(self, state: State, number: int) -> Iterator[Step[State]]:
        """Lock, limit, count: nobody's claim under the same lock can come between, so they are one step."""
        others = [other.claim for place, other in enumerate(state.daemons) if place != number and other.claim.stage == "counted"]
        lock = self.rules.lock(state.limit)
        if lock and any(claim.lock == ALONE or (claim.lock and lock == ALONE) for claim in others):
            return  # it waits for the lock
        running = self._running(state)
        granted = _may_start(self._free_slots(state, number), running, state.limit)
        if self.rules.asks_for_lease == IN and state.daemons[number].silence > TRUSTED:
            granted = 0
        daemon = state.daemons[number]
        if granted > 0:
            # From now on this limit is in force for every call that has not started.
            jobs = with_limit_seen(state.jobs, state.limit)
            state = state._replace(jobs=jobs, daemons=tuple(seen_by(other, state.limit) for other in state.daemons))
            counted = daemon._replace(claim=Claim("counted", state.limit, granted, lock))
            yield Step(f"d{number} claims: {running} run, {granted} may start", with_daemon(state, number, counted))
        elif self.mishaps.held_claims:
            yield Step(f"d{number} claims nothing", with_daemon(state, number, daemon._replace(claim=NO_CLAIM)))

    def _claim_commits(self, state: State, number: int) -> Iterator[Step[State]]:
        daemon = state.daemons[number]
        claim = daemon.claim
        ready = [place for place, job in enumerate(state.jobs) if job.status == TODO]
        state = with_daemon(state, number, daemon._replace(claim=NO_CLAIM))
        for places in itertools.combinations(ready, min(claim.granted, len(ready))):
            attempt = Attempt(number, CLAIMED, is_apart=has_lapsed_alone(daemon), allowed=claim.allowed)
            vain = list(state.jobs)
            for place in places:
                job = vain[place]
                # The token is a new one: whoever held the old one holds it no more.
                older = tuple(other._replace(holds=False) for other in job.attempts)
                vain[place] = job._replace(status=DOING, worker=number, is_forfeit=attempt.is_apart, attempts=older)
            names = ", ".join(f"job {place}" for place in places) or "nothing"
            after = state._replace(jobs=tuple(vain))
            if daemon.mode in (DEAD, CUT_OFF):
                yield Step(f"d{number} gets {names} but never hears of it", after)
                continue
            heard = tuple(and_attempt(job, attempt) if place in places else job for place, job in enumerate(vain))
            yield Step(f"d{number} gets {names}", after._replace(jobs=heard))
            if state.left.lost_answers and places:
                # Nobody knows whether it will ever come.
                left = state.left._replace(lost_answers=state.left.lost_answers - 1)
                late = attempt._replace(phase=LATE)
                waiting = tuple(and_attempt(job, late) if place in places else job for place, job in enumerate(vain))
                yield Step(f"d{number} gets {names}, the answer takes long", after._replace(jobs=waiting, left=left))

    def _running(self, state: State) -> int:
        running = sum(
            job.status == DOING and not job.has_left and not (self.rules.releases_by_timer and job.claimed_ago > LEASE)
            for job in state.jobs
        )
        return running + state.leaked

    def _free_slots(self, state: State, number: int) -> int:
        return self.slots - sum(
            attempt.daemon == number and attempt.phase not in (LATE, *RESCUES) and not (job.has_left and attempt.holds)
            for job in state.jobs
            for attempt in job.attempts
        )

    # An attempt: jobdaemon/queue/attempt.py, jobdaemon/stages/generate.py

    def _attempt_goes_on(self, state: State, place: int, index: int) -> Iterator[Step[State]]:
        job = state.jobs[place]
        attempt = job.attempts[index]
        name = f"d{attempt.daemon}, job {place}"
        if attempt.phase == LATE:
            yield Step(f"{name}: the claim's answer arrives", with_attempt(state, place, index, attempt._replace(phase=CLAIMED)))
        elif attempt.phase == CLAIMED:
            if job.has_image:
                yield Step(f"{name}: its image is there already", with_attempt(state, place, index, in_phase(attempt, ENDING)))
            else:
                after = with_attempt(state, place, index, in_phase(attempt, CALLING))
                yield Step(f"{name}: a call starts", after, self._judged(after, attempt))
        elif attempt.phase == CALLING:
            yield Step(f"{name}: the call brings an image", with_attempt(state, place, index, in_phase(attempt, MADE)))
        if attempt.phase in (CLAIMED, CALLING):
            cut = with_attempt(state, place, index, in_phase(attempt, RETURNING))
            if job.is_cancelled:
                yield Step(f"{name}: the attempt is stopped, its order is cancelled", cut)
            elif state.left.hand_backs:
                left = state.left._replace(hand_backs=state.left.hand_backs - 1)
                yield Step(f"{name}: the attempt is cut short", cut._replace(left=left))

    def _slot_left(self, state: State, place: int, index: int) -> Iterator[Step[State]]:
        """Its call is over, and its slot another's; it goes on: Team, the statement ``claim_in_place``."""
        job = state.jobs[place]
        attempt = job.attempts[index]
        is_over = attempt.phase in (MADE, ENDING) or (self.rules.frees_early and attempt.phase == CALLING)
        if is_over and attempt.holds and job.status == DOING and not job.has_left:
            yield Step(f"d{attempt.daemon}, job {place}: its slot is free", with_job(state, place, job._replace(has_left=True)))

    def _unmarked(self, job: Job) -> Job:
        """Whoever claims it next has another token."""
        return job._replace(has_left=False) if self.rules.mark_is_the_claims else job

    @staticmethod
    def _judged(state: State, attempt: Attempt) -> str | None:
        """The referee: jobdaemon/sandbox/referee.py."""
        if attempt.is_apart:
            return None
        calls = sum(other.phase == CALLING and not other.is_apart for job in state.jobs for other in job.attempts)
        return ABOVE_LIMIT if calls > attempt.allowed else None

    # Commits: jobdaemon/queue/committer.py, PostgresJobStore.commit

    def _commits(self, state: State, place: int, index: int) -> Iterator[Step[State]]:
        job = state.jobs[place]
        attempt = job.attempts[index]
        if attempt.phase not in COMMITS:
            return
        end = COMMITS[attempt.phase]
        ruled = self._ruled(job, attempt, end)
        broken = self._broken(state, job, attempt, end, ruled)
        after = self._applied(job, end, ruled)
        what = f"d{attempt.daemon}, job {place}: {end} is {ruled.verdict.replace('_', ' ')}"
        yield Step(what, with_job(state, place, answered(after, index, attempt, ruled.verdict)), broken)
        if state.left.lost_answers and after != job:
            left = state.left._replace(lost_answers=state.left.lost_answers - 1)
            yield Step(f"{what}, the answer is lost", with_job(state, place, after)._replace(left=left), broken)

    def _ruled(self, job: Job, attempt: Attempt, end: End) -> Applied:
        holds = attempt.holds or not self.rules.is_fenced
        if not self.rules.has_own_token and attempt.phase not in RESCUES:
            holds = job.worker == attempt.daemon
        status = job.status if self.rules.is_fenced and self.rules.fences_by_status else DOING
        has_beaten = self.rules.asks_again and attempt.phase == FORESTALLED
        return _ruled(end, status, holds, job.is_cancelled, has_beaten)

    def _applied(self, job: Job, end: End, ruled: Applied) -> Job:
        if ruled.writes:
            job = job._replace(has_image=True)
        if ruled.status:
            job = self._unmarked(job._replace(status=ruled.status, worker=NOBODY, is_forfeit=False, claimed_ago=0))
            if end is End.INTERRUPTED:
                # A rescue forgets the token; every other end leaves it in the row.
                job = job._replace(attempts=tuple(other._replace(holds=False) for other in job.attempts))
        return job

    def _broken(self, state: State, job: Job, attempt: Attempt, end: End, ruled: Applied) -> str | None:
        if not ruled.writes and not ruled.status:
            return None
        if not attempt.holds:
            return UNFENCED
        if ruled.writes and job.is_cancelled:
            return AFTER_CANCEL
        if ruled.writes and job.has_image and not self.rules.guards_rows:
            return STORED_TWICE
        if ruled.status and job.status != DOING:
            return TWICE
        is_theirs = job.is_forfeit or self._is_dead(state, job.worker)
        return TAKEN if end is End.INTERRUPTED and not is_theirs else None

    @staticmethod
    def _is_dead(state: State, worker: int) -> bool:
        return worker == GONE or (worker >= 0 and state.daemons[worker].mode == DEAD)

    # Rescue: Upkeep._rescue, the statement lost_jobs

    def _looks(self, state: State, number: int) -> Iterator[Step[State]]:
        """A look may bring several jobs; each is a step of its own, since nothing ties them together."""
        daemon = state.daemons[number]
        is_fit = self.rules.asks_for_steadiness == NEVER or (daemon.steady >= LEASE and daemon.silence <= TRUSTED)
        if self.rules.asks_for_steadiness != BEFORE:
            # One statement: however long it is on its way, it finds what there is in the end.
            if is_fit:
                yield from self._finds(state, number)
        elif daemon.is_looking:
            looked = with_daemon(state, number, daemon._replace(is_looking=False))
            yield from self._finds(looked, number)
            yield Step(f"d{number} has looked", looked)
        elif is_fit:
            yield Step(f"d{number} may rescue and looks", with_daemon(state, number, daemon._replace(is_looking=True)))

    @staticmethod
    def _finds(state: State, number: int) -> Iterator[Step[State]]:
        for place, job in enumerate(state.jobs):
            if job.status != DOING or job.worker == number:
                continue
            if job.worker != GONE and state.daemons[job.worker].silence <= LEASE:
                continue
            if not any(attempt.daemon == number and attempt.phase == RESCUING and attempt.holds for attempt in job.attempts):
                after = with_job(state, place, and_attempt(job, Attempt(number, RESCUING)))
                yield Step(f"d{number} finds job {place} lost", after)

    def _strays(self, state: State, place: int) -> Iterator[Step[State]]:
        """A daemon hands back what was claimed in its name and never reached it."""
        job = state.jobs[place]
        number = job.worker
        if job.status != DOING or number < 0 or not state.is_up or state.daemons[number].mode != ALIVE:
            return
        if not any(attempt.daemon == number and attempt.holds and attempt.phase != LATE for attempt in job.attempts):
            disowned = without_late(job, number) if self.rules.disowns_strays else job
            after = with_job(state, place, and_attempt(disowned, Attempt(number, RETURNING)))
            yield Step(f"d{number} finds that it does not run job {place}", after)
