"""Which jobs are picked: strict order, fair share, and lifted work that shares with the highest plan."""

from __future__ import annotations

from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobdaemon.domain.job import PREWARM_PRIORITY
from jobdaemon.domain.picking import LIFTED_ONE_IN, LIFTED_PRIORITY, ReadyJob, longest_wait, pick

TOP = 300
LIFTED = LIFTED_PRIORITY

JOBS = st.lists(
    st.builds(
        ReadyJob,
        id=st.just(0),
        priority=st.sampled_from([LIFTED, TOP, 200, 100]),
        order_id=st.none() | st.integers(1, 9),
        customer=st.sampled_from(["", "a", "b", "c"]),
    ),
    max_size=30,
).map(lambda jobs: [ReadyJob(n, job.priority, job.order_id, job.customer) for n, job in enumerate(jobs)])


def chosen(
    ready: list[ReadyJob], slots: int, *, fair_share: int | None = None, passed: int = 0, **running: int
) -> tuple[int, ...]:
    return pick(ready, slots, running=running, fair_share=fair_share, top=TOP, passed=passed).ids


def test_claim_order() -> None:
    """Highest priority, then oldest order, work for no order last, then oldest job."""
    jobs = [ReadyJob(1, 100), ReadyJob(2, 100, 9), ReadyJob(3, 100, 3), ReadyJob(4, 200, 20), ReadyJob(5, 100, 3)]
    assert chosen(jobs, 9) == (4, 3, 5, 2, 1)


def test_one_job_per_lock() -> None:
    """Of the jobs with one lock only the first in claim order starts."""
    assert chosen([ReadyJob(1, 1, lock="x"), ReadyJob(2, 2, lock="x"), ReadyJob(3, 0)], 9) == (2, 3)


def test_share_counts_what_runs() -> None:
    """A customer who runs the share already waits for the others; one who runs less gets the rest of it."""
    jobs = [ReadyJob(1, 0, 1, "a"), ReadyJob(2, 0, 2, "b"), ReadyJob(3, 0, 3, "b"), ReadyJob(4, 0, 4)]
    assert chosen(jobs, 2, fair_share=2, a=2, b=1) == (2, 4)


def test_surplus_goes_to_who_runs_least() -> None:
    """When only capped customers wait, slots go round to who runs least, whoever came first."""
    jobs = [ReadyJob(n, 0, n, "a") for n in range(1, 9)] + [ReadyJob(n, 0, n, "b") for n in range(11, 19)]
    assert chosen(jobs, 4, fair_share=1, a=3, b=1) == (11, 12, 1, 13)


def test_prewarms_get_what_nobody_else_wants() -> None:
    """Prewarms start, the oldest first, only beside all other ready jobs: capped ones and those behind a lock too."""
    prewarms = [ReadyJob(1, PREWARM_PRIORITY), ReadyJob(2, PREWARM_PRIORITY)]
    assert chosen(prewarms, 1) == (1,)
    capped = [ReadyJob(n, -1_000_000, n, "a") for n in (3, 4)]
    assert chosen(prewarms + capped, 2, fair_share=1, a=1) == (3, 4)
    assert chosen(prewarms + capped, 3, fair_share=1, a=1) == (3, 4, 1)
    assert chosen([*prewarms, ReadyJob(3, 1, lock="x"), ReadyJob(4, 2, lock="x")], 9) == (4,)


@given(jobs=JOBS, fair_share=st.integers(1, 3), slots=st.integers(0, 12), a=st.integers(0, 4))
def test_no_slot_is_left_free_and_none_goes_over_the_share(jobs: list[ReadyJob], fair_share: int, slots: int, a: int) -> None:
    """Every slot is used while a job is ready, and nobody goes above the share while somebody within it waits."""
    picked = chosen(jobs, slots, fair_share=fair_share, a=a)
    assert len(picked) == min(slots, len(jobs))
    by_id = {job.id: job for job in jobs}
    held = {"a": a}
    waiting = dict(by_id)
    for job_id in picked:
        job = waiting.pop(job_id)
        if job.customer and held.get(job.customer, 0) >= fair_share:
            assert all(other.customer and held.get(other.customer, 0) >= fair_share for other in waiting.values())
        held[job.customer] = held.get(job.customer, 0) + 1


@given(free=st.integers(0, 20), lifted=st.integers(0, 20), passed=st.integers(0, 3))
def test_lifted_work_gets_one_start_in_four_while_free_waits(free: int, lifted: int, passed: int) -> None:
    """While both wait, no four starts in a row have more than one lifted job, and none but at most three come without."""
    jobs = [ReadyJob(n, TOP, n) for n in range(1, free + 1)] + [ReadyJob(100 + n, LIFTED, n) for n in range(lifted)]
    order = chosen(jobs, 40, passed=passed)
    both = len(order)
    while both and len({job_id >= 100 for job_id in order[both - 1 :]}) == 1:
        both -= 1  # the end, where only one of them waits
    starts = [job_id >= 100 for job_id in order[:both]]
    for at in range(len(starts) - LIFTED_ONE_IN + 1):
        assert sum(starts[at : at + LIFTED_ONE_IN]) == 1


def test_lifted_work_goes_before_lower_plans() -> None:
    """With no work of the highest plan waiting, lifted work takes what is free, and the count starts anew."""
    jobs = [ReadyJob(1, 200, 1), ReadyJob(2, LIFTED, 5), ReadyJob(3, LIFTED, 4)]
    assert pick(jobs, 2, running={}, fair_share=None, top=TOP, passed=2).ids == (3, 2)
    assert pick(jobs, 2, running={}, fair_share=None, top=TOP, passed=2).passed == 0


@pytest.mark.parametrize("lift_after", [10, 60])
@pytest.mark.parametrize("ahead", [0, 1, 7])
def test_pro_waits_no_longer_than_its_bound(lift_after: int, ahead: int) -> None:
    """Under a stream of Free that alone is more than the queue drains, Pro starts within the bound derived from the settings."""
    arrived = {n: n for n in range(-ahead, 1)}  # second by order; the last is ours
    ready = [ReadyJob(n, 100, n) for n in arrived]
    poll, passed, now = 5, 0, 0
    bound = longest_wait(timedelta(seconds=lift_after), notice=timedelta(seconds=poll), ahead=ahead, starts_per_s=1)
    while any(job.id == 0 for job in ready):
        now += 1
        ready += [ReadyJob(10 * now + n, TOP, 10 * now + n) for n in range(2)]
        if now % poll == 0:
            ready = [ReadyJob(job.id, LIFTED, job.order_id) if job.id <= 0 and now >= lift_after else job for job in ready]
        picked = pick(ready, 1, running={}, fair_share=None, top=TOP, passed=passed)
        passed = picked.passed
        ready = [job for job in ready if job.id not in picked.ids]
        assert timedelta(seconds=now) <= bound
    assert now > lift_after
