"""What follows a failed attempt."""

from __future__ import annotations

from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobdaemon.domain.job import Job
from jobdaemon.domain.outcome import End, Signal
from jobdaemon.domain.retry import (
    DIED,
    DIED_ALONE,
    MAX_DEATHS,
    STORM_DEATHS,
    RetryPolicy,
    after_death,
    after_error,
    backoff_after,
)
from jobdaemon.domain.write import OrderFailed, Write
from jobdaemon.errors import (
    BackendAwayError,
    DatabaseUnavailableError,
    DeviceMemoryError,
    KeyRefusedError,
    ProviderRefusedError,
    ProviderUnavailableError,
    PutOffError,
    RateLimitedError,
    UnsupportedImageError,
)
from tests.factories import POLICY

seconds = st.floats(0.001, 10_000).map(lambda value: timedelta(seconds=value))
policies = st.builds(RetryPolicy, st.integers(1, 100), seconds, seconds, st.floats(0, 1))
jitters = st.floats(0, 1)


def dead(reason: str) -> tuple[Write, ...]:
    """What a dead job writes, in these tests."""
    return (OrderFailed(1, reason),)


@given(policies, st.integers(1, 10_000), jitters)
def test_backoff_stays_between_its_bounds(policy: RetryPolicy, attempt: int, jitter: float) -> None:
    """No backoff is negative or longer than the cap with its jitter, however many attempts there were."""
    delay = backoff_after(attempt, policy, jitter)
    assert timedelta(0) <= delay <= policy.cap * (1 + policy.jitter) + timedelta(microseconds=1)


@given(policies, st.integers(1, 100), jitters)
def test_backoff_never_shrinks(policy: RetryPolicy, attempt: int, jitter: float) -> None:
    """With the same jitter a later attempt waits at least as long."""
    assert backoff_after(attempt + 1, policy, jitter) >= backoff_after(attempt, policy, jitter)


def test_backoff_as_the_defaults_say() -> None:
    """2, 4, 8 seconds, then the cap of 10; jitter 0.2 is ±20 %."""
    middles = [backoff_after(attempt, POLICY, 0.5).total_seconds() for attempt in (1, 2, 3, 4, 50)]
    assert middles == [2, 4, 8, 10, 10]
    assert backoff_after(1, POLICY, 0.0) == timedelta(seconds=1.6)
    assert backoff_after(1, POLICY, 1.0) == timedelta(seconds=2.4)


@pytest.mark.parametrize("error", [ProviderUnavailableError("x"), DeviceMemoryError("x"), KeyError("x"), OSError("x")])
def test_errors_are_retried_until_the_attempts_are_spent(error: Exception) -> None:
    """A retryable or unknown error retries; the last attempt makes a dead letter with the reason."""
    for finished in range(POLICY.attempts - 1):
        transition = after_error(Job(1, "q", "t", 0, attempts=finished), error, POLICY, jitter=0.5, dead=dead)
        assert (transition.end, transition.writes) == (End.RETRY, ())
        assert transition.delay == backoff_after(finished + 1, POLICY, 0.5)
    last = after_error(Job(1, "q", "t", 0, attempts=POLICY.attempts - 1), error, POLICY, jitter=0.5, dead=dead)
    assert last.end is End.FAILED
    assert last.error is not None
    assert last.writes == (OrderFailed(1, last.error),)


@pytest.mark.parametrize("error", [ProviderRefusedError("no"), UnsupportedImageError("no")])
def test_permanent_errors_are_final(error: Exception) -> None:
    """Trying again cannot help: a dead letter at the first attempt, with the error's own sentence."""
    transition = after_error(Job(1, "q", "t", 0), error, POLICY, jitter=0.5, dead=dead)
    assert (transition.end, transition.error, transition.error_kind) == (End.FAILED, "no", type(error).__name__)


@pytest.mark.parametrize("error", [RateLimitedError("busy", retry_after=timedelta(minutes=3)), DatabaseUnavailableError("away")])
def test_what_is_no_fault_of_the_job_costs_nothing(error: Exception) -> None:
    """A capacity signal, or a database that is away, snoozes even the last attempt."""
    transition = after_error(Job(1, "q", "t", 0, attempts=99), error, POLICY, jitter=0.5, dead=dead)
    assert (transition.end, transition.writes) == (End.SNOOZE, ())
    assert transition.delay == (timedelta(minutes=3) if isinstance(error, RateLimitedError) else timedelta(seconds=1))


@pytest.mark.parametrize(("after", "delay_s"), [(None, 1.0), (timedelta(0), 1.0), (timedelta(seconds=10), 10.0)])
def test_what_is_put_off_costs_nothing(after: timedelta | None, delay_s: float) -> None:
    """Even the last attempt is snoozed, for as long as asked and a little more, and nothing is said of the queue."""
    for jitter in (0.0, 1.0):
        job = Job(1, "q", "t", 0, attempts=99)
        transition = after_error(job, PutOffError("later", retry_after=after), POLICY, jitter=jitter, dead=dead)
        assert (transition.end, transition.signal, transition.writes) == (End.SNOOZE, None, ())
        assert transition.delay == timedelta(seconds=delay_s) * (1 + POLICY.jitter * jitter)


@pytest.mark.parametrize(("after", "delay_s"), [(None, 2.0), (timedelta(seconds=1), 2.0), (timedelta(seconds=30), 30.0)])
def test_a_backend_that_is_away_costs_nothing(after: timedelta | None, delay_s: float) -> None:
    """Even the last attempt is snoozed, as long as after a first one, and the queue hears of an outage."""
    error = BackendAwayError("away", retry_after=after)
    transition = after_error(Job(1, "q", "t", 0, attempts=99), error, POLICY, jitter=0.5, dead=dead)
    assert (transition.end, transition.signal, transition.writes) == (End.SNOOZE, Signal.OUTAGE, ())
    assert transition.delay == timedelta(seconds=delay_s)


@pytest.mark.parametrize(("is_out_of_money", "signal"), [(False, Signal.KEY), (True, Signal.MONEY)])
def test_a_refused_key_costs_the_job_nothing(is_out_of_money: bool, signal: Signal) -> None:
    """The key is told of, and even the last attempt is snoozed; a job without a key spends its attempts as after any error."""
    error = KeyRefusedError("no", is_out_of_money=is_out_of_money)
    transition = after_error(Job(1, "q", "t", 0, attempts=99, key_alias="a"), error, POLICY, jitter=0.0, dead=dead)
    assert (transition.end, transition.signal, transition.delay) == (End.SNOOZE, signal, timedelta(seconds=1))
    assert after_error(Job(1, "q", "t", 0), error, POLICY, jitter=0.5, dead=dead).end is End.RETRY
    last = after_error(Job(1, "q", "t", 0, attempts=99), error, POLICY, jitter=0.5, dead=dead)
    assert (last.end, last.signal) == (End.FAILED, None)


def test_a_servers_wish_is_the_least_we_wait() -> None:
    """retry_after lengthens a backoff and never shortens it."""
    for wish, expected in ((60, 60), (0.5, 2)):
        error = ProviderUnavailableError("x", retry_after=timedelta(seconds=wish))
        transition = after_error(Job(1, "q", "t", 0), error, POLICY, jitter=0.5, dead=dead)
        assert transition.delay == timedelta(seconds=expected)


def test_deaths_rest_longer_and_end_in_a_dead_letter() -> None:
    """A dead worker costs its job no attempt; rests grow and are bounded; the last death is final."""
    rests: list[timedelta] = []
    for deaths in range(MAX_DEATHS - 1):
        transition = after_death(Job(1, "q", "t", 0, attempts=2, deaths=deaths), ran_alone=True, other_deaths=0, dead=dead)
        assert (transition.end, transition.writes) == (End.INTERRUPTED, ())
        rests.append(transition.delay or timedelta(0))
    assert rests[0] == timedelta(0)
    assert rests == sorted(rests)
    assert rests[-1] <= timedelta(minutes=5)
    last = after_death(Job(1, "q", "t", 0, deaths=MAX_DEATHS - 1), ran_alone=True, other_deaths=0, dead=dead)
    assert last.end is End.FAILED
    assert last.writes == (OrderFailed(1, f"{MAX_DEATHS} workers died while this job ran"),)


@pytest.mark.parametrize(
    ("deaths", "ran_alone", "other_deaths", "is_final"),
    [
        (MAX_DEATHS - 1, True, STORM_DEATHS - 1, True),
        (MAX_DEATHS + 500, True, 0, True),
        (MAX_DEATHS - 2, True, 0, False),
        (MAX_DEATHS + 500, False, 0, False),
        (MAX_DEATHS + 500, True, STORM_DEATHS, False),
    ],
)
def test_only_a_death_that_proves_something_is_final(deaths: int, ran_alone: bool, other_deaths: int, is_final: bool) -> None:
    """However many workers died: in company, or where workers die anyway, a job only rests, at most five minutes."""
    transition = after_death(Job(1, "q", "t", 0, deaths=deaths), ran_alone=ran_alone, other_deaths=other_deaths, dead=dead)
    assert (transition.end is End.FAILED) == is_final
    assert transition.error_kind == (DIED_ALONE if ran_alone else DIED)
    assert is_final or (transition.delay is not None and transition.delay <= timedelta(minutes=5))
