"""The protocol of lease, limit, fence and rescue, explored state by state; and what the explorer makes of mistakes in it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from tests.model.explorer import Exploration, Step, explore
from tests.model.protocol import AS_BUILT, BEFORE, NEVER, Rules, World
from tests.model.state import (
    ABOVE_LIMIT,
    LOST,
    NO_LIMIT,
    STORED_TWICE,
    TAKEN,
    TWICE,
    UNFENCED,
    Mishaps,
    State,
    without_names,
)

PAGE = (Path(__file__).parents[2] / "docs" / "model.md").read_text(encoding="utf-8")

#: What the engine as it is built has to stand: each mishap at every moment, alone and with its likely company.
WORLDS = {
    "a freeze, a lost answer": World(mishaps=Mishaps(freezes=1, lost_answers=1)),
    "a freeze, an outage": World(mishaps=Mishaps(freezes=1, outages=1)),
    "a freeze, a changed limit": World(limits=(1, 2), mishaps=Mishaps(freezes=1, limit_changes=1)),
    "a freeze, a cancelled order": World(mishaps=Mishaps(freezes=1, cancels=1)),
    "a freeze, a claim held up": World(mishaps=Mishaps(freezes=1, held_claims=1)),
    "an outage, a claim held up": World(mishaps=Mishaps(outages=1, held_claims=1)),
    "a freeze, a leap of the clock": World(mishaps=Mishaps(freezes=1, leaps=1)),
    "a crash, a leap of the clock": World(mishaps=Mishaps(crashes=1, leaps=1)),
    "a freeze, a crash": World(mishaps=Mishaps(freezes=1, crashes=1)),
    "a freeze, three daemons": World(daemons=3, mishaps=Mishaps(freezes=1)),
    "a daemon cut off, a lost answer": World(mishaps=Mishaps(cuts=1, lost_answers=1)),
    "a crash, a restart, a lost answer, an operator": World(mishaps=Mishaps(crashes=1, restarts=1, lost_answers=1, operators=1)),
    "a crash, a restart, an outage": World(mishaps=Mishaps(crashes=1, restarts=1, outages=1)),
    "limits, three daemons, three jobs": World(3, 3, limits=(1, 2, NO_LIMIT), mishaps=Mishaps(limit_changes=2)),
    "limits, three jobs, a hand-back, a cancelled order": World(
        jobs=3, limits=(1, 2), mishaps=Mishaps(limit_changes=2, hand_backs=1, cancels=1)
    ),
    "slots left early, a freeze": World(mishaps=Mishaps(freezes=1), leaves=True),
    "slots left early, a crash, a leap of the clock": World(mishaps=Mishaps(crashes=1, leaps=1), leaves=True),
    "slots left early, an outage, a claim held up": World(mishaps=Mishaps(outages=1, held_claims=1), leaves=True),
    "slots left early, limits, three jobs, a hand-back, a cancelled order": World(
        jobs=3, limits=(1, 2), mishaps=Mishaps(limit_changes=2, hand_backs=1, cancels=1), leaves=True
    ),
}
#: The same with more at once; minutes, not seconds.
LARGE_WORLDS = {
    "two freezes": World(mishaps=Mishaps(freezes=2)),
    "a freeze, a daemon cut off": World(mishaps=Mishaps(freezes=1, cuts=1)),
    "a freeze, a changed limit, a lost answer": World(limits=(1, 2), mishaps=Mishaps(freezes=1, limit_changes=1, lost_answers=1)),
    "a freeze, a crash, a restart, a lost answer": World(mishaps=Mishaps(freezes=1, crashes=1, restarts=1, lost_answers=1)),
    "a freeze, an outage, a claim held up": World(mishaps=Mishaps(freezes=1, outages=1, held_claims=1)),
    "a freeze, an outage, a leap of the clock": World(mishaps=Mishaps(freezes=1, outages=1, leaps=1)),
    "a freeze, a lost answer, three jobs": World(jobs=3, mishaps=Mishaps(freezes=1, lost_answers=1)),
    "slots left early, a freeze, a lost answer": World(mishaps=Mishaps(freezes=1, lost_answers=1), leaves=True),
    "slots left early, a freeze, an outage": World(mishaps=Mishaps(freezes=1, outages=1), leaves=True),
    "slots left early, a freeze, a cancelled order": World(mishaps=Mishaps(freezes=1, cancels=1), leaves=True),
    "slots left early, a daemon cut off, a lost answer": World(mishaps=Mishaps(cuts=1, lost_answers=1), leaves=True),
    "slots left early, a crash, a restart, a lost answer, an operator": World(
        mishaps=Mishaps(crashes=1, restarts=1, lost_answers=1, operators=1), leaves=True
    ),
    "slots left early, limits, three daemons, three jobs": World(
        3, 3, limits=(1, 2, NO_LIMIT), mishaps=Mishaps(limit_changes=2), leaves=True
    ),
}
FREEZE, OUTAGE, LOST_ANSWER, LEAP = Mishaps(freezes=1), Mishaps(outages=1), Mishaps(lost_answers=1), Mishaps(leaps=1)

#: Mistakes: how somebody could have built it, and the promise that each breaks.
MISTAKES = {
    "unfenced": (Rules(is_fenced=False), FREEZE, UNFENCED),
    "count_then_claim": (Rules(counts_under_lock=False), Mishaps(), ABOVE_LIMIT),
    "first_limit": (Rules(shares_lock=False), Mishaps(limit_changes=1), ABOVE_LIMIT),
    "slot_free_early": (Rules(frees_early=True), Mishaps(), ABOVE_LIMIT),
    "slot_free_for_ever": (Rules(mark_is_the_claims=False), FREEZE, ABOVE_LIMIT),
    "release_by_timer": (Rules(releases_by_timer=True), Mishaps(), ABOVE_LIMIT),
    "rescue_after_outage": (Rules(asks_for_steadiness=NEVER), OUTAGE, TAKEN),
    "look_held_up": (Rules(asks_for_steadiness=BEFORE), OUTAGE, TAKEN),
    "rescue_after_leap": (Rules(asks_for_steadiness=NEVER), LEAP, TAKEN),
    "rescue_held_up": (Rules(asks_again=False), FREEZE, TAKEN),
    "claim_before_beat": (Rules(asks_for_lease=NEVER), FREEZE, TAKEN),
    "claim_held_up": (Rules(asks_for_lease=BEFORE), Mishaps(freezes=1, held_claims=1), TAKEN),
    "late_answer": (Rules(disowns_strays=False), LOST_ANSWER, ABOVE_LIMIT),
    "lease_in_second_table": (Rules(counts_jobs=False), Mishaps(crashes=1, operators=1), LOST),
    "daemon_as_token": (Rules(has_own_token=False), FREEZE, UNFENCED),
    "fence_without_status": (Rules(fences_by_status=False), LOST_ANSWER, TWICE),
    "unguarded_rows": (Rules(guards_rows=False), LOST_ANSWER, STORED_TWICE),
}


def world_of(name: str, rules: Rules = AS_BUILT) -> World:
    """Where this mistake shows."""
    world = World(mishaps=MISTAKES[name][1], rules=rules, leaves=name.startswith("slot_free"))
    return replace(world, jobs=3, limits=(NO_LIMIT, 1)) if name == "first_limit" else world


#: What the engine takes for granted, and the promise that breaks where it is not so.
ASSUMPTIONS = {
    "outages_are_noticed": (Rules(outages_are_noticed=False), Mishaps(freezes=1, outages=1), TAKEN),
}


def explored(world: World, *, promise: str | None = None) -> Exploration:
    """All that can happen there, without regard to names; or the shortest story, with names, of how *promise* is broken."""
    watched, reduce = (None, without_names) if promise is None else ([promise], None)
    return explore(world.first(), world.steps, is_end=world.is_end, stuck=LOST, watched=watched, reduce=reduce)


def told_counts(name: str) -> tuple[int, int]:
    """States and steps of a world, as the page tells them."""
    row = re.search(rf"^\| {re.escape(name)} \| ([\d,]+) \| ([\d,]+) \|$", PAGE, re.MULTILINE)
    assert row is not None, f"docs/model.md has no row for: {name}"
    return int(row[1].replace(",", "")), int(row[2].replace(",", ""))


@pytest.mark.parametrize("name", WORLDS)
def test_the_engine_as_it_is_built_breaks_no_promise(name: str) -> None:
    """Whatever happens in whatever order, no promise is broken, and the states are as many as docs/model.md says."""
    found = explored(WORLDS[name])
    assert found.broken is None, f"\n{found}"
    assert (found.states, found.steps) == told_counts(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE_WORLDS)
def test_nor_where_more_happens_at_once(name: str) -> None:
    """The same for larger worlds."""
    found = explored(LARGE_WORLDS[name])
    assert found.broken is None, f"\n{found}"
    assert (found.states, found.steps) == told_counts(name)


@pytest.mark.parametrize("name", MISTAKES)
def test_each_mistake_is_found(name: str) -> None:
    """Every known way to build it wrong breaks the promise that it endangers, in a story that docs/model.md can tell."""
    rules, _, promise = MISTAKES[name]
    found = explored(world_of(name, rules), promise=promise)
    print(f"{name}:\n{found}")  # noqa: T201 - shown with -rP, and when this fails
    assert found.broken == promise
    assert re.search(rf"^\| `{name}` \|.*\| {len(found.story)} \|$", PAGE, re.MULTILINE), "docs/model.md tells another length"


def test_the_story_on_the_page_is_the_story() -> None:
    """docs/model.md shows one counterexample as it is printed."""
    rules, mishaps, promise = MISTAKES["count_then_claim"]
    found = explored(World(mishaps=mishaps, rules=rules), promise=promise)
    assert [line.strip() for line in str(found).splitlines()] == [
        line.strip() for line in PAGE.split("For instance `count_then_claim`:")[1].split("##")[0].strip().splitlines()
    ]


@pytest.mark.parametrize("name", ["rescue_after_outage", "look_held_up", "claim_before_beat", "claim_held_up"])
def test_what_is_taken_from_the_living_ends_above_the_limit(name: str) -> None:
    """A job taken from a daemon that lives runs twice: one call more than the limit allows."""
    rules, mishaps, _ = MISTAKES[name]
    found = explored(World(jobs=1, mishaps=mishaps, rules=rules), promise=ABOVE_LIMIT)
    assert found.broken == ABOVE_LIMIT


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_found_because_of_the_mistake(name: str) -> None:
    """The same world without the mistake keeps the promise: the mishaps alone break nothing."""
    assert explored(world_of(name)).broken is None


@pytest.mark.parametrize("name", ASSUMPTIONS)
def test_what_the_engine_takes_for_granted_matters(name: str) -> None:
    """Where an assumption does not hold a promise breaks: docs/model.md names them all."""
    rules, mishaps, promise = ASSUMPTIONS[name]
    found = explored(World(mishaps=mishaps, rules=rules), promise=promise)
    print(f"without {name}:\n{found}")  # noqa: T201 - shown with -rP, and when this fails
    assert found.broken == promise
    assert f"`{name}`" in PAGE


def test_the_promises_are_really_tried() -> None:
    """The limit binds, jobs are rescued, orders cancelled and commits sent again: an idle model would keep every promise."""
    world = World(limits=(1, 2), mishaps=Mishaps(crashes=1, lost_answers=1, cancels=1), leaves=True)
    labels: set[str] = set()

    def steps(state: State) -> list[Step[State]]:
        following = list(world.steps(state))
        labels.update(re.sub(r"\d", "N", step.label) for step in following)
        return following

    assert explore(world.first(), steps, is_end=world.is_end, stuck=LOST, reduce=without_names).broken is None
    assert {
        "dN claims: N run, N may start",
        "dN gets job N but never hears of it",
        "dN gets job N, the answer takes long",
        "dN finds that it does not run job N",
        "dN finds job N lost",
        "dN, job N: its slot is free",
        "dN, job N: interrupted is accepted",
        "dN, job N: interrupted is lease lost",
        "dN, job N: interrupted is order ended",
        "dN, job N: checkpoint is accepted, the answer is lost",
        "dN, job N: checkpoint is order ended",
        "dN, job N: its image is there already",
        "dN, job N: handed_back is accepted",
    } <= labels


# The explorer itself


def counter(state: int) -> list[Step[int]]:
    """Up to 5 by ones or twos; 4 breaks a promise; from 3 one may also fall into a hole."""
    ways = [Step(f"+{add}", state + add, "no four" if state + add == 4 else None) for add in (1, 2) if 0 <= state <= 5 - add]
    return [*ways, Step("fall", -1)] if state == 3 else ways


def test_the_shortest_story_is_told() -> None:
    """What breaks a promise is found on the shortest way to it."""
    found = explore(0, counter, is_end=lambda state: state == 5, stuck="no way out")
    assert (found.broken, found.story) == ("no four", ("+2", "+2"))
    assert str(found) == "  1. +2\n  2. +2\n     broken: no four"


def test_a_state_without_a_way_out_is_found() -> None:
    """Every state is asked for a way to an end, not the first alone."""
    found = explore(0, counter, is_end=lambda state: state == 5, stuck="no way out", watched=["no way out"])
    assert (found.broken, found.story) == ("no way out", ("+1", "+2", "fall"))
    assert explore(0, counter, is_end=lambda state: state in (5, -1), stuck="", watched=[""]).states == 7


def test_states_that_differ_by_name_only_are_one() -> None:
    """With a reduction the states are counted once for all their names."""
    whole = explore(0, counter, is_end=lambda state: True, stuck="", watched=())
    halved = explore(0, counter, is_end=lambda state: True, stuck="", watched=(), reduce=lambda state: max(state, 0))
    assert (whole.states, halved.states) == (7, 6)
