"""When a team looks for jobs, without a database."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from unittest.mock import sentinel

import pytest

from jobdaemon.events import Events
from jobdaemon.queue.store import Claim
from jobdaemon.queue.team import Team
from tests.factories import RULES

CALM = timedelta(milliseconds=50)


@dataclass(slots=True)
class EmptyQueue:
    """What a team needs of a store: notes when it was asked, by the event loop's clock; nothing is ready."""

    asked_at_s: list[float] = field(default_factory=list)
    asked: asyncio.Event = field(default_factory=asyncio.Event)

    async def take_slots(self, *_: object, **__: object) -> Claim:
        self.asked_at_s.append(asyncio.get_running_loop().time())
        self.asked.set()
        return Claim([])

    async def was_asked(self) -> None:
        """Wait for the next claim."""
        async with asyncio.timeout(5):
            await self.asked.wait()
        self.asked.clear()


async def _at_once() -> None:
    """The lease holds."""


@asynccontextmanager
async def team_at_work(queue: EmptyQueue, calm: timedelta) -> AsyncIterator[Team]:
    """A team that has looked once, as each does at its start."""
    team = Team(
        "upload",
        4,
        RULES,
        store=queue,  # type: ignore[arg-type]
        runner=sentinel.runner,
        events=Events(),
        daemon_id=lambda: 1,
        on_lease_lost=lambda: None,
        until_lease_holds=_at_once,
        calm=calm,
    )
    running = asyncio.create_task(team.run())
    await queue.was_asked()
    yield team
    running.cancel()
    await team.finish(grace_s=0, cut_short=asyncio.Event())


async def test_what_is_announced_within_the_calm_is_looked_for_once() -> None:
    """Not at once, and not once for each."""
    queue = EmptyQueue()
    async with team_at_work(queue, CALM) as team:
        announced_at_s = asyncio.get_running_loop().time()
        for _ in range(3):
            team.announced()
            await asyncio.sleep(0)
        await queue.was_asked()
        await asyncio.sleep(2 * CALM.total_seconds())
        [at_s] = queue.asked_at_s[1:]
        assert at_s - announced_at_s >= CALM.total_seconds() - 0.002
        team.announced()
        await queue.was_asked()


@pytest.mark.parametrize(("calm", "tell"), [(timedelta(0), Team.announced), (CALM * 1000, Team.wake)])
async def test_without_a_calm_and_by_its_own_slots_a_team_looks_at_once(calm: timedelta, tell: Callable[[Team], None]) -> None:
    """A slot of its own that is free again waits for nothing."""
    queue = EmptyQueue()
    async with team_at_work(queue, calm) as team:
        team.announced()
        tell(team)
        await queue.was_asked()
