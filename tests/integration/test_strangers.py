"""Others at the table: stock cancel, retry and delete, and plain SQL on our rows; orders come back in line with their jobs."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest

from jobdaemon.domain.expand import WantedImage, generate_jobs, upload_job, writes_when_dead
from jobdaemon.domain.job import Job
from jobdaemon.domain.outcome import End, Transition
from jobdaemon.domain.write import CallSubmitted
from jobdaemon.events import LeaseLost, OrderMended, OrderSettled
from jobdaemon.ports import Attempt
from jobdaemon.queue.store import Mended, PostgresJobStore
from jobdaemon.queue.supervisor import EngineRules
from tests.daemons import Stages, running_daemon, until
from tests.factories import Claimed, Orders, Row, Sql, beautified, generated, open_call

#: The reconciler looks at every sixth poll.
HASTY = EngineRules(
    heartbeat=timedelta(seconds=0.2), lease=timedelta(seconds=1), poll=timedelta(seconds=0.05), stop_grace=timedelta(seconds=5)
)


async def _mend(store: PostgresJobStore) -> list[Mended]:
    """Look and mend at once; what is in line must not be mended."""
    looked = await store.open_orders(after=0, limit=100)
    stray = [order_id for order_id, is_stray in looked.items() if is_stray]
    mended = await store.mend_orders(looked, lambda provider: 5)
    assert {order.order_id for order in mended} == set(stray)
    return mended


async def _generating(claimed: Claimed, images: int = 2) -> int:
    """An order that was beautified, with one generate job that waits."""
    job = await claimed.beautify(plan="Start", images=images, prompts=["p"])
    order_id = job.order_id or 0
    jobs = generate_jobs(order_id, 200, "local", [WantedImage(index, "p") for index in range(1, images + 1)], 5)
    done = Transition(job, End.SUCCEEDED, writes=(beautified(order_id, *jobs),))
    await claimed.store.commit([done], daemon_id=None)
    return order_id


def _open_jobs(orders: Orders, order_id: int) -> list[Row]:
    return [job for job in orders.jobs(order_id) if job["status"] in ("todo", "doing")]


async def test_a_healthy_order_is_left_alone(claimed_job_factory: Claimed, order_factory: Orders, sql: Sql) -> None:
    """Queued, scheduled for later, generating or half done: while every image has its job nothing is mended."""
    order_factory("Free")
    sql.execute("SELECT jobdaemon.enqueue_order('Free', 'https://p.example/a.jpg', at => now() + interval '1 day')")
    order_id = await _generating(claimed_job_factory)
    [job] = await claimed_job_factory.claim("generate.local")
    assert await _mend(claimed_job_factory.store) == []
    arrived = generated(order_id, 1, upload_job(order_id, 200, 1))
    await claimed_job_factory.store.commit([Transition(job, End.CHECKPOINT, writes=(arrived,))], daemon_id=None)
    assert await _mend(claimed_job_factory.store) == []


@pytest.mark.parametrize("stage", ["beautify", "generate.local"])
@pytest.mark.parametrize("is_running", [False, True])
async def test_a_deleted_job_is_made_again(
    claimed_job_factory: Claimed, order_factory: Orders, sql: Sql, stage: str, is_running: bool
) -> None:
    """A job that somebody deleted, waiting or running, comes back once, with the order's priority and all its images."""
    order_id = order_factory("Free") if stage == "beautify" else await _generating(claimed_job_factory)
    if is_running:
        await claimed_job_factory.claim(stage)
    [before] = _open_jobs(order_factory, order_id)
    sql.execute("DELETE FROM jobdaemon.procrastinate_jobs WHERE id = %s", [before["id"]])
    assert await _mend(claimed_job_factory.store) == [Mended(order_id, jobs=1, failures=0)]
    [again] = _open_jobs(order_factory, order_id)
    for column in ("queue_name", "task_name", "priority", "args"):
        assert again[column] == before[column]
    assert again["status"] == "todo"
    assert await _mend(claimed_job_factory.store) == []


async def test_a_deleted_upload_is_made_again(claimed_job_factory: Claimed, order_factory: Orders, sql: Sql) -> None:
    """An image that arrived is uploaded by a new job, not generated again."""
    order_id = await _generating(claimed_job_factory)
    [job] = await claimed_job_factory.claim("generate.local")
    arrived = Transition(job, End.CHECKPOINT, writes=(generated(order_id, 1),))  # without its upload job
    await claimed_job_factory.store.commit([arrived], daemon_id=None)
    assert [order.jobs for order in await _mend(claimed_job_factory.store)] == [1]
    [upload] = [job for job in _open_jobs(order_factory, order_id) if job["queue_name"] == "upload"]
    assert upload["args"] == {"order_id": order_id, "image": 1}


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT jobdaemon.procrastinate_cancel_job_v1(%(id)s, false, false)",
        "UPDATE jobdaemon.procrastinate_jobs SET status = 'cancelled' WHERE id = %(id)s",
        "UPDATE jobdaemon.procrastinate_jobs SET status = 'aborted' WHERE id = %(id)s",
        "UPDATE jobdaemon.procrastinate_jobs SET status = 'failed' WHERE id = %(id)s",
    ],
)
@pytest.mark.parametrize("stage", ["beautify", "generate.local"])
async def test_a_cancelled_job_ends_what_it_was_for(
    claimed_job_factory: Claimed, order_factory: Orders, sql: Sql, stage: str, statement: str
) -> None:
    """A stock or SQL cancel of a job is a wish: its images fail and say so, and the order ends."""
    order_id = order_factory("Free") if stage == "beautify" else await _generating(claimed_job_factory)
    [job] = _open_jobs(order_factory, order_id)
    sql.execute(statement.encode(), {"id": job["id"]})
    [mended] = await _mend(claimed_job_factory.store)
    assert mended.ended_as == "failed"
    reason = "its job had failed" if "failed" in statement else "its job was cancelled"
    assert {(image["status"], image["error"]) for image in order_factory.images(order_id)} == {("failed", reason)}
    order = order_factory.row(order_id)
    assert (order["status"], order["error"], order["images_failed"]) == ("failed", reason, 2)


async def test_a_job_finished_by_hand_is_made_again(claimed_job_factory: Claimed, order_factory: Orders, sql: Sql) -> None:
    """A running job that somebody marks as succeeded has made nothing: its attempt's result is dropped, and it is made again."""
    order_id = await _generating(claimed_job_factory)
    [job] = await claimed_job_factory.claim("generate.local")
    sql.execute("SELECT jobdaemon.procrastinate_finish_job_v1(%s, 'succeeded', false)", [job.id])
    await claimed_job_factory.store.commit([Transition(job, End.SUCCEEDED, writes=(generated(order_id, 1),))], daemon_id=None)
    assert {image["status"] for image in order_factory.images(order_id)} == {"pending"}
    assert await _mend(claimed_job_factory.store) == [Mended(order_id, jobs=1, failures=0)]


async def test_an_order_with_nothing_left_to_do_ends(claimed_job_factory: Claimed, order_factory: Orders, sql: Sql) -> None:
    """Where an operator has failed the last images by hand, the order is counted again and ends."""
    order_id = await _generating(claimed_job_factory)
    sql.execute("UPDATE jobdaemon.images SET status = 'failed', error = 'by hand' WHERE order_id = %s", [order_id])
    [mended] = await _mend(claimed_job_factory.store)
    assert (mended.ended_as, order_factory.row(order_id)["error"]) == ("failed", "by hand")


async def test_a_call_that_was_noted_is_asked_for_and_not_bought_again(
    claimed_job_factory: Claimed, order_factory: Orders, sql: Sql
) -> None:
    """The job that comes back for a batch knows the task id that the deleted one had noted, and no other batch's."""
    order_id = await _generating(claimed_job_factory, images=7)
    for job in await claimed_job_factory.claim("generate.local", 9):
        first = min(job.image_indexes)
        noted = CallSubmitted(order_id, job.id, "local", job.image_indexes, f"task-{first}")
        await claimed_job_factory.store.commit([Transition(job, End.CHECKPOINT, writes=(noted,))], daemon_id=None)
    sql.execute("UPDATE jobdaemon.images SET status = 'stored' WHERE order_id = %s AND index IN (1, 2)", [order_id])
    sql.execute("DELETE FROM jobdaemon.procrastinate_jobs WHERE queue_name = 'generate.local'")
    assert [order.jobs for order in await _mend(claimed_job_factory.store)] == [2]
    calls = {}
    for again in _open_jobs(order_factory, order_id):
        call = await open_call(claimed_job_factory.store, order_id, again["id"])
        calls[tuple(again["args"]["images"])] = None if call is None else call.task_id
    assert calls == {(3, 4, 5): "task-1", (6, 7): "task-6"}


async def test_who_holds_the_order_comes_first(claimed_job_factory: Claimed, order_factory: Orders, sql: Sql) -> None:
    """An order that somebody holds is left to the next look; nobody waits."""
    order_id = order_factory("Free")
    sql.execute("DELETE FROM jobdaemon.procrastinate_jobs")
    with sql.transaction():
        sql.execute("SELECT FROM jobdaemon.orders WHERE id = %s FOR UPDATE", [order_id])
        async with asyncio.timeout(60):
            assert await claimed_job_factory.store.mend_orders([order_id], lambda provider: 1) == []
    assert len(await _mend(claimed_job_factory.store)) == 1


async def test_two_daemons_mend_once(engine_database: str, order_factory: Orders, sql: Sql) -> None:
    """Jobs deleted under two daemons at work, waiting and running, are made again by one of them; every order completes."""
    running: list[int] = []
    may_go = asyncio.Event()

    async def gate(attempt: Attempt) -> None:
        running.append(attempt.job.id)
        await may_go.wait()

    stages = Stages(gate)
    async with (
        running_daemon(engine_database, stages, engine=HASTY, team_size=1) as one,
        running_daemon(engine_database, stages, engine=HASTY, team_size=1) as two,
    ):
        orders = [order_factory("Free") for _ in range(4)]
        await until(lambda: len(running) == 2)
        lost = [asyncio.ensure_future(daemon.events.wait_for(LeaseLost)) for daemon in (one, two)]
        await asyncio.to_thread(sql.execute, "DELETE FROM jobdaemon.procrastinate_jobs")
        may_go.set()
        await asyncio.gather(*lost)
        await until(lambda: {order_factory.row(order_id)["status"] for order_id in orders} == {"completed"})
        told = [event for daemon in (one, two) for event in daemon.seen if isinstance(event, OrderMended)]
    assert sorted(event.order_id for event in told) == orders
    for order_id in orders:
        # those deleted while they ran do not count: what is left is one job each for the photo, the images, and each upload
        assert len(order_factory.jobs(order_id)) == 4


async def test_a_stock_cancel_is_told(engine_database: str, order_factory: Orders, sql: Sql) -> None:
    """Whoever listens to a daemon hears that an order was mended, and that it ended by it."""
    sql.execute("SELECT jobdaemon.pause_queue('beautify')")
    async with running_daemon(engine_database, Stages(), engine=HASTY) as daemon:
        settled = daemon.events.expect(OrderSettled)
        order_id = order_factory("Free")
        [job] = order_factory.jobs(order_id)
        await asyncio.to_thread(sql.execute, "SELECT jobdaemon.procrastinate_cancel_job_v1(%s, false, false)", [job["id"]])
        assert await settled.wait(60) == OrderSettled(order_id, "failed")
        assert OrderMended(order_id, jobs=0, failures=1) in daemon.seen


@pytest.mark.parametrize("queue", ["beautify", "generate.local", "upload"])
async def test_a_stock_retry_of_an_ended_order_does_not_loop(
    engine_database: str, claimed_job_factory: Claimed, order_factory: Orders, sql: Sql, queue: str
) -> None:
    """A dead letter of an ended order that somebody retries ends again after one run, and its order stays as it was."""
    store = claimed_job_factory.store
    job: Job
    if queue == "beautify":
        job = await claimed_job_factory.beautify(plan="Free")
        order_id = job.order_id or 0
    else:
        order_id = await _generating(claimed_job_factory)
        [job] = await claimed_job_factory.claim("generate.local")
        if queue == "upload":
            writes = [generated(order_id, index, upload_job(order_id, 200, index)) for index in (1, 2)]
            await store.commit([Transition(job, End.SUCCEEDED, writes=tuple(writes))], daemon_id=None)
            job, other = await claimed_job_factory.claim("upload", 2)
            await _dead(store, other)
    await _dead(store, job)
    before = order_factory.row(order_id)
    assert before["status"] == "failed"
    sql.execute("SELECT jobdaemon.procrastinate_retry_job_v2(%s, now(), NULL, NULL, NULL)", [job.id])
    stages = Stages()
    async with running_daemon(engine_database, stages, engine=HASTY):
        await until(lambda: job.id in [run[0] for run in stages.runs] and not _open_jobs(order_factory, order_id))
        await asyncio.sleep(1)  # it must not start again
    assert [run[0] for run in stages.runs] == [job.id]
    assert order_factory.row(order_id) == before


async def _dead(store: PostgresJobStore, job: Job) -> None:
    await store.commit([Transition(job, End.FAILED, writes=writes_when_dead(job, "no"), error="no")], daemon_id=None)
