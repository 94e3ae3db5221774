"""The abandon stage."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime

import pytest

from jobdaemon.domain.job import Job, Task
from jobdaemon.domain.outcome import Done
from jobdaemon.domain.write import CallEnded
from jobdaemon.errors import (
    InvalidOrderError,
    KeyRefusedError,
    ProviderUnavailableError,
    RateLimitedError,
    RetryableError,
    UnsupportedFeatureError,
)
from jobdaemon.ports import ProviderCall
from jobdaemon.stages import abandon
from jobdaemon.stages.abandon import AbandonStage
from tests.fakes import FakeAttempt, FakeOrders, FakeProvider

CALL = ProviderCall(7, "t1", (1, 2), "spare", datetime(2026, 1, 1, tzinfo=UTC))
JOB = Job(9, "generate.fake", Task.ABANDON, 0, {"order_id": 1, "call_id": 7})
CLOSED = Done(writes=(CallEnded(1, 9, "cancelled", 7),))


@dataclass(slots=True)
class Stopping(FakeProvider):
    """A provider that answers each cancel with the next of *answers*."""

    answers: Iterator[bool | Exception] = field(default_factory=lambda: iter([True]))

    async def cancel(self, call: ProviderCall) -> bool:
        self.cancelled.append(call)
        answer = next(self.answers)
        if isinstance(answer, Exception):
            raise answer
        return answer


async def _run(provider: FakeProvider, orders: FakeOrders | None = None, job: Job = JOB) -> Done:
    orders = orders or FakeOrders(call=CALL)
    return await AbandonStage(orders=orders, providers={"fake": provider}).run(FakeAttempt(job, orders))


async def test_a_call_is_stopped_and_closed() -> None:
    """The provider is asked once, under the key the call was made with, and the row is closed."""
    provider = Stopping()
    assert await _run(provider) == CLOSED
    assert provider.cancelled == [CALL]


async def test_a_call_that_is_not_there_is_looked_for_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    An id chosen here may be noted before its task is there; whatever the second look says, the row is closed: as paid for where
    nobody could stop it.
    """
    monkeypatch.setattr(abandon, "_SECOND_LOOK_S", 0.0)
    for second in (True, False):
        provider = Stopping(answers=iter([False, second]))
        closed = CallEnded(1, 9, "cancelled", 7, made=None if second else 2)
        assert await _run(provider) == Done(writes=(closed,))
        assert len(provider.cancelled) == 2


async def test_a_call_that_ended_is_left_alone() -> None:
    """Nobody is asked about a call whose end is known."""
    provider = Stopping()
    assert await _run(provider, FakeOrders()) == Done()
    assert provider.cancelled == []


async def test_a_limit_spends_an_attempt() -> None:
    """A provider that answers 429, or refuses the key, is not asked for ever."""
    for error in (RateLimitedError("busy"), KeyRefusedError("no")):
        with pytest.raises(RetryableError) as caught:
            await _run(Stopping(answers=iter([error])))
        assert type(caught.value) is RetryableError
    with pytest.raises(ProviderUnavailableError):
        await _run(Stopping(answers=iter([ProviderUnavailableError("away")])))


@pytest.mark.parametrize(
    ("job", "error"),
    [
        (Job(9, "generate.other", Task.ABANDON, 0, {"order_id": 1, "call_id": 7}), UnsupportedFeatureError),
        (Job(9, "generate.fake", Task.ABANDON, 0, {"order_id": 1}), InvalidOrderError),
        (Job(9, "generate.fake", Task.ABANDON, 0, {"call_id": 7}), InvalidOrderError),
    ],
)
async def test_what_cannot_be_is_permanent(job: Job, error: type[Exception]) -> None:
    """No such provider, no order or no call ends it."""
    with pytest.raises(error):
        await _run(Stopping(), job=job)
