"""The sandbox's referee: what it counts as a start above the limit in force, and what it sets apart."""

from __future__ import annotations

from typing import Any

import pytest

from jobdaemon.errors import SettingsError
from jobdaemon.sandbox.faults import Fault, Faults, parse_faults
from jobdaemon.sandbox.referee import Call, Referee

QUEUE = "generate.x"


class Clock:
    """Seconds, set by hand."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Court:
    """A referee, its clock, and calls with consecutive numbers."""

    def __init__(self, limit: int | None = None) -> None:
        self.clock = Clock()
        self.referee = Referee(self.clock)
        self._jobs = 0
        if limit is not None:
            self.referee.announce(QUEUE, limit)

    def start(self, token: int | None = 1, daemon: str = "d", **call: Any) -> Call:
        self._jobs += 1
        started = Call(QUEUE, order_id=1, images=(self._jobs,), daemon=daemon, job_id=self._jobs, token=token, **call)
        self.referee.start(started)
        return started

    def change(self, limit: int, last_token: int) -> None:
        self.referee.announce(QUEUE, limit)
        self.referee.settle(QUEUE, last_token)

    @property
    def above(self) -> int:
        return int(self.referee.report()["above_limit"])


def test_starts_up_to_the_limit_are_allowed_and_the_next_is_counted() -> None:
    """With limit 2 the third call open at once is above it; one that ended before makes room."""
    court = Court(limit=2)
    first = court.start()
    court.start()
    assert court.above == 0
    court.referee.end(first, "made")
    court.start()
    assert court.above == 0
    court.start()
    report = court.referee.report()
    assert report["above_limit"] == 1
    assert (report["starts"], report["queues"][QUEUE]["peak"], report["queues"][QUEUE]["at_limit"]) == (4, 3, 2)
    assert [told["allowed"] for told in report["violations"]] == [2]


def test_without_a_limit_nothing_is_judged() -> None:
    """A queue whose limit nobody named, or that has none, allows any number."""
    court = Court()
    for _ in range(100):
        court.start()
    assert court.above == 0


def test_a_claim_made_before_the_limit_fell_may_arrive_after() -> None:
    """Lowered from 3 to 1 while claims were on their way: one up to the settling token is judged by 3, later ones by 1."""
    court = Court(limit=3)
    court.change(1, last_token=7)
    for _ in range(3):
        court.start(token=7)
    assert court.above == 0
    court.start(token=8)
    assert court.above == 1


def test_between_announcement_and_settlement_either_limit_may_have_been_seen() -> None:
    """While a change is under way the higher of the two limits judges, whichever way it goes."""
    for old, new in ((1, 3), (3, 1)):
        court = Court(limit=old)
        court.referee.announce(QUEUE, new)
        for _ in range(3):
            court.start(token=9)
        assert court.above == 0
        court.start(token=9)
        assert court.above == 1


def test_what_runs_when_the_limit_falls_runs_out() -> None:
    """Calls that are open when the limit falls are no violation; a new one among them is."""
    court = Court(limit=4)
    running = [court.start(token=3) for _ in range(4)]
    court.change(2, last_token=3)
    assert court.above == 0
    for call in running[:3]:
        court.referee.end(call, "made")
    court.start(token=4)
    assert court.above == 0
    court.start(token=5)
    assert court.above == 1


def test_a_late_call_is_judged_by_what_later_claims_may_have_seen() -> None:
    """A claim made under 1 arrives while the limit is 3 and others run: the claims after it were allowed to."""
    court = Court(limit=1)
    court.change(3, last_token=4)
    court.start(token=5)
    court.start(token=6)
    court.start(token=4)
    assert court.above == 0


def test_without_a_token_a_limit_counts_for_a_while_after_it_is_over() -> None:
    """A call that names no token is judged by every limit of the last seconds."""
    court = Court(limit=2)
    court.change(1, last_token=7)
    court.start(token=None)
    court.start(token=None)
    assert court.above == 0
    court.clock.now += 60
    court.start(token=None)
    assert court.above == 1


def test_a_frozen_daemons_calls_count_until_its_lease_lapses() -> None:
    """A frozen daemon's open calls count while its lease holds, and not after."""
    court = Court(limit=1)
    court.start(daemon="frozen")
    court.referee.freeze("frozen", lapses_in_s=2.0)
    court.clock.now += 1.0
    court.start(daemon="other")
    assert court.above == 1
    court.clock.now += 1.5
    court.start(daemon="third")
    assert court.above == 2  # the call of "other" is open: one too many, whatever the frozen one holds
    report = court.referee.report()
    assert [len(told["open"]) for told in report["violations"]] == [2, 2]


def test_after_the_thaw_only_old_claims_stay_apart() -> None:
    """A thawed daemon's call for a claim from before the thaw is counted apart; one for a newer claim is judged."""
    court = Court(limit=1)
    court.referee.freeze("d", lapses_in_s=0.5)
    court.clock.now += 5
    court.referee.thaw("d", token=9)
    court.start(token=9)
    court.start(token=10)
    report = court.referee.report()
    assert (report["above_limit"], report["apart"]) == (0, 1)
    court.start(token=11)
    assert court.above == 1


def test_a_freeze_shorter_than_the_lease_excuses_nothing() -> None:
    """A daemon that goes on before its lease lapses is judged as if it had never stood still."""
    court = Court(limit=1)
    court.referee.freeze("d", lapses_in_s=5)
    court.clock.now += 1
    court.referee.thaw("d", token=9)
    court.start(token=9)
    court.start(token=9)
    assert court.above == 1


def test_a_caller_that_is_gone_holds_no_place() -> None:
    """A call whose connection is closed is dropped when it would make another look too many."""
    court = Court(limit=1)
    court.start(is_gone=lambda: True)
    court.start()
    report = court.referee.report()
    assert (report["above_limit"], report["queues"][QUEUE]["peak"]) == (0, 1)
    assert report["queues"][QUEUE]["outcomes"] == {"gone": 1}


def test_an_image_is_stored_twice_only_with_other_bytes() -> None:
    """The same digest again is the same image; another digest is a second one, and one image paid for twice is named."""
    referee = Court().referee
    assert referee.store(1, 1, "a")
    assert not referee.store(1, 1, "a")
    assert referee.report()["images"] == {"made_again": 0, "stored": 1, "stored_again": 1, "stored_twice": 0}
    assert not referee.store(1, 1, "b")
    assert referee.report()["stored_twice"] == 1
    for _ in range(2):
        call = Call(QUEUE, 5, (1, 2), "d", 1)
        referee.start(call)
        referee.end(call, "made")
        referee.end(call, "gone")  # said again, it changes nothing
    assert referee.report()["images"]["made_again"] == 2


def test_faults_follow_seed_job_and_try() -> None:
    """The same seed gives the same fault to the same try of a job, and about the asked share of calls."""
    faults = parse_faults("429=0.1, slow=0.2", seed=3)
    drawn = [faults.of(job, 1) for job in range(2000)]
    assert drawn == [faults.of(job, 1) for job in range(2000)]
    assert 150 < drawn.count(Fault.RATE_LIMITED) < 250
    assert 330 < drawn.count(Fault.SLOW) < 470
    assert drawn != [faults.of(job, 2) for job in range(2000)]
    assert drawn != [Faults(faults.shares, 4).of(job, 1) for job in range(2000)]
    assert parse_faults("").of(1, 1) is None


@pytest.mark.parametrize("text", ["404=0.1", "429", "429=x", "429=-0.1", "429=1.1", "429=nan", "429=0.6,500=0.6"])
def test_wrong_faults_are_refused(text: str) -> None:
    """Unknown faults, shares that are none, and too much together are one sentence."""
    with pytest.raises(SettingsError, match="faults: "):
        parse_faults(text)
