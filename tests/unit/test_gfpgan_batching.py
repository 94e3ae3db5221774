"""Which faces go to the device next, decided without a device and without a clock."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import numpy as np
import pytest

from jobdaemon.backends.gfpgan.batching import Crop, Waiting
from jobdaemon.backends.gfpgan.frames import SLOTS

PIXELS = np.zeros((1, 1, 3), np.uint8)  # the decision does not look at them


@pytest.fixture(autouse=True)
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    """Futures want one."""
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


@pytest.fixture
def waiting() -> Waiting:
    return Waiting(batch=3, max_wait_s=0.5)


def crops(loop: asyncio.AbstractEventLoop, count: int, at: float = 0.0) -> list[Crop]:
    return [Crop(PIXELS, loop.create_future(), at) for _ in range(count)]


def test_a_full_batch_goes_at_once(waiting: Waiting, loop: asyncio.AbstractEventLoop) -> None:
    """And the next full one beside it, until every slot is taken."""
    waiting.add(crops(loop, 3 * SLOTS + 1))
    assert [len(waiting.next_batch(0)) for _ in range(SLOTS + 1)] == [3] * SLOTS + [0]
    waiting.ended()
    assert waiting.next_batch(9) == []  # one waits for company while the device is busy


def test_a_lonely_face_waits_for_company(waiting: Waiting, loop: asyncio.AbstractEventLoop) -> None:
    """No longer than the limit while the device has nothing to do."""
    one = crops(loop, 1, at=10.0)
    waiting.add(one)
    assert waiting.next_batch(10.4) == []
    assert waiting.due_in(10.4) == pytest.approx(0.1)
    assert waiting.next_batch(10.5) == one


def test_a_face_nobody_wants_never_goes(waiting: Waiting, loop: asyncio.AbstractEventLoop) -> None:
    """What was cancelled makes room in the batch for others."""
    given = crops(loop, 4)
    waiting.add(given)
    given[0].restored.cancel()
    assert waiting.next_batch(0) == given[1:]


def test_suspects_go_alone(waiting: Waiting, loop: asyncio.AbstractEventLoop) -> None:
    """Nothing is on the device beside them, neither before nor after they were sent."""
    first, second = crops(loop, 3), crops(loop, 3)
    waiting.add([*first, *second])
    assert [waiting.next_batch(0), waiting.next_batch(0)] == [first, second]
    assert waiting.died(first) == []
    waiting.ended()
    assert waiting.next_batch(0) == []  # the other batch is still there
    assert waiting.died(second) == []
    waiting.ended()
    for crop in [*first, *second]:
        assert waiting.next_batch(9) == [crop]
        waiting.add(crops(loop, 3))
        assert waiting.next_batch(9) == []
        waiting.ended()
        assert len(waiting.next_batch(9)) == 3
        assert waiting.next_batch(9) == []
        waiting.ended()


def test_suspects_hold_nobody_up(waiting: Waiting, loop: asyncio.AbstractEventLoop) -> None:
    """They take turns with whoever came since, so that each process does something for those before the next may die."""
    evil = crops(loop, 3)
    waiting.add(evil)
    done, lives = 0, 0
    while evil:
        waiting.add(crops(loop, 3, at=lives))
        batch = waiting.next_batch(lives)
        if batch[0] in evil:
            guilty = waiting.died(batch)
            evil = [crop for crop in evil if crop not in guilty]
            lives += 1
        else:
            done += len(batch)
        waiting.ended()
    assert lives == 1 + 2 * 3  # once together, twice each alone
    assert done >= 3 * (lives - 2)


def test_who_kills_twice_alone_is_guilty(waiting: Waiting, loop: asyncio.AbstractEventLoop) -> None:
    """A death in company proves nothing, and one alone may have been something else's doing."""
    evil, innocent = crops(loop, 2)
    waiting.add([evil, innocent])
    batch = waiting.next_batch(1)
    assert waiting.died(batch) == []
    waiting.ended()
    guilty: list[Crop] = []
    while not guilty:
        batch = waiting.next_batch(1)
        guilty = waiting.died(batch) if batch == [evil] else []
        waiting.ended()
    assert (guilty, evil.deaths_alone, innocent.deaths_alone) == ([evil], 2, 0)
    assert waiting.take_all() == []


@pytest.mark.parametrize("leaves", ["turned away", "cancelled"])
def test_a_suspect_that_comes_back_is_known(waiting: Waiting, loop: asyncio.AbstractEventLoop, leaves: str) -> None:
    """What it did before counts, whoever holds its pixels now; one that came through is an innocent again."""
    evil, innocent = (Crop(np.full((1, 1, 3), value, np.uint8), loop.create_future(), 0) for value in (1, 2))
    waiting.add([evil, innocent])
    for _ in range(2):  # both, then the first alone
        assert waiting.died(waiting.next_batch(1)) == []
        waiting.ended()
    if leaves == "turned away":
        assert waiting.take_all() == [innocent, evil]
    else:
        evil.restored.cancel()
        innocent.restored.cancel()
    assert waiting.next_batch(1) == []
    evil, innocent = (Crop(crop.pixels, loop.create_future(), 2) for crop in (evil, innocent))
    waiting.add([innocent, evil])
    assert (innocent.is_suspect, innocent.deaths_alone, evil.is_suspect, evil.deaths_alone) == (True, 0, True, 1)
    assert waiting.next_batch(3) == [innocent]
    waiting.ended()
    batch = waiting.next_batch(3)
    assert waiting.died(batch) == [evil]
    waiting.ended()
    # Given up, it comes back with the next attempt of its photo: alone at once, and with all its chances.
    evil, innocent = (Crop(crop.pixels, loop.create_future(), 4) for crop in (evil, innocent))
    waiting.add([evil, innocent])
    assert (evil.is_suspect, evil.deaths_alone, innocent.is_suspect) == (True, 0, False)


def test_what_is_put_back_goes_first(waiting: Waiting, loop: asyncio.AbstractEventLoop) -> None:
    """In its old order."""
    given = crops(loop, 5)
    waiting.add(given)
    batch = waiting.next_batch(0)
    waiting.put_back(batch)
    waiting.ended()
    assert waiting.next_batch(0) == given[:3]
