"""
PostgresJobStore: the only module that runs queue SQL.

A daemon has five connections, whatever its team sizes: one claims, one finishes (a second finisher would only wait for the
first on the orders they share), one does upkeep, one reads for the stages and notes their provider calls, and one listens and
beats the heart: each heartbeat proves that the listening connection is alive, and nothing slow can hold a heartbeat up.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import Any, NamedTuple

import asyncpg

from jobdaemon import db
from jobdaemon.domain.fallback import FallbackRules, Trouble
from jobdaemon.domain.job import Job, JobStatus
from jobdaemon.domain.keys import ProviderKey
from jobdaemon.domain.mending import OrderCall, OrderImage, OrderJob, StrayOrder, mend
from jobdaemon.domain.outcome import End, Transition, Verdict
from jobdaemon.domain.plan import Plan
from jobdaemon.domain.retry import DIED_ALONE, STORM_DEATHS, STORM_WINDOW
from jobdaemon.domain.write import CallSubmitted, OrderFailed, PhotoPrewarmed
from jobdaemon.errors import DatabaseUnavailableError, LeaseLostError, RowsLockedError
from jobdaemon.events import Event, KeyMissing
from jobdaemon.queue import fence, moving, sql, writes
from jobdaemon.queue.image_cache import CacheRows
from jobdaemon.queue.key_rests import rest_keys
from jobdaemon.queue.order_rows import OrderRows
from jobdaemon.queue.photo_links import PhotoLinkRows
from jobdaemon.queue.prewarmed import PrewarmedRows
from jobdaemon.queue.pruner import RetentionRows
from jobdaemon.queue.steering import Steering

#: A job became ready in the queue that is the payload; one will be due later; an operator changed the queue.
READY_CHANNEL, SCHEDULED_CHANNEL, CONTROL_CHANNEL = "jobdaemon_jobs", "jobdaemon_scheduled", "jobdaemon_control"
#: The running job whose id is the payload should stop.
ABORT_CHANNEL = "jobdaemon_abort"
CHANNELS = (READY_CHANNEL, SCHEDULED_CHANNEL, CONTROL_CHANNEL, ABORT_CHANNEL)

#: A queue whose lock somebody holds for longer has to wait: the other queues of this daemon claim over the same connection.
_CLAIM_PATIENCE = timedelta(seconds=1)
#: So has a commit whose order somebody holds: all attempts of this daemon end over the same connection.
_COMMIT_PATIENCE = timedelta(seconds=1)

_FINAL = {JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.ABORTED}

_JOBS = sql.load("jobs.sql")
_ORDERS = sql.load("orders.sql")
_RECONCILE = sql.load("reconcile.sql")


@dataclass(frozen=True, slots=True)
class QueueRow:
    """
    A queue as it is now.

    Attributes:
        is_draining: whether an operator wants this daemon to claim nothing more.
        team_size: what operators set for every daemon; None leaves it to each daemon's settings.
        has_ready: whether a job is ready in it.
        opens_in: how long it still rests; None when it does not.
    """

    name: str
    is_paused: bool
    is_draining: bool
    team_size: int | None
    has_ready: bool
    opens_in: timedelta | None = None


@dataclass(frozen=True, slots=True)
class Promoted:
    """
    What a look at the clock brought.

    Attributes:
        count: due jobs that were let in.
        next_due: how long until the next one falls due, when that is soon.
        has_expired: an open order's time is up.
        has_overdue: an order has waited longer than its plan's ``lift_after``.
    """

    count: int
    next_due: timedelta | None
    has_expired: bool
    has_overdue: bool = False


class LostJob(NamedTuple):
    """
    A running job that nobody runs.

    Attributes:
        owner: the daemon it belongs to; None when there is none.
        last_beat: the owner's last heartbeat, as the database writes it; ``""`` when there is none.
    """

    job: Job
    owner: int | None
    last_beat: str


class Look(NamedTuple):
    """
    What a look for lost jobs found.

    Attributes:
        lapse: in how long it may find more, if the heartbeats that it saw are the last ones; None for never.
    """

    lost: list[LostJob]
    lapse: timedelta | None


@dataclass(frozen=True, slots=True)
class OrderChange:
    """An order that a commit moved on; *told* is False when listeners still have to hear of it."""

    order_id: int
    status: str
    has_ended: bool
    told: bool


@dataclass(frozen=True, slots=True)
class Mended:
    """An open order that was out of line with its jobs: so many *jobs* were made again, so many *failures* written."""

    order_id: int
    jobs: int
    failures: int
    ended_as: str | None = None


@dataclass(frozen=True, slots=True)
class Claim:
    """
    What a claim brought.

    Attributes:
        jobs: highest priority first, then oldest.
        opens_in: when to look again, if the provider's keys hold ready jobs back until then.
        freed: ids of those that were to leave their slots, and were still this daemon's to speak for.
    """

    jobs: list[Job]
    opens_in: timedelta | None = None
    freed: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Committed:
    """What the database made of a group of transitions: one verdict each, in order, the orders that moved, and what to tell."""

    verdicts: list[Verdict]
    changes: list[OrderChange]
    news: list[Event] = field(default_factory=list)


class PostgresJobStore:
    """Claims, commits, beats and reads. Every method raises DatabaseUnavailableError when the connection is lost."""

    def __init__(self, address: db.DatabaseAddress) -> None:
        self._claims = db.Session(address, name="claim", lock_timeout=_CLAIM_PATIENCE)
        self._finishes = db.Session(address, name="finish", lock_timeout=_COMMIT_PATIENCE)
        self._upkeep = db.Session(address, name="upkeep")
        self._reads = db.Session(address, name="read", lock_timeout=_COMMIT_PATIENCE)
        self._pulse = db.Session(address, name="pulse", on_connect=self._listen)
        #: What stages read of orders.
        self.orders = OrderRows(self._reads)
        #: The rows of the cache, over the connections of the stages and of upkeep.
        self.cache = CacheRows(self._reads, self._upkeep)
        #: The rows of prewarmed photos, over the same.
        self.prewarmed = PrewarmedRows(self._reads, self._upkeep)
        #: And of photos that lie where providers fetch them.
        self.photo_links = PhotoLinkRows(self._reads, self._upkeep)
        #: Of orders that ended long ago.
        self.retention = RetentionRows(self._upkeep)
        self._steering = Steering()
        self._on_notify: Callable[[str, str], None] | None = None
        self._on_silence: Callable[[], None] | None = None
        self._on_probe: Callable[[str], None] | None = None

    async def connect(self) -> None:
        """Open what a first job would otherwise wait for; the first heartbeat opens the listening connection."""
        for session in (self._claims, self._finishes, self._reads):
            async with session.use():
                pass

    async def close(self) -> None:
        """Close all connections."""
        self._on_silence = None
        for session in (self._claims, self._finishes, self._upkeep, self._reads, self._pulse):
            await session.close()

    # Listening

    def listen(
        self,
        on_notify: Callable[[str, str], None],
        on_silence: Callable[[], None],
        on_probe: Callable[[str], None] | None = None,
    ) -> None:
        """
        Hear of ready jobs and changed queues from the next heartbeat on.

        Args:
            on_notify: gets channel and payload; a new connection calls it with channel ``""``, since something may have
                been missed.
            on_silence: called when the listening connection is lost; a heartbeat brings it back.
            on_probe: gets the queue whose open circuit a claim of ours probes.
        """
        self._on_notify = on_notify
        self._on_silence = on_silence
        self._on_probe = on_probe

    async def _listen(self, connection: db.Connection) -> None:
        if self._on_notify is None:
            return
        connection.add_termination_listener(self._fell_silent)
        for channel in CHANNELS:
            await connection.add_listener(channel, self._heard)
        self._on_notify("", "")

    def _heard(self, _connection: object, _pid: int, channel: str, payload: object) -> None:
        if self._on_notify is not None:
            self._on_notify(channel, str(payload))

    def _fell_silent(self, _connection: object) -> None:
        if self._on_silence is not None:
            self._on_silence()

    # The daemon itself

    async def applied_migrations(self) -> list[str]:
        """Ids of the migrations this database records; empty when it was never migrated."""
        async with self._upkeep.use() as connection:
            if await connection.fetchval("SELECT to_regclass('jobdaemon._yoyo_migration')") is None:
                return []
            records = await connection.fetch("SELECT migration_id FROM jobdaemon._yoyo_migration")
            return [record["migration_id"] for record in records]

    async def register(
        self,
        *,
        host: str,
        pid: int,
        version: str,
        queues: dict[str, int],
        was: int | None = None,
        lease: timedelta | None = None,
        keys: Mapping[str, Sequence[str]] | None = None,
    ) -> int:
        """
        Announce this daemon, the queues it serves, and the id it had before; returns its id.

        Args:
            lease: how long it may be silent, if not its first beat says so.
            keys: provider -> aliases of the keys that it has.
        """
        held = _held_keys(keys)
        lease_s = None if lease is None else lease.total_seconds()
        async with self._upkeep.use() as connection:
            daemon_id: int = await connection.fetchval(
                _JOBS["register_daemon"], host, pid, version, json.dumps(queues), was, lease_s, held
            )
            return daemon_id

    async def restore_daemon(
        self, daemon_id: int, *, host: str, pid: int, version: str, queues: dict[str, int], keys: Mapping[str, Sequence[str]]
    ) -> None:
        """Write this daemon's row again where somebody removed it, or pruned it after a long silence."""
        async with self._upkeep.use() as connection:
            arguments = daemon_id, host, pid, version, json.dumps(queues), _held_keys(keys)
            await connection.execute(_JOBS["restore_daemon"], *arguments)

    async def prune_daemons(self, daemon_id: int, *, silence: timedelta, limit: int) -> int:
        """
        Remove the rows of daemons that are long gone; how many there were.

        Args:
            daemon_id: who does it.
            silence: since when nothing was heard of them.
        """
        async with self._upkeep.use() as connection:
            return len(await connection.fetch(_JOBS["prune_daemons"], daemon_id, limit, silence.total_seconds()))

    async def end_silent_sessions(self, silence: timedelta) -> int:
        """
        End sessions of daemons whose process stands still in the middle of a statement, and give free what they hold.

        Args:
            silence: since when the server waits for them; the lease.

        Returns:
            How many were ended.
        """
        async with self._upkeep.use() as connection:
            return len(await connection.fetch(_JOBS["end_silent_sessions"], silence.total_seconds()))

    async def ensure_rows(self, queues: Iterable[str], plans: Iterable[Plan], keys: Iterable[ProviderKey] = ()) -> None:
        """Insert the queues, plans and provider keys that are missing; an operator's rows stay as they are."""
        async with self._upkeep.use() as connection, connection.transaction():
            await connection.execute(_JOBS["ensure_queues"], sorted(queues))
            await connection.execute(_JOBS["ensure_plans"], json.dumps([writes.plan_row(plan) for plan in plans]))
            if rows := [asdict(key) for key in keys]:
                await connection.execute(_JOBS["ensure_keys"], json.dumps(rows))

    async def rows(self, statement: str) -> dict[tuple[str, str], dict[str, Any]]:
        """What *statement* selects as kind, name and columns: kind and name -> column -> value as JSON has it."""
        async with self._upkeep.use() as connection:
            records = await connection.fetch(statement)
        return {(record["kind"], record["name"]): json.loads(record["columns"]) for record in records}

    async def heartbeat(
        self,
        daemon_id: int,
        *,
        lease: timedelta,
        timeout: timedelta,  # noqa: ASYNC109 - the statement's
        is_steady: bool = True,
    ) -> bool:
        """
        Renew the *lease* of all this daemon's jobs; False when its row is gone and it must register again.

        Args:
            is_steady: whether no beat has failed since the last one that succeeded.
        """
        arguments = daemon_id, lease.total_seconds(), is_steady
        async with self._pulse.use() as connection:
            return await connection.fetchval(_JOBS["heartbeat"], *arguments, timeout=timeout.total_seconds()) is not None

    async def answers(self, *, timeout: timedelta) -> bool:  # noqa: ASYNC109 - the statement's
        """Whether the database answers, and takes writes, now; never raises."""
        try:
            async with asyncio.timeout(timeout.total_seconds()), self._reads.use() as connection:
                return bool(await connection.fetchval(_JOBS["answers"]))
        except (TimeoutError, DatabaseUnavailableError):
            return False

    async def set_daemon_status(self, daemon_id: int, status: str) -> None:
        """running, stopping or stopped."""
        async with self._upkeep.use() as connection:
            await connection.execute(_JOBS["set_daemon_status"], daemon_id, status)

    async def report_team_sizes(self, daemon_id: int, team_sizes: dict[str, int]) -> None:
        """Tell what this daemon's team sizes are now."""
        async with self._upkeep.use() as connection:
            await connection.execute(_JOBS["report_team_sizes"], daemon_id, json.dumps(team_sizes))

    async def queue_rows(self, names: Iterable[str], daemon_id: int) -> list[QueueRow]:
        """These queues as they are now, for this daemon."""
        names = list(names)
        async with self._upkeep.use() as connection:
            records = await connection.fetch(_JOBS["queue_rows"], names, daemon_id)
        self._steering.watch((record["name"] for record in records if record["is_steered"]), among=names)
        return [
            QueueRow(
                record["name"],
                is_paused=record["paused"],
                is_draining=record["is_draining"],
                team_size=record["team_size"],
                has_ready=record["has_ready"],
                opens_in=_rest(record["opens_in_s"]),
            )
            for record in records
        ]

    # Claiming and upkeep

    async def claim(self, queue: str, daemon_id: int, limit: int) -> list[Job]:
        """Up to *limit* ready jobs of a queue whose provider knows no keys; as :meth:`take_slots`."""
        return (await self.take_slots(queue, daemon_id, limit)).jobs

    async def take_slots(
        self,
        queue: str,
        daemon_id: int,
        slots: int,
        keys: Sequence[str] | None = None,
        *,
        leaving: Sequence[Job] = (),
        room: int | None = None,
    ) -> Claim:
        """
        Ready jobs for so many free *slots*, under this daemon's lease from now on; each under one of the provider's keys, if any.

        Args:
            keys: aliases of those whose secrets this daemon has; None where the provider knows no keys.
            leaving: running jobs whose slots are to be used too, and first of all freed of every limit: the provider has done
                what they asked of it. All of this happens, or nothing.
            room: no more jobs than this.

        Raises:
            LeaseLostError: a heartbeat has to come first: this daemon was silent for half its lease, or its row is gone.
            RowsLockedError: somebody has held the queue's lock, or the row of one that leaves, for a second.
        """
        room = slots + len(leaving) if room is None else room
        arguments: list[Any] = [queue, daemon_id, slots if leaving else min(slots, room), None if keys is None else list(keys)]
        if leaving:
            arguments += [[job.id for job in leaving], [job.token for job in leaving], room]
        async with self._claims.use() as connection:
            try:
                records = await connection.fetch(_JOBS["claim_in_place" if leaving else "claim"], *arguments)
            except asyncpg.UniqueViolationError:
                # A stock worker took a job with the same lock between our look and our update: as good as none ready.
                return Claim([])
            except asyncpg.LockNotAvailableError as error:
                raise RowsLockedError(f"queue {queue} is locked") from error
            except asyncpg.ForeignKeyViolationError as error:
                raise LeaseLostError("somebody removed this daemon's row") from error
            except asyncpg.ObjectNotInPrerequisiteStateError as error:
                raise LeaseLostError("this daemon was silent for half its lease") from error
        is_probe = any(record["id"] is not None and record["circuit_before"] == "open" for record in records)
        if is_probe and self._on_probe is not None:
            self._on_probe(queue)
        waits_s = [record["opens_in_s"] for record in records if record["id"] is None and record["opens_in_s"] is not None]
        return Claim(
            sorted((_job(record, queue) for record in records if record["id"] is not None), key=Job.claim_order),
            next((timedelta(seconds=wait_s) for wait_s in waits_s), None),
            frozenset(records[0]["freed"] if leaving else ()),
        )

    async def promote(self, limit: int = 1000) -> Promoted:
        """Let due jobs in, and look at the clock for what comes next."""
        async with self._upkeep.use() as connection:
            record = await connection.fetchrow(_JOBS["promote"], limit)
        assert record is not None
        next_due_s = record["next_due_s"]
        next_due = None if next_due_s is None else timedelta(seconds=max(next_due_s, 0.0))
        return Promoted(record["promoted"], next_due, record["has_expired"], record["has_overdue"])

    async def expire_orders(self, limit: int = 50) -> list[OrderChange]:
        """End open orders whose time is up: what waits is cancelled, what runs is asked to stop, the reason is on every image."""
        async with self._finishes.use() as connection, connection.transaction():
            expired = await connection.fetch(_ORDERS["lock_expired"], limit)
            if not expired:
                return []
            order_ids = {record["id"] for record in expired}
            await connection.execute(_JOBS["stop_jobs"], sorted(order_ids))
            document = json.dumps([writes.row(OrderFailed(record["id"], record["error"])) for record in expired])
            await connection.execute(_ORDERS["order_failed"], document)
            changes = await self._settle(connection, order_ids)
            await connection.execute(_ORDERS["abandon_calls"], sorted(order_ids))
            return changes

    async def abandon_calls(self, limit: int) -> int:
        """
        The net below cancelling and expiring: have calls of ended orders stopped that nobody goes on with, and lost ones told.

        Returns:
            How many orders had any, *limit* at most.
        """
        async with self._upkeep.use() as connection, connection.transaction():
            order_ids = [record["id"] for record in await connection.fetch(_ORDERS["abandoned_orders"], limit)]
            if order_ids:
                await connection.execute(_ORDERS["abandon_calls"], order_ids)
        return len(order_ids)

    async def missing_keys(self) -> list[KeyMissing]:
        """Keys that no running daemon has, though something bought with them is to be collected."""
        async with self._upkeep.use() as connection:
            records = await connection.fetch(_JOBS["missing_keys"])
        return [KeyMissing(record["provider"], record["alias"], record["jobs"]) for record in records]

    async def troubled_providers(self, after: timedelta) -> list[Trouble]:
        """Providers of which nothing can start, by their circuit or their keys; *after* is what counts as long."""
        async with self._upkeep.use() as connection:
            records = await connection.fetch(_JOBS["troubled_providers"], after.total_seconds())
        return [Trouble(record["provider"], record["is_long"], record["reason"]) for record in records]

    async def move_waiting(
        self, provider: str, rules: FallbackRules, *, avoid: Collection[str], reason: str, skip: int, limit: int
    ) -> moving.Look:
        """Send on what waits in a provider's queue: see :func:`jobdaemon.queue.moving.move_waiting`."""
        async with self._upkeep.use() as connection, connection.transaction():
            return await moving.move_waiting(connection, provider, rules, avoid=avoid, reason=reason, skip=skip, limit=limit)

    async def lift_orders(self, limit: int = 20) -> int:
        """Lift orders that waited longer than their plan's ``lift_after`` over all plans; returns how many, *limit* at most."""
        async with self._upkeep.use() as connection:
            lifted: int = await connection.fetchval(_ORDERS["lift_orders"], limit)
        return lifted

    async def open_orders(self, *, after: int, limit: int) -> dict[int, bool]:
        """The next open orders after this id, and of each whether it waits for a job that is not there."""
        async with self._upkeep.use() as connection:
            records = await connection.fetch(_RECONCILE["open_orders"], after, limit)
        return {record["id"]: record["is_stray"] for record in records}

    async def mend_orders(self, order_ids: Iterable[int], images_per_call: Callable[[str], int]) -> list[Mended]:
        """
        Bring open orders back in line with their jobs, whatever became of those; nothing where they are.

        Args:
            images_per_call: of a provider, by its name.
        """
        async with self._finishes.use() as connection, connection.transaction():
            strays = await self._load_strays(connection, sorted(order_ids))
            mendings = {order.id: mend(order, images_per_call(order.provider)) for order in strays}
            for statement, group in writes.by_statement(write for mending in mendings.values() for write in mending.writes):
                await connection.execute(_ORDERS[statement], json.dumps([writes.row(write) for write in group]))
            if jobs := [writes.job_row(job) for mending in mendings.values() for job in mending.jobs]:
                await connection.execute(_JOBS["defer_jobs"], json.dumps(jobs))
            calls = [(order_id, *pair) for order_id, mending in mendings.items() for pair in mending.resumed]
            if calls:
                names = ("order_id", "batch", "first")
                document = json.dumps([dict(zip(names, call, strict=True)) for call in calls])
                await connection.execute(_RECONCILE["hand_on_calls"], document)
            ended = {change.order_id: change for change in await self._settle(connection, set(mendings)) if change.has_ended}
        return [
            Mended(order_id, len(mending.jobs), len(mending.writes), ended[order_id].status if order_id in ended else None)
            for order_id, mending in mendings.items()
            if mending.jobs or mending.writes or order_id in ended
        ]

    @staticmethod
    async def _load_strays(connection: db.Connection, order_ids: list[int]) -> list[StrayOrder]:
        """Lock those that are open, and look at them with a new snapshot."""
        orders = await connection.fetch(_RECONCILE["lock_strays"], order_ids)
        order_ids = [order["id"] for order in orders]
        images: dict[int, list[OrderImage]] = {order_id: [] for order_id in order_ids}
        jobs: dict[int, list[OrderJob]] = {order_id: [] for order_id in order_ids}
        for row in await connection.fetch(_RECONCILE["stray_images"], order_ids):
            images[row["order_id"]].append(OrderImage(row["index"], row["prompt"], row["status"]))
        for row in await connection.fetch(_RECONCILE["stray_jobs"], order_ids):
            job = Job(row["id"], "", row["task_name"], 0, json.loads(row["args"]))
            jobs[row["order_id"]].append(OrderJob(job, row["status"]))
        calls: dict[int, list[OrderCall]] = {order_id: [] for order_id in order_ids}
        for row in await connection.fetch(_RECONCILE["stray_calls"], order_ids):
            calls[row["order_id"]].append(OrderCall(row["provider"], tuple(row["images"])))
        return [
            StrayOrder(id, order["priority"], order["provider"], order["is_beautified"], images[id], jobs[id], calls[id])
            for id, order in zip(order_ids, orders, strict=True)  # noqa: A001 - an order's
        ]

    async def lost_jobs(self, daemon_id: int, running: Iterable[int], *, lease: timedelta | None, limit: int = 500) -> Look:
        """
        Look for running jobs that nobody runs, and for jobs of *running* that belong to nobody.

        The database judges others only for a daemon whose own heartbeats have come without a gap for a whole lease.

        Args:
            running: jobs this daemon knows that it runs; a job of its own that is missing here was claimed in vain, because the
                answer to the claim was lost.
            lease: a worker that was silent for longer, and for longer than its own lease, has lost its jobs; None leaves other
                workers alone.
        """
        lease_s = None if lease is None else lease.total_seconds()
        async with self._upkeep.use() as connection:
            records = await connection.fetch(_JOBS["lost_jobs"], lease_s, limit, daemon_id, list(running))
        jobs = [record for record in records if record["id"] is not None]
        lost = [LostJob(_job(record, record["queue_name"]), record["worker_id"], record["last_beat"]) for record in jobs]
        seconds = records[0]["lapses_in_s"]
        return Look(lost, None if seconds is None else timedelta(seconds=seconds))

    async def adopt_jobs(self, daemon_id: int, jobs: Iterable[Job]) -> None:
        """Take jobs that run here along under a new id, after somebody removed this daemon's row; what is held is left."""
        jobs = list(jobs)
        async with self._upkeep.use() as connection:
            await connection.execute(_JOBS["adopt_jobs"], daemon_id, [job.id for job in jobs], [job.token for job in jobs])

    async def other_deaths(self, job: Job, worker: int | None, *, lease: timedelta) -> int:
        """Signs, within STORM_WINDOW, that workers die without this job, whose last *worker* is left out, too."""
        seconds = STORM_WINDOW.total_seconds(), lease.total_seconds()
        async with self._upkeep.use() as connection:
            count: int = await connection.fetchval(_JOBS["other_deaths"], *seconds, worker, DIED_ALONE, job.id, STORM_DEATHS)
        return count

    # Committing

    async def commit(self, transitions: Sequence[Transition], *, daemon_id: int | None, wake: Iterable[str] = ()) -> Committed:
        """
        Commit a group of transitions in one transaction, each fenced on its own.

        Args:
            transitions: at most one per job.
            daemon_id: who ran the attempts, for ``attempts``.
            wake: queues in which this frees slots that other daemons should use.

        Raises:
            DatabaseUnavailableError: whether the group was committed is unknown; sending it again is safe.
            RowsLockedError: it was not, since somebody has held something of it for a second: see :meth:`locked_jobs`.
            asyncpg.PostgresError: the group was rolled back because of one of its members.
        """
        # What only notes calls has a connection of its own, and waits for no commit of its order: a slot of a provider, for which
        # others wait, is idle until then. For an order that has ended there is more to do.
        committed = await self._note_submits(transitions)
        if committed is None and all(t.only_notes_calls for t in transitions):
            committed = await self._commit(transitions, daemon_id, only_notes=True)
        if committed is None:
            committed = await self._commit(transitions, daemon_id, wake)
        assert committed is not None
        return committed

    async def _note_submits(self, transitions: Sequence[Transition]) -> Committed | None:
        """None where there is more to do than to note submits, or to judge than that all are accepted."""
        notes = [write for t in transitions if t.end is End.CHECKPOINT for write in t.writes if isinstance(write, CallSubmitted)]
        if len(notes) < sum(max(1, len(t.writes)) for t in transitions):
            return None
        order_ids = sorted({note.order_id for note in notes})
        ids, tokens = [t.job.id for t in transitions], [t.job.token for t in transitions]
        async with self._reads.use() as connection:
            document = json.dumps([writes.row(note) for note in notes])
            if not await connection.fetchval(_JOBS["note_submits"], order_ids, ids, tokens, document):
                return None
        return Committed([Verdict.ACCEPTED] * len(transitions), [])

    async def _commit(
        self, transitions: Sequence[Transition], daemon_id: int | None, wake: Iterable[str] = (), *, only_notes: bool = False
    ) -> Committed | None:
        """None, and nothing is done, where notes are of an order that has ended."""
        session, lock = (self._reads, "share_orders") if only_notes else (self._finishes, "lock_orders")
        async with session.use() as connection, connection.transaction():
            order_ids = sorted({t.job.order_id for t in transitions if t.job.order_id is not None})
            ended: set[int] = set()
            if order_ids:
                locked = await connection.fetch(_JOBS[lock], order_ids)
                ended = {record["id"] for record in locked if record["ended"]}
                ended |= set(order_ids) - {record["id"] for record in locked}
                if ended and only_notes:
                    return None
            held = {
                record["id"]: fence.HeldJob(record["status"], record["token"], record["abort_requested"])
                for record in await connection.fetch(_JOBS["lock_jobs"], sorted(t.job.id for t in transitions))
            }
            living = await self._living_jobs(connection, transitions)
            rulings = [
                fence.rule(
                    transition,
                    held.get(transition.job.id),
                    order_has_ended=transition.job.order_id in ended,
                    has_beaten=transition.job.id in living,
                )
                for transition in transitions
            ]
            changed = await self._apply_writes(connection, [ruling.commit for ruling in rulings if ruling.commit])
            # Every end may be the last thing its order waited for, even one that had nothing to write.
            changed |= {ruling.job.order_id for ruling in rulings if ruling.status in _FINAL and ruling.job.order_id is not None}
            # Before its attempt's end: what has moved ends where it is now.
            moves = [(ruling.job, ruling.commit.move) for ruling in rulings if ruling.commit and ruling.commit.move]
            await moving.move_jobs(connection, moves)
            await self._end_jobs(connection, [ruling for ruling in rulings if ruling.status is not None], daemon_id)
            changes = await self._settle(connection, changed)
            if over := {ruling.job.order_id for ruling in rulings if ruling.verdict is Verdict.ORDER_ENDED}:
                await connection.execute(_ORDERS["abandon_calls"], sorted(id for id in over if id is not None))  # noqa: A001
            ended_here = [t for t, ruling in zip(transitions, rulings, strict=True) if ruling.status is not None]
            news: list[Event] = list(await rest_keys(connection, ended_here))
            news += await self._steering.apply(connection, ended_here)
            if queues := sorted(set(wake)):
                await connection.execute(_JOBS["wake_queues"], queues)
        return Committed([ruling.verdict for ruling in rulings], changes, news)

    @staticmethod
    async def _living_jobs(connection: db.Connection, transitions: Sequence[Transition]) -> set[int]:
        seen = {t.job.id: t.last_beat for t in transitions if t.last_beat is not None}
        if not seen:
            return set()
        return {record["id"] for record in await connection.fetch(_JOBS["living_jobs"], list(seen), list(seen.values()))}

    async def locked_jobs(self, jobs: Iterable[Job]) -> set[int]:
        """Those of these jobs whose commit would have to wait: somebody holds the job, its order or an image of that."""
        numbers = [(job.id, job.order_id) for job in jobs]
        async with self._finishes.use() as connection:
            records = await connection.fetch(_JOBS["locked_jobs"], [job for job, _ in numbers], [order for _, order in numbers])
        return {record["job_id"] for record in records}

    async def _apply_writes(self, connection: db.Connection, transitions: list[Transition]) -> set[int]:
        """Run the writes of accepted transitions, kind by kind; returns the orders that may have moved on."""
        touched: set[int] = set()
        following: list[dict[str, Any]] = []
        for statement, group in writes.by_statement(write for t in transitions for write in t.writes):
            document = json.dumps([writes.row(write) for write in group])
            applied = {tuple(record.values()) for record in await connection.fetch(_ORDERS[statement], document)}
            if statement not in writes.OF_CALLS:
                touched |= {write.order_id for write in group if not isinstance(write, PhotoPrewarmed)}
            for write in group:
                if writes.key(write) in applied:
                    following += [writes.job_row(job) for job in getattr(write, "then", ())]
        if following:
            await connection.execute(_JOBS["defer_jobs"], json.dumps(following))
        return touched

    async def _end_jobs(self, connection: db.Connection, rulings: list[fence.Ruling], daemon_id: int | None) -> None:
        if not rulings:
            return
        await connection.execute(
            _JOBS["end_jobs"],
            [ruling.job.id for ruling in rulings],
            [ruling.status for ruling in rulings],
            [ruling.attempts_spent for ruling in rulings],
            [None if ruling.delay is None else ruling.delay.total_seconds() for ruling in rulings],
            [ruling.deaths for ruling in rulings],
        )
        unsuccessful = [writes.attempt_row(ruling, daemon_id) for ruling in rulings if ruling.recorded_outcome is not None]
        if unsuccessful:
            await connection.execute(_JOBS["record_attempts"], json.dumps(unsuccessful))

    async def _settle(self, connection: db.Connection, order_ids: set[int]) -> list[OrderChange]:
        if not order_ids:
            return []
        records = await connection.fetch(_ORDERS["settle_orders"], sorted(order_ids))
        changes = [OrderChange(record["id"], record["status"], record["ended"], record["told"]) for record in records]
        ended = [change.order_id for change in changes if change.has_ended]
        if ended:
            await connection.execute(_ORDERS["clear_links"], ended)
        return changes

    async def tell_orders(self, order_ids: Iterable[int]) -> set[int]:
        """Tell listeners about orders whose change came too soon after the last one; returns those still too early."""
        async with self._finishes.use() as connection:
            records = await connection.fetch(_ORDERS["tell_orders"], sorted(order_ids))
        return {record["id"] for record in records if not record["told"]}


def _held_keys(keys: Mapping[str, Sequence[str]] | None) -> str | None:
    return None if keys is None else json.dumps({provider: list(aliases) for provider, aliases in keys.items()})


def _rest(seconds: float | None) -> timedelta | None:
    return None if seconds is None or seconds <= 0 else timedelta(seconds=min(seconds, 86_400))


def _job(record: asyncpg.Record, queue: str) -> Job:
    return Job(
        id=record["id"],
        queue=queue,
        task=record["task_name"],
        priority=record["priority"],
        args=json.loads(record["args"]),
        attempts=record["attempts"],
        deaths=record["deaths"] or 0,
        token=record["token"],
        key_alias=record["key_alias"],
    )
