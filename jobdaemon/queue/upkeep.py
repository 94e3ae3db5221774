"""
Upkeep that any daemon does, in small batches that any number of daemons may do at once: let due jobs in, follow what operators
set, look for ready jobs in case a notification was lost, rescue what dead workers left.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping
from datetime import timedelta

from jobdaemon.domain.expand import writes_when_dead
from jobdaemon.domain.job import Job
from jobdaemon.domain.outcome import Transition, Verdict
from jobdaemon.domain.retry import after_death
from jobdaemon.errors import DatabaseUnavailableError
from jobdaemon.events import Events, JobsRescued, UpkeepFailed
from jobdaemon.queue.committer import Committer
from jobdaemon.queue.store import CONTROL_CHANNEL, READY_CHANNEL, PostgresJobStore
from jobdaemon.queue.team import Team

#: The share by which a round may come earlier, so that daemons started together drift apart.
_JITTER = 0.2
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
        may_rescue: Callable[[], bool],
    ) -> None:
        self._store = store
        self._teams = teams
        self._committer = committer
        self._events = events
        self._poll_s = poll.total_seconds()
        self._lease = lease
        self._may_rescue = may_rescue
        self._now = asyncio.Event()
        self._next_due_s: float | None = None
        self._queues_changed = False
        self.last_turn_s = 0.0

    def heard(self, channel: str, payload: str) -> None:
        """React to a notification: wake the team it is for, or this loop; ``""`` says that some may have been missed."""
        if channel == READY_CHANNEL:
            if (team := self._teams.get(payload)) is not None:
                team.wake()
            return
        if channel in (CONTROL_CHANNEL, ""):
            self._queues_changed = True
        self._now.set()

    async def run(self) -> None:
        """Do rounds until cancelled."""
        loop = asyncio.get_running_loop()
        next_poll = loop.time()
        while True:
            self.last_turn_s = now = loop.time()
            is_poll = now >= next_poll
            if is_poll:
                next_poll = now + self._poll_s * (1 - _JITTER * random.random())
            try:
                await self._round(is_poll)
            except DatabaseUnavailableError:
                pass  # the heartbeat reports it
            except Exception as error:
                self._events.emit(UpkeepFailed(error=f"upkeep: {type(error).__name__}: {error}"))
            await self._sleep_until(next_poll)

    async def _sleep_until(self, next_poll: float) -> None:
        rest_s = next_poll - asyncio.get_running_loop().time()
        if self._next_due_s is not None:
            rest_s = min(rest_s, self._next_due_s + _TIMER_SLACK_S)
        try:
            async with asyncio.timeout(max(rest_s, 0.0)):
                await self._now.wait()
        except TimeoutError:
            pass
        self._now.clear()

    async def _round(self, is_poll: bool) -> None:
        self._next_due_s = None
        _, next_due = await self._store.promote()
        self._next_due_s = None if next_due is None else next_due.total_seconds()
        if is_poll or self._queues_changed:
            self._queues_changed = False
            await self._follow_queues()
        if is_poll and self._may_rescue():
            await self._rescue()

    async def _follow_queues(self) -> None:
        for row in await self._store.queue_rows(self._teams):
            team = self._teams[row.name]
            team.steer(is_paused=row.is_paused, size=row.team_size)
            if row.has_ready:
                team.wake()

    async def _rescue(self) -> None:
        lapsed = await self._store.lapsed_jobs(self._lease)
        verdicts = await asyncio.gather(*(self._committer.commit(_rescued(job)) for job, _ in lapsed))
        rescued_by_daemon: dict[int | None, int] = {}
        for (_, daemon_id), verdict in zip(lapsed, verdicts, strict=True):
            if verdict is not Verdict.LEASE_LOST:
                rescued_by_daemon[daemon_id] = rescued_by_daemon.get(daemon_id, 0) + 1
        for daemon_id, count in rescued_by_daemon.items():
            self._events.emit(JobsRescued(count=count, daemon_id=daemon_id or ""))


def _rescued(job: Job) -> Transition:
    return after_death(job, dead=lambda reason: writes_when_dead(job, reason))
