"""
The supervisor: starts a daemon's services in order, keeps them going, and stops them in order.

Start: schema, committer, heartbeat (which registers and listens), upkeep, teams. Stop: no more claims, running attempts finish
within the grace, the rest is handed back unspent, and the heartbeat goes on until the last commit is in.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from jobdaemon.domain.fallback import FallbackRules
from jobdaemon.domain.job import provider_of
from jobdaemon.errors import DatabaseUnavailableError
from jobdaemon.events import (
    CircuitTurned,
    DaemonReady,
    DaemonStarted,
    DaemonStopped,
    DaemonStopping,
    Events,
    LeaseInDoubt,
    UpkeepFailed,
)
from jobdaemon.ports import Stage
from jobdaemon.queue.attempt import AttemptRules, AttemptRunner
from jobdaemon.queue.committer import Committer
from jobdaemon.queue.heartbeat import Heartbeat
from jobdaemon.queue.solitude import Solitude
from jobdaemon.queue.store import PostgresJobStore
from jobdaemon.queue.team import Team
from jobdaemon.queue.upkeep import Upkeep

_RECONNECT_S = 1.0
#: A daemon that waits for its database says so this often; systemd is asked for more time with it.
_SAY_AGAIN_S = 15.0
#: A loop that has not turned for this long, database timeouts allowed for, is stuck.
_STUCK_S = 60.0


@dataclass(frozen=True, slots=True)
class EngineRules:
    """
    Attributes:
        heartbeat: how often this daemon says that it lives.
        lease: a daemon silent for longer loses what it runs.
        poll: the net below lost notifications.
        stop_grace: how long running attempts may take to finish once the daemon stops.
    """

    heartbeat: timedelta
    lease: timedelta
    poll: timedelta
    stop_grace: timedelta


@dataclass(frozen=True, slots=True)
class QueueRules:
    """
    How this daemon serves one queue.

    Attributes:
        keys: aliases of the provider's keys that this daemon has; None where the provider knows no keys.
        calm: how long a job that others announce may wait here, for the sake of jobs of other queues that begin in that moment.
    """

    team_size: int
    attempt: AttemptRules
    keys: tuple[str, ...] | None = None
    calm: timedelta = timedelta(0)


class Supervisor:
    """One daemon; see the module docstring."""

    def __init__(
        self,
        *,
        store: PostgresJobStore,
        stages: Mapping[str, Stage],
        queues: Mapping[str, QueueRules],
        engine: EngineRules,
        events: Events,
        version: str,
        require_schema: Callable[[list[str]], None],
        ensure_rows: Callable[[], Awaitable[None]],
        discard: Callable[[tuple[str, ...]], Awaitable[None]],
        images_per_call: Callable[[str], int] = lambda provider: 1,  # noqa: ARG005 - a provider's name
        fallback: FallbackRules | None = None,
        companions: Sequence[Callable[[], Coroutine[Any, Any, None]]] = (),
    ) -> None:
        """
        Args:
            companions: what else goes on while this daemon claims; each may end by itself, and raises nothing.
            images_per_call: how many images one call of a provider makes, for jobs that have to be made again.
            fallback: who takes over what waits for a provider in trouble; nobody when None.
            require_schema: raises SchemaVersionError when these applied migrations do not fit this program.
            ensure_rows: inserts the plans and queues of the settings that are missing.
            discard: deletes artifacts that nobody needs any more; must not raise.
        """
        self._store = store
        self._events = events
        self._engine = engine
        self._version = version
        self._companions = companions
        self._require_schema = require_schema
        self._ensure_rows = ensure_rows
        self._stopping = asyncio.Event()
        self._cut_short = asyncio.Event()
        self._team_sizes = {name: rules.team_size for name, rules in queues.items()}
        self._keys = {provider_of(name): rules.keys for name, rules in queues.items() if rules.keys is not None}
        self._committer = Committer(store, events)
        self._heartbeat = Heartbeat(
            store,
            events,
            interval=engine.heartbeat,
            lease=engine.lease,
            register=self._register,
            on_first_beat=lambda: events.emit(DaemonReady(daemon_id=self.daemon_id)),
            on_stall=self._doubt_the_lease,
        )
        self._solitude = Solitude(events)
        runner = AttemptRunner(
            stages, self._committer, events, discard=discard, is_sure=self._heartbeat.is_sure, solitude=self._solitude
        )
        self._teams = {
            name: Team(
                name,
                rules.team_size,
                rules.attempt,
                store=store,
                runner=runner,
                events=events,
                daemon_id=lambda: self.daemon_id,
                on_lease_lost=self._heartbeat.beat_first,
                until_lease_holds=self._until_it_may_claim,
                keys=rules.keys,
                calm=rules.calm,
            )
            for name, rules in queues.items()
        }
        self._upkeep = Upkeep(
            store,
            self._teams,
            self._committer,
            events,
            poll=engine.poll,
            lease=engine.lease,
            daemon_id=lambda: self.daemon_id,
            may_rescue=self._heartbeat.may_rescue,
            on_drain=self._drain,
            restore=self._restore,
            images_per_call=images_per_call,
            fallback=fallback,
        )

    @property
    def daemon_id(self) -> int:
        """This daemon's id; it changes when somebody removed its row."""
        if self._heartbeat.daemon_id is None:
            raise RuntimeError("the daemon is not registered yet")
        return self._heartbeat.daemon_id

    def is_progressing(self) -> bool:
        """Whether the loops go round: what the watchdog wants to know. Waiting for the database is progress."""
        now = asyncio.get_running_loop().time()
        turns = (
            (self._heartbeat.last_turn_s, self._engine.heartbeat.total_seconds()),
            (self._upkeep.last_turn_s, self._engine.poll.total_seconds()),
        )
        return all(last == 0.0 or now - last < _STUCK_S + interval_s for last, interval_s in turns)

    def stop(self, reason: str) -> None:
        """Stop claiming and finish; called again, cut short what still runs."""
        if self._stopping.is_set():
            self._cut_short.set()
            return
        self._events.emit(DaemonStopping(reason=reason))
        self._stopping.set()

    def resize(self, team_sizes: Mapping[str, int]) -> None:
        """Follow changed settings; operators' rows still win."""
        for name, size in team_sizes.items():
            if (team := self._teams.get(name)) is not None:
                team.configure(size)
                self._team_sizes[name] = size
        self._upkeep.resized(self._team_sizes)

    async def _until_it_may_claim(self) -> None:
        await self._solitude.until_open()
        await self._heartbeat.until_lease_holds()

    def _doubt_the_lease(self, reason: str) -> None:
        aborted = sum(team.abort_paid(reason) for team in self._teams.values())
        self._events.emit(LeaseInDoubt(reason=reason, aborted=aborted))

    def _drain(self, is_draining: bool) -> None:
        # The slots that a draining daemon frees are for others.
        self._committer.is_draining = is_draining or self._stopping.is_set()

    async def run(self, *, wait_for_database: bool) -> None:
        """
        Work until :meth:`stop`.

        Args:
            wait_for_database: wait for a database that is down, instead of raising.

        Raises:
            DatabaseUnavailableError: it is down, and we should not wait.
            SchemaVersionError: its schema does not fit this program.
        """
        self._events.emit(DaemonStarted(daemon_id="", queues=self._team_sizes))
        if not await self._reach_database(wait_for_database):
            return
        self._store.listen(
            self._upkeep.heard,
            self._heartbeat.beat_now,
            on_probe=lambda queue: self._events.emit(CircuitTurned(queue, "probing")),
        )
        services = [asyncio.ensure_future(self._committer.run()), asyncio.ensure_future(self._heartbeat.run())]
        claiming = [asyncio.ensure_future(team.run()) for team in self._teams.values()]
        upkeep = asyncio.ensure_future(self._upkeep.run())
        companions = [asyncio.ensure_future(run()) for run in self._companions]
        stop = asyncio.ensure_future(self._stopping.wait())
        try:
            done, _ = await asyncio.wait({*services, *claiming, upkeep, stop}, return_when=asyncio.FIRST_COMPLETED)
            for service in done - {stop}:
                service.result()  # none ends by itself: show why this one did
        finally:
            stop.cancel()
            await _cancel(companions)
            await self._stop_in_order(claiming, upkeep, services)

    async def _reach_database(self, wait: bool) -> bool:
        """Check the schema and register; False when the daemon was stopped while it waited."""
        loop = asyncio.get_running_loop()
        say_at = loop.time()
        while not self._stopping.is_set():
            try:
                self._require_schema(await self._store.applied_migrations())
                await self._ensure_rows()
                await self._store.connect()
                self._heartbeat.daemon_id = await self._register()
                return True
            except DatabaseUnavailableError as error:
                if not wait:
                    raise
                if loop.time() >= say_at:
                    say_at = loop.time() + _SAY_AGAIN_S
                    self._events.emit(UpkeepFailed(error=str(error), chore="start"))
            try:
                async with asyncio.timeout(_RECONNECT_S):
                    await self._stopping.wait()
            except TimeoutError:
                pass
        return False

    async def _register(self) -> int:
        daemon_id = await self._store.register(
            host=socket.gethostname(),
            pid=os.getpid(),
            version=self._version,
            queues=self._team_sizes,
            was=self._heartbeat.daemon_id,
            lease=self._engine.lease,
            keys=self._keys,
        )
        self._committer.daemon_id = daemon_id
        self._upkeep.look()
        return daemon_id

    async def _restore(self) -> None:
        await self._store.restore_daemon(
            self.daemon_id,
            host=socket.gethostname(),
            pid=os.getpid(),
            version=self._version,
            queues=self._team_sizes,
            keys=self._keys,
        )

    async def _stop_in_order(
        self, claiming: Sequence[asyncio.Future[None]], upkeep: asyncio.Future[None], services: Sequence[asyncio.Future[None]]
    ) -> None:
        began = asyncio.get_running_loop().time()
        self._committer.is_draining = True
        await self._say("stopping")
        await _cancel([*claiming, upkeep])
        grace_s = self._engine.stop_grace.total_seconds()
        handed_back = sum(
            await asyncio.gather(*(team.finish(grace_s=grace_s, cut_short=self._cut_short) for team in self._teams.values()))
        )
        await self._say("stopped")
        await _cancel(services)
        self._events.emit(DaemonStopped(handed_back=handed_back, seconds=asyncio.get_running_loop().time() - began))

    async def _say(self, status: str) -> None:
        # When the database is away, the silence of our heartbeat says the same, later.
        with suppress(DatabaseUnavailableError):
            await self._store.set_daemon_status(self.daemon_id, status)


async def _cancel(tasks: Sequence[asyncio.Future[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
