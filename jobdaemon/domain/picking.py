"""
Which of a queue's ready jobs start next. The claim decides this in SQL (``pick_jobs``, ``pick_shared_jobs``); tests hold it equal
to :func:`pick`, and the capacity simulator runs on this page.

Four rules, each giving way to the one before it:

- **Idle slots**: a prewarm starts only when every other ready job of its queue starts too.
- **Fair share**: nobody gets a slot above the share while somebody within the share waits. What is left goes round, to the
  customer who runs least. Work of no customer is always within the share.
- **Lifting**: lifted work goes first, but while work of the highest plan waits too, only after three of that have started.
- **Claim order**: highest priority, then oldest order (work for no order last), then oldest job.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta

from jobdaemon.domain.job import PREWARM_PRIORITY

#: The priority of every lifted job: above whatever settings allow, and one for all, so that lifted work goes by age alone.
LIFTED_PRIORITY = 10_000_000
#: Of so many starts one may be lifted work while work of the highest plan waits.
LIFTED_ONE_IN = 4


@dataclass(frozen=True, slots=True)
class ReadyJob:
    """
    A job that may start.

    Attributes:
        priority: higher goes first.
        order_id: its order, whose age it has; None goes after all orders.
        customer: '' is nobody in particular and never capped.
        lock: of the jobs with one lock only the first in claim order may start.
    """

    id: int
    priority: int
    order_id: int | None = None
    customer: str = ""
    lock: str | None = None

    @property
    def is_lifted(self) -> bool:
        """Whether it waited longer than its plan's ``lift_after``."""
        return self.priority >= LIFTED_PRIORITY

    @property
    def is_wanted(self) -> bool:
        """Whether somebody waits for it: it is no prewarm."""
        return self.priority > PREWARM_PRIORITY

    def claim_order(self) -> tuple[int, bool, int, int]:
        """Sorts jobs as they are claimed."""
        return (-self.priority, self.order_id is None, self.order_id or 0, self.id)


@dataclass(frozen=True, slots=True)
class Picked:
    """
    What starts.

    Attributes:
        ids: in the order in which slots were given.
        passed: see :func:`pick`; for the next call.
    """

    ids: tuple[int, ...]
    passed: int


def pick(
    ready: Iterable[ReadyJob],
    slots: int,
    *,
    running: Mapping[str, int],
    fair_share: int | None,
    top: int,
    passed: int,
) -> Picked:
    """
    Give free slots of one queue to its ready jobs, one after another.

    Args:
        ready: those whose lock is not held by a running job.
        slots: how many may start, 0 or more.
        running: how many jobs of the queue each customer runs.
        fair_share: most jobs of one customer while others wait, 1 or more; None: no matter.
        top: the highest plan's priority in this queue's stage (:func:`jobdaemon.domain.plan.top_priority`); work of at least
            this is what lifted work has to share with.
        passed: how often such work went first while lifted work waited, since lifted work last started.
    """
    ready = list(ready)
    waiting = _first_of_each_lock(job for job in ready if job.is_wanted)
    held = Counter(running)
    picked: list[int] = []
    while waiting and len(picked) < slots:
        job = _next(_allowed(waiting, held, fair_share), top, passed)
        if job.is_lifted:
            passed = 0
        elif any(other.is_lifted for other in _allowed(waiting, held, fair_share)):
            passed += 1
        picked.append(job.id)
        held[job.customer] += 1
        waiting.remove(job)
    if len(picked) == sum(job.is_wanted for job in ready):
        idle = sorted((job for job in ready if not job.is_wanted), key=ReadyJob.claim_order)
        picked += [job.id for job in idle][: slots - len(picked)]
    return Picked(tuple(picked), passed)


def _first_of_each_lock(ready: Iterable[ReadyJob]) -> list[ReadyJob]:
    first: dict[object, ReadyJob] = {}
    for job in sorted(ready, key=ReadyJob.claim_order):
        first.setdefault(job.id if job.lock is None else job.lock, job)
    return list(first.values())


def _allowed(waiting: list[ReadyJob], held: Mapping[str, int], fair_share: int | None) -> list[ReadyJob]:
    """Those of *waiting*, never none, that the fair share lets go next."""
    if fair_share is None:
        return waiting
    within = [job for job in waiting if not job.customer or held[job.customer] < fair_share]
    least = min(held[job.customer] for job in waiting)
    return within or [job for job in waiting if held[job.customer] == least]


def _next(allowed: list[ReadyJob], top: int, passed: int) -> ReadyJob:
    """*allowed* is in claim order and not empty."""
    first = allowed[0]
    if not first.is_lifted or passed >= LIFTED_ONE_IN - 1:
        return first
    other = next((job for job in allowed if not job.is_lifted), first)
    return other if other.priority >= top else first


def longest_wait(lift_after: timedelta, *, notice: timedelta, ahead: int, starts_per_s: float) -> timedelta:
    """
    How long a job may wait in one queue, however much work of higher plans keeps coming, if its customer's share allows it.

    Args:
        lift_after: its plan's; zero when its order was lifted in an earlier stage.
        notice: at most this long after that, upkeep looks (``engine.poll``).
        ahead: jobs of older orders that are lifted by then and still wait.
        starts_per_s: how many jobs of the queue start per second, all plans together.
    """
    return lift_after + notice + timedelta(seconds=LIFTED_ONE_IN * (ahead + 1) / starts_per_s)
