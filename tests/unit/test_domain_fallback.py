"""Who makes the images when an order's provider does not."""

from __future__ import annotations

from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobdaemon.domain.fallback import FallbackRules, Move, Settle, Trouble, may_help, stranded
from jobdaemon.domain.job import Job, Task
from jobdaemon.domain.outcome import End, Signal
from jobdaemon.domain.retry import after_error
from jobdaemon.domain.write import CallEnded, ImageFailed, Write
from jobdaemon.errors import (
    DeviceMemoryError,
    KeyRefusedError,
    ProviderRefusedError,
    ProviderUnavailableError,
    SourceUnavailableError,
    StoreUnavailableError,
    UnsupportedFeatureError,
)
from tests.factories import POLICY

RULES = FallbackRules(
    chains={"a": ("b", "c"), "b": ("a",)},
    plans={"Free": ("c",), "Pro": ()},
    images_per_call=lambda name: {"b": 4}.get(name, 1),
)
LAST = Job(9, "generate.a", Task.GENERATE, 0, {"order_id": 1, "images": [1, 2]}, attempts=POLICY.attempts - 1)
ELSEWHERE = Move("b", 4, (CallEnded(1, 9, "cancelled"),))


def _dead(reason: str) -> tuple[Write, ...]:
    return (ImageFailed(1, 1, reason, was="pending"),)


@pytest.mark.parametrize(
    ("plan", "ordered", "current", "expected"),
    [
        ("Start", "a", "a", "b"),
        ("Start", "a", "b", "c"),
        ("Start", "a", "c", None),
        ("Start", "b", "b", "a"),
        ("Start", "b", "a", None),
        ("Start", "c", "c", None),
        ("Start", "a", "gone", "b"),
        ("Free", "a", "a", "c"),
        ("Free", "c", "c", None),
        ("Pro", "a", "a", None),
    ],
)
def test_the_next_provider(plan: str, ordered: str, current: str, expected: str | None) -> None:
    """A chain is the order's provider's, or its plan's instead, and is walked forwards; a list is not followed further."""
    assert RULES.next_provider(plan, ordered, current) == expected


def test_a_provider_in_trouble_is_passed_over() -> None:
    """Where one ahead takes nothing, the one after it does; where none does, nobody."""
    assert RULES.next_provider("Start", "a", "a", avoid={"b"}) == "c"
    assert RULES.next_provider("Start", "a", "a", avoid={"b", "c"}) is None


def test_a_move_is_cut_to_the_next_providers_calls() -> None:
    """The move carries how many images one call of the next provider makes."""
    assert RULES.move("Start", "a", "a") == Move("b", 4)
    assert RULES.move("Start", "a", "c") is None


@given(
    chains=st.dictionaries(st.sampled_from("abcd"), st.lists(st.sampled_from("abcd"), unique=True)),
    ordered=st.sampled_from("abcd"),
    avoid=st.sets(st.sampled_from("abcd")),
)
def test_nobody_is_asked_twice(chains: dict[str, list[str]], ordered: str, avoid: set[str]) -> None:
    """Whatever the chains, the walk from an order's provider ends, and no provider comes twice."""
    rules = FallbackRules(chains=chains)
    walk = [ordered]
    while (following := rules.next_provider("Start", ordered, walk[-1], avoid=avoid)) is not None:
        walk.append(following)
        assert len(set(walk)) == len(walk)
        assert following not in avoid


@pytest.mark.parametrize(
    ("error", "helps"),
    [
        (ProviderUnavailableError("away"), True),
        (KeyRefusedError("no money", is_out_of_money=True), True),
        (DeviceMemoryError("full"), True),
        (KeyError("a bug of the provider's"), True),
        (ProviderRefusedError("unsafe"), False),
        (UnsupportedFeatureError("no"), False),
        (StoreUnavailableError("ours"), False),
        (SourceUnavailableError("the customer's"), False),
    ],
)
def test_what_another_provider_may_do_better(error: Exception, helps: bool) -> None:
    """Outages, keys and faults of a provider; not what it refuses for good, nor what is nobody's but ours or the customer's."""
    assert may_help(error) is helps
    transition = after_error(LAST, error, POLICY, jitter=0.5, dead=_dead, instead=lambda: ELSEWHERE)
    assert (transition.end is End.MOVED) is helps


def test_a_batch_out_of_attempts_moves() -> None:
    """Instead of failing its images: with what the move writes, the reason told, and the outage still counted."""
    transition = after_error(LAST, ProviderUnavailableError("away"), POLICY, jitter=0.5, dead=_dead, instead=lambda: ELSEWHERE)
    assert (transition.end, transition.move, transition.writes) == (End.MOVED, ELSEWHERE, ELSEWHERE.writes)
    assert (transition.error, transition.signal) == ("moved from a to b: away", Signal.OUTAGE)


def test_a_batch_that_has_bought_something_asks_on() -> None:
    """It is retried beyond its attempts, more and more rarely, and never given up."""
    rests = []
    for attempts in (POLICY.attempts - 1, POLICY.attempts + 1, POLICY.attempts + 50):
        job = Job(9, "generate.a", Task.GENERATE, 0, {}, attempts=attempts)
        error = ProviderUnavailableError("away")
        transition = after_error(job, error, POLICY, jitter=0.5, dead=_dead, instead=Settle)
        assert (transition.end, transition.writes) == (End.RETRY, ())
        rests.append(transition.delay)
    assert rests == [timedelta(seconds=8), timedelta(seconds=32), timedelta(minutes=1)]


def test_nobody_left_fails_the_images() -> None:
    """At the end of the chain the images fail with the last provider's reason; before the last attempt nobody is asked."""
    transition = after_error(LAST, ProviderUnavailableError("away"), POLICY, jitter=0.5, dead=_dead)
    assert (transition.end, transition.writes) == (End.FAILED, _dead("away"))
    first = Job(9, "generate.a", Task.GENERATE, 0, {})
    assert after_error(first, KeyError(), POLICY, jitter=0.5, dead=_dead, instead=lambda: ELSEWHERE).end is End.RETRY


def test_a_best_effort_is_given_up_quietly() -> None:
    """A call that cannot be stopped leaves no dead letter."""
    job = Job(9, "generate.a", Task.ABANDON, 0, {"order_id": 1, "call_id": 7}, attempts=POLICY.attempts - 1)
    transition = after_error(job, ProviderUnavailableError("away"), POLICY, jitter=0.5, dead=_dead)
    assert (transition.end, transition.writes) == (End.SUCCEEDED, _dead("away"))


def test_troubles_decide_who_gives_and_who_takes() -> None:
    """What waits for a provider that was in trouble for too long goes, and nobody in trouble takes anything over."""
    troubles = [Trouble("a", True, "x"), Trouble("b", False, "y"), Trouble("a", False, "z")]
    assert stranded(troubles) == ({"a": "x"}, {"a", "b"})
