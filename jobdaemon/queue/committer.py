"""
The committer: gathers what attempts want committed and commits it in groups, one at a time on each of its connections.

While one group is being committed the next one gathers, so a busy daemon pays one commit for many jobs and an idle one commits
at once. A commit that cannot reach the database is kept and sent again, which the fence makes safe; how many wait is bounded by
the number of running attempts, since each waits for its own. Where somebody holds an order, all that concerns it is held back
until it is free, and the others go on.

There are two lanes, each with a connection: a note of a provider call has a slot of the provider wait for it, and must not wait
for the images of its order to be counted. What one job has committed keeps its order, whatever the lane.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable

from jobdaemon.domain.expand import writes_when_dead
from jobdaemon.domain.outcome import End, Transition, Verdict
from jobdaemon.errors import DatabaseUnavailableError, RetryableError, RowsLockedError
from jobdaemon.events import CommitFailed, Events, OrderSettled
from jobdaemon.queue.store import OrderChange, PostgresJobStore

MAX_GROUP = 200
_FIRST_REST_S = 0.1
_LONGEST_REST_S = 5.0
#: How often to look whether what somebody held is free.
_LOCK_REST_S = 0.5

_Member = tuple[Transition, asyncio.Future[Verdict]]


class Committer:
    """Commits transitions; see the module docstring."""

    def __init__(self, store: PostgresJobStore, events: Events) -> None:
        self._store = store
        self._events = events
        #: Job -> what is to be committed for it, oldest first: only the first one may go.
        self._lines: defaultdict[int, deque[asyncio.Future[Verdict]]] = defaultdict(deque)
        self._notes, self._others = (_Lane(store, events, self._commit_surely, self._is_first) for _ in range(2))
        self._untold: set[int] = set()
        self._telling: asyncio.Task[None] | None = None
        #: The daemon whose attempts these are; the supervisor keeps it current.
        self.daemon_id: int | None = None
        #: Set when this daemon claims no more: the slots its attempts free are for others.
        self.is_draining = False

    async def commit(self, transition: Transition) -> Verdict:
        """Wait until *transition* is committed or refused by the fence; cancelling the wait does not call it back."""
        future: asyncio.Future[Verdict] = asyncio.get_running_loop().create_future()
        self._lines[transition.job.id].append(future)
        future.add_done_callback(lambda _: self._leave_line(transition.job.id))
        (self._notes if transition.only_notes_calls else self._others).take((transition, future))
        return await asyncio.shield(future)

    async def run(self) -> None:
        """Commit until cancelled."""
        try:
            async with asyncio.TaskGroup() as lanes:
                for lane in (self._notes, self._others):
                    lanes.create_task(lane.run())
        finally:
            if self._telling is not None:
                self._telling.cancel()

    def _is_first(self, member: _Member) -> bool:
        return self._lines[member[0].job.id][0] is member[1]

    def _leave_line(self, job_id: int) -> None:
        line = self._lines[job_id]
        line.popleft()
        if line:
            self._notes.look()
            self._others.look()
        else:
            del self._lines[job_id]

    async def _commit_surely(self, transitions: list[Transition]) -> list[Verdict]:
        wake = [t.job.queue for t in transitions if t.frees_elsewhere or (self.is_draining and t.end is not End.CHECKPOINT)]
        is_told = False
        rest_s = _FIRST_REST_S
        while True:
            try:
                committed = await self._store.commit(transitions, daemon_id=self.daemon_id, wake=wake)
            except RowsLockedError:
                raise
            except DatabaseUnavailableError as error:
                if not is_told:
                    is_told = True
                    self._events.emit(CommitFailed(error=str(error), jobs=len(transitions)))
                await asyncio.sleep(rest_s)
                rest_s = min(rest_s * 2, _LONGEST_REST_S)
                continue
            self._announce(committed.changes)
            for event in committed.news:
                self._events.emit(event)
            return committed.verdicts

    def _announce(self, changes: list[OrderChange]) -> None:
        for change in changes:
            self._untold.discard(change.order_id)
            if change.has_ended:
                self._events.emit(OrderSettled(order_id=change.order_id, status=change.status))
            elif not change.told:
                self._untold.add(change.order_id)
        if self._untold and (self._telling is None or self._telling.done()):
            self._telling = asyncio.get_running_loop().create_task(self._tell())

    async def _tell(self) -> None:
        """Tell listeners about changes that came too soon after the last: each order at most ten times a second."""
        while self._untold:
            await asyncio.sleep(0.1)
            order_ids = set(self._untold)
            try:
                too_early = await self._store.tell_orders(order_ids)
            except DatabaseUnavailableError:
                continue
            self._untold -= order_ids - too_early


class _Lane:
    """What is committed over one connection."""

    def __init__(
        self,
        store: PostgresJobStore,
        events: Events,
        commit: Callable[[list[Transition]], Awaitable[list[Verdict]]],
        is_first: Callable[[_Member], bool],
    ) -> None:
        """
        Args:
            commit: one verdict for each, in order; tries until the database answers.
            is_first: whether nothing of the same job has to be committed before.
        """
        self._store = store
        self._events = events
        self._commit_surely = commit
        self._is_first = is_first
        self._waiting: list[_Member] = []
        #: What waits for a lock that somebody holds, oldest first; and who looks whether it is free.
        self._held: list[_Member] = []
        self._freeing: asyncio.Task[None] | None = None
        self._work = asyncio.Event()

    def take(self, member: _Member) -> None:
        """Commit it soon, and resolve its future."""
        self._waiting.append(member)
        self._work.set()

    def look(self) -> None:
        """Something may have become the first of its job."""
        self._work.set()

    async def run(self) -> None:
        """Commit until cancelled."""
        try:
            while True:
                await self._work.wait()
                self._work.clear()
                while group := self._take_group():
                    await self._commit_group(group)
        finally:
            if self._freeing is not None:
                self._freeing.cancel()

    def _take_group(self) -> list[_Member]:
        """The oldest that wait, one per job: an attempt cut short during a checkpoint, or rescued meanwhile, has two."""
        group: list[_Member] = []
        rest: list[_Member] = []
        held_orders = {transition.job.order_id for transition, _ in self._held} - {None}
        for member in self._waiting:
            if member[0].job.order_id in held_orders:
                self._held.append(member)
            elif len(group) < MAX_GROUP and self._is_first(member):
                group.append(member)
            else:
                rest.append(member)
        self._waiting = rest
        return group

    async def _commit_group(self, group: list[_Member]) -> None:
        try:
            verdicts = await self._commit_surely([transition for transition, _ in group])
        except RowsLockedError:
            await self._hold_back(group)
            return
        except Exception as error:  # noqa: BLE001 - a group must not die of one member
            if len(group) == 1:
                await self._give_up_on(*group[0], error)
                return
            # One bad member rolls its whole group back: find it by committing singly.
            for member in group:
                await self._commit_group([member])
            return
        for (_, future), verdict in zip(group, verdicts, strict=True):
            if not future.done():
                future.set_result(verdict)

    async def _hold_back(self, group: list[_Member]) -> None:
        """Somebody holds something of this group: let those wait whom it concerns, and the others try again."""
        locked = await self._locked(group)
        held = [member for member in group if member[0].job.id in locked]
        # None where it is free again, or is no row: a queue's lock, which nobody keeps for longer than a lease.
        self._waiting[:0] = [member for member in group if member[0].job.id not in locked]
        if held:
            self._held += held
            self._events.emit(CommitFailed(error="somebody holds what has to be written", jobs=len(held)))
            if self._freeing is None or self._freeing.done():
                self._freeing = asyncio.get_running_loop().create_task(self._free())

    async def _free(self) -> None:
        """Commit what was held back, in its old order, as soon as nothing of it is held any more."""
        while self._held:
            await asyncio.sleep(_LOCK_REST_S)
            locked = await self._locked(self._held)
            self._waiting[:0] = [member for member in self._held if member[0].job.id not in locked]
            self._held = [member for member in self._held if member[0].job.id in locked]
            self._work.set()

    async def _locked(self, members: list[_Member]) -> set[int]:
        """The jobs of those that have to wait; all of them while the database does not say."""
        try:
            return await self._store.locked_jobs([transition.job for transition, _ in members])
        except Exception:  # noqa: BLE001 - what is held back must not be forgotten
            return {transition.job.id for transition, _ in members}

    async def _give_up_on(self, transition: Transition, future: asyncio.Future[Verdict], error: Exception) -> None:
        """The database refuses what this attempt wants to write: that is the attempt's own failure."""
        job = transition.job
        # The first line alone: the details quote the row, and with it a signed URL.
        reason = f"the result could not be recorded: {(str(error).splitlines() or [type(error).__name__])[0]}"
        self._events.emit(CommitFailed(job_id=job.id, error=reason, is_dropped=True))
        if transition.end is End.CHECKPOINT:
            if not future.done():
                future.set_exception(RetryableError(reason))
            return
        verdict = Verdict.LEASE_LOST
        for writes in (writes_when_dead(job, reason), ()):
            kind, seconds = type(error).__name__, transition.seconds
            failed = Transition(job, End.FAILED, writes=writes, error_kind=kind, error=reason, seconds=seconds)
            try:
                [verdict] = await self._commit_surely([failed])
                break
            except RowsLockedError:
                self._waiting.insert(0, (transition, future))
                return
            except Exception as again:  # noqa: BLE001 - a group must not die of one member
                self._events.emit(CommitFailed(job_id=job.id, error=(str(again).splitlines() or [""])[0]))
        if not future.done():
            future.set_result(verdict)
