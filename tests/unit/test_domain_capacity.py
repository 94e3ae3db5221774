"""How many may run: the adaptive limit, rests and circuits as pure decisions, alone and against a simulated provider."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobdaemon.domain.capacity import (
    CALM,
    LONGEST_REST,
    LONGEST_RETRY_AFTER,
    OUTAGE_WINDOW,
    STALE,
    Circuit,
    CircuitRules,
    Ends,
    QueueState,
    Scene,
    capacity,
    is_calm,
    steer,
)

NOW = datetime(2026, 1, 1, tzinfo=UTC)
RULES = CircuitRules()

tokens = st.integers(1, 100)
moments = st.none() | st.integers(-7200, 7200).map(lambda s: NOW + timedelta(seconds=s))
states = st.builds(
    QueueState,
    limit=st.none() | st.integers(1, 200),
    limit_token=st.integers(0, 100),
    limit_changed_at=moments,
    successes=st.integers(0, 300),
    step=st.integers(0, 64),
    signalled_at=moments,
    rests=st.integers(0, 100_000),
    rested_until=moments,
    circuit=st.sampled_from(Circuit),
    circuit_until=moments,
    circuit_token=st.integers(0, 100),
    opened=st.integers(0, 100_000),
    outages=st.integers(0, 10),
    outage_at=moments,
)
token_lists = st.lists(tokens, max_size=20).map(tuple)
ends = st.builds(
    Ends,
    succeeded=token_lists,
    refused=token_lists,
    outages=token_lists,
    others=st.integers(0, 40),
    retry_after=st.none() | st.integers(0, 10**6).map(lambda s: timedelta(seconds=s)),
)
scenes = st.builds(
    Scene,
    now=st.just(NOW),
    running=st.integers(0, 300),
    most=st.integers(1, 200),
    token=st.just(101),
    rules=st.builds(CircuitRules, after=st.integers(0, 10)),
)


def scene(running: int = 0, most: int = 100, at: datetime = NOW, token: int = 101) -> Scene:
    """A queue at a moment."""
    return Scene(now=at, running=running, most=most, token=token)


def may_start(state: QueueState, now: datetime = NOW, running: int = 0, probes: int = 0, asked: int = 1000) -> int:
    """Capacity without other limits."""
    return capacity(state, asked, running=running, probes=probes, cluster_limit=None, paused=False, now=now)


@given(states, ends, scenes)
def test_a_limit_never_locks_a_queue_and_only_refusals_lower_it(state: QueueState, end: Ends, at: Scene) -> None:
    """The limit stays 1 or more, sinks only by a refusal, never grows by one, and never grows past what could run."""
    after = steer(state, end, at)
    assert after.limit is None or after.limit >= 1
    if end.refused:
        assert after.limit is not None
        assert state.limit is None or after.limit <= state.limit
    elif state.limit is None:
        assert after.limit is None
    elif after.limit is not None:
        assert after.limit == state.limit or state.limit < after.limit <= at.most


@given(states, ends, scenes)
def test_every_rest_ends(state: QueueState, end: Ends, at: Scene) -> None:
    """What a decision adds to a rest is bounded: by our own cap, or by the cap on what a server may ask for."""
    after = steer(state, end, at)
    if after.rested_until is not None and after.rested_until != state.rested_until:
        assert after.rested_until - at.now <= max(LONGEST_REST, LONGEST_RETRY_AFTER)
    if after.circuit_until is not None and after.circuit_until != state.circuit_until:
        assert after.circuit_until - at.now <= at.rules.rest_cap


@given(states, st.integers(0, 1000), st.integers(0, 50), st.integers(0, 50), st.none() | st.integers(0, 100), st.booleans())
def test_capacity_stays_within_every_limit(
    state: QueueState, asked: int, running: int, probes: int, cluster_limit: int | None, paused: bool
) -> None:
    """Never negative, never more than asked, and with what runs never above any limit; one probe at a time."""
    got = capacity(state, asked, running=running, probes=probes, cluster_limit=cluster_limit, paused=paused, now=NOW)
    assert 0 <= got <= asked
    for limit in (cluster_limit, state.limit):
        assert got == 0 or limit is None or got + running <= limit
    if state.circuit is not Circuit.CLOSED:
        assert got == 0 or got + probes == 1


def test_one_burst_counts_once() -> None:
    """Ten calls started, two were let in: their eight refusals, one after another, end at two."""
    state = QueueState()
    for left in range(9, 1, -1):
        state = steer(state, Ends(refused=(50,)), scene(running=left))
    assert state.limit == 2
    assert state.rested_until is None


def test_a_refused_step_up_costs_that_step_and_no_more() -> None:
    """A provider that bears 20 and refuses the 21st leaves the limit at 20, and many successes go by before the next try."""
    state = QueueState(limit=21, limit_token=50, limit_changed_at=NOW, step=1)
    state = steer(state, Ends(refused=(51,)), scene(running=20))
    assert (state.limit, state.step) == (20, 0)
    state = steer(state, Ends(succeeded=(102,) * 29, others=1), scene(running=19, token=150))
    assert state.limit == 20
    state = steer(state, Ends(succeeded=(102,), others=1), scene(running=19, token=150))
    assert (state.limit, state.step) == (21, 1)


def test_what_is_left_from_better_times_does_not_hold_the_limit_up() -> None:
    """Refused again before anything succeeded, the limit shrinks by its share, whatever still runs."""
    state = QueueState(limit=100, limit_token=50, limit_changed_at=NOW)
    assert steer(state, Ends(refused=(51,)), scene(running=99)).limit == 70
    assert steer(replace(state, successes=1), Ends(refused=(51,)), scene(running=99)).limit == 99


def test_a_refusal_of_an_older_claim_is_no_news() -> None:
    """Attempts claimed under an earlier limit change nothing while more than the limit were let in."""
    state = QueueState(limit=7, limit_token=50, limit_changed_at=NOW)
    after = steer(state, Ends(refused=(50, 49)), scene(running=8))
    assert (after.limit, after.limit_token) == (7, 50)


def test_successes_of_an_older_claim_prove_nothing() -> None:
    """Only attempts that were claimed under this limit let it grow."""
    state = QueueState(limit=2, limit_token=50, limit_changed_at=NOW)
    assert steer(state, Ends(succeeded=(50,) * 100, others=2), scene(running=2)).successes == 0


def test_a_limit_that_binds_nobody_does_not_grow() -> None:
    """A queue that uses less than half of its limit learns nothing about more."""
    state = QueueState(limit=10, limit_token=1, limit_changed_at=NOW, successes=1000)
    assert steer(state, Ends(succeeded=(2,), others=1), scene(running=3)).limit == 10
    assert steer(state, Ends(succeeded=(2,), others=1), scene(running=4)).limit == 11


def test_a_limit_that_is_not_needed_is_forgotten() -> None:
    """At what all daemons could run for a while, or without a signal for long, there is no limit any more."""
    state = QueueState(limit=10, limit_token=1, limit_changed_at=NOW, signalled_at=NOW)
    quiet = Ends(succeeded=(2,), others=1)
    assert steer(state, quiet, scene(9, most=10, at=NOW + CALM / 2)).limit == 10
    assert steer(state, quiet, scene(9, most=10, at=NOW + CALM)).limit is None
    assert steer(state, quiet, scene(1, most=99, at=NOW + CALM)).limit == 10
    forgotten = steer(state, quiet, scene(1, most=99, at=NOW + STALE))
    assert forgotten.limit is None
    assert is_calm(forgotten, NOW + STALE)


def test_a_queue_that_is_refused_alone_rests_longer_each_time() -> None:
    """With nothing else running a refusal makes the queue rest: half a second, doubling to ten; one success ends that."""
    state, at, rests = QueueState(), NOW, []
    for token in range(110, 210, 10):
        state = steer(state, Ends(refused=(token - 1,)), scene(at=at, token=token))
        assert state.rested_until is not None
        rests.append((state.rested_until - at).total_seconds())
        assert may_start(state, at) == 0
        at = state.rested_until
        assert may_start(state, at) == 1
    assert rests == [0.5, 1, 2, 4, 8, 10, 10, 10, 10, 10]
    state = steer(state, Ends(succeeded=(300,), others=1), scene(at=at, token=301))
    state = steer(state, Ends(refused=(302,)), scene(at=at, token=303))
    assert state.rested_until == at + timedelta(seconds=0.5)


def test_a_servers_wish_holds_for_the_whole_queue() -> None:
    """Retry-After rests the queue, however much runs; a shorter wish that comes later does not shorten it."""
    state = steer(QueueState(), Ends(refused=(1,), retry_after=timedelta(seconds=7)), scene(running=5))
    state = steer(state, Ends(refused=(1,), retry_after=timedelta(seconds=2)), scene(running=4))
    assert state.rested_until == NOW + timedelta(seconds=7)
    assert may_start(state, NOW + timedelta(seconds=6.9)) == 0
    assert may_start(state, NOW + timedelta(seconds=7)) == 4


def test_outages_in_a_row_open_the_circuit() -> None:
    """The fifth outage in a row opens it; a success between them, or too long a time, begins the count again."""
    state = steer(QueueState(), Ends(outages=(1, 1, 1, 1)), scene())
    assert state.circuit is Circuit.CLOSED
    assert steer(state, Ends(outages=(1,)), scene()).circuit is Circuit.OPEN
    assert steer(state, Ends(outages=(1,)), scene(at=NOW + OUTAGE_WINDOW * 2)).circuit is Circuit.CLOSED
    assert steer(steer(state, Ends(succeeded=(1,)), scene()), Ends(outages=(1,)), scene()).circuit is Circuit.CLOSED
    off = replace(scene(), rules=replace(RULES, after=0))
    assert steer(state, Ends(outages=(1,) * 100), off).circuit is Circuit.CLOSED


def test_an_open_circuit_probes_and_rests_longer_each_time() -> None:
    """Nothing while it is open, then one job; each failed probe doubles the rest up to the cap; a success closes it."""
    state, at, rests = steer(QueueState(), Ends(outages=(1,) * 5), scene()), NOW, []
    for token in range(102, 108):
        assert state.circuit is Circuit.OPEN
        assert state.circuit_until is not None
        rests.append((state.circuit_until - at).total_seconds())
        assert may_start(state, state.circuit_until - timedelta(seconds=0.1)) == 0
        at = state.circuit_until
        assert may_start(state, at, running=3) == 1
        assert may_start(state, at, running=4, probes=1) == 0
        # What had been claimed before it opened says nothing.
        assert steer(state, Ends(succeeded=(1,), outages=(2,)), scene(at=at)).circuit is Circuit.OPEN
        state = steer(replace(state, circuit=Circuit.PROBING), Ends(outages=(token,)), scene(at=at, token=token))
    assert rests == [5, 10, 20, 40, 60, 60]
    for answer in (Ends(succeeded=(200,), others=1), Ends(refused=(200,))):
        assert steer(replace(state, circuit=Circuit.PROBING), answer, scene(at=at, token=201)).circuit is Circuit.CLOSED


def test_a_circuit_that_opens_again_at_once_goes_on_where_it_was() -> None:
    """A provider that comes and goes does not get the first short rest each time; after a calm minute it does."""
    closed = QueueState(opened=3, circuit_until=NOW)
    for waited, rest_s in ((OUTAGE_WINDOW / 2, 40), (OUTAGE_WINDOW * 2, 5)):
        state = steer(closed, Ends(outages=(1,) * 5), scene(at=NOW + waited))
        assert state.circuit_until == NOW + waited + timedelta(seconds=rest_s)


def _simulate(bears: Callable[[float], int], call_s: float, until_s: float, slots: int) -> list[tuple[float, bool]]:
    """(when, whether it was let in) of every call to a provider that bears so many at a time, with jobs always waiting."""
    state, token, clock, open_calls, running = QueueState(), 1, 0.0, 0, 0
    calls: list[tuple[float, bool]] = []
    pending: list[tuple[float, int, bool]] = []
    while clock < until_s:
        now = NOW + timedelta(seconds=clock)
        free = min(may_start(state, now, running=running), slots - running)
        token += 1
        for place in range(free):
            is_in = open_calls < bears(clock)
            calls.append((clock, is_in))
            open_calls += is_in
            running += 1
            # Calls differ a little, as real ones do.
            heapq.heappush(pending, (clock + (call_s * (0.9 + 0.02 * ((token + place) % 10)) if is_in else 0.02), token, is_in))
        if not pending:
            assert state.rested_until is not None
            clock = (state.rested_until - NOW).total_seconds()
            continue
        clock, ended, was_in = heapq.heappop(pending)
        running -= 1
        open_calls -= was_in
        token += 1
        end = Ends(succeeded=(ended,), others=1) if was_in else Ends(refused=(ended,))
        state = steer(state, end, scene(running, slots, NOW + timedelta(seconds=clock), token))
    return calls


@pytest.mark.parametrize("call_s", [0.1, 0.3, 1.0])
def test_a_provider_that_shrinks_and_grows_is_followed(call_s: float) -> None:
    """From 10 to 2 and back: under 5 % refused after 10 s, 95 % of the possible within 30 s, and no storm in between."""
    calls = _simulate(lambda at: 2 if 20 <= at < 120 else 10, call_s, 200, slots=64)
    low = [is_in for at, is_in in calls if 30 <= at < 120]
    assert low.count(False) / len(low) < 0.05
    assert low.count(True) * call_s / 90 > 0.9 * 2
    assert [is_in for at, is_in in calls if 20 <= at < 30].count(False) < 20
    high = [is_in for at, is_in in calls if 150 <= at < 200]
    assert high.count(True) * call_s / 50 >= 0.95 * 10
    assert high.count(False) / len(high) < 0.05


def test_a_provider_that_refuses_everything_is_left_alone() -> None:
    """An account that answers 429 for ever gets a call each ten seconds in the end, however many jobs wait."""
    calls = _simulate(lambda _: 0, 1.0, 120, slots=10)
    assert len([at for at, _ in calls if at >= 20]) <= 11
