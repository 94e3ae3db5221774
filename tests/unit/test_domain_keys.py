"""Which key a job starts under, and how keys rest."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobdaemon.domain.keys import (
    FIRST_REST,
    LONGEST_REST,
    LONGEST_RETRY_AFTER,
    MAX_PASSED_BY,
    KeyedJob,
    KeyEnds,
    KeyRest,
    KeyState,
    deal,
    next_day,
    rest,
)

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
TODAY = NOW.date()
HOUR = timedelta(hours=1)


def jobs(count: int, images: int = 1) -> list[KeyedJob]:
    return [KeyedJob(number, images) for number in range(1, count + 1)]


def dealt(ready: list[KeyedJob], *keys: KeyState, slots: int = 10, now: datetime = NOW, **running: int) -> list[tuple[int, str]]:
    return list(deal(ready, keys, running=running, slots=slots, now=now).started)


def test_jobs_go_to_the_key_with_most_free_starts() -> None:
    """Each start goes where most are free, of equals to the first alias, until every key is full."""
    a, b = KeyState("a", concurrency=2), KeyState("b", concurrency=4)
    assert dealt(jobs(9), b, a, b=1) == [(1, "b"), (2, "a"), (3, "b"), (4, "a"), (5, "b")]


def test_keys_without_a_limit_share() -> None:
    """Of keys without a concurrency the one that runs least is next."""
    assert dealt(jobs(3), KeyState("a"), KeyState("b"), a=1) == [(1, "b"), (2, "a"), (3, "b")]


def test_a_rate_spaces_starts() -> None:
    """A key with a rate starts one job, and the next one a whole interval later."""
    key = KeyState("a", rate=4)
    first = deal(jobs(3), [key], running={}, slots=3, now=NOW)
    assert first.started == ((1, "a"),)
    assert first.opens_at == NOW + timedelta(seconds=0.25)
    assert deal(jobs(3), first.keys, running={}, slots=3, now=NOW + timedelta(seconds=0.249)).started == ()
    assert len(deal(jobs(3), first.keys, running={}, slots=3, now=NOW + timedelta(seconds=0.25)).started) == 1


def test_a_budget_counts_images_and_ends_at_midnight() -> None:
    """Jobs start while all their images fit the day's budget; the next day begins anew."""
    key = KeyState("a", daily_budget=10, spent=4, spent_on=TODAY)
    today = deal(jobs(3, images=3), [key], running={}, slots=3, now=NOW)
    assert [job for job, _ in today.started] == [1, 2]
    assert today.opens_at == datetime(2026, 3, 2, tzinfo=UTC)
    tomorrow = deal(jobs(9, images=3), today.keys, running={}, slots=9, now=NOW + timedelta(days=1))
    assert len(tomorrow.started) == 3
    assert tomorrow.keys[0].spent == 9


def test_what_does_not_fit_a_budget_is_passed_by() -> None:
    """A call too large for what is left goes to another key, or lets smaller ones pass, but only so many times."""
    key = KeyState("a", daily_budget=4)
    assert dealt([KeyedJob(1, 5), KeyedJob(2, 4)], key) == [(2, "a")]
    assert dealt([KeyedJob(1, 5), KeyedJob(2, 4)], key, KeyState("b", concurrency=1)) == [(1, "b"), (2, "a")]
    assert dealt([*jobs(MAX_PASSED_BY, images=5), KeyedJob(99, 4)], key) == []


@pytest.mark.parametrize(
    "key",
    [
        KeyState("a", is_paused=True),
        KeyState("a", rested_until=NOW + HOUR),
        KeyState("a", concurrency=0),
        KeyState("a", concurrency=2),
        KeyState("a", daily_budget=0),
        KeyState("a", daily_budget=5, spent=9, spent_on=TODAY),
        KeyState("a", rate=1, next_start_at=NOW + HOUR),
    ],
)
def test_a_key_that_may_not_start_does_not(key: KeyState) -> None:
    """Paused, resting, full, spent or before its time: the other key takes the work, and alone it starts none."""
    assert dealt(jobs(1), key, a=2) == []
    assert dealt(jobs(1), key, KeyState("b"), a=2) == [(1, "b")]


def test_a_bought_task_goes_on_under_its_key() -> None:
    """It costs no rate and no budget and minds no pause; it waits, and lets others pass, while its key is full or rests."""
    bought = [KeyedJob(1, 5, "a"), KeyedJob(2, 5)]
    for key in (KeyState("a", daily_budget=0), KeyState("a", is_paused=True), KeyState("a", rate=1, next_start_at=NOW + HOUR)):
        assert dealt(bought, key) == [(1, "a")]
        assert dealt(bought, key, KeyState("b")) == [(1, "a"), (2, "b")]
    for key in (KeyState("a", concurrency=1), KeyState("a", rested_until=NOW + HOUR)):
        assert dealt(bought, key, KeyState("b"), a=1) == [(2, "b")]
    assert dealt(bought, KeyState("b")) == [(1, "b"), (2, "b")]


def test_when_to_look_again() -> None:
    """The earliest moment at which the clock alone opens a key; none for a pause, a full key, a budget of 0, or no job left."""

    def opens(*keys: KeyState, ready: int = 2, slots: int = 10, **running: int) -> datetime | None:
        return deal(jobs(ready), keys, running=running, slots=slots, now=NOW).opens_at

    resting = KeyState("a", rested_until=NOW + HOUR)
    assert opens(resting) == NOW + HOUR
    assert opens(resting, KeyState("b", rate=1, next_start_at=NOW + HOUR / 2)) == NOW + HOUR / 2
    assert opens(KeyState("a", rested_until=NOW + HOUR, rate=1, next_start_at=NOW + 2 * HOUR)) == NOW + 2 * HOUR
    assert opens(KeyState("a", daily_budget=0)) is None
    assert opens(KeyState("a", is_paused=True, rested_until=NOW + HOUR)) is None
    assert opens(KeyState("a", concurrency=1, rested_until=NOW + HOUR), a=1) is None
    assert opens(KeyState("a", rate=1), slots=1) is None
    assert opens(KeyState("a", rate=1), ready=1) is None


def test_the_next_day_is_utc() -> None:
    """Midnight is that of UTC, whatever the zone of the moment."""
    assert next_day(datetime.fromisoformat("2026-03-01T23:30:00-05:00")) == datetime(2026, 3, 3, tzinfo=UTC)
    assert date(2026, 3, 3) == next_day(datetime.fromisoformat("2026-03-02T00:00:00+00:00")).date()


def test_refusals_rest_longer_each_time() -> None:
    """A minute, doubled for each refusal in a row, an hour at most; a success since begins anew."""
    state, lengths = KeyRest(), []
    for token in range(1, 12):
        now = NOW + token * 2 * LONGEST_REST
        state = rest(state, KeyEnds(refused=(token,)), now=now, token=token)
        assert state.until is not None
        lengths.append(state.until - now)
    assert lengths[:4] == [FIRST_REST, 2 * FIRST_REST, 4 * FIRST_REST, 8 * FIRST_REST]
    assert lengths == sorted(lengths)
    assert lengths[-1] == LONGEST_REST
    assert rest(state, KeyEnds(succeeded=(99,)), now=NOW, token=100).rests == 0


def test_one_burst_of_refusals_counts_once() -> None:
    """Attempts that were claimed before the last refusal say nothing new, refused or not."""
    state = rest(KeyRest(), KeyEnds(refused=(1, 2)), now=NOW, token=5)
    assert (state.rests, state.token) == (1, 5)
    assert rest(state, KeyEnds(refused=(3,)), now=NOW + FIRST_REST / 2, token=6) == state
    assert rest(state, KeyEnds(succeeded=(4,)), now=NOW + FIRST_REST / 2, token=6) == state


def test_an_empty_account_rests_until_the_next_day() -> None:
    """Out of money is a rest until midnight, UTC, which a shorter one does not shorten."""
    state = rest(KeyRest(), KeyEnds(is_out_of_money=True), now=NOW, token=5)
    assert state.until == datetime(2026, 3, 2, tzinfo=UTC)
    asked = rest(state, KeyEnds(retry_after=timedelta(seconds=5)), now=NOW, token=6)
    assert (asked.until, asked.reason) == (state.until, state.reason)


def test_a_wished_wait_is_obeyed_up_to_an_hour() -> None:
    """Retry-After rests the key and is no refusal."""
    state = rest(KeyRest(), KeyEnds(retry_after=timedelta(seconds=5)), now=NOW, token=5)
    assert (state.until, state.rests) == (NOW + timedelta(seconds=5), 0)
    assert rest(KeyRest(), KeyEnds(retry_after=timedelta(days=9)), now=NOW, token=5).until == NOW + LONGEST_RETRY_AFTER


moments = st.none() | st.sampled_from([-3600, -1, 1, 3600]).map(lambda s: NOW + timedelta(seconds=s))
states = st.builds(
    KeyState,
    alias=st.sampled_from("abcd"),
    concurrency=st.none() | st.integers(0, 4),
    rate=st.none() | st.sampled_from([0.001, 1.0, 50.0]),
    daily_budget=st.none() | st.integers(0, 12),
    is_paused=st.booleans(),
    rested_until=moments,
    next_start_at=moments,
    spent=st.integers(0, 12),
    spent_on=st.sampled_from([None, TODAY, TODAY - timedelta(days=1)]),
)


@given(
    st.lists(states, max_size=4, unique_by=lambda key: key.alias),
    st.lists(st.tuples(st.integers(0, 5), st.none() | st.sampled_from("abcde")), max_size=12),
    st.dictionaries(st.sampled_from("abcd"), st.integers(0, 4)),
    st.integers(0, 8),
)
def test_no_limit_is_ever_passed(
    keys: list[KeyState], ready: list[tuple[int, str | None]], running: dict[str, int], slots: int
) -> None:
    """Whatever the keys and the queue: concurrency, budget and rate hold, and nothing starts under a key that may not."""
    waiting = [KeyedJob(number, images, alias) for number, (images, alias) in enumerate(ready)]
    result = deal(waiting, keys, running=running, slots=slots, now=NOW)
    assert len(result.started) <= slots
    for key in keys:
        mine = [waiting[job] for job, alias in result.started if alias == key.alias]
        bought = [job for job in mine if job.bought_with != key.alias]
        assert not mine or key.concurrency is None or running.get(key.alias, 0) + len(mine) <= key.concurrency
        assert not mine or key.rested_until is None or key.rested_until <= NOW
        if bought:
            spent = key.spent if key.spent_on == TODAY else 0
            assert key.daily_budget is None or spent + sum(job.images for job in bought) <= key.daily_budget
            assert key.rate is None or len(bought) == 1
            assert not key.is_paused
