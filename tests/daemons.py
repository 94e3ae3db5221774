"""Daemons in this process: a real supervisor on a real database, with stages that a test steers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta

from jobdaemon import schema_version
from jobdaemon.db import DatabaseAddress
from jobdaemon.domain.expand import WantedImage, generate_jobs, upload_job
from jobdaemon.domain.job import Task
from jobdaemon.domain.outcome import Done
from jobdaemon.domain.write import OrderStarted
from jobdaemon.events import DaemonReady, Event, Events
from jobdaemon.ports import Attempt
from jobdaemon.queue.attempt import AttemptRules
from jobdaemon.queue.store import PostgresJobStore
from jobdaemon.queue.supervisor import EngineRules, QueueRules, Supervisor
from tests.factories import PLANS, QUEUES, RULES, beautified, generated, prewarmed, stored

#: Fast enough for a test, slow enough for a noisy machine.
QUICK = EngineRules(
    heartbeat=timedelta(seconds=0.2), lease=timedelta(seconds=1), poll=timedelta(seconds=0.3), stop_grace=timedelta(seconds=5)
)
#: Nothing is taken from a daemon that stands still for a while, as one does on a busy machine.
PATIENT = replace(QUICK, lease=timedelta(seconds=20))
#: No poll within a test's lifetime: only signals and timers can wake anybody.
NO_POLL = EngineRules(
    heartbeat=timedelta(seconds=0.5), lease=timedelta(seconds=60), poll=timedelta(seconds=60), stop_grace=timedelta(seconds=5)
)


async def _pass(attempt: Attempt) -> None:
    """Let every attempt through at once."""


async def until(condition: Callable[[], bool], *, timeout_s: float = 60.0) -> None:
    """Wait for what gives no signal: the state of rows, or of a process."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - see above
            await asyncio.sleep(0.02)


@dataclass(slots=True)
class Stages:
    """
    Stages that do no work: each goes through *gate* first, then commits what the real one would.

    Attributes:
        gate: awaited with the attempt; may block, raise or count.
        runs: (job id, attempt number) of every run.
    """

    gate: Callable[[Attempt], Awaitable[None]] = _pass
    runs: list[tuple[int, int]] = field(default_factory=list)

    def table(self) -> Mapping[str, _FakeStage]:
        """Task name -> stage."""
        return {task: _FakeStage(self, work) for task, work in _WORK.items()}


@dataclass(slots=True)
class _FakeStage:
    stages: Stages
    work: Callable[[Attempt], Awaitable[Done]]

    async def run(self, attempt: Attempt) -> Done:
        self.stages.runs.append((attempt.job.id, attempt.job.attempt))
        await self.stages.gate(attempt)
        return await self.work(attempt)


async def _beautify(attempt: Attempt) -> Done:
    order_id = attempt.job.args["order_id"]
    await attempt.checkpoint(OrderStarted(order_id))
    jobs = generate_jobs(order_id, attempt.job.priority, "local", [WantedImage(1, "p"), WantedImage(2, "p")], 5)
    return Done((beautified(order_id, *jobs),))


async def _generate(attempt: Attempt) -> Done:
    order_id = attempt.job.args["order_id"]
    for index in attempt.job.args["images"]:
        await attempt.checkpoint(generated(order_id, index, upload_job(order_id, attempt.job.priority, index)))
    return Done()


async def _upload(attempt: Attempt) -> Done:
    return Done((stored(attempt.job.args["order_id"], attempt.job.args["image"]),))


async def _prewarm(attempt: Attempt) -> Done:
    return Done((prewarmed(attempt.job.id),))


_WORK = {Task.BEAUTIFY: _beautify, Task.PREWARM: _prewarm, Task.GENERATE: _generate, Task.UPLOAD: _upload}


@dataclass(slots=True)
class RunningDaemon:
    """A daemon at work in this process."""

    supervisor: Supervisor
    store: PostgresJobStore
    events: Events
    seen: list[Event]
    task: asyncio.Task[None]


@asynccontextmanager
async def running_daemon(
    url: str,
    stages: Stages,
    *,
    engine: EngineRules = PATIENT,
    rules: AttemptRules = RULES,
    team_size: int = 2,
    paid: Collection[str] = (),
    keys: tuple[str, ...] | None = None,
) -> AsyncIterator[RunningDaemon]:
    """
    Run a daemon that serves every queue of the tests' plans, some of them *paid*, with *keys* for its provider; stop it in
    order at the end.
    """
    events = Events()
    seen: list[Event] = []
    events.subscribe(seen.append)
    store = PostgresJobStore(DatabaseAddress(url, command_timeout=timedelta(seconds=5)))

    async def discard(keys: tuple[str, ...]) -> None:
        assert keys == ()

    supervisor = Supervisor(
        store=store,
        stages=stages.table(),
        queues={
            name: QueueRules(team_size, replace(rules, is_paid=name in paid), keys if name.startswith("generate.") else None)
            for name in QUEUES
        },
        engine=engine,
        events=events,
        version="test",
        require_schema=lambda applied: schema_version.compare(applied).require_usable(),
        ensure_rows=lambda: store.ensure_rows(QUEUES, PLANS),
        discard=discard,
    )
    ready = events.expect(DaemonReady)
    task = asyncio.ensure_future(supervisor.run(wait_for_database=True))
    try:
        await ready.wait(20)
        yield RunningDaemon(supervisor, store, events, seen, task)
    finally:
        supervisor.stop("the test is over")
        supervisor.stop("the test is over")
        try:
            async with asyncio.timeout(30):
                await task
        finally:
            await store.close()
