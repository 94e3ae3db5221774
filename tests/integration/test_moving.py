"""Moving batches to another provider's queue: what goes, what stays, and two daemons at it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import asyncpg
import pytest

from jobdaemon.db import DatabaseAddress
from jobdaemon.domain.expand import WantedImage, generate_jobs
from jobdaemon.domain.fallback import FallbackRules, Move
from jobdaemon.domain.job import Job
from jobdaemon.domain.outcome import End, Transition, Verdict
from jobdaemon.domain.write import CallSubmitted, ImageFailed
from jobdaemon.queue import moving
from jobdaemon.queue.moving import Look
from jobdaemon.queue.store import PostgresJobStore
from tests.factories import Claimed, Orders, Row, Sql, beautified, generated, open_call

RULES = FallbackRules(chains={"local": ("other", "third")}, images_per_call=lambda provider: {"other": 2}.get(provider, 5))


@pytest.fixture(autouse=True)
def other_queues(sql: Sql) -> None:
    """Two more providers."""
    sql.execute("INSERT INTO jobdaemon.queues (name) VALUES ('generate.other'), ('generate.third')")


async def _waiting(claimed: Claimed, *, images: int = 5, customer: str = "ada") -> int:
    """An order with generate jobs of five images each that wait."""
    job = await claimed.beautify(plan="Start", images=images, prompts=["p"], customer=customer)
    order_id = job.order_id or 0
    jobs = generate_jobs(order_id, 200, "local", [WantedImage(index, "p") for index in range(1, images + 1)], 5)
    done = Transition(job, End.SUCCEEDED, writes=(beautified(order_id, *jobs),))
    await claimed.store.commit([done], daemon_id=None)
    return order_id


async def _move(store: PostgresJobStore, *, rules: FallbackRules = RULES, skip: int = 0, limit: int = 100) -> Look:
    return await store.move_waiting("local", rules, avoid={"local"}, reason="it is away", skip=skip, limit=limit)


def _generates(orders: Orders, order_id: int) -> list[Row]:
    return [row for row in orders.jobs(order_id) if row["task_name"] == "jobdaemon.generate"]


def _batches(orders: Orders, order_id: int) -> list[tuple[str, list[int]]]:
    return [(row["queue_name"], row["args"]["images"]) for row in _generates(orders, order_id)]


async def test_a_batch_is_cut_to_the_next_providers_calls(claimed_job_factory: Claimed, order_factory: Orders, sql: Sql) -> None:
    """The job itself goes with the first call's images, jobs like it are added; attempts begin anew, the place in line stays."""
    order_id = await _waiting(claimed_job_factory)
    [before] = _generates(order_factory, order_id)
    sql.execute("UPDATE jobdaemon.procrastinate_jobs SET attempts = 2 WHERE id = %s", [before["id"]])
    look = await _move(claimed_job_factory.store)
    assert (look.seen, [(batch.job_id, batch.provider) for batch in look.moved]) == (1, [(before["id"], "other")])
    assert _batches(order_factory, order_id) == [("generate.other", [1, 2]), ("generate.other", [3, 4]), ("generate.other", [5])]
    for row in _generates(order_factory, order_id):
        assert (row["priority"], row["attempts"], row["status"]) == (before["priority"], 0, "todo")
        assert (row["args"]["customer"], row["args"]["tried"]) == ("ada", ["local"])
    told = sql.execute("SELECT job_id, queue, outcome, error FROM jobdaemon.failures").fetchall()
    assert told == [
        {
            "job_id": before["id"],
            "queue": "generate.local",
            "outcome": "moved",
            "error": "moved from local to other: it is away",
        }
    ]
    assert len(await claimed_job_factory.claim("generate.other", 10)) == 3


async def test_it_goes_on_and_never_back(claimed_job_factory: Claimed, order_factory: Orders) -> None:
    """From the second provider to the third with both behind it; there it stays."""
    order_id = await _waiting(claimed_job_factory, images=2)
    store = claimed_job_factory.store
    await _move(store)
    for provider in ("other", "third"):
        await store.move_waiting(provider, RULES, avoid=(), reason="it is away", skip=0, limit=10)
    assert _batches(order_factory, order_id) == [("generate.third", [1, 2])]
    [row] = _generates(order_factory, order_id)
    assert row["args"]["tried"] == ["local", "other"]


async def test_a_batch_that_has_bought_something_stays(claimed_job_factory: Claimed, order_factory: Orders, sql: Sql) -> None:
    """Only its provider can say what became of that; where calls cost nothing it goes, and the call is closed."""
    order_id = await _waiting(claimed_job_factory)
    [job] = await claimed_job_factory.claim("generate.local")
    noted = CallSubmitted(order_id, job.id, "local", job.image_indexes, "t1")
    await claimed_job_factory.store.commit([Transition(job, End.CHECKPOINT, writes=(noted,))], daemon_id=None)
    await claimed_job_factory.store.commit([Transition(job, End.RETRY)], daemon_id=None)
    assert await _move(claimed_job_factory.store) == Look(0, [])
    assert len((await _move(claimed_job_factory.store, rules=replace(RULES, unpaid={"local"}))).moved) == 1
    assert sql.execute("SELECT outcome FROM jobdaemon.provider_calls").fetchall() == [{"outcome": "cancelled"}]
    assert _batches(order_factory, order_id)[0] == ("generate.other", [1, 2])


async def test_only_what_is_still_to_be_made_goes(claimed_job_factory: Claimed, order_factory: Orders, sql: Sql) -> None:
    """Images that arrived or failed are not asked for again; a batch with none left stays where it is."""
    order_id = await _waiting(claimed_job_factory, images=10)
    sql.execute("UPDATE jobdaemon.images SET status = 'stored' WHERE order_id = %s AND index IN (1, 2, 4, 6, 7, 8)", [order_id])
    sql.execute("UPDATE jobdaemon.images SET status = 'failed' WHERE order_id = %s AND index IN (9, 10)", [order_id])
    look = await _move(claimed_job_factory.store)
    assert (look.seen, len(look.moved)) == (2, 1)
    assert _batches(order_factory, order_id) == [("generate.other", [3, 5]), ("generate.local", [6, 7, 8, 9, 10])]


async def test_what_runs_waits_for_later_or_is_held_stays(claimed_job_factory: Claimed, sql: Sql) -> None:
    """Running jobs, jobs that rest, and orders that somebody holds are left to the next look; nobody waits."""
    await _waiting(claimed_job_factory)
    [job] = await claimed_job_factory.claim("generate.local")
    assert (await _move(claimed_job_factory.store)).seen == 0
    rested = Transition(job, End.RETRY, delay=timedelta(hours=1))
    await claimed_job_factory.store.commit([rested], daemon_id=None)
    assert (await _move(claimed_job_factory.store)).seen == 0
    sql.execute("UPDATE jobdaemon.procrastinate_jobs SET scheduled_at = NULL")
    with sql.transaction():
        sql.execute("SELECT FROM jobdaemon.orders FOR UPDATE")
        async with asyncio.timeout(60):
            assert await _move(claimed_job_factory.store) == Look(1, [])
    assert len((await _move(claimed_job_factory.store)).moved) == 1


@dataclass(slots=True)
class Interrupted:
    """A connection on which something else happens before the statement that holds *marker*."""

    connection: Any
    marker: str
    meanwhile: Callable[[], Awaitable[None]]

    async def _before(self, query: str) -> None:
        if self.marker in query:
            self.marker = "\0"
            await self.meanwhile()

    async def fetch(self, query: str, *values: Any) -> Any:
        await self._before(query)
        return await self.connection.fetch(query, *values)

    async def execute(self, query: str, *values: Any) -> Any:
        await self._before(query)
        return await self.connection.execute(query, *values)


async def _interrupted_move(url: str, marker: str, meanwhile: Callable[[], Awaitable[None]]) -> Look:
    connection = await asyncpg.connect(url)
    try:
        async with connection.transaction():
            interrupted: Any = Interrupted(connection, marker, meanwhile)
            return await moving.move_waiting(interrupted, "local", RULES, avoid=(), reason="it is away", skip=0, limit=9)
    finally:
        await connection.close()


async def test_a_provider_that_comes_back_while_it_is_looked_at_keeps_what_it_sold(
    engine_database: str, claimed_job_factory: Claimed, order_factory: Orders
) -> None:
    """A batch that buys a task between the look and the move stays: its task would be paid for and dropped."""
    order_id = await _waiting(claimed_job_factory)

    async def buy() -> None:
        [job] = await claimed_job_factory.claim("generate.local")
        noted = CallSubmitted(order_id, job.id, "local", job.image_indexes, "t1")
        await claimed_job_factory.store.commit([Transition(job, End.CHECKPOINT, writes=(noted,))], daemon_id=None)
        await claimed_job_factory.store.commit([Transition(job, End.HANDED_BACK)], daemon_id=None)

    look = await _interrupted_move(engine_database, "o.plan, o.provider FROM jobdaemon.orders o", buy)
    assert look == Look(1, [])
    assert _batches(order_factory, order_id) == [("generate.local", [1, 2, 3, 4, 5])]


@pytest.mark.parametrize("marker", ["SET queue_name = m.queue", "procrastinate_defer_jobs_v1", "INSERT INTO jobdaemon.attempts"])
async def test_a_move_that_is_cut_off_has_not_begun(
    engine_database: str, claimed_job_factory: Claimed, order_factory: Orders, sql: Sql, marker: str
) -> None:
    """Wherever its daemon is killed, the batch is whole where it was, and the next look moves it."""
    order_id = await _waiting(claimed_job_factory)
    connections = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE state = 'idle in transaction'"

    async def kill() -> None:
        await asyncio.to_thread(sql.execute, f"{connections} AND datname = current_database()".encode())

    with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError, OSError)):
        await _interrupted_move(engine_database, marker, kill)
    assert _batches(order_factory, order_id) == [("generate.local", [1, 2, 3, 4, 5])]
    assert sql.execute("SELECT FROM jobdaemon.attempts").fetchall() == []
    assert len((await _move(claimed_job_factory.store)).moved) == 1
    assert [batch for _, batch in _batches(order_factory, order_id)] == [[1, 2], [3, 4], [5]]


async def test_with_everybody_down_a_batch_stays_and_goes_on_with_who_is_back_first(
    claimed_job_factory: Claimed, order_factory: Orders
) -> None:
    """A batch waits where it is while nobody could take it over; a provider that is still down is passed over."""
    order_id = await _waiting(claimed_job_factory, images=2)
    store = claimed_job_factory.store
    everybody = {"local", "other", "third"}
    for avoid, moved in ((everybody, 0), (everybody - {"third"}, 1)):
        look = await store.move_waiting("local", RULES, avoid=avoid, reason="it is away", skip=0, limit=9)
        assert len(look.moved) == moved
    assert _batches(order_factory, order_id) == [("generate.third", [1, 2])]


async def test_a_plan_that_asks_nobody_holds_nobody_up(claimed_job_factory: Claimed, order_factory: Orders) -> None:
    """Batches that stay are passed over by the next look, so that those behind them get their turn."""
    rules = replace(RULES, plans={"Start": ()})
    for _ in range(3):
        await _waiting(claimed_job_factory, images=1)
    last = await claimed_job_factory.beautify(plan="Pro", images=1, prompts=["p"])
    jobs = generate_jobs(last.order_id or 0, 0, "local", [WantedImage(1, "p")], 5)
    done = Transition(last, End.SUCCEEDED, writes=(beautified(last.order_id or 0, *jobs),))
    await claimed_job_factory.store.commit([done], daemon_id=None)
    look = await _move(claimed_job_factory.store, rules=rules, limit=2)
    assert (look.seen, look.moved) == (2, [])
    look = await _move(claimed_job_factory.store, rules=rules, skip=2, limit=2)
    assert [batch.order_id for batch in look.moved] == [last.order_id]


async def test_two_daemons_move_each_batch_once(
    claimed_job_factory: Claimed, order_factory: Orders, engine_database: str
) -> None:
    """Whoever comes second finds nothing left to move, and no image has two jobs."""
    orders = [await _waiting(claimed_job_factory) for _ in range(8)]
    stores = [PostgresJobStore(DatabaseAddress(engine_database)) for _ in range(3)]
    try:
        for _ in range(3):
            await asyncio.gather(*(_move(store, limit=5) for store in stores))
    finally:
        for store in stores:
            await store.close()
    for order_id in orders:
        batches = _batches(order_factory, order_id)
        assert {queue for queue, _ in batches} == {"generate.other"}
        assert sorted(index for _, images in batches for index in images) == [1, 2, 3, 4, 5]


def _moved(job: Job) -> Transition:
    return Transition(job, End.MOVED, error_kind="X", error="moved from local to other: away", move=Move("other", 2))


async def test_an_attempt_ends_in_the_next_queue(claimed_job_factory: Claimed, order_factory: Orders, sql: Sql) -> None:
    """Its job is ready there with new attempts and what is pending; sent again after a lost answer, nothing happens twice."""
    order_id = await _waiting(claimed_job_factory)
    [job] = await claimed_job_factory.claim("generate.local")
    arrived = Transition(job, End.CHECKPOINT, writes=(generated(order_id, 2), ImageFailed(order_id, 3, "no", was="pending")))
    await claimed_job_factory.store.commit([arrived], daemon_id=None)
    for _ in range(2):
        committed = await claimed_job_factory.store.commit([_moved(job)], daemon_id=None)
        assert committed.verdicts == [Verdict.ACCEPTED]
    assert _batches(order_factory, order_id) == [("generate.other", [1, 4]), ("generate.other", [5])]
    [row, _] = _generates(order_factory, order_id)
    assert (row["id"], row["status"], row["attempts"], row["worker_id"]) == (job.id, "todo", 0, None)
    assert len(sql.execute("SELECT FROM jobdaemon.attempts WHERE outcome = 'moved'").fetchall()) == 1
    await claimed_job_factory.claim("generate.other", 5)


async def test_a_cancelled_orders_batch_moves_nowhere(claimed_job_factory: Claimed, order_factory: Orders, sql: Sql) -> None:
    """The fence comes first."""
    order_id = await _waiting(claimed_job_factory)
    [job] = await claimed_job_factory.claim("generate.local")
    sql.execute("SELECT jobdaemon.cancel_order(%s)", [order_id])
    committed = await claimed_job_factory.store.commit([_moved(job)], daemon_id=None)
    assert committed.verdicts == [Verdict.ORDER_ENDED]
    assert _batches(order_factory, order_id) == [("generate.local", [1, 2, 3, 4, 5])]


async def test_a_moved_batchs_lost_job_goes_back_to_its_call(
    claimed_job_factory: Claimed, order_factory: Orders, sql: Sql
) -> None:
    """The reconciler makes a deleted job again where its images were bought, and under its own call only."""
    order_id = await _waiting(claimed_job_factory)
    await _move(claimed_job_factory.store)
    job, *_ = await claimed_job_factory.claim("generate.other", 1)
    noted = CallSubmitted(order_id, job.id, "other", job.image_indexes, "t1")
    await claimed_job_factory.store.commit([Transition(job, End.CHECKPOINT, writes=(noted,))], daemon_id=None)
    sql.execute("DELETE FROM jobdaemon.procrastinate_jobs WHERE queue_name LIKE 'generate.%%'")
    await claimed_job_factory.store.mend_orders([order_id], lambda provider: 5)
    assert sorted(_batches(order_factory, order_id)) == [("generate.local", [3, 4, 5]), ("generate.other", [1, 2])]

    async def calls() -> dict[str, str | None]:
        found = {
            row["queue_name"]: await open_call(claimed_job_factory.store, order_id, row["id"])
            for row in _generates(order_factory, order_id)
        }
        return {queue: None if call is None else call.task_id for queue, call in found.items()}

    assert await calls() == {"generate.other": "t1", "generate.local": None}
    sql.execute("UPDATE jobdaemon.images SET status = 'stored' WHERE order_id = %s AND index <= 2", [order_id])
    sql.execute("DELETE FROM jobdaemon.procrastinate_jobs WHERE queue_name LIKE 'generate.%%'")
    await claimed_job_factory.store.mend_orders([order_id], lambda provider: 5)
    assert await calls() == {"generate.local": None}


async def _troubles(store: PostgresJobStore, seconds: float) -> dict[str, bool]:
    return {trouble.provider: trouble.is_long for trouble in await store.troubled_providers(timedelta(seconds=seconds))}


async def test_how_long_a_circuit_has_been_open(store: PostgresJobStore, sql: Sql) -> None:
    """From when it first left closed, through every probe, until it closes; only providers' queues count."""

    def turn(circuit: str) -> None:
        sql.execute("UPDATE jobdaemon.queues SET circuit = %s WHERE name IN ('generate.other', 'upload')", [circuit])

    assert await _troubles(store, 0) == {}
    turn("open")
    sql.execute("UPDATE jobdaemon.queues SET circuit_since = circuit_since - interval '1 minute'")
    for circuit in ("probing", "open"):
        turn(circuit)
        assert await _troubles(store, 59) == {"other": True}
        assert await _troubles(store, 90) == {"other": False}
    turn("closed")
    turn("open")
    assert await _troubles(store, 59) == {"other": False}


async def test_a_provider_without_a_key_that_opens_soon_is_in_trouble(store: PostgresJobStore, sql: Sql) -> None:
    """Keys that rest, are paused or have spent their budget; one that can start is enough, and pausing all is no trouble."""

    def key(alias: str, change: str) -> None:
        sql.execute(f"UPDATE jobdaemon.provider_keys SET {change} WHERE alias = %s".encode(), [alias])

    sql.execute("INSERT INTO jobdaemon.provider_keys (provider, alias) VALUES ('other', 'a'), ('other', 'b')")
    key("a", "rested_until = now() + interval '1 hour', rest_reason = 'its account is out of money'")
    assert await _troubles(store, 60) == {}
    key("b", "rested_until = now() + interval '30 seconds'")
    assert await _troubles(store, 60) == {"other": False}
    key("b", "rested_until = NULL, daily_budget = 10, spent = 10, spent_on = (now() AT TIME ZONE 'UTC')::date")
    assert await _troubles(store, 0.001) == {"other": True}
    [trouble] = await store.troubled_providers(timedelta(seconds=0.001))
    assert trouble.reason == (
        "no key of it can start a call within 0.001 s: a rests (its account is out of money), b has spent its budget for today"
    )
    key("b", "spent = 9")
    assert await _troubles(store, 0) == {}
    key("b", "paused = true")
    assert await _troubles(store, 60) == {"other": True}
    key("a", "paused = true")
    assert await _troubles(store, 60) == {}
