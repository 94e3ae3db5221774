"""
The referee: what of a queue's calls was open when, and whether a call started that the limit in force did not allow.

A limit is a row that changes while claims are under way, so "the limit at that moment" is a set. Whoever changes the row tells
the referee twice: before the change (*announce*: from now on a claim may see this limit) and once every claim that could have
seen an older one has committed (*settle*: a claim with a token above this one saw it). Tokens are handed out inside the claim,
under the queue's lock, so they order a queue's claims. A call is then judged by the highest limit that any claim from its own on
may have seen: the last claim before this moment counted what ran against one of those, and every open call is a running job.
Nothing more is excused.

Calls of a daemon that was frozen beyond its lease are counted apart: its jobs are another's by then, and no database can close
its sockets. They are apart from the moment its lease lapses, and so are calls it starts after the thaw for claims made before it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

#: A call that names no token is judged by every limit in force within this long: longer than any honest way from claim to call.
_GRACE_S = 5.0
#: Violations that are kept with all their circumstances.
_MAX_TOLD = 50


@dataclass(eq=False, slots=True)
class Call:
    """
    One call, from its start to its end.

    Attributes:
        token: of the claim that led to it; None where the caller knows none.
        is_gone: whether the caller's connection is closed by now, asked of the kernel: a killed caller's end may still wait in
            the socket while another's start is judged.
        began: by the referee's clock, seconds.
        was_apart: whether it was open while its daemon was frozen beyond its lease, or goes back to a claim of before.
    """

    queue: str
    order_id: int
    images: tuple[int, ...]
    daemon: str
    job_id: int
    token: int | None = None
    is_gone: Callable[[], bool] = lambda: False
    began: float = 0.0
    was_apart: bool = False


@dataclass(slots=True)
class _Limit:
    """One value of a queue's limit; None is no limit. Claims above *last_token* did not see it any more."""

    value: int | None
    last_token: int | None = None
    over_at: float | None = None


@dataclass(slots=True)
class _Freeze:
    """What is known of one daemon's freezes."""

    lapses_at: float | None = None
    last_token: int = -1
    thawed_at: float = float("-inf")


@dataclass(slots=True)
class _Tally:
    """Counts of one queue."""

    open: set[Call] = field(default_factory=set)
    limits: list[_Limit] = field(default_factory=list)
    starts: int = 0
    rejected: int = 0
    peak: int = 0
    at_limit: int = 0
    above_limit: int = 0
    apart: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)


class Referee:
    """Counts and judges; see the module docstring. One thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._queues: dict[str, _Tally] = {}
        self._freezes: dict[str, _Freeze] = {}
        self._made: Counter[tuple[int, int]] = Counter()
        self._stored: dict[tuple[int, int], set[str]] = {}
        self._stored_again = 0
        self._told: list[dict[str, Any]] = []

    # What it is told of limits and daemons

    def announce(self, queue: str, limit: int | None) -> None:
        """From now on a claim may see this limit; those before stay possible until :meth:`settle`."""
        self._tally(queue).limits.append(_Limit(limit))

    def settle(self, queue: str, token: int) -> None:
        """Every claim with a higher token saw the limit announced last: those before are over."""
        now = self._clock()
        limits = self._tally(queue).limits
        for limit in limits[:-1]:
            if limit.last_token is None:
                limit.last_token, limit.over_at = token, now
        # What no open or coming call can refer to: kept for a while, since a claim may take long to become a call.
        limits[:-1] = [limit for limit in limits[:-1] if limit.over_at is None or now - limit.over_at < 600]

    def freeze(self, daemon: str, lapses_in_s: float) -> None:
        """This daemon stands still, and will for longer than its lease, which lapses in so many seconds."""
        self._freezes.setdefault(daemon, _Freeze()).lapses_at = self._clock() + lapses_in_s

    def thaw(self, daemon: str, token: int) -> None:
        """It goes on; what it claimed up to this token stays apart, if its lease did lapse."""
        freeze, now = self._freezes.setdefault(daemon, _Freeze()), self._clock()
        if freeze.lapses_at is not None and now >= freeze.lapses_at:
            freeze.last_token, freeze.thawed_at = token, now
        freeze.lapses_at = None

    # Calls

    def open_calls(self, queue: str) -> int:
        """How many calls of the queue are open now."""
        return len(self._tally(queue).open)

    def start(self, call: Call) -> None:
        """A call begins: count it, and judge whether it should have."""
        tally = self._tally(call.queue)
        call.began = self._clock()
        tally.starts += 1
        tally.open.add(call)
        allowed = self._allowed(tally, call)
        if len(tally.open) > min(tally.peak, allowed):
            self._drop_gone(tally, call)
        tally.peak = max(tally.peak, len(tally.open))
        under_lease = [other for other in tally.open if not self._set_apart(tally, other)]
        if call not in under_lease:
            return
        if len(under_lease) > allowed:
            tally.above_limit += 1
            self._tell(call, under_lease, allowed)
        elif len(under_lease) == allowed:
            tally.at_limit += 1

    def reject(self, queue: str) -> None:
        """A call was refused before it began."""
        self._tally(queue).rejected += 1

    def end(self, call: Call, outcome: str) -> None:
        """A call is over (``made``, ``500``, ``reset``, ``gone``); must be said before its caller can know it."""
        tally = self._tally(call.queue)
        if call not in tally.open:
            return
        self._set_apart(tally, call)
        tally.open.remove(call)
        tally.outcomes[outcome] += 1
        if outcome == "made":
            self._made.update((call.order_id, image) for image in call.images)

    def store(self, order_id: int, image: int, digest: str) -> bool:
        """An image is kept for good; the same bytes again are no second image. Returns whether they are the first."""
        digests = self._stored.setdefault((order_id, image), set())
        if digest in digests:
            self._stored_again += 1
            return False
        digests.add(digest)
        return len(digests) == 1

    # The judgement

    def _tally(self, queue: str) -> _Tally:
        return self._queues.setdefault(queue, _Tally())

    def _allowed(self, tally: _Tally, call: Call) -> float:
        """The highest limit that a claim from this call's on may have seen; infinite where no limit was ever named."""
        since = self._clock() - _GRACE_S
        possible = [limit.value for limit in tally.limits if _may_have_been_seen(limit, call.token, since)]
        if not possible:
            return float("inf")
        return max(float("inf") if value is None else value for value in possible)

    def _set_apart(self, tally: _Tally, call: Call) -> bool:
        """Whether the call is judged by nobody now; counted once."""
        if not self._is_apart(call):
            return False
        tally.apart += not call.was_apart
        call.was_apart = True
        return True

    def _is_apart(self, call: Call) -> bool:
        freeze = self._freezes.get(call.daemon)
        if freeze is None:
            return False
        if freeze.lapses_at is not None and self._clock() >= freeze.lapses_at:
            return True
        return call.began < freeze.thawed_at if call.token is None else call.token <= freeze.last_token

    def _drop_gone(self, tally: _Tally, but: Call) -> None:
        for call in [call for call in tally.open if call is not but and call.is_gone()]:
            self.end(call, "gone")

    def _tell(self, call: Call, under_lease: Iterable[Call], allowed: float) -> None:
        if len(self._told) < _MAX_TOLD:
            now = self._clock()
            calls = [
                {"daemon": other.daemon, "job_id": other.job_id, "token": other.token, "open_s": round(now - other.began, 3)}
                for other in sorted(under_lease, key=lambda other: other.began)
            ]
            limits = [[limit.value, limit.last_token] for limit in self._tally(call.queue).limits[-4:]]
            told = {"queue": call.queue, "job_id": call.job_id, "token": call.token, "allowed": allowed}
            self._told.append(told | {"open": calls, "limits": limits})

    # The report

    def report(self) -> dict[str, Any]:
        """
        All counts so far.

        Returns:
            ``queues`` by name: ``starts``, ``open``, ``peak`` (most open at once, gone callers left out), ``at_limit`` (starts
            that filled the limit), ``above_limit``, ``apart`` (calls of a daemon frozen beyond its lease, judged by nobody),
            ``rejected`` (429, no start), ``outcomes`` and ``limit``. ``images``: ``made_again`` (paid for more than once: a
            daemon died between the answer and its commit), ``stored``, ``stored_again`` (the same bytes, harmless) and
            ``stored_twice`` (different bytes for one image). ``violations``: the first of them with their circumstances. Of all
            queues: ``starts``, ``above_limit``, ``apart`` and ``stored_twice``.
        """
        images = {
            "made_again": sum(times - 1 for times in self._made.values()),
            "stored": len(self._stored),
            "stored_again": self._stored_again,
            "stored_twice": sum(len(digests) > 1 for digests in self._stored.values()),
        }
        return {
            "starts": sum(tally.starts for tally in self._queues.values()),
            "above_limit": sum(tally.above_limit for tally in self._queues.values()),
            "apart": sum(tally.apart for tally in self._queues.values()),
            "stored_twice": images["stored_twice"],
            "queues": {name: _told(tally) for name, tally in sorted(self._queues.items())},
            "images": images,
            "violations": self._told,
        }


def _may_have_been_seen(limit: _Limit, token: int | None, since: float) -> bool:
    if limit.last_token is None or limit.over_at is None:
        return True
    return limit.over_at >= since if token is None else limit.last_token >= token


def _told(tally: _Tally) -> dict[str, Any]:
    return {
        "starts": tally.starts,
        "open": len(tally.open),
        "peak": tally.peak,
        "at_limit": tally.at_limit,
        "above_limit": tally.above_limit,
        "apart": tally.apart,
        "rejected": tally.rejected,
        "outcomes": dict(tally.outcomes),
        "limit": tally.limits[-1].value if tally.limits else None,
    }
