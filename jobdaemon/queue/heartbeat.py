"""
The heartbeat: renews the lease of everything this daemon runs, and knows how far it can be trusted.

Two clocks: the database's decides whether a lease holds (in the claim, and in the look for jobs that nobody runs), this machine's
own for how long no beat got through, sleep included. After three quarters of the lease this daemon stalls, and its paid calls are
aborted: it stood still, or the database answers others. While the database itself is away nothing is aborted: nobody else can
have claimed the work.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from datetime import timedelta

from jobdaemon.errors import DatabaseUnavailableError
from jobdaemon.events import DatabaseBack, DatabaseLost, Events, UpkeepFailed
from jobdaemon.queue.store import PostgresJobStore

_REST_WHILE_LOST_S = 0.5
#: The share of the lease for which a beat is trusted; the rest is for what is done on its strength.
_TRUSTED = 0.75
#: A timer that rings later than this share of the lease says that the process stood still, not that the loop was busy.
_LATE = 0.05
#: The event loop's timers stand still while the machine sleeps: look this often whether it did.
_LOOK_S = 1.0
#: No beat is given up sooner than after this share of the lease.
_LEAST_PATIENCE = 1 / 15
_STOOD_STILL = "this process stood still for most of its lease"
_NOT_THROUGH = "the database answers, but no heartbeat got through for most of the lease"

#: Goes on while the machine sleeps, where the system has such a clock.
_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def elapsed_s() -> float:
    """Seconds since some moment, forward only; the time that the machine slept counts."""
    return time.clock_gettime(_CLOCK)


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
        on_stall: Callable[[str], None],
    ) -> None:
        """
        Args:
            register: announces this daemon anew; returns its id.
            on_first_beat: called once, when this daemon lives and listens.
            on_stall: called with the reason, once per stall: no beat got through for three quarters of the lease, though the
                database is there. After a standstill it is called before any task of this process goes on.
        """
        self._store = store
        self._events = events
        self._interval_s = interval.total_seconds()
        self._lease = lease
        self._lease_s = lease.total_seconds()
        self._register = register
        self._on_first_beat = on_first_beat
        self._on_stall = on_stall
        self._now = asyncio.Event()
        #: When the last beat that succeeded was sent: the database's clock saw it later.
        self._leased_at: float | None = None
        self._beaten = asyncio.Event()
        self._lost_at: float | None = None
        self._was_ready = False
        #: Whether a beat has failed since the last one that succeeded.
        self._has_failed = False
        #: When the last beat stops being trusted, by elapsed_s, and the timer that looks whether that is now.
        self._trusted_until = 0.0
        self._watch: asyncio.TimerHandle | None = None
        self._is_beating = False
        self._has_stalled = False
        #: After how many failed beats in a row the database answered all the same.
        self._answers = 0
        self.daemon_id: int | None = None
        self.last_turn_s = 0.0

    def beat_now(self) -> None:
        """Do not wait for the interval: the listening connection was lost."""
        self._now.set()

    def may_rescue(self) -> bool:
        """
        Whether no beat has failed since the last one that succeeded.

        After an outage of Postgres every daemon looks silent. The database knows how steadily this one has beaten, but not that
        it tried in vain.
        """
        return not self._has_failed

    def beat_first(self) -> None:
        """The database refused a claim, because the lease has lapsed by its clock or this daemon's row is gone."""
        self._leased_at = None
        self._now.set()

    async def until_lease_holds(self) -> None:
        """
        Wait for a beat, unless the last one is recent.

        A job claimed under a lapsed lease is another daemon's at once, while it runs here too. That is what a process that stood
        still would do when it goes on, since what woke it waits in its sockets, and so would one whose beats do not get through.
        """
        while not self.is_sure():
            self._beaten.clear()
            self._now.set()
            await self._beaten.wait()

    def is_sure(self) -> bool:
        """Whether the last beat is so recent that nobody else can have what this daemon runs."""
        return self._leased_at is not None and elapsed_s() <= self._trusted_until

    async def run(self) -> None:
        """Beat until cancelled."""
        try:
            while True:
                await self._beat()
                rest_s = self._interval_s if self._lost_at is None else min(_REST_WHILE_LOST_S, self._interval_s)
                try:
                    async with asyncio.timeout(rest_s):
                        await self._now.wait()
                except TimeoutError:
                    pass
                self._now.clear()
        finally:
            if self._watch is not None:
                self._watch.cancel()

    async def _beat(self) -> None:
        loop = asyncio.get_running_loop()
        self.last_turn_s = loop.time()
        if self._watch is not None and elapsed_s() > self._trusted_until:
            self._ring()  # after a sleep it would come too late: this beat may succeed
        began = elapsed_s()
        self._is_beating = True
        try:
            await self._beat_once(self._patience(began))
        except DatabaseUnavailableError as error:
            self._has_failed = True
            if self._lost_at is None:
                self._lost_at = loop.time()
                self._events.emit(DatabaseLost(error=str(error)))
            self._failed(is_answering=await self._store.answers(timeout=self._patience(elapsed_s())))
            return
        except Exception as error:  # noqa: BLE001 - the heart goes on
            self._has_failed = True
            self._events.emit(UpkeepFailed(error=f"heartbeat: {type(error).__name__}: {error}"))
            self._failed(is_answering=True)
            return
        finally:
            self._is_beating = False
        if elapsed_s() - began > _TRUSTED * self._lease_s:
            # The process stood still before it read the answer: how old the beat is nobody knows.
            self._now.set()
            return
        self._succeeded(began)

    def _succeeded(self, began: float) -> None:
        loop = asyncio.get_running_loop()
        self._leased_at = began
        self._trusted_until = began + _TRUSTED * self._lease_s
        self._answers, self._has_stalled, self._has_failed = 0, False, False
        self._look_again()
        self._beaten.set()
        if self._lost_at is not None:
            self._events.emit(DatabaseBack(seconds=loop.time() - self._lost_at))
            self._lost_at = None
        if not self._was_ready:
            self._was_ready = True
            self._on_first_beat()

    def _failed(self, *, is_answering: bool) -> None:
        # The database may have come back after this beat failed: one that was sent after an answer has to fail, too.
        self._answers = self._answers + 1 if is_answering else 0
        if self._answers > 1 and not self.is_sure():
            self._stall(_NOT_THROUGH)

    def _look_again(self) -> None:
        """Ring when the last beat is not to be trusted any more, or in a while, since the timer does not count sleep."""
        if self._watch is not None:
            self._watch.cancel()
        left_s = self._trusted_until - elapsed_s()
        self._watch = asyncio.get_running_loop().call_later(min(left_s, _LOOK_S), self._ring)

    def _ring(self) -> None:
        """
        See whether the last beat is still to be trusted.

        A timer, since the event loop calls it before any task goes on that waited while the process stood still.
        """
        late_s = elapsed_s() - self._trusted_until
        if late_s < 0:
            self._look_again()
            return
        if self._answers > 1:
            self._stall(_NOT_THROUGH)
        is_late = late_s > _LATE * self._lease_s
        if self._lost_at is None and (is_late or not self._is_beating):
            self._stall(_STOOD_STILL)

    def _stall(self, reason: str) -> None:
        if not self._has_stalled:
            self._has_stalled = True
            self._on_stall(reason)

    def _patience(self, now: float) -> timedelta:
        """How long to wait for an answer: where beats fail, that is to be known when the last one is not trusted any more."""
        patience_s = min(self._interval_s, self._lease_s / 3)
        left_s = self._trusted_until - now
        if left_s > 0:
            patience_s = min(patience_s, max(left_s, _LEAST_PATIENCE * self._lease_s))
        return timedelta(seconds=patience_s)

    async def _beat_once(self, timeout: timedelta) -> None:  # noqa: ASYNC109 - the statement's
        if self.daemon_id is None or not await self._renew(self.daemon_id, timeout):
            self.daemon_id = await self._register()
            await self._renew(self.daemon_id, timeout)

    async def _renew(self, daemon_id: int, timeout: timedelta) -> bool:  # noqa: ASYNC109 - the statement's
        return await self._store.heartbeat(daemon_id, lease=self._lease, timeout=timeout, is_steady=not self._has_failed)
