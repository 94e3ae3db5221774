"""Two at the same order or queue at once, in either order, forced by locks: a clear answer, and rows that fit together."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
from psycopg.rows import dict_row

from jobdaemon.domain.expand import WantedImage, generate_jobs, upload_job, writes_when_dead
from jobdaemon.domain.job import Job
from jobdaemon.domain.outcome import End, Transition, Verdict
from jobdaemon.domain.picking import LIFTED_PRIORITY
from tests.daemons import until
from tests.factories import Claimed, Jobs, Orders, Row, Sql, beautified, generated, stored


async def _blocked(sql: Sql) -> None:
    """Wait until a connection to this database waits for a lock."""
    query = "SELECT count(*) AS n FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    await until(lambda: sql.execute(query).fetchone() != {"n": 0})


@contextmanager
def _open(url: str, statement: str, *values: object) -> Iterator[Any]:
    """Run *statement* in a transaction that is committed when the block ends; gives what it answered."""
    with psycopg.connect(url, row_factory=dict_row) as connection:
        row = connection.execute(statement.encode(), values).fetchone()
        yield None if row is None else row.get("answer")


def _call(url: str, statement: str, *values: object) -> Any:
    """What one statement answers, or the sentence with which it is refused."""
    with psycopg.connect(url, autocommit=True, row_factory=dict_row) as connection:
        try:
            row = connection.execute(statement.encode(), values).fetchone()
        except psycopg.DatabaseError as error:
            return error.sqlstate, error.diag.message_primary
    return None if row is None else row["answer"]


async def _meanwhile(url: str, sql: Sql, holder: str, waiter: str, *values: object) -> tuple[Any, Any]:
    """*waiter* comes while *holder* has done its work and has not committed yet; what both answer."""
    with _open(url, holder, *values) as first:
        second = asyncio.create_task(asyncio.to_thread(_call, url, waiter, *values))
        await _blocked(sql)
    return first, await asyncio.wait_for(second, 10)


CANCEL = "SELECT jobdaemon.cancel_order(%s) AS answer"
REDRIVE = "SELECT jobdaemon.redrive(%s) AS answer"


async def _uploading(claimed: Claimed, images: int = 2) -> tuple[int, list[Job]]:
    """An order whose images were all made, and its upload jobs at work."""
    order_id = claimed.orders("Start", images=images)
    [job] = await claimed.claim("beautify")
    jobs = generate_jobs(order_id, 200, "local", [WantedImage(n, "p") for n in range(1, images + 1)], images)
    await claimed.store.commit([Transition(job, End.SUCCEEDED, writes=(beautified(order_id, *jobs),))], daemon_id=None)
    [job] = await claimed.claim("generate.local")
    writes = tuple(generated(order_id, n, upload_job(order_id, 200, n)) for n in range(1, images + 1))
    await claimed.store.commit([Transition(job, End.SUCCEEDED, writes=writes)], daemon_id=None)
    return order_id, await claimed.claim("upload", images)


async def _partial(claimed: Claimed) -> int:
    """An order that ended partial: one image stored, the other's upload given up."""
    order_id, [good, bad] = await _uploading(claimed)
    await claimed.store.commit([Transition(good, End.SUCCEEDED, writes=(stored(order_id, 1),))], daemon_id=None)
    failed = Transition(bad, End.FAILED, writes=writes_when_dead(bad, "no"), error="no", error_kind="Kind")
    await claimed.store.commit([failed], daemon_id=None)
    assert claimed.orders.row(order_id)["status"] == "partial"
    return order_id


async def _half_dead(claimed: Claimed) -> int:
    """An open order of which one upload was given up and the other waits."""
    order_id, [_, bad] = await _uploading(claimed)
    failed = Transition(bad, End.FAILED, writes=writes_when_dead(bad, "no"), error="no", error_kind="Kind")
    await claimed.store.commit([failed], daemon_id=None)
    return order_id


def _state(orders: Orders, order_id: int) -> tuple[str, list[str], list[str]]:
    """Status of the order, of its images, and of its upload jobs; its counters are those of its images."""
    order, images = orders.row(order_id), [image["status"] for image in orders.images(order_id)]
    assert (order["images_stored"], order["images_failed"]) == (images.count("stored"), images.count("failed"))
    assert (order["finished_at"] is None) == (order["status"] in ("queued", "beautifying", "generating", "uploading"))
    return order["status"], images, [job["status"] for job in orders.jobs(order_id) if job["queue_name"] == "upload"]


# -- Cancel and redrive -------------------------------------------------------------------------------------------------------


async def test_redrive_comes_while_cancel_is_at_it(claimed_job_factory: Claimed, engine_database: str, sql: Sql) -> None:
    """It waits and is told that the order was cancelled; nothing is revived."""
    order_id = await _half_dead(claimed_job_factory)
    cancelled, redriven = await _meanwhile(engine_database, sql, CANCEL, REDRIVE, order_id)
    assert (cancelled, redriven) == ("cancelled", ("JD005", f"order {order_id} was cancelled and cannot be redriven"))
    assert _state(claimed_job_factory.orders, order_id) == ("cancelled", ["cancelled", "failed"], ["doing", "failed"])
    running = claimed_job_factory.orders.jobs(order_id)[-2]
    assert running["abort_requested"]


async def test_cancel_comes_while_redrive_is_at_it(claimed_job_factory: Claimed, engine_database: str, sql: Sql) -> None:
    """It waits and cancels what was revived; what runs is asked to stop."""
    order_id = await _half_dead(claimed_job_factory)
    redriven, cancelled = await _meanwhile(engine_database, sql, REDRIVE, CANCEL, order_id)
    assert (redriven, cancelled) == (1, "cancelled")
    assert _state(claimed_job_factory.orders, order_id) == ("cancelled", ["cancelled", "cancelled"], ["doing", "cancelled"])


async def test_cancel_comes_while_redrive_opens_an_ended_order(
    claimed_job_factory: Claimed, engine_database: str, sql: Sql
) -> None:
    """An order that redrive has opened again is an open one: it is cancelled, and the stored image stays."""
    order_id = await _partial(claimed_job_factory)
    redriven, cancelled = await _meanwhile(engine_database, sql, REDRIVE, CANCEL, order_id)
    assert (redriven, cancelled) == (1, "cancelled")
    assert _state(claimed_job_factory.orders, order_id) == ("cancelled", ["stored", "cancelled"], ["succeeded", "cancelled"])


async def test_redrive_after_a_cancel_that_came_too_late(claimed_job_factory: Claimed, engine_database: str, sql: Sql) -> None:
    """Cancelling an ended order changes nothing, so that a redrive that waits for it finds what it came for."""
    order_id = await _partial(claimed_job_factory)
    cancelled, redriven = await _meanwhile(engine_database, sql, CANCEL, REDRIVE, order_id)
    assert (cancelled, redriven) == ("partial", 1)
    assert _state(claimed_job_factory.orders, order_id) == ("uploading", ["stored", "generated"], ["succeeded", "todo"])


async def test_two_redrives(claimed_job_factory: Claimed, engine_database: str, sql: Sql) -> None:
    """The second finds nothing that has failed any more, and no job is there twice."""
    order_id = await _partial(claimed_job_factory)
    assert await _meanwhile(engine_database, sql, REDRIVE, REDRIVE, order_id) == (1, 0)
    assert _state(claimed_job_factory.orders, order_id) == ("uploading", ["stored", "generated"], ["succeeded", "todo"])


async def test_two_cancels(claimed_job_factory: Claimed, engine_database: str, sql: Sql) -> None:
    """Both are told that it is cancelled; listeners hear of it once."""
    order_id = await _half_dead(claimed_job_factory)
    with psycopg.connect(engine_database, autocommit=True) as listener:
        listener.execute("LISTEN jobdaemon_orders")
        assert await _meanwhile(engine_database, sql, CANCEL, CANCEL, order_id) == ("cancelled", "cancelled")
        listener.execute("SELECT 1")
        assert len(list(listener.notifies(timeout=0.2))) == 1


# -- Cancel and the engine ----------------------------------------------------------------------------------------------------


async def _held_image(
    url: str, sql: Sql, order_id: int, commit: Callable[[], Awaitable[Any]], statement: str, *values: object
) -> tuple[Any, Any]:
    """*statement* comes while a commit has the order's and the job's lock and is about to write the image."""
    with psycopg.connect(url) as somebody:
        somebody.execute("SELECT FROM jobdaemon.images WHERE order_id = %s FOR UPDATE", [order_id])
        committing = asyncio.ensure_future(commit())
        await _blocked(sql)
        waiting = asyncio.create_task(asyncio.to_thread(_call, url, statement, *values))
        query = "SELECT count(*) AS n FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        await until(lambda: sql.execute(query).fetchone() == {"n": 2})
        somebody.commit()
    return await asyncio.wait_for(committing, 10), await asyncio.wait_for(waiting, 10)


async def test_cancel_comes_while_the_last_image_is_stored(claimed_job_factory: Claimed, engine_database: str, sql: Sql) -> None:
    """The commit was first: the order is completed, and so is cancel told; every row is that of a completed order."""
    order_id, [upload] = await _uploading(claimed_job_factory, images=1)
    last = Transition(upload, End.SUCCEEDED, writes=(stored(order_id, 1),))
    committed, answer = await _held_image(
        engine_database,
        sql,
        order_id,
        lambda: claimed_job_factory.store.commit([last], daemon_id=None),
        "SELECT jobdaemon.cancel_order(%s, true) AS answer",
        order_id,
    )
    assert (committed.verdicts, answer) == ([Verdict.ACCEPTED], "completed")
    # nothing is removed from an order that was not cancelled
    assert _state(claimed_job_factory.orders, order_id) == ("completed", ["stored"], ["succeeded"])


async def test_the_last_image_comes_while_cancel_is_at_it(claimed_job_factory: Claimed, engine_database: str, sql: Sql) -> None:
    """Cancel was first: the commit waits, hears that the order ended, writes nothing, and its job ends aborted."""
    order_id, [upload] = await _uploading(claimed_job_factory, images=1)
    last = Transition(upload, End.SUCCEEDED, writes=(stored(order_id, 1),))
    with _open(engine_database, CANCEL, order_id) as answer:
        committing = asyncio.ensure_future(claimed_job_factory.store.commit([last], daemon_id=None))
        await _blocked(sql)
    committed = await asyncio.wait_for(committing, 10)
    assert (answer, committed.verdicts) == ("cancelled", [Verdict.ORDER_ENDED])
    assert _state(claimed_job_factory.orders, order_id) == ("cancelled", ["cancelled"], ["aborted"])


async def test_redrive_comes_while_the_last_image_is_stored(claimed_job_factory: Claimed, engine_database: str, sql: Sql) -> None:
    """The commit ends the order partial, and redrive opens it again for the image that had failed."""
    order_id, [good, bad] = await _uploading(claimed_job_factory)
    failed = Transition(bad, End.FAILED, writes=writes_when_dead(bad, "no"), error="no", error_kind="Kind")
    await claimed_job_factory.store.commit([failed], daemon_id=None)
    last = Transition(good, End.SUCCEEDED, writes=(stored(order_id, 1),))
    committed, answer = await _held_image(
        engine_database, sql, order_id, lambda: claimed_job_factory.store.commit([last], daemon_id=None), REDRIVE, order_id
    )
    assert (committed.verdicts, [change.status for change in committed.changes], answer) == ([Verdict.ACCEPTED], ["partial"], 1)
    assert _state(claimed_job_factory.orders, order_id) == ("uploading", ["stored", "generated"], ["succeeded", "todo"])


async def test_a_claim_passes_by_what_cancel_holds(claimed_job_factory: Claimed, engine_database: str) -> None:
    """A job of an order that is being cancelled is not claimed; the next one is, without waiting."""
    first, second = claimed_job_factory.orders("Free"), claimed_job_factory.orders("Free")
    with _open(engine_database, CANCEL, first):
        [job] = await asyncio.wait_for(claimed_job_factory.claim("beautify"), 5)
    assert job.order_id == second
    assert await claimed_job_factory.claim("beautify") == []


async def test_cancel_comes_while_a_job_is_claimed(
    claimed_job_factory: Claimed, order_factory: Orders, engine_database: str, sql: Sql
) -> None:
    """It waits for the claim and asks the job that now runs to stop."""
    order_id = order_factory("Free")
    claim = "SELECT id AS answer FROM jobdaemon.claim_jobs('beautify', %s, 1)"
    with _open(engine_database, claim, claimed_job_factory.daemon_id):
        cancelling = asyncio.create_task(asyncio.to_thread(_call, engine_database, CANCEL, order_id))
        await _blocked(sql)
    assert await asyncio.wait_for(cancelling, 10) == "cancelled"
    [job] = order_factory.jobs(order_id)
    assert (job["status"], job["abort_requested"]) == ("doing", True)


# -- Priority and the jobs that follow ----------------------------------------------------------------------------------------


PRIORITIZE = "SELECT jobdaemon.prioritize_order(%s, 777) AS answer"
LIFT = "SELECT jobdaemon.lift_orders(9) AS answer"


async def _beautified(claimed: Claimed) -> tuple[int, Transition]:
    """An old order of Pro at its first stage, and the transition that makes its generate job."""
    order_id = claimed.orders("Pro", images=1)
    claimed.orders.sql.execute("UPDATE jobdaemon.orders SET waits_from = now() - interval '1 hour'")
    [job] = await claimed.claim("beautify")
    jobs = generate_jobs(order_id, 100, "local", [WantedImage(1, "p")], 1)
    return order_id, Transition(job, End.SUCCEEDED, writes=(beautified(order_id, *jobs),))


def _priorities(orders: Orders, order_id: int) -> set[int]:
    return {job["priority"] for job in orders.jobs(order_id) if job["status"] == "todo"}


@pytest.mark.parametrize(("change", "priority"), [(PRIORITIZE, 777), (LIFT, LIFTED_PRIORITY)])
async def test_a_stage_ends_while_its_orders_priority_changes(
    claimed_job_factory: Claimed, engine_database: str, sql: Sql, change: str, priority: int
) -> None:
    """The commit waits, and the jobs that it makes have the priority that was set meanwhile."""
    order_id, end = await _beautified(claimed_job_factory)
    values = [order_id] if change == PRIORITIZE else []
    with _open(engine_database, change, *values):
        committing = asyncio.ensure_future(claimed_job_factory.store.commit([end], daemon_id=None))
        await _blocked(sql)
    assert (await asyncio.wait_for(committing, 10)).verdicts == [Verdict.ACCEPTED]
    assert _priorities(claimed_job_factory.orders, order_id) == {priority}


async def test_a_priority_changes_while_a_stage_ends(claimed_job_factory: Claimed, engine_database: str, sql: Sql) -> None:
    """It waits for the commit, and reaches the job that this has just made."""
    order_id = claimed_job_factory.orders("Pro", images=1)
    [job] = await claimed_job_factory.claim("beautify")
    generate = generate_jobs(order_id, 100, "local", [WantedImage(1, "p")], 1)
    done = Transition(job, End.SUCCEEDED, writes=(beautified(order_id, *generate),))
    await claimed_job_factory.store.commit([done], daemon_id=None)
    [job] = await claimed_job_factory.claim("generate.local")
    made = Transition(job, End.SUCCEEDED, writes=(generated(order_id, 1, upload_job(order_id, 100, 1)),))
    committed, waiting = await _held_image(
        engine_database, sql, order_id, lambda: claimed_job_factory.store.commit([made], daemon_id=None), PRIORITIZE, order_id
    )
    assert (committed.verdicts, waiting) == ([Verdict.ACCEPTED], 1)
    assert _priorities(claimed_job_factory.orders, order_id) == {777}


# -- Queues -------------------------------------------------------------------------------------------------------------------


RESIZE = "SELECT jobdaemon.resize_queue('upload', 3, 30) AS answer"
UPDATE = "UPDATE jobdaemon.queues SET team_size = 4, fair_share = 2 WHERE name = 'upload' RETURNING name AS answer"


def _limits(sql: Sql) -> Row | None:
    return sql.execute(
        "SELECT paused, team_size, cluster_limit, fair_share FROM jobdaemon.queues WHERE name = 'upload'"
    ).fetchone()


@pytest.mark.parametrize(
    ("first", "second", "limits"),
    [
        (RESIZE, UPDATE, (False, 4, 30, 2)),
        (UPDATE, RESIZE, (False, 3, 30, 2)),
        (RESIZE, "SELECT jobdaemon.pause_queue('upload') AS answer", (True, 3, 30, None)),
        (
            "SELECT jobdaemon.pause_queue('upload') AS answer",
            "SELECT jobdaemon.resume_queue('upload') AS answer",
            (False,) + (None,) * 3,
        ),
        (RESIZE, "SELECT jobdaemon.resize_queue('upload', unset => '{team_size}') AS answer", (False, None, 30, None)),
    ],
)
async def test_two_operators_at_one_queue(
    engine_database: str, sql: Sql, first: str, second: str, limits: tuple[object, ...]
) -> None:
    """Whatever the door, the second waits, wins in what it sets and leaves the rest as the first one made it."""
    await _meanwhile(engine_database, sql, first, second)
    row = _limits(sql)
    assert row is not None
    assert tuple(row.values()) == limits


async def test_a_wrong_value_leaves_the_first_operators(engine_database: str, sql: Sql) -> None:
    """The second one, who waited, is refused in one sentence; what the first one set holds."""
    wrong = "UPDATE jobdaemon.queues SET team_size = -1 WHERE name = 'upload' RETURNING name AS answer"
    _, answer = await _meanwhile(engine_database, sql, RESIZE, wrong)
    assert answer == ("JD004", "a team size must be 0 to 10000, not -1")
    assert _limits(sql) == {"paused": False, "team_size": 3, "cluster_limit": 30, "fair_share": None}


async def test_a_limit_shrinks_while_jobs_are_claimed(
    claimed_job_factory: Claimed, job_factory: Jobs, engine_database: str, sql: Sql
) -> None:
    """The first claim after the change waits for the one under way and counts what it took: the new limit holds from then on."""
    sql.execute("SELECT jobdaemon.resize_queue('upload', cluster_limit => 5)")
    for _ in range(9):
        job_factory("upload")
    claim = "SELECT count(*) AS answer FROM jobdaemon.claim_jobs('upload', %s, 4)"
    with _open(engine_database, claim, claimed_job_factory.daemon_id) as taken:
        assert _call(engine_database, "SELECT jobdaemon.resize_queue('upload', cluster_limit => 2) AS answer") is not None
        claiming = asyncio.ensure_future(claimed_job_factory.claim("upload", 4))
        await _blocked(sql)
    assert (taken, await asyncio.wait_for(claiming, 10)) == (4, [])
