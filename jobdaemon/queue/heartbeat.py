"""
The heartbeat: renews the lease of everything this daemon runs, and knows how far it can be trusted.

Two clocks: the database's decides whether a lease holds, this process's own monotonic clock decides whether beats were missed
because the process itself stood still (then its paid calls are aborted) or because the database was away (then they go on: no
one else can have claimed the work).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta

from jobdaemon.errors import DatabaseUnavailableError
from jobdaemon.events import DatabaseBack, DatabaseLost, Events, UpkeepFailed
from jobdaemon.queue.store import PostgresJobStore

_REST_WHILE_LOST_S = 0.5
#: The share of the lease for which a beat is trusted; the rest is for what is done on its strength.
_TRUSTED = 0.75


class Heartbeat:
    """Beats until cancelled; see the module docstring."""

    def __init__(
        self,
        store: PostgresJobStore,
        events: Events,
        *,
        interval: timedelta,
        lease: timedelta,
        register: Callable[[], Awaitable[int]],
        on_first_beat: Callable[[], None],
        on_stall: Callable[[], None],
    ) -> None:
        """
        Args:
            register: announces this daemon anew; returns its id.
            on_first_beat: called once, when this daemon lives and listens.
            on_stall: called when this process itself stood still for three quarters of the lease.
        """
        self._store = store
        self._events = events
        self._interval_s = interval.total_seconds()
        self._lease_s = lease.total_seconds()
        self._register = register
        self._on_first_beat = on_first_beat
        self._on_stall = on_stall
        self._now = asyncio.Event()
        self._steady_since: float | None = None
        self._last_beat: float | None = None
        #: When the last beat that succeeded was sent: the database's clock saw it later.
        self._leased_at: float | None = None
        self._beaten = asyncio.Event()
        self._lost_at: float | None = None
        self.daemon_id: int | None = None
        self.last_turn_s = 0.0

    def beat_now(self) -> None:
        """Do not wait for the interval: the listening connection was lost, or this daemon's row is gone."""
        self._now.set()

    def may_rescue(self) -> bool:
        """
        Whether this daemon's own beats have succeeded without a gap for a whole lease.

        After an outage of Postgres every daemon's lease looks lapsed; the first one back must not rescue everybody's jobs.
        """
        return self._steady_since is not None and asyncio.get_running_loop().time() - self._steady_since >= self._lease_s

    async def until_lease_holds(self) -> None:
        """
        Wait for a beat, unless the last one is recent.

        A job claimed under a lapsed lease is another daemon's at once, while it runs here too. That is what a process that stood
        still would do when it goes on, since what woke it waits in its sockets, and so would one whose beats do not get through.
        """
        loop = asyncio.get_running_loop()
        while self._leased_at is None or loop.time() - self._leased_at > _TRUSTED * self._lease_s:
            self._beaten.clear()
            self._now.set()
            await self._beaten.wait()

    async def run(self) -> None:
        """Beat until cancelled."""
        while True:
            await self._beat()
            rest_s = self._interval_s if self._lost_at is None else min(_REST_WHILE_LOST_S, self._interval_s)
            try:
                async with asyncio.timeout(rest_s):
                    await self._now.wait()
            except TimeoutError:
                pass
            self._now.clear()

    async def _beat(self) -> None:
        loop = asyncio.get_running_loop()
        self.last_turn_s = began = loop.time()
        if self._lost_at is None and self._last_beat is not None and began - self._last_beat > _TRUSTED * self._lease_s:
            self._steady_since = None
            self._on_stall()
        try:
            await self._beat_once()
        except DatabaseUnavailableError as error:
            self._steady_since = None
            if self._lost_at is None:
                self._lost_at = loop.time()
                self._events.emit(DatabaseLost(error=str(error)))
            return
        except Exception as error:  # noqa: BLE001 - the heart goes on
            self._steady_since = None
            self._events.emit(UpkeepFailed(error=f"heartbeat: {type(error).__name__}: {error}"))
            return
        now = loop.time()
        self._leased_at = began
        self._beaten.set()
        if self._lost_at is not None:
            self._events.emit(DatabaseBack(seconds=now - self._lost_at))
            self._lost_at = None
        if self._steady_since is None or (self._last_beat is not None and now - self._last_beat > self._lease_s):
            self._steady_since = now
        is_first, self._last_beat = self._last_beat is None, now
        if is_first:
            self._on_first_beat()

    async def _beat_once(self) -> None:
        timeout = timedelta(seconds=min(self._interval_s, self._lease_s / 3))
        if self.daemon_id is None or not await self._store.heartbeat(self.daemon_id, timeout=timeout):
            self.daemon_id = await self._register()
            self._steady_since = None
            await self._store.heartbeat(self.daemon_id, timeout=timeout)
