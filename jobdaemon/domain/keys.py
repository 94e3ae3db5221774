"""
Which provider key each job starts under, and what a refusal does to a key.

The claim deals keys out in SQL (``claim_keyed_jobs``); tests hold it equal to :func:`deal`. Jobs start one after another in claim
order, each under one key:

- a job that has **bought** a task goes on under that task's key and costs neither rate nor budget; while that key is full or
  rests, or where this daemon does not have it, it waits and others pass it by;
- any other job takes the key with most free starts (of equals the first by alias) whose budget holds all its images. A key that
  is paused, rests, is full, has spent its day's budget or is before its next start has none.

A **refused** key rests, longer each time; one whose account is out of money rests until the next day, UTC.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, time, timedelta

#: So many jobs that fit no key's budget are passed by in one claim; then nothing more is bought in it.
MAX_PASSED_BY = 20
#: The rest of a key that was refused; doubles up to the longest.
FIRST_REST = timedelta(minutes=1)
LONGEST_REST = timedelta(hours=1)
#: A server's Retry-After is obeyed up to this long.
LONGEST_RETRY_AFTER = timedelta(hours=1)

_UNBOUNDED = 2**31
_MOST_DOUBLINGS = 20

REFUSED = "the provider refused it"
OUT_OF_MONEY = "its account is out of money"
ASKED_TO_WAIT = "the provider asked for a pause"


@dataclass(frozen=True, slots=True)
class ProviderKey:
    """
    What the settings say of a key, without its secret. None is no limit.

    Attributes:
        concurrency: most jobs under it at once, over all daemons.
        rate: starts per second, evenly spaced.
        daily_budget: images asked for per day, UTC.
    """

    provider: str
    alias: str
    concurrency: int | None = None
    rate: float | None = None
    daily_budget: int | None = None


@dataclass(frozen=True, slots=True)
class KeyState:
    """
    A key as the claim sees it; see :class:`ProviderKey` for the limits.

    Attributes:
        next_start_at: with a rate, nothing is bought before.
        spent: images asked for on the day *spent_on*.
    """

    alias: str
    concurrency: int | None = None
    rate: float | None = None
    daily_budget: int | None = None
    is_paused: bool = False
    rested_until: datetime | None = None
    next_start_at: datetime | None = None
    spent: int = 0
    spent_on: date | None = None


@dataclass(frozen=True, slots=True)
class KeyedJob:
    """
    A ready job of a provider's queue.

    Attributes:
        images: how many it asks for.
        bought_with: the key of the task that it has bought and not collected.
    """

    id: int
    images: int = 1
    bought_with: str | None = None


@dataclass(frozen=True, slots=True)
class Deal:
    """
    What starts.

    Attributes:
        started: job and key, in the order of the starts.
        keys: all keys afterwards.
        opens_at: when the clock alone lets more start, if fewer started than asked.
    """

    started: tuple[tuple[int, str], ...]
    keys: tuple[KeyState, ...]
    opens_at: datetime | None


def deal(
    jobs: Iterable[KeyedJob],
    keys: Sequence[KeyState],
    *,
    running: Mapping[str, int],
    slots: int,
    now: datetime,
    elsewhere: Collection[str] = (),
) -> Deal:
    """
    Give free slots of one queue to its ready jobs, each under one of *keys*.

    Args:
        jobs: in claim order.
        running: how many jobs run under each key.
        slots: how many may start, 0 or more.
        now: aware; its day counts in UTC.
        elsewhere: aliases of the provider's keys that only other daemons have.
    """
    hands = {key.alias: _Hand(key, running.get(key.alias, 0), now) for key in sorted(keys, key=lambda key: key.alias)}
    waiting = [job for job in jobs if job.bought_with not in elsewhere]
    started: list[tuple[int, str]] = []
    unfit: set[int] = set()
    while len(started) < slots and (chosen := _next(waiting, hands, unfit)) is not None:
        job, hand = chosen
        hand.start(job)
        waiting.remove(job)
        started.append((job.id, hand.key.alias))
    opens = [moment for hand in hands.values() if (moment := hand.opens_at(waiting, has_unfit=bool(unfit))) is not None]
    opens_at = min(opens, default=None) if waiting and len(started) < slots else None
    return Deal(tuple(started), tuple(hand.key for hand in hands.values()), opens_at)


def _next(waiting: Iterable[KeyedJob], hands: Mapping[str, _Hand], unfit: set[int]) -> tuple[KeyedJob, _Hand] | None:
    """The first job that may start, and its key; notes in *unfit* which ones were passed by for their size."""
    for job in waiting:
        own = hands.get(job.bought_with or "")
        if own is not None:
            if own.may_collect:
                return job, own
            continue
        open_hands = [hand for hand in hands.values() if hand.free > 0]
        if not open_hands or job.id in unfit or len(unfit) >= MAX_PASSED_BY:
            continue
        if fitting := [hand for hand in open_hands if hand.holds(job)]:
            return job, max(fitting, key=lambda hand: hand.free)  # the first of equals
        unfit.add(job.id)
    return None


class _Hand:
    """One key during a deal."""

    def __init__(self, key: KeyState, running: int, now: datetime) -> None:
        today = now.astimezone(UTC).date()
        self.key = key if key.spent_on == today else replace(key, spent=0)
        self._room = (_UNBOUNDED if key.concurrency is None else key.concurrency) - running
        self._now = now
        self._today = today

    @property
    def may_collect(self) -> bool:
        """Whether a job that has bought under this key may go on: a pause does not matter to it."""
        return self._room > 0 and not _is_ahead(self.key.rested_until, self._now)

    @property
    def free(self) -> int:
        """How many more jobs may buy now."""
        key = self.key
        is_early = key.rate is not None and _is_ahead(key.next_start_at, self._now)
        if key.is_paused or not self.may_collect or is_early or self._left <= 0:
            return 0
        return self._room if key.rate is None else 1

    @property
    def _left(self) -> int:
        return _UNBOUNDED if self.key.daily_budget is None else self.key.daily_budget - self.key.spent

    def holds(self, job: KeyedJob) -> bool:
        """Whether the day's budget has room for all its images."""
        return self.key.daily_budget is None or job.images <= self._left

    def start(self, job: KeyedJob) -> None:
        """Take what *job* costs."""
        self._room -= 1
        if job.bought_with == self.key.alias:
            return
        next_start_at = None if self.key.rate is None else self._now + timedelta(seconds=1 / self.key.rate)
        self.key = replace(self.key, spent=self.key.spent + job.images, spent_on=self._today, next_start_at=next_start_at)

    def opens_at(self, waiting: Iterable[KeyedJob], *, has_unfit: bool) -> datetime | None:
        """When this key opens by the clock alone: a pause ends by a word, a key that is full by a job's end."""
        key = self.key
        if self._room <= 0:
            return None
        moments: list[datetime | None] = [key.rested_until]
        if key.is_paused or key.daily_budget == 0:
            if not any(job.bought_with == key.alias for job in waiting):
                return None
        else:
            moments += [key.next_start_at if key.rate is not None else None]
            if key.daily_budget is not None and (self._left <= 0 or has_unfit):
                moments.append(next_day(self._now))
        return max((moment for moment in moments if _is_ahead(moment, self._now) and moment is not None), default=None)


def _is_ahead(moment: datetime | None, now: datetime) -> bool:
    return moment is not None and moment > now


def next_day(now: datetime) -> datetime:
    """The next midnight, UTC: when budgets begin anew."""
    return datetime.combine(now.astimezone(UTC).date() + timedelta(days=1), time(), UTC)


@dataclass(frozen=True, slots=True)
class KeyRest:
    """
    How a key rests, or did.

    Attributes:
        until: nothing starts before; None when it never had to rest.
        reason: one of ours, never the provider's words, which may quote the key.
        rests: refusals in a row.
        token: attempts with this token or an older one were claimed before the last refusal.
    """

    until: datetime | None = None
    reason: str | None = None
    rests: int = 0
    token: int = 0


@dataclass(frozen=True, slots=True)
class KeyEnds:
    """
    How attempts under one key ended in a commit.

    Attributes:
        succeeded, refused: their tokens.
        is_out_of_money: one of them met an empty account.
        retry_after: the longest wait that was asked for.
    """

    succeeded: tuple[int, ...] = ()
    refused: tuple[int, ...] = ()
    is_out_of_money: bool = False
    retry_after: timedelta | None = None


def rest(state: KeyRest, ends: KeyEnds, *, now: datetime, token: int) -> KeyRest:
    """
    The key's rest after *ends*.

    Attempts that were claimed before the last refusal say nothing new: one burst of refusals counts once.

    Args:
        now: by the database's clock.
        token: newer than every token given out so far.
    """
    if any(used > state.token for used in ends.succeeded) and not ends.refused and not ends.is_out_of_money:
        state = replace(state, rests=0)
    if ends.retry_after is not None:
        state = _until(state, now + min(ends.retry_after, LONGEST_RETRY_AFTER), ASKED_TO_WAIT, now)
    if any(used > state.token for used in ends.refused):
        rests = state.rests + 1
        length = min(FIRST_REST * 2.0 ** min(rests - 1, _MOST_DOUBLINGS), LONGEST_REST)
        state = replace(_until(state, now + length, REFUSED, now), rests=rests, token=token)
    if ends.is_out_of_money:
        state = replace(_until(state, next_day(now), OUT_OF_MONEY, now), token=token)
    return state


def _until(state: KeyRest, until: datetime, reason: str, now: datetime) -> KeyRest:
    """The longer rest counts, with its reason."""
    if state.until is not None and state.until >= max(until, now):
        return state
    return replace(state, until=until, reason=reason)
