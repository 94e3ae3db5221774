"""Calls of orders that ended early: stopped by a job of their own, or told as lost; dead letters keep theirs."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest

from jobdaemon.domain.expand import WantedImage, generate_jobs, writes_when_dead
from jobdaemon.domain.job import Job, Task
from jobdaemon.domain.outcome import End, Signal, Transition, Verdict
from jobdaemon.domain.write import CallAccepted, CallEnded, CallSubmitted, Write
from jobdaemon.queue.store import PostgresJobStore
from tests.factories import Claimed, Orders, Row, Sql, beautified, open_call

pytestmark = pytest.mark.newest_postgres

QUEUE = "generate.local"


async def _generating(claimed: Claimed, *, images: int = 2) -> Job:
    """The claimed generate job of a new order."""
    job = await claimed.beautify(plan="Start", images=images, prompts=["p"])
    order_id = job.order_id or 0
    jobs = generate_jobs(order_id, 200, "local", [WantedImage(index, "p") for index in range(1, images + 1)], 5)
    await _commit(claimed.store, job, End.SUCCEEDED, beautified(order_id, *jobs))
    [job] = [job for job in await claimed.claim(QUEUE, 10) if job.order_id == order_id]
    return job


async def _commit(store: PostgresJobStore, job: Job, end: End, *writes: Write) -> Verdict:
    [verdict] = (await store.commit([Transition(job, end, writes=writes)], daemon_id=None)).verdicts
    return verdict


async def _bought(store: PostgresJobStore, job: Job, task_id: str | None) -> None:
    noted = CallSubmitted(job.order_id or 0, job.id, "local", job.image_indexes, task_id)
    assert await _commit(store, job, End.CHECKPOINT, noted) is Verdict.ACCEPTED


def _cancel(sql: Sql, job: Job) -> None:
    sql.execute("SELECT jobdaemon.cancel_order(%s)", [job.order_id])


def _abandons(orders: Orders, job: Job) -> list[Row]:
    return [row for row in orders.jobs(job.order_id or 0) if row["task_name"] == Task.ABANDON]


def _calls(sql: Sql, job: Job) -> list[tuple[str | None, str | None]]:
    rows = sql.execute(
        "SELECT external_task_id, outcome FROM jobdaemon.provider_calls WHERE order_id = %s ORDER BY id", [job.order_id]
    ).fetchall()
    return [(row["external_task_id"], row["outcome"]) for row in rows]


def _lost(sql: Sql) -> int:
    return len(sql.execute("SELECT FROM jobdaemon.unknown_submits").fetchall())


async def test_a_cancelled_orders_task_is_the_first_thing_a_daemon_stops(
    claimed_job_factory: Claimed, order_factory: Orders, sql: Sql
) -> None:
    """One job for each open task, before all work of its queue, lifted or not; cancelling again makes no other."""
    job = await _generating(claimed_job_factory)
    await _bought(claimed_job_factory.store, job, "t1")
    waiting = await _generating(claimed_job_factory)
    await _commit(claimed_job_factory.store, waiting, End.HANDED_BACK)
    _cancel(sql, job)
    _cancel(sql, job)
    [abandon] = _abandons(order_factory, job)
    assert (abandon["queue_name"], abandon["status"]) == (QUEUE, "todo")
    [first] = await claimed_job_factory.claim(QUEUE)
    assert (first.id, first.outlives_its_order) == (abandon["id"], True)
    call = await claimed_job_factory.store.orders.unfinished_call(first.args["call_id"])
    assert call is not None
    assert call.task_id == "t1"
    closed = CallEnded(job.order_id or 0, first.id, "cancelled", call.id)
    assert await _commit(claimed_job_factory.store, first, End.SUCCEEDED, closed) is Verdict.ACCEPTED
    assert _calls(sql, job) == [("t1", "cancelled")]
    assert await claimed_job_factory.store.orders.unfinished_call(call.id) is None


async def test_a_submit_on_its_way_is_told_as_lost_only_when_its_attempt_is_over(
    claimed_job_factory: Claimed, order_factory: Orders, sql: Sql
) -> None:
    """An id that did not arrive before the order was cancelled may still arrive; once it cannot, the call is unknown."""
    job = await _generating(claimed_job_factory)
    await _bought(claimed_job_factory.store, job, None)
    _cancel(sql, job)
    assert (_calls(sql, job), _lost(sql)) == ([(None, None)], 0)
    assert await _commit(claimed_job_factory.store, job, End.HANDED_BACK) is Verdict.ORDER_ENDED
    assert (_calls(sql, job), _lost(sql)) == ([(None, "unknown")], 1)
    assert _abandons(order_factory, job) == []


async def test_a_lost_submit_of_a_waiting_job_is_told_at_once(claimed_job_factory: Claimed, sql: Sql) -> None:
    """Nobody will look for it any more."""
    job = await _generating(claimed_job_factory)
    await _bought(claimed_job_factory.store, job, None)
    await _commit(claimed_job_factory.store, job, End.RETRY)
    _cancel(sql, job)
    assert (_calls(sql, job), _lost(sql)) == ([(None, "unknown")], 1)


async def test_a_task_accepted_while_its_order_was_cancelled_is_stopped(
    claimed_job_factory: Claimed, order_factory: Orders, sql: Sql
) -> None:
    """Its id is noted although the attempt is told to stop, and a job for it is made, so that no crash leaves it running."""
    job = await _generating(claimed_job_factory)
    await _bought(claimed_job_factory.store, job, None)
    _cancel(sql, job)
    accepted = CallAccepted(job.order_id or 0, job.id, "t1")
    assert await _commit(claimed_job_factory.store, job, End.CHECKPOINT, accepted) is Verdict.ORDER_ENDED
    assert _calls(sql, job) == [("t1", None)]
    assert len(_abandons(order_factory, job)) == 1
    assert await _commit(claimed_job_factory.store, job, End.HANDED_BACK) is Verdict.ORDER_ENDED
    assert (len(_abandons(order_factory, job)), _lost(sql)) == (1, 0)


async def test_a_call_that_ended_meanwhile_keeps_its_end(claimed_job_factory: Claimed, sql: Sql) -> None:
    """An attempt that closes its call as its order is cancelled has the last word."""
    job = await _generating(claimed_job_factory)
    await _bought(claimed_job_factory.store, job, "t1")
    _cancel(sql, job)
    closed = CallEnded(job.order_id or 0, job.id, "succeeded")
    assert await _commit(claimed_job_factory.store, job, End.SUCCEEDED, closed) is Verdict.ORDER_ENDED
    [abandon] = await claimed_job_factory.claim(QUEUE)
    late = CallEnded(job.order_id or 0, abandon.id, "cancelled", abandon.args["call_id"])
    await _commit(claimed_job_factory.store, abandon, End.SUCCEEDED, late)
    assert _calls(sql, job) == [("t1", "succeeded")]


@pytest.mark.parametrize("is_cancelled", [False, True])
async def test_a_dead_letter_keeps_its_task_for_a_redrive(
    claimed_job_factory: Claimed, order_factory: Orders, sql: Sql, is_cancelled: bool
) -> None:
    """An order that failed by itself may be redriven and fetch what was bought; a cancelled one never."""
    job = await _generating(claimed_job_factory, images=2)
    await _bought(claimed_job_factory.store, job, "t1")
    dead = writes_when_dead(job, "no")
    # one image left keeps the order open
    await _commit(claimed_job_factory.store, job, End.FAILED, *dead[is_cancelled:])
    if is_cancelled:
        _cancel(sql, job)
        assert len(_abandons(order_factory, job)) == 1
        return
    assert order_factory.row(job.order_id or 0)["status"] == "failed"
    assert await claimed_job_factory.store.abandon_calls(10) == 0
    sql.execute("SELECT jobdaemon.redrive(order_id => %s)", [job.order_id])
    call = await open_call(claimed_job_factory.store, job.order_id, job.id)
    assert call is not None
    assert call.task_id == "t1"


async def test_upkeep_finds_what_others_left(claimed_job_factory: Claimed, order_factory: Orders, sql: Sql) -> None:
    """An order that somebody ended with SQL of his own has its calls stopped too, once."""
    job = await _generating(claimed_job_factory)
    await _bought(claimed_job_factory.store, job, "t1")
    sql.execute("UPDATE jobdaemon.procrastinate_jobs SET status = 'aborted' WHERE id = %s", [job.id])
    assert await claimed_job_factory.store.abandon_calls(10) == 0
    sql.execute("UPDATE jobdaemon.orders SET status = 'cancelled', finished_at = now() WHERE id = %s", [job.order_id])
    assert await claimed_job_factory.store.abandon_calls(10) == 1
    assert await claimed_job_factory.store.abandon_calls(10) == 0
    assert len(_abandons(order_factory, job)) == 1


async def test_an_expired_orders_tasks_are_stopped(claimed_job_factory: Claimed, order_factory: Orders, sql: Sql) -> None:
    """Waiting or running, what it has bought gets a job that stops it."""
    running, waiting = await _generating(claimed_job_factory), await _generating(claimed_job_factory)
    for job in (running, waiting):
        await _bought(claimed_job_factory.store, job, "t1")
    await _commit(claimed_job_factory.store, waiting, End.RETRY)
    sql.execute("UPDATE jobdaemon.orders SET expires_at = now()")
    assert len(await claimed_job_factory.store.expire_orders()) == 2
    assert [len(_abandons(order_factory, job)) for job in (running, waiting)] == [1, 1]


async def test_a_call_is_stopped_with_the_key_it_was_made_with(claimed_job_factory: Claimed, daemon_id: int, sql: Sql) -> None:
    """Even when that key is paused and has spent its budget, which it does not touch; not while it rests."""
    sql.execute(
        "INSERT INTO jobdaemon.provider_keys (provider, alias, daily_budget, spent, spent_on, paused)"
        " VALUES ('local', 'main', 100, 0, now(), false), ('local', 'spare', 1, 1, (now() AT TIME ZONE 'UTC')::date, true)"
    )
    store = claimed_job_factory.store
    job = await _generating(claimed_job_factory)
    noted = CallSubmitted(job.order_id or 0, job.id, "local", job.image_indexes, "t1", "spare")
    await _commit(store, job, End.CHECKPOINT, noted)
    _cancel(sql, job)
    sql.execute("UPDATE jobdaemon.provider_keys SET rested_until = now() + interval '1 hour' WHERE alias = 'spare'")
    assert (await store.take_slots(QUEUE, daemon_id, 5, ["main", "spare"])).jobs == []
    sql.execute("UPDATE jobdaemon.provider_keys SET rested_until = NULL WHERE alias = 'spare'")
    [abandon] = (await store.take_slots(QUEUE, daemon_id, 5, ["main", "spare"])).jobs
    assert (abandon.task, abandon.key_alias) == (Task.ABANDON, "spare")
    spent = sql.execute("SELECT alias, spent FROM jobdaemon.provider_keys ORDER BY alias").fetchall()
    assert spent == [{"alias": "main", "spent": 0}, {"alias": "spare", "spent": 1}]


async def test_it_says_nothing_of_its_queue(claimed_job_factory: Claimed, daemon_id: int, sql: Sql) -> None:
    """Calls that cannot be stopped open no circuit, and those that can close none; a batch that succeeds does."""
    store = claimed_job_factory.store

    def circuit() -> str:
        row = sql.execute("SELECT circuit FROM jobdaemon.queues WHERE name = %s", [QUEUE]).fetchone()
        assert row is not None
        return str(row["circuit"])

    batch, *jobs = [await _generating(claimed_job_factory) for _ in range(7)]
    for job in jobs:
        await _bought(store, job, "t1")
        _cancel(sql, job)
        await _commit(store, job, End.HANDED_BACK)
    one, *others = await claimed_job_factory.claim(QUEUE, 10)
    assert {job.task for job in others} == {Task.ABANDON}
    for abandon in others:
        ended = Transition(abandon, End.RETRY, delay=timedelta(hours=1), signal=Signal.OUTAGE, error="away")
        await store.commit([ended], daemon_id=None)
    assert circuit() == "closed"
    sql.execute("UPDATE jobdaemon.queues SET circuit = 'probing' WHERE name = %s", [QUEUE])
    await store.queue_rows([QUEUE], daemon_id)  # counts its ends from now on
    await _commit(store, one, End.SUCCEEDED)
    assert circuit() == "probing"
    await asyncio.sleep(0.3)  # steering looks at a queue four times a second
    await _commit(store, batch, End.SUCCEEDED)
    assert circuit() == "closed"
