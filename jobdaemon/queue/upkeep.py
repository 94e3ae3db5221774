"""
Upkeep that any daemon does, in small batches that any number of daemons may do at once: let due jobs in, follow what operators
set, look for ready jobs in case a notification was lost, rescue what dead workers left and forget who is long gone, mend orders
whose jobs others had their hands on.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from datetime import timedelta
from functools import partial

from jobdaemon.domain.expand import writes_when_dead
from jobdaemon.domain.fallback import FallbackRules, moved_sentence, stranded
from jobdaemon.domain.job import Job
from jobdaemon.domain.outcome import End, Transition, Verdict
from jobdaemon.domain.retry import MAX_DEATHS, after_death
from jobdaemon.errors import DatabaseUnavailableError
from jobdaemon.events import (
    Events,
    JobsRescued,
    OrderMended,
    OrderSettled,
    OrdersLifted,
    ProviderChanged,
    SilentSessionsEnded,
    UpkeepFailed,
)
from jobdaemon.queue.committer import Committer
from jobdaemon.queue.store import ABORT_CHANNEL, CONTROL_CHANNEL, READY_CHANNEL, LostJob, PostgresJobStore
from jobdaemon.queue.team import Team

#: The share by which a round may come earlier, so that daemons started together drift apart.
_JITTER = 0.2
_PROMOTE_LIMIT = 1000
#: Orders of up to 100 jobs each: some 20 ms, in which their jobs cannot be claimed.
_LIFT_LIMIT = 20
#: Of so many polls one looks for orders that are out of line with their jobs, a part of the open ones at a time.
_RECONCILE_EVERY = 6
_RECONCILE_LIMIT = 200
#: And mends so many of them: each is locked meanwhile.
_MEND_LIMIT = 50
#: A daemon that was silent for so long is gone; its row goes too, so many at a time, once an hour.
_GONE_AFTER = timedelta(days=1)
_PRUNE_LIMIT = 100
_PRUNE_EVERY_S = 3600.0
#: A round waits no longer for what it wants committed: somebody may hold an order for hours.
_COMMIT_PATIENCE_S = 5.0
#: Batches behind an open circuit are sent on so many at a time, and so many times a round.
_MOVE_LIMIT = 100
_MOVES_PER_ROUND = 20
#: The share of the lease over which daemons spread their looks after a heartbeat lapsed, so that not all rescue the same at once.
_SPREAD = 1 / 15
#: The share of the lease after which to look again, when a round broke off: perhaps before it had looked for lost jobs.
_AGAIN = 1 / 5
#: Timers ring a little early; asking again too soon would find the job still not due.
_TIMER_SLACK_S = 0.002


class Upkeep:
    """Rounds of upkeep; see the module docstring."""

    def __init__(
        self,
        store: PostgresJobStore,
        teams: Mapping[str, Team],
        committer: Committer,
        events: Events,
        *,
        poll: timedelta,
        lease: timedelta,
        daemon_id: Callable[[], int],
        may_rescue: Callable[[], bool],
        on_drain: Callable[[bool], None],
        restore: Callable[[], Awaitable[None]],
        images_per_call: Callable[[str], int],
        fallback: FallbackRules | None = None,
    ) -> None:
        """
        Args:
            images_per_call: of a provider, by its name.
            fallback: who takes over what waits for a provider in trouble; nobody when None.
            on_drain: told at each look whether this daemon is to claim nothing more.
            restore: writes this daemon's row again where it is gone.
            daemon_id: this daemon's, at the moment.
            may_rescue: whether it has not missed a heartbeat; the database knows the rest.
        """
        self._store = store
        self._teams = teams
        self._committer = committer
        self._events = events
        self._poll_s = poll.total_seconds()
        self._lease = lease
        self._daemon_id = daemon_id
        self._may_rescue = may_rescue
        self._on_drain = on_drain
        self._restore = restore
        self._prune_at = 0.0
        self._new_team_sizes: dict[str, int] | None = None
        #: Jobs (id, token) that were ours by the last look though no attempt of ours ran them.
        self._strays: set[tuple[int, int | None]] = set()
        #: Jobs (id, token) without a daemon, and since when.
        self._ownerless: dict[tuple[int, int | None], float] = {}
        #: Of jobs (id, token) that nobody runs, the ends that are not committed yet.
        self._ends: dict[tuple[int, int | None], asyncio.Future[Verdict]] = {}
        self._must_look = False
        #: When the first heartbeat lapses that is not renewed, or a job without a daemon is lost, as far as the last look knew.
        self._lapses_at = math.inf
        self._images_per_call = images_per_call
        self._fallback = fallback or FallbackRules()
        self._polls = 0
        #: Open orders that were out of line at the last look, and up to which id the open ones were looked at.
        self._stray_orders: set[int] = set()
        self._looked_at = 0
        self._rests: dict[str, asyncio.TimerHandle] = {}
        #: Provider and alias of keys that nobody had at the last look.
        self._missing_keys: set[tuple[str, str]] = set()
        self._now = asyncio.Event()
        self._next_due_s: float | None = None
        self._queues_changed = False
        self.last_turn_s = 0.0

    def heard(self, channel: str, payload: str) -> None:
        """React to a notification: wake the team it is for, or this loop; ``""`` says that some may have been missed."""
        if channel == ABORT_CHANNEL:
            for team in self._teams.values():
                team.abort(int(payload))
            return
        named = self._teams.get(payload)
        if named is not None and channel == READY_CHANNEL:
            named.announced()
        if named is not None and channel == CONTROL_CHANNEL:
            named.wake()
        if channel in (CONTROL_CHANNEL, ""):
            self._queues_changed = True
        if channel != READY_CHANNEL:
            self._now.set()

    def resized(self, team_sizes: Mapping[str, int]) -> None:
        """This daemon's own settings changed: tell who reads ``daemons``."""
        self._new_team_sizes = dict(team_sizes)
        self._queues_changed = True
        self._now.set()

    def look(self) -> None:
        """Look now: this daemon has a new id, and what it runs has to come along."""
        self._must_look = True
        self._now.set()

    async def run(self) -> None:
        """Do rounds until cancelled."""
        try:
            await self._run()
        finally:
            for end in self._ends.values():
                end.cancel()

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        next_poll = loop.time()
        while True:
            self.last_turn_s = now = loop.time()
            is_poll = now >= next_poll or self._must_look
            if is_poll:
                self._must_look = False
                next_poll = now + self._poll_s * (1 - _JITTER * random.random())
            try:
                await self._round(is_poll, is_look=is_poll or now >= self._lapses_at)
            except DatabaseUnavailableError:
                self._look_in(_AGAIN * self._lease)  # the heartbeat reports it
            except Exception as error:  # noqa: BLE001 - upkeep goes on
                self._look_in(_AGAIN * self._lease)
                self._events.emit(UpkeepFailed(error=f"upkeep: {type(error).__name__}: {error}"))
            await self._sleep_until(next_poll)

    async def _sleep_until(self, next_poll: float) -> None:
        rest_s = min(next_poll, self._lapses_at) - asyncio.get_running_loop().time()
        if self._next_due_s is not None:
            rest_s = min(rest_s, self._next_due_s + _TIMER_SLACK_S)
        try:
            async with asyncio.timeout(max(rest_s, 0.0)):
                await self._now.wait()
        except TimeoutError:
            pass
        self._now.clear()

    async def _round(self, is_poll: bool, *, is_look: bool) -> None:
        self._next_due_s = None
        if is_look:
            # Nothing that this look does not know of lapses before that: who came since has beaten since.
            self._lapses_at = asyncio.get_running_loop().time() + self._lease.total_seconds()
        if is_poll and (count := await self._store.end_silent_sessions(self._lease)):
            self._events.emit(SilentSessionsEnded(count=count))
        promoted = await self._store.promote(_PROMOTE_LIMIT)
        self._next_due_s = None if promoted.next_due is None else promoted.next_due.total_seconds()
        if promoted.count >= _PROMOTE_LIMIT:
            self._now.set()  # more may be due
        if promoted.has_expired:
            for change in await self._store.expire_orders():
                self._events.emit(OrderSettled(order_id=change.order_id, status=change.status))
        if promoted.has_overdue:
            await self._lift()
        if is_poll or self._queues_changed:
            self._queues_changed = False
            try:
                await self._follow_queues()
            except BaseException:
                self._queues_changed = True  # what was announced is still to be looked at
                raise
        if is_look:
            await self._rescue(is_poll=is_poll)
        if is_poll:
            await self._fall_back()
            self._polls += 1
            if self._polls % _RECONCILE_EVERY == 0:
                await self._reconcile()
                await self._miss_keys()
                await self._store.abandon_calls(_RECONCILE_LIMIT)
                await self._restore()
                await self._prune()

    async def _lift(self) -> None:
        count = await self._store.lift_orders(_LIFT_LIMIT)
        if count:
            self._events.emit(OrdersLifted(count=count))
        if count >= _LIFT_LIMIT:
            self._now.set()  # more may be overdue

    async def _follow_queues(self) -> None:
        daemon_id = self._daemon_id()
        if (team_sizes := self._new_team_sizes) is not None:
            await self._store.report_team_sizes(daemon_id, team_sizes)
            if self._new_team_sizes is team_sizes:
                self._new_team_sizes = None
        rows = await self._store.queue_rows(self._teams, daemon_id)
        self._on_drain(any(row.is_draining for row in rows))
        for row in rows:
            team = self._teams[row.name]
            team.steer(is_paused=row.is_paused or row.is_draining, size=row.team_size)
            self._ring_at_the_end_of_rest(row.name, row.opens_in)
            if row.has_ready:
                team.wake()

    def _ring_at_the_end_of_rest(self, queue: str, rest: timedelta | None) -> None:
        """A queue that rests, or whose circuit is open, opens by the clock: no notification says so."""
        if (timer := self._rests.pop(queue, None)) is not None:
            timer.cancel()
        if rest is not None:
            wake = self._teams[queue].wake
            self._rests[queue] = asyncio.get_running_loop().call_later(rest.total_seconds() + _TIMER_SLACK_S, wake)

    async def _rescue(self, *, is_poll: bool) -> None:
        daemon_id = self._daemon_id()
        running = [job.id for team in self._teams.values() for job in team.running_jobs]
        found, lapse = await self._store.lost_jobs(daemon_id, running, lease=self._lease if self._may_rescue() else None)
        if lapse is not None:
            self._look_in(lapse)
        lost = [one for one in found if (one.job.id, one.job.token) not in self._ends]
        # Before anything else is awaited: the answer to a claim comes before this, and the job runs, or after it, and is dropped.
        strays = {(one.job.id, one.job.token): one.job for one in lost if one.owner == daemon_id}
        # Not at the first look: most answers are on their way for an instant. Two polls are far enough apart.
        given_up = [job for key, job in strays.items() if is_poll and key in self._strays and self._disown(job)]
        if is_poll:
            self._strays = set(strays)
        dead = [one for one in lost if one.owner not in (None, daemon_id)]
        dead += await self._take_in([one for one in lost if one.owner is None])
        company = Counter(one.owner for one in dead)
        ends = [await self._rescued(one, ran_alone=company[one.owner] == 1) for one in dead]
        await self._commit_ends([*ends, *(_stray(job, daemon_id) for job in given_up)])

    async def _take_in(self, ownerless: list[LostJob]) -> list[LostJob]:
        """
        Somebody removed the row of the daemon that runs these. It needs a heartbeat to notice, and takes them along under its new
        id, as we do here; those that have been nobody's for a whole lease are lost.
        """
        now = asyncio.get_running_loop().time()
        ours = {job.id: job.token for team in self._teams.values() for job in team.running_jobs}
        if own := [job for job, _, _ in ownerless if job.id in ours and ours[job.id] == job.token]:
            await self._store.adopt_jobs(self._daemon_id(), own)
        others = {(one.job.id, one.job.token): one for one in ownerless if one.job.id not in ours}
        self._ownerless = {key: self._ownerless.get(key, now) for key in others}
        lease_s = self._lease.total_seconds()
        lost = [one for key, one in others.items() if now - self._ownerless[key] >= lease_s]
        if left := [since for since in self._ownerless.values() if now - since < lease_s]:
            self._look_in(timedelta(seconds=min(left) + lease_s - now))
        return lost

    def _look_in(self, lapse: timedelta) -> None:
        """Look for lost jobs again when that long has passed: the next poll would be late by as much as a poll is long."""
        spread_s = random.uniform(_TIMER_SLACK_S, _SPREAD * self._lease.total_seconds())
        self._lapses_at = min(self._lapses_at, asyncio.get_running_loop().time() + lapse.total_seconds() + spread_s)

    def _disown(self, job: Job) -> bool:
        team = self._teams.get(job.queue)
        return team is None or team.disown(job)

    async def _reconcile(self) -> None:
        """Mend what was out of line at the last look already: an operator may be in the middle of something."""
        due = sorted(self._stray_orders)[:_MEND_LIMIT]
        if due:
            mended = await self._store.mend_orders(due, self._images_per_call)
            self._stray_orders.difference_update(due)
            for order in mended:
                self._events.emit(OrderMended(order_id=order.order_id, jobs=order.jobs, failures=order.failures))
                if order.ended_as is not None:
                    self._events.emit(OrderSettled(order_id=order.order_id, status=order.ended_as))
        looked = await self._store.open_orders(after=self._looked_at, limit=_RECONCILE_LIMIT)
        self._looked_at = max(looked) if len(looked) == _RECONCILE_LIMIT else 0
        self._stray_orders.update(order_id for order_id, is_stray in looked.items() if is_stray)

    async def _fall_back(self) -> None:
        """Send on what waits for providers that have been in trouble for too long."""
        rules = self._fallback
        if not rules.is_any:
            return
        providers, avoid = stranded(await self._store.troubled_providers(rules.after))
        for provider, reason in providers.items():
            skip = 0
            for _ in range(_MOVES_PER_ROUND):
                look = await self._store.move_waiting(provider, rules, avoid=avoid, reason=reason, skip=skip, limit=_MOVE_LIMIT)
                for batch in look.moved:
                    told = moved_sentence(provider, batch.provider, reason)
                    self._events.emit(ProviderChanged(batch.order_id, batch.job_id, provider, batch.provider, reason=told))
                skip += look.seen - len(look.moved)
                if look.seen < _MOVE_LIMIT:
                    break

    async def _miss_keys(self) -> None:
        """Say of each key that no running daemon has, once for as long as that lasts."""
        missing = await self._store.missing_keys()
        for event in missing:
            if (event.provider, event.alias) not in self._missing_keys:
                self._events.emit(event)
        self._missing_keys = {(event.provider, event.alias) for event in missing}

    async def _prune(self) -> None:
        """Forget daemons that are long gone. One that only stood still, and comes back, writes its row again."""
        now = asyncio.get_running_loop().time()
        if now < self._prune_at or not self._may_rescue():
            return
        self._prune_at = now + _PRUNE_EVERY_S
        if await self._store.prune_daemons(self._daemon_id(), silence=_GONE_AFTER, limit=_PRUNE_LIMIT) == _PRUNE_LIMIT:
            self._prune_at = now  # there may be more

    async def _rescued(self, lost: LostJob, *, ran_alone: bool) -> Transition:
        other_deaths = 0
        if lost.job.deaths + 1 >= MAX_DEATHS:
            other_deaths = await self._store.other_deaths(lost.job, lost.owner, lease=self._lease)
        transition = after_death(
            lost.job, ran_alone=ran_alone, other_deaths=other_deaths, dead=lambda reason: writes_when_dead(lost.job, reason)
        )
        return replace(transition, ran_by=lost.owner, last_beat=lost.last_beat)

    async def _commit_ends(self, ends: list[Transition]) -> None:
        commits: dict[asyncio.Future[Verdict], int | None] = {}
        for transition in ends:
            key = (transition.job.id, transition.job.token)
            self._ends[key] = end = asyncio.ensure_future(self._committer.commit(transition))
            end.add_done_callback(partial(self._ended, key))
            commits[end] = transition.ran_by
        if not commits:
            return
        done, _ = await asyncio.wait(commits, timeout=_COMMIT_PATIENCE_S)
        count_by_daemon = Counter(commits[end] for end in done if end.result() is not Verdict.LEASE_LOST)
        for daemon_id, count in count_by_daemon.items():
            self._events.emit(JobsRescued(count=count, daemon_id=daemon_id or ""))

    def _ended(self, key: tuple[int, int | None], _end: asyncio.Future[Verdict]) -> None:
        del self._ends[key]


def _stray(job: Job, daemon_id: int) -> Transition:
    return Transition(job, End.HANDED_BACK, error="the answer to the claim was lost", ran_by=daemon_id)
