"""
What happened, as typed values, and the dispatcher that tells whoever listens (logs, metrics, tests).

Whoever emits says what happened and nothing about how it is shown; docs/configure.md has the table of events, and a test
holds it equal to this module. An emitter is never hurt by a listener.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar

_log = logging.getLogger(__name__)

Outcome = Literal["succeeded", "retry", "snooze", "handed_back", "moved", "failed", "cancelled"]


@dataclass(frozen=True, slots=True)
class Event:
    """Base of every event. Texts are for people and hold no secret; times in seconds are monotonic differences."""


@dataclass(frozen=True, slots=True)
class DaemonStarted(Event):
    """The process runs and begins to connect. *queues*: queue -> team size."""

    daemon_id: int | str
    queues: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class DaemonReady(Event):
    """The daemon is registered, listens and claims."""

    daemon_id: int | str = ""


@dataclass(frozen=True, slots=True)
class DaemonStopping(Event):
    """No more claims from now on; *reason* is a signal's name or a sentence."""

    reason: str


@dataclass(frozen=True, slots=True)
class DaemonStopped(Event):
    """Everything is finished or handed back; *handed_back* jobs were cut short, *seconds* it took."""

    handed_back: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class SettingsReloaded(Event):
    """SIGHUP was obeyed; *error* says why it was not."""

    error: str | None = None


@dataclass(frozen=True, slots=True)
class SettingsOverruled(Event):
    """A *row* of the database, such as ``plan Free``, says something else than the settings, and wins; told at the start."""

    row: str
    reason: str


@dataclass(frozen=True, slots=True)
class JobStarted(Event):
    """An attempt, counted from 1, began."""

    job_id: int
    queue: str
    task: str
    attempt: int
    order_id: int | None = None


@dataclass(frozen=True, slots=True)
class JobFinished(Event):
    """An attempt's end is committed. *seconds* it ran; *error* when it did not succeed."""

    job_id: int
    queue: str
    outcome: Outcome
    seconds: float
    error: str | None = None
    order_id: int | None = None


@dataclass(frozen=True, slots=True)
class JobIsolated(Event):
    """A job in whose company *deaths* workers died runs alone here, as soon as nothing else runs."""

    job_id: int
    queue: str
    deaths: int
    order_id: int | None = None


@dataclass(frozen=True, slots=True)
class CheckpointCommitted(Event):
    """A running attempt noted *what* it must not do twice (a provider's task, an image that arrived)."""

    job_id: int
    what: str = ""
    order_id: int | None = None


@dataclass(frozen=True, slots=True)
class LeaseLost(Event):
    """The attempt's token no longer holds; its result is dropped."""

    job_id: int
    queue: str = ""
    order_id: int | None = None


@dataclass(frozen=True, slots=True)
class LeaseInDoubt(Event):
    """No heartbeat got through for three quarters of the lease, though Postgres is there: *aborted* paid calls were stopped."""

    reason: str
    aborted: int = 0


@dataclass(frozen=True, slots=True)
class JobsRescued(Event):
    """*count* jobs were taken from *daemon_id*, whose heartbeat had stopped."""

    count: int
    daemon_id: int | str


@dataclass(frozen=True, slots=True)
class SilentSessionsEnded(Event):
    """*count* database sessions of daemons that stood still in the middle of a statement were ended: they held locks."""

    count: int


@dataclass(frozen=True, slots=True)
class CircuitTurned(Event):
    """
    The circuit of a queue turned, over all daemons: *open* for *seconds*, *in_a_row* times by now, because of *reason*; *probing*
    with one job of this daemon; *closed*, since one succeeded.
    """

    queue: str
    circuit: Literal["open", "probing", "closed"]
    seconds: float | None = None
    in_a_row: int | None = None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class LimitAdapted(Event):
    """The adaptive limit of a queue went from *was* to *limit*; None: there was, or is, none."""

    queue: str
    was: int | None
    limit: int | None


@dataclass(frozen=True, slots=True)
class QueueRests(Event):
    """Nothing of a queue starts for *seconds*: its provider refused though nothing else ran, or asked for it."""

    queue: str
    seconds: float
    in_a_row: int
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class ProviderChanged(Event):
    """A batch that *was* one provider's goes on with *provider*, the next in the chain, for *reason*."""

    order_id: int
    job_id: int
    was: str
    provider: str
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class OrdersLifted(Event):
    """*count* orders had waited longer than their plan's ``lift_after``."""

    count: int


@dataclass(frozen=True, slots=True)
class OrderSettled(Event):
    """An order reached its final status: completed, partial, failed or cancelled."""

    order_id: int
    status: str
    error: str | None = None


@dataclass(frozen=True, slots=True)
class OrdersRetired(Event):
    """*count* orders ended ``retention.photos`` ago: their photos and jobs are being removed, and they cannot be redriven."""

    count: int


@dataclass(frozen=True, slots=True)
class OrdersRemoved(Event):
    """*count* orders ended ``retention.orders`` ago: their rows are gone."""

    count: int


@dataclass(frozen=True, slots=True)
class OrderMended(Event):
    """Somebody else had ended or deleted jobs of an open order: so many were made again, so many images (or the order) failed."""

    order_id: int
    jobs: int = 0
    failures: int = 0


@dataclass(frozen=True, slots=True)
class DatabaseLost(Event):
    """Postgres stopped answering; said once per outage."""

    error: str


@dataclass(frozen=True, slots=True)
class DatabaseBack(Event):
    """Postgres answers again after *seconds*."""

    seconds: float


@dataclass(frozen=True, slots=True)
class UpkeepFailed(Event):
    """A chore (promote, lift, rescue, retention, reconcile) failed and will be tried again."""

    error: str
    chore: str = ""


@dataclass(frozen=True, slots=True)
class CommitFailed(Event):
    """*jobs* ends could not be committed; they are kept and tried again, unless *is_dropped*."""

    error: str
    jobs: int = 1
    job_id: int | None = None
    is_dropped: bool = False


@dataclass(frozen=True, slots=True)
class KeyRested(Event):
    """A provider refused the key *alias*, or its account is out of money: nothing starts under it for *seconds*."""

    provider: str
    alias: str
    seconds: float
    reason: str


@dataclass(frozen=True, slots=True)
class KeyMissing(Event):
    """So many *jobs* wait to collect what was bought with the key *alias*, and no running daemon has it."""

    provider: str
    alias: str
    jobs: int


@dataclass(frozen=True, slots=True)
class PhotoLeft(Event):
    """The photo of an order that has ended lies where providers fetched it, and could not be deleted there in all *tries*."""

    order_id: int
    tries: int
    error: str


E = TypeVar("E", bound=Event)
Callback = Callable[[Event], None]


class Events:
    """
    Tells every subscriber about every event, in the order of subscription, at once, in the emitter's thread.

    Emitters and waiters share one event loop; subscribers are short and do not block.
    """

    def __init__(self) -> None:
        self._callbacks: list[tuple[Callback]] = []

    def subscribe(self, callback: Callback) -> Callable[[], None]:
        """Call *callback* with every event from now on; returns what ends it (calling that again does nothing)."""
        # Replaced, never changed in place: a callback may subscribe or end subscriptions while an event is told.
        entry = (callback,)
        self._callbacks = [*self._callbacks, entry]

        def unsubscribe() -> None:
            self._callbacks = [other for other in self._callbacks if other is not entry]

        return unsubscribe

    def emit(self, event: Event) -> None:
        """Tell the subscribers. Never raises: a subscriber that fails is logged, and the others are still told."""
        for (callback,) in self._callbacks:
            try:
                callback(event)
            except Exception:  # noqa: BLE001 - a listener's fault must not fail the job that is being told about
                _log.exception("a subscriber failed on %s", type(event).__name__)

    async def wait_for(
        self,
        kind: type[E],
        predicate: Callable[[E], bool] | None = None,
        timeout: float | None = 10.0,  # noqa: ASYNC109 - an argument, so that the error can name what did not come
    ) -> E:
        """
        Wait for the next event of a kind; what happened before does not count.

        Whoever causes the event before waiting for it uses :meth:`expect` first, so as not to miss it.

        Args:
            kind: class of the event.
            predicate: which events of that kind count; all, when None.
            timeout: seconds; None waits for ever.

        Raises:
            TimeoutError: naming *kind*.
        """
        return await self.expect(kind, predicate).wait(timeout)

    def expect(self, kind: type[E], predicate: Callable[[E], bool] | None = None) -> Expectation[E]:
        """Note the next event of a kind from this moment on, to be awaited later in the same event loop."""
        return Expectation(self, kind, predicate)


class Expectation(Generic[E]):
    """One event to come; made by :meth:`Events.expect`."""

    def __init__(self, events: Events, kind: type[E], predicate: Callable[[E], bool] | None) -> None:
        self._kind = kind
        self._predicate = predicate
        self._event: asyncio.Future[E] = asyncio.get_running_loop().create_future()
        self._unsubscribe = events.subscribe(self._note)

    def _note(self, event: Event) -> None:
        if isinstance(event, self._kind) and not self._event.done() and (self._predicate is None or self._predicate(event)):
            self._event.set_result(event)
            self._unsubscribe()

    async def wait(self, timeout: float | None = 10.0) -> E:  # noqa: ASYNC109 - as in wait_for
        """The event, when it has happened; *timeout* in seconds. Raises TimeoutError, naming the kind of event."""
        try:
            return await asyncio.wait_for(asyncio.shield(self._event), timeout)
        except TimeoutError:
            raise TimeoutError(f"no {self._kind.__name__} within {timeout} s") from None
        finally:
            self._unsubscribe()
