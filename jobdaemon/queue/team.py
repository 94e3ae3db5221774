"""
A team: the workers of one queue in one daemon. Its loop is capacity -> claim -> start attempts.

It claims as many jobs as it has free slots, never more: a prefetched job would break priority and hold a slot of the cluster
limit while it does nothing. An attempt may go on without its slot, once whom it works for has done its part: the next call begins
while the images of the last one are being kept. There are never more of those than slots.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from datetime import timedelta

from jobdaemon.domain.job import Job
from jobdaemon.errors import DatabaseUnavailableError, LeaseLostError, RowsLockedError
from jobdaemon.events import Events, UpkeepFailed
from jobdaemon.queue.attempt import AttemptRules, AttemptRunner
from jobdaemon.queue.store import Claim, PostgresJobStore

_REST_AFTER_ERROR_S = 1.0
#: How long a stopping daemon waits for its last commits when the database does not answer.
_LAST_COMMIT_S = 10.0
#: How long a daemon that is cut short waits for what was paid for to be kept.
_KEEP_S = 2.0
#: Timers ring a little early; a key would still be shut.
_TIMER_SLACK_S = 0.002


class Team:
    """The workers of one queue; see the module docstring."""

    def __init__(
        self,
        queue: str,
        size: int,
        rules: AttemptRules,
        *,
        store: PostgresJobStore,
        runner: AttemptRunner,
        events: Events,
        daemon_id: Callable[[], int],
        on_lease_lost: Callable[[], None],
        until_lease_holds: Callable[[], Awaitable[None]],
        keys: Sequence[str] | None = None,
        calm: timedelta = timedelta(0),
    ) -> None:
        """
        Args:
            calm: how long what is announced may wait, see :class:`jobdaemon.queue.supervisor.QueueRules`.
            keys: aliases of the provider's keys that this daemon has; None where the provider knows no keys.
            on_lease_lost: called when the database refuses a claim before the next heartbeat.
            until_lease_holds: returns once this daemon may claim: its heartbeat is recent, and no suspect has it for itself.
        """
        self.queue = queue
        self._configured_size = size
        self._operators_size: int | None = None
        self._rules = rules
        self._store = store
        self._runner = runner
        self._events = events
        self._daemon_id = daemon_id
        self._on_lease_lost = on_lease_lost
        self._until_lease_holds = until_lease_holds
        self._keys = keys
        self._opening: asyncio.TimerHandle | None = None
        self._calm_s = calm.total_seconds()
        self._calm: asyncio.TimerHandle | None = None
        self._is_paused = False
        self._wake = asyncio.Event()
        self._wake.set()
        self._claiming: asyncio.Future[None] | None = None
        self._attempts: dict[asyncio.Task[None], Job] = {}
        #: Of these, those that need their slot no more, with what tells them to go on; and those of which the database knows it,
        #: which hold none.
        self._leaving: dict[asyncio.Task[None], asyncio.Future[None]] = {}
        self._left: set[asyncio.Task[None]] = set()
        #: Both, and those whose slot could not be left: their calls are over, and what these have made is here and paid for.
        self._over: set[asyncio.Task[None]] = set()
        #: Those that have noted no call yet; and what tells those that left that there are none.
        self._beginning: set[asyncio.Task[None]] = set()
        self._gone: dict[asyncio.Task[None], asyncio.Future[None]] = {}
        #: Of the claim that is under way: jobs (id, token) that it was given and that were handed back before its answer came.
        self._disowned: set[tuple[int, int | None]] = set()
        #: When the loop last went round, by the event loop's clock; for the watchdog.
        self.last_turn_s = 0.0

    @property
    def running(self) -> int:
        """How many attempts run now."""
        return len(self._attempts)

    @property
    def running_jobs(self) -> list[Job]:
        """Their jobs."""
        return list(self._attempts.values())

    def wake(self) -> None:
        """Look for ready jobs now: a slot is free, or an operator changed something."""
        self._wake.set()

    def announced(self) -> None:
        """Others say that a job is ready, or a slot free: look for it, once for all that is said within the calm."""
        if not self._calm_s:
            self.wake()
        elif self._calm is None:
            self._calm = asyncio.get_running_loop().call_later(self._calm_s, self._end_calm)

    def _end_calm(self) -> None:
        self._calm = None
        self.wake()

    def abort(self, job_id: int) -> None:
        """Stop the attempt of this job, if it runs here and may be stopped; its end is committed as the fence decides."""
        for task, job in self._attempts.items():
            if job.id == job_id and self._rules.is_abortable:
                task.cancel("it was cancelled")

    def abort_paid(self, reason: str) -> int:
        """
        Stop the calls of a queue in which they are paid for, and hand their jobs back, as the fence decides; how many. Where the
        call is over there is nothing to stop: what it made is kept, as the fence decides, too.
        """
        if not self._rules.is_paid:
            return 0
        calling = self._attempts.keys() - self._over
        for task in calling:
            task.cancel(reason)
        return len(calling)

    def disown(self, job: Job) -> bool:
        """
        Give up a job that was claimed in this daemon's name, if no attempt here runs it: should the answer to the claim come
        after all, it is not started any more.
        """
        if any(running.id == job.id for running in self._attempts.values()):
            return False
        self._disowned.add((job.id, job.token))
        return True

    def steer(self, *, is_paused: bool, size: int | None) -> None:
        """Follow what operators set; a smaller team lets the surplus run out."""
        if (is_paused, size) != (self._is_paused, self._operators_size):
            self._is_paused, self._operators_size = is_paused, size
            self.wake()

    def configure(self, size: int) -> None:
        """Follow this daemon's settings; what operators set wins."""
        self._configured_size = size
        self.wake()

    @property
    def size(self) -> int:
        """How many attempts may run at once now."""
        if self._is_paused:
            return 0
        return self._configured_size if self._operators_size is None else self._operators_size

    async def run(self) -> None:
        """Claim and start attempts until cancelled; attempts run on."""
        loop = asyncio.get_running_loop()
        while True:
            await self._wake.wait()
            self._wake.clear()
            self.last_turn_s = loop.time()
            await self._until_lease_holds()
            if self._free(len(self._leaving)) <= 0:
                # A slot that this team would not use stays its attempt's until that ends: then others are told.
                _tell(self._leaving.values())
                continue
            try:
                # Shielded: a claim that is under way when the daemon stops must not lose the jobs it got.
                self._claiming = asyncio.ensure_future(self._claim())
                await asyncio.shield(self._claiming)
            except LeaseLostError:
                self._on_lease_lost()
                await self._rest()
            except DatabaseUnavailableError:
                await self._rest()
            except Exception as error:  # noqa: BLE001 - the team goes on
                self._events.emit(UpkeepFailed(error=f"claim from {self.queue}: {type(error).__name__}: {error}"))
                await self._rest()

    async def _rest(self) -> None:
        await asyncio.sleep(_REST_AFTER_ERROR_S)
        self.wake()

    def _free(self, leaving: int = 0) -> int:
        """How many attempts may start; with so many more leaving their slots."""
        return min(self.size - len(self._attempts) + len(self._left) + leaving, self._room)

    @property
    def _room(self) -> int:
        """How many attempts more there may be, whether they hold slots or not."""
        return 2 * self.size - len(self._attempts)

    async def _claim(self) -> None:
        """Claim and start as many as there are slots, those included that attempts are leaving."""
        self._disowned.clear()  # a new claim has a new token
        leaving = dict(self._leaving)
        try:
            claim = await self._take_slots([self._attempts[task] for task in leaving])
        except RowsLockedError:
            if not leaving:
                raise
            # Perhaps it is the row of one that leaves: then its end frees its slot.
            self._leave_no_more(leaving)
            claim = await self._take_slots([])
        self._leave_no_more(leaving)
        self._left |= {task for task in leaving if task in self._attempts and self._attempts[task].id in claim.freed}
        self._ring_when_keys_open(claim.opens_in)
        for job in claim.jobs:
            if (job.id, job.token) not in self._disowned:
                self._start(job)
        self._gone |= {task: future for task, future in leaving.items() if task in self._attempts}
        self._tell_those_gone()

    async def _take_slots(self, leaving: Sequence[Job]) -> Claim:
        free = self.size - len(self._attempts) + len(self._left)
        return await self._store.take_slots(self.queue, self._daemon_id(), free, self._keys, leaving=leaving, room=self._room)

    def _ring_when_keys_open(self, opens_in: timedelta | None) -> None:
        """What keys hold back until a moment starts by the clock: no notification says so."""
        if self._opening is not None:
            self._opening.cancel()
            self._opening = None
        if opens_in is not None:
            self._opening = asyncio.get_running_loop().call_later(opens_in.total_seconds() + _TIMER_SLACK_S, self.wake)

    def _start(self, job: Job) -> None:
        running = self._runner.run(
            job, self._rules, leave_slot=lambda: self._leave(task), on_noted=lambda: self._begin_no_more(task)
        )
        task = asyncio.get_running_loop().create_task(running, name=f"job {job.id}")
        self._attempts[task] = job
        self._beginning.add(task)
        task.add_done_callback(self._ended)

    def _leave(self, task: asyncio.Task[None]) -> asyncio.Future[None]:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if task in self._attempts and task not in self._left:
            self._over.add(task)
            future = self._leaving.setdefault(task, future)
            self._begin_no_more(task)
            self.wake()
        return future

    def _leave_no_more(self, tasks: Iterable[asyncio.Task[None]]) -> None:
        for task in tasks:
            self._leaving.pop(task, None)

    def _begin_no_more(self, task: asyncio.Task[None]) -> None:
        if task in self._beginning:
            self._beginning.remove(task)
            self._tell_those_gone()

    def _tell_those_gone(self) -> None:
        """Whoever has left its slot may go on when no call is being prepared, neither for that slot nor for another."""
        if not self._beginning and not self._leaving:
            _tell(self._gone.values())
            self._gone.clear()

    def _ended(self, task: asyncio.Task[None]) -> None:
        # The slot of one that left was looked after when it did.
        if task not in self._left or self._room <= 0:
            self.wake()
        self._attempts.pop(task, None)
        self._leaving.pop(task, None)
        self._left.discard(task)
        self._over.discard(task)
        self._gone.pop(task, None)
        self._begin_no_more(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._events.emit(UpkeepFailed(error=f"attempt in {self.queue}: {type(error).__name__}: {error}"))

    async def finish(self, *, grace_s: float, cut_short: asyncio.Event) -> int:
        """
        Let running attempts end; after *grace_s*, or when *cut_short* is set, hand the rest back.

        The loop must have been cancelled.

        Returns:
            How many attempts were cut short.
        """
        if self._claiming is not None:
            await asyncio.wait({self._claiming}, timeout=_LAST_COMMIT_S)
            # What it brings now nobody would run to its end: others take it up once this daemon has stopped.
            self._claiming.cancel()
        self._ring_when_keys_open(None)
        if self._calm is not None:
            self._calm.cancel()
        cut = asyncio.ensure_future(cut_short.wait())
        loop = asyncio.get_running_loop()
        deadline = loop.time() + grace_s
        while self._attempts and not cut.done() and (left_s := deadline - loop.time()) > 0:
            await asyncio.wait({*self._attempts, cut}, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
        cut.cancel()
        # What these have paid for is here, on its way into the store: a moment is cheaper than buying it again.
        keeping = set(self._over)
        for task in self._attempts.keys() - keeping:
            task.cancel()
        rest = set(self._attempts)
        if keeping:
            kept, _ = await asyncio.wait(keeping, timeout=_KEEP_S)
            rest -= kept
        for task in rest & keeping:
            task.cancel()
        if rest:
            # Each hands its job back. One that cannot, because the database is away, leaves it to the rescue.
            _, stuck = await asyncio.wait(rest, timeout=_LAST_COMMIT_S)
            for task in stuck:
                task.cancel()
        return len(rest)


def _tell(futures: Iterable[asyncio.Future[None]]) -> None:
    for future in futures:
        if not future.done():
            future.set_result(None)
