"""The fence in the database: what may be committed for a job that was rescued, cancelled, ended or committed before."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from decimal import Decimal

import asyncpg
import psycopg
import pytest

from jobdaemon.domain.expand import upload_job
from jobdaemon.domain.job import Job, Task
from jobdaemon.domain.outcome import End, Transition, Verdict
from jobdaemon.domain.write import CallSubmitted, ImageFailed, OrderStarted
from jobdaemon.errors import RowsLockedError
from jobdaemon.queue.store import Committed, PostgresJobStore
from tests.daemons import until
from tests.factories import Claimed, Jobs, Sql, beautified, generated, open_call, stored

ENDS = [End.SUCCEEDED, End.RETRY, End.SNOOZE, End.HANDED_BACK, End.FAILED, End.CHECKPOINT]


async def commit(store: PostgresJobStore, *transitions: Transition) -> list[Verdict]:
    """Commit a group."""
    return (await store.commit(transitions, daemon_id=None)).verdicts


async def _generate_job(claimed: Claimed, images: int = 2) -> Job:
    job = await claimed.beautify(plan="Free", images=images)
    assert job.order_id is not None
    order_id = job.order_id
    claimed.orders.sql.execute("UPDATE jobdaemon.orders SET started_at = now() WHERE id = %s", [order_id])
    batch = {"order_id": order_id, "images": list(range(1, images + 1))}
    from jobdaemon.domain.job import NewJob

    next_job = NewJob("generate.local", Task.GENERATE, 300, batch)
    await commit(claimed.store, Transition(job, End.SUCCEEDED, writes=(beautified(order_id, next_job),)))
    [generate] = [job for job in await claimed.claim("generate.local", 100) if job.order_id == order_id]
    return generate


async def _rescue(store: PostgresJobStore, job: Job) -> None:
    assert await commit(store, Transition(job, End.INTERRUPTED)) == [Verdict.ACCEPTED]


@pytest.mark.parametrize("end", ENDS)
async def test_nothing_of_a_rescued_and_reclaimed_job(claimed_job_factory: Claimed, sql: Sql, end: End) -> None:
    """Every end, checkpoint and hand-back of an attempt whose job was rescued and claimed again is refused and writes nothing."""
    job = await _generate_job(claimed_job_factory)
    assert job.order_id is not None
    await _rescue(claimed_job_factory.store, job)
    [again] = await claimed_job_factory.claim("generate.local")
    assert again.id == job.id
    before = (claimed_job_factory.orders.images(job.order_id), claimed_job_factory.orders.jobs(job.order_id))
    late = generated(job.order_id, 1, upload_job(job.order_id, 1, 1))
    writes = (late, CallSubmitted(job.order_id, job.id, "local", (1, 2), "task"))
    assert await commit(claimed_job_factory.store, Transition(job, end, writes=writes)) == [Verdict.LEASE_LOST]
    assert (claimed_job_factory.orders.images(job.order_id), claimed_job_factory.orders.jobs(job.order_id)) == before
    assert sql.execute("SELECT * FROM jobdaemon.provider_calls").fetchall() == []
    assert await commit(claimed_job_factory.store, Transition(again, End.CHECKPOINT, writes=writes)) == [Verdict.ACCEPTED]


@pytest.mark.parametrize("end", ENDS)
async def test_the_same_transition_sent_twice(claimed_job_factory: Claimed, end: End) -> None:
    """A commit whose answer was lost may be sent again: it is accepted, and applied once."""
    job = await _generate_job(claimed_job_factory)
    assert job.order_id is not None
    transition = Transition(job, end, writes=(generated(job.order_id, 1, upload_job(job.order_id, 1, 1)),))
    for _ in range(3):
        assert await commit(claimed_job_factory.store, transition) == [Verdict.ACCEPTED]
    uploads = [row for row in claimed_job_factory.orders.jobs(job.order_id) if row["queue_name"] == "upload"]
    assert len(uploads) == 1
    [row] = [row for row in claimed_job_factory.orders.jobs(job.order_id) if row["id"] == job.id]
    assert row["attempts"] == (1 if end in (End.SUCCEEDED, End.RETRY, End.FAILED) else 0)
    events = claimed_job_factory.orders.sql.execute("SELECT count(*) AS n FROM jobdaemon.attempts").fetchone()
    assert events is not None
    assert events["n"] == (0 if end in (End.SUCCEEDED, End.CHECKPOINT) else 1)


async def test_call_is_noted_once(claimed_job_factory: Claimed, sql: Sql) -> None:
    """A provider's task id sent twice is one call; the next attempt finds it."""
    job = await _generate_job(claimed_job_factory)
    assert job.order_id is not None
    noted = Transition(job, End.CHECKPOINT, writes=(CallSubmitted(job.order_id, job.id, "local", (1, 2), "task-1"),))
    assert await open_call(claimed_job_factory.store, job.order_id, job.id) is None
    await commit(claimed_job_factory.store, noted)
    await commit(claimed_job_factory.store, noted)
    assert len(sql.execute("SELECT * FROM jobdaemon.provider_calls").fetchall()) == 1
    call = await open_call(claimed_job_factory.store, job.order_id, job.id)
    assert call is not None
    assert (call.task_id, call.images, call.key) == ("task-1", (1, 2), None)


async def test_calls_of_several_jobs_are_noted_at_once(claimed_job_factory: Claimed, sql: Sql) -> None:
    """Whatever the fence says of one of them, the others are noted: those of an open order whose attempt still has its job."""
    jobs = [await _generate_job(claimed_job_factory) for _ in range(3)]

    def notes() -> list[Transition]:
        calls = [CallSubmitted(job.order_id or 0, job.id, "local", (1, 2), key="a", price=Decimal("0.04")) for job in jobs]
        return [Transition(job, End.CHECKPOINT, writes=(call,)) for job, call in zip(jobs, calls, strict=True)]

    assert await commit(claimed_job_factory.store, *notes()[:2]) == [Verdict.ACCEPTED] * 2
    columns = "job_id, order_id, batch, provider, images, external_task_id, key_alias, price"
    rows = sql.execute(f"SELECT {columns} FROM jobdaemon.provider_calls ORDER BY job_id".encode()).fetchall()
    common = {"batch": 1, "provider": "local", "images": [1, 2], "external_task_id": None, "key_alias": "a"}
    assert rows == [{"job_id": j.id, "order_id": j.order_id, **common, "price": Decimal("0.04")} for j in jobs[:2]]
    sql.execute("SELECT jobdaemon.cancel_order(%s)", [jobs[0].order_id])
    await _rescue(claimed_job_factory.store, jobs[1])
    expected = [Verdict.ORDER_ENDED, Verdict.LEASE_LOST, Verdict.ACCEPTED]
    assert await commit(claimed_job_factory.store, *notes()) == expected
    rows = sql.execute("SELECT job_id FROM jobdaemon.provider_calls ORDER BY job_id").fetchall()
    assert [row["job_id"] for row in rows] == [job.id for job in jobs]


@pytest.mark.parametrize(
    "what", ["its order was cancelled", "its job was rescued", "its job was claimed again", "its job has ended"]
)
async def test_a_call_that_may_not_be_bought_is_not_noted(claimed_job_factory: Claimed, sql: Sql, what: str) -> None:
    """Alone too, where one statement judges and notes: nothing is written, and the attempt hears why."""
    job = await _generate_job(claimed_job_factory)
    assert job.order_id is not None
    note = Transition(job, End.CHECKPOINT, writes=(CallSubmitted(job.order_id, job.id, "local", (1, 2)),))
    match what:
        case "its order was cancelled":
            sql.execute("SELECT jobdaemon.cancel_order(%s)", [job.order_id])
        case "its job has ended":
            await commit(claimed_job_factory.store, Transition(job, End.SUCCEEDED))
        case _:
            await _rescue(claimed_job_factory.store, job)
    if what == "its job was claimed again":
        assert [again.id for again in await claimed_job_factory.claim("generate.local")] == [job.id]
    expected = Verdict.ORDER_ENDED if what == "its order was cancelled" else Verdict.LEASE_LOST
    assert await commit(claimed_job_factory.store, note) == [expected]
    assert sql.execute("SELECT FROM jobdaemon.provider_calls").fetchall() == []


async def test_a_call_of_an_order_that_somebody_holds_is_not_noted(claimed_job_factory: Claimed, sql: Sql) -> None:
    """Who is about to cancel it comes first; nobody waits for longer than a second."""
    job = await _generate_job(claimed_job_factory)
    assert job.order_id is not None
    note = Transition(job, End.CHECKPOINT, writes=(CallSubmitted(job.order_id, job.id, "local", (1, 2)),))
    with sql.transaction():
        sql.execute("SELECT FROM jobdaemon.orders WHERE id = %s FOR UPDATE", [job.order_id])
        with pytest.raises(RowsLockedError):
            await commit(claimed_job_factory.store, note)
        assert sql.execute("SELECT FROM jobdaemon.provider_calls").fetchall() == []
    assert await commit(claimed_job_factory.store, note) == [Verdict.ACCEPTED]


@pytest.mark.parametrize("what", ["its order is being cancelled", "its job is being claimed again"])
async def test_a_call_waits_for_who_is_about_to_forbid_it(
    engine_database: str, claimed_job_factory: Claimed, sql: Sql, what: str
) -> None:
    """What was there when the statement began does not count, but what is there when it has the rows."""
    job = await _generate_job(claimed_job_factory)
    assert job.order_id is not None
    note = Transition(job, End.CHECKPOINT, writes=(CallSubmitted(job.order_id, job.id, "local", (1, 2)),))

    async def noted() -> list[Verdict]:
        while True:
            with suppress(RowsLockedError):  # on a machine that stood still for a second
                return await commit(claimed_job_factory.store, note)

    with psycopg.connect(engine_database) as other:
        if what == "its order is being cancelled":
            other.execute("SELECT jobdaemon.cancel_order(%s)", [job.order_id])
        else:
            other.execute("UPDATE jobdaemon.procrastinate_jobs SET token = token + 1 WHERE id = %s", [job.id])
        noting = asyncio.create_task(noted())
        waiting = "SELECT FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        await until(lambda: sql.execute(waiting.encode()).fetchone() is not None)
    expected = Verdict.ORDER_ENDED if what == "its order is being cancelled" else Verdict.LEASE_LOST
    assert await noting == [expected]
    assert sql.execute("SELECT FROM jobdaemon.provider_calls").fetchall() == []


async def test_order_cancelled_while_its_job_runs(claimed_job_factory: Claimed, sql: Sql) -> None:
    """The running job of a cancelled order ends aborted, whatever it brings, and its writes are dropped."""
    job = await _generate_job(claimed_job_factory)
    assert job.order_id is not None
    sql.execute("SELECT jobdaemon.cancel_order(%s)", [job.order_id])
    late = (generated(job.order_id, 1, upload_job(job.order_id, 1, 1)),)
    store = claimed_job_factory.store
    assert await commit(store, Transition(job, End.CHECKPOINT, writes=late)) == [Verdict.ORDER_ENDED]
    assert await commit(store, Transition(job, End.SUCCEEDED, writes=late)) == [Verdict.ORDER_ENDED]
    rows = claimed_job_factory.orders.jobs(job.order_id)
    assert {row["id"]: row["status"] for row in rows}[job.id] == "aborted"
    assert [row for row in rows if row["queue_name"] == "upload"] == []
    assert {image["status"] for image in claimed_job_factory.orders.images(job.order_id)} == {"cancelled"}
    assert await commit(store, Transition(job, End.SUCCEEDED, writes=late)) == [Verdict.ACCEPTED], "sent again after its end"


async def test_generate_attempt_that_outlives_its_order_succeeded(claimed_job_factory: Claimed) -> None:
    """The upload of its last image may end the order first; the generate attempt that made it still counts as a success."""
    job = await _generate_job(claimed_job_factory, images=1)
    assert job.order_id is not None
    store = claimed_job_factory.store
    await commit(store, Transition(job, End.CHECKPOINT, writes=(generated(job.order_id, 1, upload_job(job.order_id, 1, 1)),)))
    [upload] = await claimed_job_factory.claim("upload")
    await commit(store, Transition(upload, End.SUCCEEDED, writes=(stored(job.order_id, 1),)))
    assert claimed_job_factory.orders.row(job.order_id)["status"] == "completed"
    assert await commit(store, Transition(job, End.SUCCEEDED)) == [Verdict.ACCEPTED]
    assert {row["status"] for row in claimed_job_factory.orders.jobs(job.order_id)} == {"succeeded"}


async def test_one_job_aborted_by_stock_means(claimed_job_factory: Claimed, sql: Sql) -> None:
    """Procrastinate's abort of one job ends it where it would run again, and takes its images along."""
    job = await _generate_job(claimed_job_factory)
    assert job.order_id is not None
    sql.execute("SELECT jobdaemon.procrastinate_cancel_job_v1(%s, true, false)", [job.id])
    assert await commit(claimed_job_factory.store, Transition(job, End.RETRY)) == [Verdict.ACCEPTED]
    assert claimed_job_factory.orders.row(job.order_id)["status"] == "failed"
    assert {image["error"] for image in claimed_job_factory.orders.images(job.order_id)} == {"the job was aborted"}


async def test_job_deleted_while_it_runs(claimed_job_factory: Claimed, sql: Sql) -> None:
    """The end of a job whose row an operator deleted is refused, and its group is none the worse."""
    job = await _generate_job(claimed_job_factory)
    other = await claimed_job_factory.beautify(plan="Free")
    assert other.order_id is not None
    sql.execute("DELETE FROM jobdaemon.procrastinate_jobs WHERE id = %s", [job.id])
    verdicts = await commit(
        claimed_job_factory.store,
        Transition(job, End.SUCCEEDED),
        Transition(other, End.CHECKPOINT, writes=(OrderStarted(other.order_id),)),
    )
    assert verdicts == [Verdict.LEASE_LOST, Verdict.ACCEPTED]
    assert claimed_job_factory.orders.row(other.order_id)["status"] == "beautifying"


async def test_retry_waits_in_the_database(claimed_job_factory: Claimed, job_factory: Jobs) -> None:
    """A retry spends an attempt and waits by the database's clock; a snooze waits and spends none; a hand-back neither."""
    expected = {End.RETRY: (1, True), End.SNOOZE: (0, True), End.HANDED_BACK: (0, False), End.INTERRUPTED: (0, False)}
    for end, (attempts, waits) in expected.items():
        job_id = job_factory(args={})
        [job] = await claimed_job_factory.claim("upload")
        assert job.id == job_id
        delay = timedelta(hours=1) if waits else None
        await commit(claimed_job_factory.store, Transition(job, end, delay=delay, error="why", error_kind="E"))
        row = job_factory.row(job_id)
        assert (row["status"], row["attempts"], row["scheduled_at"] is not None) == ("todo", attempts, waits)
        assert row["worker_id"] is None
        assert row["deaths"] == (1 if end is End.INTERRUPTED else None)
        job_factory.sql.execute("DELETE FROM jobdaemon.procrastinate_jobs WHERE id = %s", [job_id])


async def test_dead_generate_takes_only_what_had_not_arrived(claimed_job_factory: Claimed) -> None:
    """An image that arrived before its generate job died is still uploaded."""
    job = await _generate_job(claimed_job_factory)
    assert job.order_id is not None
    store = claimed_job_factory.store
    await commit(store, Transition(job, End.CHECKPOINT, writes=(generated(job.order_id, 2, upload_job(job.order_id, 1, 2)),)))
    dead = tuple(ImageFailed(job.order_id, index, "no more", was="pending") for index in (1, 2))
    await commit(store, Transition(job, End.FAILED, writes=dead))
    assert [image["status"] for image in claimed_job_factory.orders.images(job.order_id)] == ["failed", "generated"]
    assert claimed_job_factory.orders.row(job.order_id)["status"] == "uploading"


async def test_argument_that_cannot_be_sent_is_the_callers_error(store: PostgresJobStore, daemon_id: int) -> None:
    """A value asyncpg cannot encode is no lost connection: trying again would never end."""
    with pytest.raises(asyncpg.DataError):
        await store.commit([Transition(Job(2**70, "upload", "x", 0), End.SUCCEEDED)], daemon_id=None)
    assert isinstance(await store.commit([], daemon_id=None), Committed)


async def test_constraint_error_rolls_the_group_back(claimed_job_factory: Claimed) -> None:
    """A member the database refuses raises, and nothing of its group is written."""
    good, bad = await claimed_job_factory.beautify(plan="Free"), await claimed_job_factory.beautify(plan="Free")
    assert good.order_id is not None
    assert bad.order_id is not None
    broken = replace(beautified(bad.order_id), then=(upload_job(bad.order_id, 2**40, 1),))
    with pytest.raises(asyncpg.PostgresError):
        await commit(
            claimed_job_factory.store,
            Transition(good, End.SUCCEEDED, writes=(beautified(good.order_id),)),
            Transition(bad, End.SUCCEEDED, writes=(broken,)),
        )
    assert claimed_job_factory.orders.row(good.order_id)["beautified"] is None
