"""The committer on a real database: settling, telling, bad members, cancel, redrive, and many at once without a deadlock."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator

import asyncpg
import psycopg
import pytest

from jobdaemon.db import DatabaseAddress
from jobdaemon.domain.expand import WantedImage, generate_jobs, upload_job, writes_when_dead
from jobdaemon.domain.job import Job
from jobdaemon.domain.outcome import End, Transition, Verdict
from jobdaemon.domain.write import ImageFailed, OrderStarted, Write
from jobdaemon.errors import RetryableError
from jobdaemon.events import CommitFailed, Event, Events
from jobdaemon.queue.committer import Committer
from jobdaemon.queue.store import PostgresJobStore
from tests.factories import Claimed, Orders, Sql, beautified, generated, stored


@pytest.fixture
def seen() -> list[Event]:
    """Events, in order."""
    return []


@pytest.fixture
async def committer(store: PostgresJobStore, seen: list[Event]) -> AsyncIterator[Committer]:
    """A committer at work."""
    events = Events()
    events.subscribe(seen.append)
    committer = Committer(store, events)
    task = asyncio.ensure_future(committer.run())
    yield committer
    task.cancel()


class Line:
    """Drives orders through their stages by hand."""

    def __init__(self, claimed: Claimed, committer: Committer) -> None:
        self.claimed, self.committer, self.orders = claimed, committer, claimed.orders

    async def end(self, job: Job, *writes: Write, end: End = End.SUCCEEDED) -> Verdict:
        """Commit the end of one job."""
        return await self.committer.commit(Transition(job, end, writes=writes))

    async def generating(self, images: int = 2) -> Job:
        """The claimed generate job of a new order with one batch."""
        job = await self.claimed.beautify(plan="Pro", images=images, prompts=["p"])
        assert job.order_id is not None
        await self.committer.commit(Transition(job, End.CHECKPOINT, writes=(OrderStarted(job.order_id),)))
        wanted = [WantedImage(index, "p") for index in range(1, images + 1)]
        jobs = generate_jobs(job.order_id, 100, "local", wanted, 100)
        await self.end(job, beautified(job.order_id, *jobs))
        return await self.claim("generate.local", job.order_id)

    async def claim(self, queue: str, order_id: int | None) -> Job:
        """Claim one job of one order."""
        jobs = await self.claimed.claim(queue, 100)
        return next(job for job in jobs if job.order_id == order_id)

    async def uploading(self, *locators: str) -> tuple[int, list[Job]]:
        """Order id and claimed upload jobs of an order whose images lie under *locators*."""
        generate = await self.generating(len(locators))
        assert generate.order_id is not None
        order_id = generate.order_id
        writes = [
            generated(order_id, index, upload_job(order_id, 100, index), locator=locator)
            for index, locator in enumerate(locators, 1)
        ]
        await self.committer.commit(Transition(generate, End.CHECKPOINT, writes=tuple(writes)))
        await self.end(generate)
        return order_id, await self.claimed.claim("upload", len(locators))

    def status(self, order_id: int | None) -> str:
        """The order's."""
        assert order_id is not None
        return str(self.orders.row(order_id)["status"])


@pytest.fixture
def line(claimed_job_factory: Claimed, committer: Committer) -> Line:
    """Drives orders by hand."""
    return Line(claimed_job_factory, committer)


# ---------------------------------------------------------------- settling


async def test_an_order_goes_through_its_statuses(line: Line) -> None:
    """queued, beautifying, generating, uploading, completed; times are set as they happen and counts add up."""
    job = await line.claimed.beautify(plan="Free")
    order_id = job.order_id
    assert order_id is not None
    assert line.status(order_id) == "queued"
    await line.committer.commit(Transition(job, End.CHECKPOINT, writes=(OrderStarted(order_id),)))
    assert line.status(order_id) == "beautifying"
    jobs = generate_jobs(order_id, 300, "local", [WantedImage(1, "p"), WantedImage(2, "p")], 5)
    await line.end(job, beautified(order_id, *jobs))
    assert line.status(order_id) == "generating"
    generate = await line.claim("generate.local", order_id)
    first = generated(order_id, 1, upload_job(order_id, 300, 1))
    await line.committer.commit(Transition(generate, End.CHECKPOINT, writes=(first,)))
    upload = await line.claim("upload", order_id)
    await line.end(upload, stored(order_id, 1))
    order = line.orders.row(order_id)
    assert (order["status"], order["images_stored"], order["finished_at"]) == ("generating", 1, None)
    assert order["first_image_at"] is not None
    await line.committer.commit(
        Transition(generate, End.CHECKPOINT, writes=(generated(order_id, 2, upload_job(order_id, 300, 2)),))
    )
    assert line.status(order_id) == "uploading"
    await line.end(generate)
    await line.end(await line.claim("upload", order_id), stored(order_id, 2))
    ended = line.orders.row(order_id)
    assert (ended["status"], ended["images_stored"], ended["images_failed"]) == ("completed", 2, 0)
    assert ended["first_image_at"] == order["first_image_at"] < ended["finished_at"]
    assert {row["status"] for row in line.orders.jobs(order_id)} == {"succeeded"}


@pytest.mark.parametrize(("failed", "status"), [(0, "completed"), (1, "partial"), (3, "failed")])
async def test_how_an_order_ends(line: Line, failed: int, status: str) -> None:
    """One image's failure fails no sibling: partial when some were stored, failed when none was, each with a reason."""
    order_id, uploads = await line.uploading(*["artifact:a"] * 3)
    for place, upload in enumerate(uploads, 1):
        if place <= failed:
            await line.end(upload, ImageFailed(order_id, place, f"no {place}", was="generated"), end=End.FAILED)
        else:
            await line.end(upload, stored(order_id, place))
    order = line.orders.row(order_id)
    assert (order["status"], order["images_failed"], order["images_stored"]) == (status, failed, 3 - failed)
    assert order["error"] == ("no 1" if failed else None)


async def test_links_leave_the_rows_when_the_order_ends(line: Line) -> None:
    """A provider's signed URL is kept no longer than its order is open; artifact keys may stay."""
    order_id, uploads = await line.uploading("https://provider.example/x?signature=secret", "artifact:work/1/2")
    assert line.orders.images(order_id)[0]["locator"].endswith("secret")
    for index, upload in enumerate(uploads, 1):
        await line.end(upload, ImageFailed(order_id, index, "gone", was="generated"), end=End.FAILED)
    assert [image["locator"] for image in line.orders.images(order_id)] == [None, "artifact:work/1/2"]


async def test_long_locator_is_kept_whole(line: Line) -> None:
    """A locator is an address: it is cleaned of what Postgres cannot hold and never shortened."""
    url = "https://provider.example/" + "x" * 5000
    order_id, _ = await line.uploading(url + "\x00")
    assert line.orders.images(order_id)[0]["locator"] == url


# ---------------------------------------------------------------- telling


async def test_listeners_hear_at_most_ten_times_a_second_and_always_the_end(line: Line, engine_database: str) -> None:
    """NOTIFY jobdaemon_orders comes at most every 100 ms per order, the last state is never left out, the end comes at once."""
    order_id, uploads = await line.uploading(*["artifact:a"] * 40)
    heard: list[tuple[float, dict[str, object]]] = []
    listener = await asyncpg.connect(engine_database)
    arrived = asyncio.Event()

    def hear(_: object, __: int, ___: str, payload: object) -> None:
        heard.append((time.monotonic(), json.loads(str(payload))))
        arrived.set()

    async def hears(stored: int) -> None:
        async with asyncio.timeout(30):
            while not any(message["stored"] == stored for _, message in heard):
                arrived.clear()
                await arrived.wait()

    await listener.add_listener("jobdaemon_orders", hear)
    began = time.monotonic()
    for index, upload in enumerate(uploads[:-1], 1):
        await line.end(upload, stored(order_id, index))
    await hears(39)
    await line.end(uploads[-1], stored(order_id, 40))
    await hears(40)
    await listener.close()
    assert heard[-1][1] == {"order_id": order_id, "status": "completed", "stored": 40, "failed": 0, "total": 40}
    duration = heard[-1][0] - began  # not from the first one heard, which may have come late
    assert len(heard) <= duration / 0.1 + 3
    counts = [message["stored"] for _, message in heard]
    assert counts == sorted(counts)  # type: ignore[type-var]


async def test_untold_change_is_told_even_when_another_daemon_told_meanwhile(
    store: PostgresJobStore, line: Line, sql: Sql
) -> None:
    """tell_orders names the orders for which it is still too early, and nothing for orders that ended."""
    order_id, uploads = await line.uploading("artifact:a", "artifact:a")
    sql.execute("UPDATE jobdaemon.orders SET notified_at = now() + interval '1 minute' WHERE id = %s", [order_id])
    assert await store.tell_orders([order_id]) == {order_id}
    sql.execute("UPDATE jobdaemon.orders SET notified_at = now() - interval '1 minute' WHERE id = %s", [order_id])
    assert await store.tell_orders([order_id]) == set()
    for index, upload in enumerate(uploads, 1):
        await line.end(upload, stored(order_id, index))
    assert await store.tell_orders([order_id]) == set()


# ---------------------------------------------------------------- bad members


async def test_one_poisonous_member_fails_alone(line: Line, sql: Sql, seen: list[Event]) -> None:
    """The database refuses one member of a group: the others are committed, its order fails with a reason, nothing hangs."""
    sql.execute("ALTER TABLE jobdaemon.images ADD CONSTRAINT no_poison CHECK (object_key NOT LIKE '%007%')")
    order_id, uploads = await line.uploading(*["https://provider.example/?signature=secret"] * 10)
    async with asyncio.timeout(60):
        ends = (line.end(upload, stored(order_id, index)) for index, upload in enumerate(uploads, 1))
        assert set(await asyncio.gather(*ends)) == {Verdict.ACCEPTED}
    order = line.orders.row(order_id)
    assert (order["status"], order["images_stored"], order["images_failed"]) == ("partial", 9, 1)
    failed = line.orders.images(order_id)[6]
    assert "the result could not be recorded" in failed["error"]
    everything = f"{failed} {order} {sql.execute('SELECT * FROM jobdaemon.attempts').fetchall()} {seen}"
    assert "secret" not in everything, "the row that Postgres quotes holds a signed URL"
    assert sum(isinstance(event, CommitFailed) for event in seen) == 1


async def test_poisonous_checkpoint_is_the_attempts_own_error(line: Line, sql: Sql) -> None:
    """A checkpoint the database refuses fails its attempt retryably, and the committer goes on."""
    generate = await line.generating()
    assert generate.order_id is not None
    sql.execute("ALTER TABLE jobdaemon.images ADD CONSTRAINT no_poison CHECK (locator <> 'poison')")
    poison = Transition(generate, End.CHECKPOINT, writes=(generated(generate.order_id, 1, locator="poison"),))
    with pytest.raises(RetryableError, match="could not be recorded"):
        await line.committer.commit(poison)
    good = Transition(generate, End.CHECKPOINT, writes=(generated(generate.order_id, 1),))
    assert await line.committer.commit(good) is Verdict.ACCEPTED


async def test_text_that_postgres_cannot_hold_is_cleaned(line: Line) -> None:
    """NUL and lone surrogates in a provider's or a decoder's words neither fail the group nor lose the reason."""
    order_id, uploads = await line.uploading("artifact:a")
    await line.end(uploads[0], ImageFailed(order_id, 1, "bad \x00 \ud800 bytes " + "x" * 9000, was="generated"), end=End.FAILED)
    error = line.orders.images(order_id)[0]["error"]
    assert error.startswith("bad  ? bytes")
    assert len(error) == 2000


async def test_two_transitions_of_one_job_are_never_in_one_group(line: Line) -> None:
    """A rescue and an end of the same job, sent at once, are judged one after the other: the second is refused."""
    order_id, [upload] = await line.uploading("artifact:a")
    rescue = line.end(upload, end=End.INTERRUPTED)
    end = line.end(upload, stored(order_id, 1))
    assert list(await asyncio.gather(rescue, end)) == [Verdict.ACCEPTED, Verdict.LEASE_LOST]
    assert line.orders.images(order_id)[0]["status"] == "generated"


# ---------------------------------------------------------------- cancel and redrive


async def test_cancel_takes_everything_along(line: Line, sql: Sql) -> None:
    """cancel_order ends order, waiting jobs and unmade images; what is stored stays; twice is the same; unknown is JD005."""
    order_id, uploads = await line.uploading("artifact:a", "https://provider.example/?signature=secret")
    await line.end(uploads[0], stored(order_id, 1))
    await line.end(uploads[1], end=End.HANDED_BACK)
    for _ in range(2):
        row = sql.execute("SELECT jobdaemon.cancel_order(%s) AS status", [order_id]).fetchone()
        assert row == {"status": "cancelled"}
    order = line.orders.row(order_id)
    assert (order["status"], order["images_stored"], order["finished_at"] is None) == ("cancelled", 1, False)
    assert [(image["status"], image["locator"]) for image in line.orders.images(order_id)] == [
        ("stored", None),
        ("cancelled", None),
    ]
    assert sorted(row["status"] for row in line.orders.jobs(order_id)) == ["cancelled", "succeeded", "succeeded", "succeeded"]
    with pytest.raises(psycopg.Error) as caught:
        sql.execute("SELECT jobdaemon.cancel_order(%s)", [2**40])
    assert caught.value.sqlstate == "JD005"


async def test_cancel_of_a_completed_order_changes_nothing(line: Line, sql: Sql) -> None:
    """An order that ended keeps its status, and its images are not removed behind the customer's back."""
    order_id, uploads = await line.uploading("artifact:a")
    await line.end(uploads[0], stored(order_id, 1))
    assert sql.execute("SELECT jobdaemon.cancel_order(%s, true) AS status", [order_id]).fetchone() == {"status": "completed"}
    assert {row["task_name"] for row in line.orders.jobs(order_id)} == {
        "jobdaemon.beautify",
        "jobdaemon.generate",
        "jobdaemon.upload",
    }


async def test_cancel_with_removal_enqueues_it(line: Line, sql: Sql) -> None:
    """cancel_order(remove_images) leaves a job that works on the ended order and is not dropped by the fence."""
    order_id, uploads = await line.uploading("artifact:a", "artifact:a")
    await line.end(uploads[0], stored(order_id, 1))
    sql.execute("SELECT jobdaemon.cancel_order(%s, true)", [order_id])
    remove = await line.claim("upload", order_id)
    assert remove.task == "jobdaemon.remove"
    from jobdaemon.domain.write import ImagesRemoved

    assert await line.end(remove, ImagesRemoved(order_id)) is Verdict.ACCEPTED
    assert {image["status"] for image in line.orders.images(order_id)} == {"cancelled"}


def test_cancel_looks_past_other_apps_jobs(order_factory: Orders, sql: Sql) -> None:
    """Another app's job with an order_id of its own kind neither breaks a cancel nor is touched by it."""
    order_id = order_factory("Free")
    for value in ("abc", str(order_id)):
        sql.execute(
            "INSERT INTO jobdaemon.procrastinate_jobs (queue_name, task_name, args) VALUES ('mail', 'shop.ship', %s::jsonb)",
            [json.dumps({"order_id": value})],
        )
    sql.execute("SET enable_indexscan = off; SET enable_bitmapscan = off")
    sql.execute("SELECT jobdaemon.cancel_order(%s)", [order_id])
    rows = sql.execute("SELECT status FROM jobdaemon.procrastinate_jobs WHERE task_name = 'shop.ship'").fetchall()
    assert [row["status"] for row in rows] == ["todo", "todo"]


def _redrive(sql: Sql, **what: int) -> int:
    [(name, value)] = what.items()
    row = sql.execute(f"SELECT jobdaemon.redrive({name} => %s) AS n".encode(), [value]).fetchone()
    assert row is not None
    return int(row["n"])


async def _die(line: Line, job: Job) -> None:
    await line.end(job, *writes_when_dead(job, "died"), end=End.FAILED)


async def test_redrive_after_dead_beautify(line: Line, sql: Sql) -> None:
    """A redriven beautify job starts the order over; a second redrive finds nothing to do."""
    job = await line.claimed.beautify(plan="Free")
    assert job.order_id is not None
    await _die(line, job)
    assert line.status(job.order_id) == "failed"
    assert line.orders.row(job.order_id)["error"] == "died"
    assert _redrive(sql, order_id=job.order_id) == 1
    order = line.orders.row(job.order_id)
    assert (order["status"], order["error"], order["finished_at"], order["images_failed"]) == ("queued", None, None, 0)
    assert _redrive(sql, order_id=job.order_id) == 0
    again = await line.claim("beautify", job.order_id)
    assert (again.id, again.attempts, again.deaths) == (job.id, 0, 0)
    assert await line.end(again, OrderStarted(job.order_id), beautified(job.order_id)) is Verdict.ACCEPTED
    assert line.status(job.order_id) == "generating"


async def test_redrive_after_dead_generate(line: Line, sql: Sql) -> None:
    """A redriven generate job makes only what is missing; the order completes."""
    generate = await line.generating(2)
    assert generate.order_id is not None
    order_id = generate.order_id
    await line.committer.commit(
        Transition(generate, End.CHECKPOINT, writes=(generated(order_id, 1, upload_job(order_id, 1, 1)),))
    )
    await _die(line, generate)
    await line.end(await line.claim("upload", order_id), stored(order_id, 1))
    assert line.status(order_id) == "partial"
    assert _redrive(sql, order_id=order_id) == 1
    assert [image["status"] for image in line.orders.images(order_id)] == ["stored", "pending"]
    again = await line.claim("generate.local", order_id)
    await line.committer.commit(Transition(again, End.CHECKPOINT, writes=(generated(order_id, 2, upload_job(order_id, 1, 2)),)))
    await line.end(again)
    await line.end(await line.claim("upload", order_id), stored(order_id, 2))
    order = line.orders.row(order_id)
    assert (order["status"], order["images_stored"], order["images_failed"], order["error"]) == ("completed", 2, 0, None)


async def test_redrive_after_dead_upload(line: Line, sql: Sql) -> None:
    """An upload that died with its image still in the store is uploaded again, by job or by order."""
    order_id, uploads = await line.uploading("artifact:a", "artifact:b")
    for upload in uploads:
        await _die(line, upload)
    assert line.status(order_id) == "failed"
    assert _redrive(sql, job_id=uploads[0].id) == 1
    assert line.status(order_id) == "uploading"
    assert _redrive(sql, order_id=order_id) == 1
    for _ in range(2):
        [job] = await line.claimed.claim("upload")
        await line.end(job, stored(order_id, job.args["image"]))
    assert line.status(order_id) == "completed"


async def test_redrive_after_dead_upload_whose_link_is_gone(line: Line, sql: Sql) -> None:
    """An image whose URL was cleared with its order's end is made again, by the upload job turned into a generate job."""
    order_id, uploads = await line.uploading("https://provider.example/?signature=secret", "artifact:b")
    for upload in uploads:
        await _die(line, upload)
    assert _redrive(sql, order_id=order_id) == 2
    assert line.status(order_id) == "generating"
    assert [image["status"] for image in line.orders.images(order_id)] == ["pending", "generated"]
    generate = await line.claim("generate.local", order_id)
    assert (generate.id, generate.args["images"]) == (uploads[0].id, [1])
    await line.committer.commit(
        Transition(generate, End.CHECKPOINT, writes=(generated(order_id, 1, upload_job(order_id, 1, 1)),))
    )
    await line.end(generate)
    for job in await line.claimed.claim("upload", 5):
        await line.end(job, stored(order_id, job.args["image"]))
    assert line.status(order_id) == "completed"


async def test_redrive_of_a_generate_job_and_the_uploads_it_covers(line: Line, sql: Sql) -> None:
    """When a dead generate job is redriven with dead uploads whose links are gone, each image is made once."""
    generate = await line.generating(2)
    assert generate.order_id is not None
    order_id = generate.order_id
    arrived = generated(order_id, 1, upload_job(order_id, 1, 1), locator="https://provider.example/1")
    await line.committer.commit(Transition(generate, End.CHECKPOINT, writes=(arrived,)))
    await _die(line, generate)
    await _die(line, await line.claim("upload", order_id))
    assert line.status(order_id) == "failed"
    assert _redrive(sql, order_id=order_id) == 1
    assert [image["status"] for image in line.orders.images(order_id)] == ["pending", "pending"]
    assert [job.id for job in await line.claimed.claim("generate.local", 5)] == [generate.id]
    assert await line.claimed.claim("upload", 5) == []


async def test_redrive_of_one_generate_job_leaves_dead_uploads_alone(line: Line, sql: Sql) -> None:
    """An image that arrived and failed in its upload is not set waiting for an upload that nobody redrove."""
    generate = await line.generating(2)
    assert generate.order_id is not None
    order_id = generate.order_id
    await line.committer.commit(
        Transition(generate, End.CHECKPOINT, writes=(generated(order_id, 1, upload_job(order_id, 1, 1)),))
    )
    await _die(line, generate)
    await _die(line, await line.claim("upload", order_id))
    assert _redrive(sql, job_id=generate.id) == 1
    assert [image["status"] for image in line.orders.images(order_id)] == ["failed", "pending"]


async def test_redrive_of_a_job_with_nothing_left_to_do(line: Line, sql: Sql) -> None:
    """A dead job whose images are all there does not open its order for ever."""
    order_id, uploads = await line.uploading("artifact:a")
    await line.end(uploads[0], stored(order_id, 1))
    [dead] = [row for row in line.orders.jobs(order_id) if row["queue_name"] == "generate.local"]
    sql.execute("UPDATE jobdaemon.procrastinate_jobs SET status = 'failed' WHERE id = %s", [dead["id"]])
    assert _redrive(sql, order_id=order_id) == 1
    assert line.status(order_id) == "completed"
    assert await line.end(await line.claim("generate.local", order_id)) is Verdict.ACCEPTED
    assert line.status(order_id) == "completed"


async def test_redrive_refuses_what_cannot_be(line: Line, sql: Sql) -> None:
    """A cancelled order, an unknown order or job, both or neither: JD005 with the reason."""
    order_id = line.orders("Free")
    sql.execute("SELECT jobdaemon.cancel_order(%s)", [order_id])
    for call, words in {
        f"redrive({order_id})": "was cancelled and cannot be redriven",
        "redrive(999999)": "unknown order 999999",
        "redrive(job_id => 999999)": "unknown job 999999",
        "redrive()": "either an order or a job",
        f"redrive({order_id}, 1)": "either an order or a job",
    }.items():
        with pytest.raises(psycopg.Error, match=words) as caught:
            sql.execute(f"SELECT jobdaemon.{call}".encode())
        assert caught.value.sqlstate == "JD005"


# ---------------------------------------------------------------- many at once


def _all_generated(url: str) -> None:
    """Bring every order to where only its uploads are left, in an order of their own."""
    with psycopg.connect(url) as setup:
        setup.execute("UPDATE jobdaemon.procrastinate_jobs SET status = 'succeeded'")
        setup.execute("UPDATE jobdaemon.images SET status = 'generated', locator = 'artifact:a'")
        setup.execute("UPDATE jobdaemon.orders SET beautified = '{}', started_at = now()")
        setup.execute(
            "INSERT INTO jobdaemon.procrastinate_jobs (queue_name, task_name, args)"
            " SELECT 'upload', 'jobdaemon.upload', jsonb_build_object('order_id', order_id, 'image', index)"
            " FROM jobdaemon.images ORDER BY random()"
        )


async def _upload_all(store: PostgresJobStore, committer: Committer, daemon_id: int) -> None:
    """Claim and end uploads in groups of any order until none is left; a third of them dies."""
    while jobs := await store.claim("upload", daemon_id, 15):
        random.shuffle(jobs)
        ends = []
        for job in jobs:
            assert job.order_id is not None
            fails = random.random() < 0.3
            writes = writes_when_dead(job, "x") if fails else (stored(job.order_id, job.args["image"]),)
            ends.append(committer.commit(Transition(job, End.FAILED if fails else End.SUCCEEDED, writes=writes)))
        await asyncio.gather(*ends)


async def _disturb(url: str, order_ids: list[int], seconds: float) -> None:
    """Redrive and cancel orders at random; only "was cancelled" is a refusal we expect."""
    connection = await asyncpg.connect(url)
    loop = asyncio.get_running_loop()
    until = loop.time() + seconds
    refusals: set[str] = set()
    try:
        while loop.time() < until:
            # a third of the orders is cancelled some time, the others are redriven to the end
            is_cancel = random.random() < 0.01
            order_id = random.choice(order_ids[: len(order_ids) // 3] if is_cancel else order_ids)
            call = "cancel_order($1)" if is_cancel else "redrive($1)"
            try:
                await connection.execute(f"SELECT jobdaemon.{call}", order_id)
            except asyncpg.PostgresError as error:
                refusals.add(str(error.sqlstate))
    finally:
        await connection.close()
    assert refusals <= {"JD005"}


async def test_no_deadlock_and_no_lost_end_under_stress(engine_database: str, sql: Sql, daemon_id: int) -> None:
    """Groups over several orders from two committers, with cancels and redrives between: every job ends, none by an error."""
    orders = Orders(sql)
    ids = [orders("Pro", images=40) for _ in range(12)]
    _all_generated(engine_database)
    failures: list[Event] = []
    events = Events()
    events.subscribe(lambda event: failures.append(event) if isinstance(event, CommitFailed) else None)
    stores = [PostgresJobStore(DatabaseAddress(engine_database)) for _ in range(2)]
    committers = [Committer(store, events) for store in stores]
    running = [asyncio.ensure_future(committer.run()) for committer in committers]
    async with asyncio.timeout(60):
        disturbing = asyncio.gather(*(_disturb(engine_database, ids, 3.0) for _ in range(2)))
        while not disturbing.done():
            await asyncio.gather(*(_upload_all(*pair, daemon_id) for pair in zip(stores, committers, strict=True)))
        await disturbing
        await _upload_all(stores[0], committers[0], daemon_id)
    for task in running:
        task.cancel()
    for store in stores:
        await store.close()
    assert failures == []
    left = sql.execute("SELECT count(*) AS n FROM jobdaemon.procrastinate_jobs WHERE status IN ('todo', 'doing')").fetchone()
    assert left == {"n": 0}
    ends = sql.execute(
        "SELECT count(*) AS n FROM jobdaemon.procrastinate_events WHERE type IN ('succeeded', 'failed')"
    ).fetchone()
    assert ends is not None
    assert ends["n"] > 300, "there was some stress"
    assert {orders.row(order_id)["status"] for order_id in ids} <= {"completed", "partial", "failed", "cancelled"}
    deadlocks = sql.execute("SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()").fetchone()
    assert deadlocks == {"deadlocks": 0}
