"""What a queue does on all daemons is told once, by the daemon whose attempt or round caused it."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import timedelta
from typing import TypeVar

from jobdaemon.domain.job import Task
from jobdaemon.errors import ProviderUnavailableError, RateLimitedError
from jobdaemon.events import CircuitTurned, Event, LimitAdapted, OrdersLifted, QueueRests
from jobdaemon.logs import level_of
from jobdaemon.ports import Attempt
from tests.daemons import RunningDaemon, Stages, running_daemon, until
from tests.factories import RULES, Jobs, Orders, Sql

QUEUE = "generate.local"
HASTY = replace(RULES, retry=replace(RULES.retry, attempts=50, backoff=timedelta(seconds=0.05), cap=timedelta(seconds=0.1)))
E = TypeVar("E", bound=Event)


class Provider:
    """A gate that raises what a test sets, and else lets attempts through after a while."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.seconds = 0.05

    async def __call__(self, attempt: Attempt) -> None:
        """One call."""
        if self.error is not None:
            raise self.error
        await asyncio.sleep(self.seconds)


def _fill(job_factory: Jobs, jobs: int) -> None:
    for _ in range(jobs):
        job_factory(QUEUE, Task.GENERATE, args={"order_id": None, "images": []})


def _told(kind: type[E], *daemons: RunningDaemon) -> list[E]:
    return [event for daemon in daemons for event in daemon.seen if isinstance(event, kind)]


async def test_a_circuit_is_told_once_whoever_turned_it(engine_database: str, job_factory: Jobs, sql: Sql) -> None:
    """Each opening is told by one of two daemons, with its reason, no probe twice, and the one success that closes it."""
    sql.execute("UPDATE jobdaemon.queues SET circuit_rest = '200 milliseconds' WHERE name = %s", [QUEUE])
    provider = Provider()
    provider.error = ProviderUnavailableError("the provider answered 503")
    stages = Stages(gate=provider)
    async with (
        running_daemon(engine_database, stages, rules=HASTY) as one,
        running_daemon(engine_database, stages, rules=HASTY) as two,
    ):
        _fill(job_factory, 8)
        await until(lambda: len([turn for turn in _told(CircuitTurned, one, two) if turn.circuit == "open"]) >= 3)
        provider.error = None
        await until(lambda: any(turn.circuit == "closed" for turn in _told(CircuitTurned, one, two)))
        await asyncio.sleep(0.3)  # nobody must tell it again
        turns = _told(CircuitTurned, one, two)
    opened = sorted((turn.in_a_row or 0, turn.reason) for turn in turns if turn.circuit == "open")
    assert opened == [(place, "the provider answered 503") for place in range(1, len(opened) + 1)]
    assert all(0 < turn.seconds <= 0.2 * 2 ** (turn.in_a_row or 0) for turn in turns if turn.seconds is not None)
    # A claim that waited for the queue's lock while the circuit opened and its rest went by does not know that it is the probe.
    assert 1 <= [turn.circuit for turn in turns].count("probing") <= len(opened)
    assert [turn.circuit for turn in turns].count("closed") == 1
    levels = {(turn.circuit, turn.in_a_row == 1): level_of(turn) for turn in turns}
    assert levels[("open", True)] == "warning"
    assert levels[("open", False)] == levels[("probing", False)] == levels[("closed", False)] == "info"


async def test_a_limit_and_a_rest_are_told_once(engine_database: str, job_factory: Jobs, sql: Sql) -> None:
    """A provider that refuses everything: the limit's coming is told once, and each rest once, the later ones quietly."""
    provider = Provider()
    provider.error = RateLimitedError("429: too many")
    stages = Stages(gate=provider)
    async with running_daemon(engine_database, stages, team_size=3) as one, running_daemon(engine_database, stages) as two:
        _fill(job_factory, 6)
        await until(lambda: len(_told(QueueRests, one, two)) >= 2)
        provider.error = None
        await until(
            lambda: (
                sql.execute("SELECT count(*) AS n FROM jobdaemon.procrastinate_jobs WHERE status <> 'succeeded'").fetchone()
                == {"n": 0}
            )
        )
        rests, limits = _told(QueueRests, one, two), _told(LimitAdapted, one, two)
    assert [limit.was for limit in limits].count(None) == 1
    assert all(limit.was != limit.limit for limit in limits)
    counts = sorted(rest.in_a_row for rest in rests)
    assert (counts[0], counts) == (1, sorted(set(counts)))
    assert {rest.reason for rest in rests} == {"429: too many"}
    assert {(rest.in_a_row == 1, level_of(rest)) for rest in rests} == {(True, "info"), (False, "debug")}
    assert (level_of(LimitAdapted("q", None, 3)), level_of(LimitAdapted("q", 3, 4)), level_of(LimitAdapted("q", 4, None))) == (
        "info",
        "debug",
        "info",
    )


async def test_a_retry_after_is_a_rest(engine_database: str, job_factory: Jobs) -> None:
    """A burst of refusals that all ask for a minute is one rest of a minute."""
    provider = Provider()
    provider.error = RateLimitedError("429: wait", retry_after=timedelta(seconds=60))
    async with running_daemon(engine_database, Stages(gate=provider), team_size=5) as daemon:
        rested = daemon.events.expect(QueueRests)
        _fill(job_factory, 5)
        rest = await rested.wait(60)
        await asyncio.sleep(0.3)  # the others of the burst must not tell it again
        assert _told(QueueRests, daemon) == [rest]
    assert 55 < rest.seconds <= 60


async def test_lifted_orders_are_counted_once(engine_database: str, order_factory: Orders, sql: Sql) -> None:
    """Orders that waited too long are told by the one of two daemons that lifted them."""
    sql.execute("SELECT jobdaemon.pause_queue('beautify')")
    async with running_daemon(engine_database, Stages()) as one, running_daemon(engine_database, Stages()) as two:
        for _ in range(3):
            order_factory("Pro")
        await asyncio.to_thread(sql.execute, "UPDATE jobdaemon.orders SET waits_from = now() - interval '1 day'")
        await until(lambda: sum(event.count for event in _told(OrdersLifted, one, two)) >= 3)
        await asyncio.sleep(0.5)  # a round more
        assert sum(event.count for event in _told(OrdersLifted, one, two)) == 3
