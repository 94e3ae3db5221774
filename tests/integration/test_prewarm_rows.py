"""Prewarms as rows: the door, the job, what is kept, and what becomes of a job that others have their hands on."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from threading import Barrier

import psycopg
import pytest

from jobdaemon.domain.outcome import End, Transition, Verdict
from jobdaemon.errors import StoreRefusedError
from jobdaemon.events import Events
from jobdaemon.queue.prewarmed import PrewarmedKeeper
from jobdaemon.queue.store import PostgresJobStore
from tests.factories import BACKEND, SOURCE, Orders, Row, Sql, prewarmed
from tests.fakes import FakeArtifacts

HOUR = timedelta(hours=1)


def prewarm(sql: Sql, source: str = SOURCE) -> Row:
    row = sql.execute("SELECT * FROM jobdaemon.prewarm(%s)", [source]).fetchone()
    assert row is not None
    return row


def job(sql: Sql, job_id: int) -> Row:
    row = sql.execute("SELECT * FROM jobdaemon.procrastinate_jobs WHERE id = %s", [job_id]).fetchone()
    assert row is not None
    return row


def refusal(sql: Sql, source: str | None) -> tuple[str | None, str | None]:
    with pytest.raises(psycopg.Error) as caught:
        sql.execute("SELECT jobdaemon.prewarm(%s)", [source])
    return caught.value.sqlstate, caught.value.diag.message_primary


# -- the door


def test_a_source_is_one_open_job(sql: Sql) -> None:
    """The same source again is the same job while that is open, waiting or running; after its end it is a new one."""
    first = prewarm(sql)
    assert first["created"]
    assert prewarm(sql) == {"job_id": first["job_id"], "created": False}
    row = job(sql, first["job_id"])
    assert (row["queue_name"], row["task_name"], row["args"]) == ("beautify", "jobdaemon.prewarm", {"source": SOURCE})
    for status, is_new in (("doing", False), ("succeeded", True)):
        sql.execute("UPDATE jobdaemon.procrastinate_jobs SET status = %s", [status])
        assert prewarm(sql)["created"] is is_new


def test_who_asks_at_once_gets_one_job(engine_database: str, sql: Sql) -> None:
    """Twenty callers of the same three sources at one moment: three jobs."""
    sources = [f"artifact:sources/{name}.jpg" for name in "abc"]
    begin = Barrier(20)

    def ask(_: int) -> list[tuple[int, bool]]:
        with psycopg.connect(engine_database, autocommit=True) as app:
            begin.wait(30)
            return [app.execute("SELECT * FROM jobdaemon.prewarm(%s)", [source]).fetchone() for source in sources]  # type: ignore[misc]

    with ThreadPoolExecutor(20) as pool:
        answers = [answer for answers in pool.map(ask, range(20)) for answer in answers]
    assert Counter(Counter(job_id for job_id, _ in answers).values()) == {20: 3}
    assert sum(created for _, created in answers) == 3
    assert sql.execute("SELECT count(*) AS n FROM jobdaemon.procrastinate_jobs").fetchone() == {"n": 3}


@pytest.mark.parametrize(
    "source",
    [
        None,
        "",
        "/etc/passwd",
        "http://photos.example/a.jpg",
        "https://",
        "https://photos.example/a b.jpg",
        "https://photos.example/a\n.jpg",
        "file:///etc/passwd",
        "artifact:",
        "artifact:../secret",
        "artifact:a/./b",
        "artifact:/a",
        "https://photos.example/" + "x" * 4096,
    ],
)
def test_bad_sources_are_those_of_orders(sql: Sql, source: str | None) -> None:
    """What the door refuses of an order it refuses of a prewarm, in the same words, and no job is left."""
    refused = refusal(sql, source)
    assert refused == ("JD004", "bad source: it must be https://… or artifact:<key>, of at most 4096 bytes")
    with pytest.raises(psycopg.Error) as caught:
        sql.execute("SELECT jobdaemon.enqueue_order('Free', %s)", [source])
    assert (caught.value.sqlstate, caught.value.diag.message_primary) == refused
    assert sql.execute("SELECT FROM jobdaemon.procrastinate_jobs").fetchall() == []


@pytest.mark.parametrize("source", ["https://photos.example/" + "x" * 4000, "artifact:prewarmed/a-1.jpg", "https://h?q=é"])
def test_good_sources_are_those_of_orders(sql: Sql, source: str) -> None:
    """What the door takes for an order it takes for a prewarm."""
    assert prewarm(sql, source)["created"]
    sql.execute("SELECT jobdaemon.enqueue_order('Free', %s)", [source])


def test_only_so_many_are_open(sql: Sql) -> None:
    """A full door refuses new sources and no known one, opens when one has ended, and can be shut."""
    sql.execute("UPDATE jobdaemon.queues SET max_prewarms = 2 WHERE name = 'beautify'")
    first, second = (prewarm(sql, f"artifact:{name}")["job_id"] for name in "ab")
    sql.execute("UPDATE jobdaemon.procrastinate_jobs SET status = 'doing' WHERE id = %s", [second])
    assert refusal(sql, "artifact:c") == ("JD002", "queue full: as many prewarms are open as may be (2)")
    assert prewarm(sql, "artifact:a") == {"job_id": first, "created": False}
    sql.execute("UPDATE jobdaemon.procrastinate_jobs SET status = 'failed' WHERE id = %s", [second])
    assert prewarm(sql, "artifact:c")["created"]
    sql.execute("UPDATE jobdaemon.queues SET max_prewarms = 0 WHERE name = 'beautify'")
    assert refusal(sql, "artifact:d") == ("JD002", "prewarming is switched off: max_prewarms of queue beautify is 0")


@pytest.mark.parametrize("value", ["-1", "1001", "NULL"])
def test_impossible_doors(sql: Sql, value: str) -> None:
    """A bound that cannot be is refused in a sentence, and nothing changes."""
    with pytest.raises(psycopg.Error) as caught:
        sql.execute(f"UPDATE jobdaemon.queues SET max_prewarms = {value} WHERE name = 'beautify'".encode())
    assert (caught.value.sqlstate, caught.value.diag.message_primary) == ("JD004", f"max_prewarms must be 0 to 1000, not {value}")


def test_a_database_without_rows(database: str) -> None:
    """Before any daemon or `config apply` the door says what is missing."""
    with psycopg.connect(database, autocommit=True) as connection, pytest.raises(psycopg.Error, match="unknown queue") as caught:
        connection.execute("SELECT jobdaemon.prewarm('artifact:a')")
    assert caught.value.sqlstate == "JD005"


# -- the job


async def test_a_prewarm_that_ended_well_is_kept(store: PostgresJobStore, daemon_id: int, sql: Sql) -> None:
    """One commit ends the job and keeps the photo, which is given for that photo and that backend only, and counted."""
    prewarm(sql)
    [claimed] = await store.claim("beautify", daemon_id, 1)
    done = Transition(claimed, End.SUCCEEDED, writes=(prewarmed(7),))
    assert (await store.commit([done], daemon_id=daemon_id)).verdicts == [Verdict.ACCEPTED]
    # The answer to the commit was lost: it is sent again.
    assert (await store.commit([done], daemon_id=daemon_id)).verdicts == [Verdict.ACCEPTED]
    assert job(sql, claimed.id)["status"] == "succeeded"
    photo = f"{7:064x}"
    found = await store.prewarmed.find(photo, BACKEND)
    assert found is not None
    await store.prewarmed.used(found.id)
    assert (found.artifact, found.faces, found.model) == (prewarmed(7).artifact, 1, "test 1")
    assert await store.prewarmed.find(photo, "0" * 64) is None
    assert await store.prewarmed.find(f"{8:064x}", BACKEND) is None
    stats = "SELECT waiting, running, kept, bytes, used FROM jobdaemon.prewarm_stats"
    assert sql.execute(stats).fetchone() == {"waiting": 0, "running": 0, "kept": 1, "bytes": 10, "used": 1}
    await store.prewarmed.forget(found.id)
    assert await store.prewarmed.find(photo, BACKEND) is None
    assert sql.execute(stats).fetchone() == {"waiting": 0, "running": 0, "kept": 0, "bytes": 0, "used": 0}


async def test_of_two_at_once_one_is_kept(store: PostgresJobStore, daemon_id: int, sql: Sql) -> None:
    """The same photo under two sources, made at one moment: the first is kept, and what the other left is deleted."""
    prewarm(sql, "artifact:a")
    prewarm(sql, "artifact:b")
    prewarm(sql, "artifact:c")
    jobs = await store.claim("beautify", daemon_id, 3)
    made = [prewarmed(n, photo=1) for n in (1, 2, 3)]
    await store.commit([Transition(jobs[n], End.SUCCEEDED, writes=(made[n],)) for n in (0, 1)], daemon_id=daemon_id)
    await store.commit([Transition(jobs[2], End.SUCCEEDED, writes=(made[2],))], daemon_id=daemon_id)
    artifacts = FakeArtifacts({photo.artifact.key: b"x" for photo in made})
    await PrewarmedKeeper(store.prewarmed, artifacts, Events(), ttl=HOUR, max_bytes=100).trim()
    found = await store.prewarmed.find(f"{1:064x}", BACKEND)
    assert found is not None
    assert list(artifacts.objects) == [found.artifact.key]
    assert len(sql.execute("SELECT FROM jobdaemon.prewarmed").fetchall()) == 1


async def test_an_order_waits_for_nobody_who_holds_the_row(
    store: PostgresJobStore, daemon_id: int, sql: Sql, engine_database: str
) -> None:
    """Who has locked the row of a prewarmed photo keeps no order from it: only the count of uses misses one."""
    prewarm(sql)
    [claimed] = await store.claim("beautify", daemon_id, 1)
    await store.commit([Transition(claimed, End.SUCCEEDED, writes=(prewarmed(7),))], daemon_id=daemon_id)
    with psycopg.connect(engine_database) as other:
        other.execute("SELECT FROM jobdaemon.prewarmed FOR UPDATE")
        found = await store.prewarmed.find(f"{7:064x}", BACKEND)
        assert found is not None
        await store.prewarmed.used(found.id)
        await store.prewarmed.forget(found.id)
    assert sql.execute("SELECT uses, dropped_at FROM jobdaemon.prewarmed").fetchone() == {"uses": 0, "dropped_at": None}


async def test_what_cannot_be_deleted_stands_in_nobody_s_way(store: PostgresJobStore, sql: Sql) -> None:
    """However many artifacts the store will not delete, those given up after them go; the failure is told, and tried again."""

    class Stubborn(FakeArtifacts):
        async def delete(self, key: str) -> None:
            if key.startswith("prewarmed/1/"):
                raise StoreRefusedError(f"{key} may not be deleted")
            await super().delete(key)

    for folder, count in ((1, 250), (2, 250)):
        sql.execute(
            "INSERT INTO jobdaemon.prewarmed (photo, backend, artifact, sha256, bytes, media_type, width, height, faces,"
            " unrestored, model, device, dropped_at) SELECT repeat('a', 64), repeat('b', 64),"
            " format('prewarmed/%%s/%%s.jpg', %s::int, n), '', 1, 'image/jpeg', 1, 1, 0, 0, '', '', now()"
            " FROM generate_series(1, %s) AS n",
            [folder, count],
        )
    artifacts = Stubborn({f"prewarmed/{folder}/{n}.jpg": b"x" for folder in (1, 2) for n in range(1, 251)})
    with pytest.raises(StoreRefusedError):
        await PrewarmedKeeper(store.prewarmed, artifacts, Events(), ttl=HOUR, max_bytes=100).trim()
    assert len(artifacts.objects) == 250
    assert sql.execute("SELECT count(*) FROM jobdaemon.prewarmed").fetchone() == {"count": 250}


async def test_no_artifact_is_without_a_row(store: PostgresJobStore, daemon_id: int, sql: Sql) -> None:
    """What was announced and never kept is deleted after an hour; what was kept stays, and nothing tells of it twice."""
    prewarm(sql)
    [claimed] = await store.claim("beautify", daemon_id, 1)
    lost, kept = prewarmed(1), prewarmed(2)
    for photo in (lost, kept):
        await store.prewarmed.announce(photo)
    assert await store.prewarmed.find(kept.photo, BACKEND) is None
    artifacts = FakeArtifacts({photo.artifact.key: b"x" for photo in (lost, kept)})
    keeper = PrewarmedKeeper(store.prewarmed, artifacts, Events(), ttl=HOUR, max_bytes=100)
    await keeper.trim()
    assert len(artifacts.objects) == 2  # they may be on their way
    await store.commit([Transition(claimed, End.SUCCEEDED, writes=(kept,))], daemon_id=daemon_id)
    sql.execute("UPDATE jobdaemon.prewarmed SET dropped_at = dropped_at - interval '1 hour'")
    await keeper.trim()
    assert list(artifacts.objects) == [kept.artifact.key]
    assert sql.execute("SELECT artifact, dropped_at FROM jobdaemon.prewarmed").fetchall() == [
        {"artifact": kept.artifact.key, "dropped_at": None}
    ]


async def test_what_is_old_or_too_much_goes(store: PostgresJobStore, daemon_id: int, sql: Sql) -> None:
    """Upkeep gives up what is older than the ttl, then the oldest until the rest fits, and deletes row and artifact."""
    for n in range(5):
        prewarm(sql, f"artifact:{n}")
    jobs = await store.claim("beautify", daemon_id, 5)
    made = [prewarmed(n, 10) for n in range(5)]
    await store.commit(
        [Transition(claimed, End.SUCCEEDED, writes=(photo,)) for claimed, photo in zip(jobs, made, strict=True)],
        daemon_id=daemon_id,
    )
    sql.execute("UPDATE jobdaemon.prewarmed SET made_at = now() - interval '2 hours' WHERE artifact = 'prewarmed/4.jpg'")
    sql.execute(
        "UPDATE jobdaemon.prewarmed SET made_at = now() - interval '1 minute' * (50 - substr(artifact, 11, 1)::integer)"
        " WHERE artifact <> 'prewarmed/4.jpg'"
    )
    artifacts = FakeArtifacts({photo.artifact.key: b"x" for photo in made})
    keeper = PrewarmedKeeper(store.prewarmed, artifacts, Events(), ttl=HOUR, max_bytes=25)
    await keeper.trim()
    assert sorted(artifacts.objects) == ["prewarmed/2.jpg", "prewarmed/3.jpg"]
    rows = sql.execute("SELECT artifact FROM jobdaemon.prewarmed ORDER BY artifact").fetchall()
    assert [row["artifact"] for row in rows] == ["prewarmed/2.jpg", "prewarmed/3.jpg"]
    await keeper.trim()
    assert len(artifacts.objects) == 2


async def test_a_prewarm_that_waited_too_long_is_cancelled(store: PostgresJobStore, daemon_id: int, sql: Sql) -> None:
    """What nobody had time for within the ttl is cancelled; younger prewarms, those that run, and orders are not."""
    old, running, young = (prewarm(sql, f"artifact:{name}")["job_id"] for name in "abc")
    order_job = Orders(sql).jobs(Orders(sql)("Pro"))[0]["id"]
    sql.execute("UPDATE jobdaemon.procrastinate_jobs SET status = 'doing' WHERE id = %s", [running])
    sql.execute("UPDATE jobdaemon.procrastinate_events SET at = now() - interval '2 hours' WHERE job_id <> %s", [young])
    await PrewarmedKeeper(store.prewarmed, FakeArtifacts(), Events(), ttl=HOUR, max_bytes=100).trim()
    statuses = [job(sql, number)["status"] for number in (old, running, young, order_job)]
    assert statuses == ["cancelled", "doing", "todo", "todo"]
    assert prewarm(sql, "artifact:a")["created"]


async def test_failures_are_told_and_cost_no_order(
    store: PostgresJobStore, daemon_id: int, sql: Sql, order_factory: Orders
) -> None:
    """A prewarm that failed says why, cannot be redriven, changes no order, and may be asked for again."""
    order = order_factory("Free")
    before = order_factory.row(order)
    job_id = prewarm(sql)["job_id"]
    claimed = next(one for one in await store.claim("beautify", daemon_id, 2) if one.id == job_id)
    dead = Transition(claimed, End.FAILED, error_kind="UnsupportedImageError", error="it is no picture")
    await store.commit([dead], daemon_id=daemon_id)
    row = sql.execute("SELECT reason, told FROM jobdaemon.explain_job(%s)", [job_id]).fetchone()
    assert row == {"reason": "given_up", "told": "it was given up: it is no picture"}
    with pytest.raises(psycopg.Error, match=f"job {job_id} is for no order and cannot be redriven") as caught:
        sql.execute("SELECT jobdaemon.redrive(job_id => %s)", [job_id])
    assert caught.value.sqlstate == "JD005"
    assert order_factory.row(order) == before
    assert prewarm(sql)["created"]


async def test_others_may_cancel_one(store: PostgresJobStore, daemon_id: int, sql: Sql) -> None:
    """Cancelling with procrastinate's own functions ends a waiting prewarm or a running one; neither counts as open any more."""
    waiting, running = prewarm(sql, "artifact:a")["job_id"], prewarm(sql, "artifact:b")["job_id"]
    sql.execute("SELECT jobdaemon.procrastinate_cancel_job_v1(%s, false, false)", [waiting])
    assert job(sql, waiting)["status"] == "cancelled"
    [claimed] = await store.claim("beautify", daemon_id, 2)
    assert claimed.id == running
    sql.execute("SELECT jobdaemon.procrastinate_cancel_job_v1(%s, true, false)", [running])
    assert prewarm(sql, "artifact:b")["created"]
    verdict = (await store.commit([Transition(claimed, End.HANDED_BACK)], daemon_id=daemon_id)).verdicts
    assert (verdict, job(sql, running)["status"]) == ([Verdict.ACCEPTED], "aborted")


async def test_a_prewarm_is_cancelled(store: PostgresJobStore, daemon_id: int, sql: Sql, order_factory: Orders) -> None:
    """One that waits, or rests, is dropped at once; what runs ends as aborted; the job of an order is refused."""

    def cancel(job_id: int) -> str:
        row = sql.execute("SELECT jobdaemon.cancel_prewarm(%s) AS status", [job_id]).fetchone()
        assert row is not None
        return str(row["status"])

    waiting, running = prewarm(sql, "artifact:a")["job_id"], prewarm(sql, "artifact:b")["job_id"]
    assert (cancel(waiting), cancel(waiting)) == ("cancelled", "cancelled")
    assert prewarm(sql, "artifact:a")["created"]
    [claimed, resting] = await store.claim("beautify", daemon_id, 2)
    assert claimed.id == running
    await store.commit([Transition(resting, End.RETRY, delay=HOUR, error="x")], daemon_id=daemon_id)
    assert cancel(resting.id) == "cancelled"
    assert (cancel(running), cancel(running)) == ("doing", "doing")
    await store.commit([Transition(claimed, End.HANDED_BACK)], daemon_id=daemon_id)
    assert (job(sql, running)["status"], cancel(running)) == ("aborted", "aborted")
    order = order_factory("Free")
    row = sql.execute("SELECT id FROM jobdaemon.procrastinate_jobs WHERE status = 'todo'").fetchone()
    assert row is not None
    for job_id, told in ((row["id"], f"job {row['id']} is no prewarm: cancel its order, {order}"), (None, "unknown job NULL")):
        with pytest.raises(psycopg.Error, match=told) as caught:
            sql.execute("SELECT jobdaemon.cancel_prewarm(%s)", [job_id])
        assert caught.value.sqlstate == "JD005"


async def test_queue_depth_counts_what_holds_slots(
    store: PostgresJobStore, daemon_id: int, sql: Sql, order_factory: Orders
) -> None:
    """Prewarms that wait, rest or failed are no work of the queue to watch; one that runs holds a slot."""
    for name in "abcd":
        prewarm(sql, f"artifact:{name}")
    jobs = await store.claim("beautify", daemon_id, 3)
    ends = [Transition(jobs[0], End.FAILED, error="x"), Transition(jobs[1], End.RETRY, delay=HOUR, error="x")]
    await store.commit(ends, daemon_id=daemon_id)
    depth = "SELECT ready, scheduled, running, failed, oldest_ready_seconds IS NULL AS is_idle FROM jobdaemon.queue_depth"
    depth += " WHERE queue = 'beautify'"
    assert sql.execute(depth).fetchone() == {"ready": 0, "scheduled": 0, "running": 1, "failed": 0, "is_idle": True}
    order_factory("Free")
    assert sql.execute(depth).fetchone() == {"ready": 1, "scheduled": 0, "running": 1, "failed": 0, "is_idle": False}
    row = sql.execute("SELECT waiting, running FROM jobdaemon.prewarm_stats").fetchone()
    assert row == {"waiting": 2, "running": 1}
    assert sql.execute("SELECT order_id FROM jobdaemon.running_jobs").fetchall() == [{"order_id": None}]


def test_why_it_waits(sql: Sql, order_factory: Orders) -> None:
    """explain_job says of a prewarm how many go before it."""
    job_id = prewarm(sql)["job_id"]
    order_factory("Pro")
    rows = sql.execute("SELECT reason, told FROM jobdaemon.explain_job(%s)", [job_id]).fetchall()
    assert rows[-1] == {"reason": "behind", "told": "1 job goes first in queue beautify"}
