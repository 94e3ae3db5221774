"""The claim: no job twice, priority then age, pause, exact limits, locks; and stock workers kept away from our queues."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import procrastinate
import psycopg
import pytest

from jobdaemon.db import DatabaseAddress
from jobdaemon.domain.job import Job
from jobdaemon.errors import LeaseLostError
from jobdaemon.queue.store import PostgresJobStore, Promoted
from tests.daemons import until
from tests.factories import Jobs, Orders, Sql


@pytest.fixture
async def stores(engine_database: str, patient_locks: None):  # type: ignore[no-untyped-def]
    """Eight stores, each with connections of its own."""
    stores = [PostgresJobStore(DatabaseAddress(engine_database)) for _ in range(8)]
    yield stores
    for store in stores:
        await store.close()


async def test_two_connections_never_get_the_same_job(stores: list[PostgresJobStore], daemon_id: int, job_factory: Jobs) -> None:
    """Eight claimers that race for the same queue share it out, each job once."""
    wanted = {job_factory("upload") for _ in range(200)}

    async def drain(store: PostgresJobStore) -> list[Job]:
        claimed: list[Job] = []
        while jobs := await store.claim("upload", daemon_id, 7):
            claimed += jobs
        return claimed

    got = [job.id for jobs in await asyncio.gather(*map(drain, stores)) for job in jobs]
    assert len(got) == len(set(got)) == 200
    assert set(got) == wanted


async def test_highest_priority_then_oldest(store: PostgresJobStore, daemon_id: int, job_factory: Jobs) -> None:
    """Jobs come by priority, higher first, and by age within one."""
    ids = {(priority, place): job_factory(priority=priority) for place in range(2) for priority in (100, 300, 200)}
    first = await store.claim("upload", daemon_id, 4)
    rest = await store.claim("upload", daemon_id, 4)
    expected = [ids[key] for key in sorted(ids, key=lambda key: (-key[0], key[1]))]
    assert [job.id for job in first] + [job.id for job in rest] == expected


async def test_an_order_keeps_its_age_through_all_stages(store: PostgresJobStore, daemon_id: int, job_factory: Jobs) -> None:
    """Within a priority the older order's job goes first, however late it was made; work for no order goes last."""
    without = job_factory(task="mail")
    young = job_factory(args={"order_id": 9})
    old = job_factory(args={"order_id": 3})
    urgent = job_factory(priority=1, args={"order_id": 20})
    first = await store.claim("upload", daemon_id, 2)
    rest = await store.claim("upload", daemon_id, 2)
    assert [job.id for job in (*first, *rest)] == [urgent, old, young, without]


async def test_claimed_job_carries_the_row_and_one_token(store: PostgresJobStore, daemon_id: int, job_factory: Jobs) -> None:
    """All jobs of a call have one token, the next call has another, and rows say doing under this worker."""
    a, b = job_factory(args={"order_id": 1}), job_factory()
    jobs = await store.claim("upload", daemon_id, 2)
    c = job_factory()
    [other] = await store.claim("upload", daemon_id, 2)
    assert [job.id for job in jobs] == [a, b]
    assert jobs[0].args == {"order_id": 1}
    assert jobs[0].token == jobs[1].token != other.token
    row = job_factory.row(c)
    assert (row["status"], row["worker_id"], row["token"]) == ("doing", daemon_id, other.token)


async def test_paused_queue_gives_nothing(store: PostgresJobStore, daemon_id: int, job_factory: Jobs) -> None:
    """A paused queue gives no job, and its jobs again when it is resumed."""
    job_factory()
    job_factory.sql.execute("SELECT jobdaemon.pause_queue('upload')")
    assert await store.claim("upload", daemon_id, 1) == []
    job_factory.sql.execute("SELECT jobdaemon.resume_queue('upload')")
    assert len(await store.claim("upload", daemon_id, 1)) == 1


@pytest.mark.parametrize("change", ["paused = true", "cluster_limit = 0"])
@pytest.mark.parametrize("keys", [None, ["a"]], ids=["plain", "keyed"])
async def test_what_comes_after_a_pause_does_not_start(
    daemon_id: int, job_factory: Jobs, engine_database: str, change: str, keys: list[str] | None
) -> None:
    """A claim that was under way when an operator paused or limited the queue takes no job that was enqueued after that."""
    queue, sql = "generate.local", job_factory.sql
    sql.execute("INSERT INTO jobdaemon.provider_keys (provider, alias) VALUES ('local', 'a')")
    sql.execute("INSERT INTO jobdaemon.lifted_turns (queue) VALUES ('generate.local')")

    def claim() -> set[int]:
        with psycopg.connect(engine_database) as connection:
            query = "SELECT id FROM jobdaemon.claim_jobs('generate.local', %s, 2, %s::text[]) WHERE id IS NOT NULL"
            return {row[0] for row in connection.execute(query, [daemon_id, keys]).fetchall()}

    with psycopg.connect(engine_database) as holder:
        # With lifted work waiting, the claim stands still between the queue's row and the jobs: for whose turn it is.
        holder.execute("SELECT FROM jobdaemon.lifted_turns FOR UPDATE")
        lifted = job_factory(queue, priority=10_000_000)
        claiming = asyncio.ensure_future(asyncio.to_thread(claim))
        waiting = "SELECT FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        await until(lambda: sql.execute(waiting).fetchone() is not None)
        sql.execute(f"UPDATE jobdaemon.queues SET {change} WHERE name = 'generate.local'".encode())
        late = job_factory(queue)
        holder.rollback()
        assert await claiming == set()
    assert {job_factory.row(job)["status"] for job in (lifted, late)} == {"todo"}
    sql.execute("UPDATE jobdaemon.queues SET paused = false, cluster_limit = NULL WHERE name = 'generate.local'")
    assert claim() == {lifted, late}


async def test_a_first_limit_counts_what_is_being_claimed(
    store: PostgresJobStore, daemon_id: int, job_factory: Jobs, engine_database: str
) -> None:
    """Jobs that a claim under way takes without a limit are counted by the first claim under one, though not committed yet."""
    for _ in range(9):
        job_factory()
    with psycopg.connect(engine_database) as early:
        claimed = early.execute("SELECT id FROM jobdaemon.claim_jobs('upload', %s, 4)", [daemon_id]).fetchall()
        job_factory.sql.execute("UPDATE jobdaemon.queues SET cluster_limit = 5 WHERE name = 'upload'")
        counting = asyncio.ensure_future(store.claim("upload", daemon_id, 3))
        waiting = "SELECT FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        await until(lambda: counting.done() or job_factory.sql.execute(waiting).fetchone() is not None)
        early.commit()
    assert (len(claimed), len(await counting)) == (4, 1)


@pytest.mark.parametrize("limit", [0, 1, 5])
async def test_cluster_limit_is_exact(stores: list[PostgresJobStore], daemon_id: int, job_factory: Jobs, limit: int) -> None:
    """However many daemons claim at once, no more jobs run than the limit, and as many as it allows."""
    for _ in range(60):
        job_factory()
    job_factory.sql.execute("SELECT jobdaemon.resize_queue('upload', cluster_limit => %s)", [limit])
    for _ in range(3):
        claims = await asyncio.gather(*(store.claim("upload", daemon_id, 3) for store in stores for _ in range(2)))
        row = job_factory.sql.execute("SELECT count(*) AS n FROM jobdaemon.procrastinate_jobs WHERE status = 'doing'").fetchone()
        assert row is not None
        assert row["n"] == sum(map(len, claims)) == limit
        job_factory.sql.execute("UPDATE jobdaemon.procrastinate_jobs SET status = 'succeeded' WHERE status = 'doing'")


async def test_lowered_limit_stops_claims_until_the_surplus_ran_out(
    store: PostgresJobStore, daemon_id: int, job_factory: Jobs
) -> None:
    """A limit below what runs gives nothing, not an error; jobs of other queues do not count."""
    for _ in range(4):
        job_factory()
    job_factory("beautify")
    assert len(await store.claim("upload", daemon_id, 3)) == 3
    job_factory.sql.execute("SELECT jobdaemon.resize_queue('upload', cluster_limit => 2)")
    assert await store.claim("upload", daemon_id, 3) == []
    assert len(await store.claim("beautify", daemon_id, 3)) == 1


async def test_scheduled_job_waits_for_its_promotion(
    store: PostgresJobStore, daemon_id: int, job_factory: Jobs, sql: Sql
) -> None:
    """A job that is not due, or due and not let in yet, is not claimed; promoting lets in what is due."""
    later = job_factory(delay=timedelta(hours=1))
    due = job_factory(delay=timedelta(seconds=-1))
    assert await store.claim("upload", daemon_id, 5) == []
    promoted = await store.promote()
    assert promoted.count == 1
    assert promoted.next_due is not None
    assert timedelta(minutes=59) < promoted.next_due <= timedelta(hours=1)
    assert [job.id for job in await store.claim("upload", daemon_id, 5)] == [due]
    assert job_factory.row(later)["status"] == "todo"


async def test_job_due_at_infinity_hurts_nobody(store: PostgresJobStore, job_factory: Jobs, sql: Sql) -> None:
    """A job that some app deferred to 'infinity' gives no timer and no error."""
    job_id = job_factory(delay=timedelta(hours=1))
    sql.execute("UPDATE jobdaemon.procrastinate_jobs SET scheduled_at = 'infinity' WHERE id = %s", [job_id])
    assert await store.promote() == Promoted(0, None, has_expired=False)


async def test_promote_leaves_foreign_queues_alone(store: PostgresJobStore, job_factory: Jobs) -> None:
    """Due jobs of a queue that is not ours keep their time: it is their stock worker's business."""
    foreign = job_factory("mail", "send", delay=timedelta(seconds=-1))
    assert await store.promote() == Promoted(0, None, has_expired=False)
    assert job_factory.row(foreign)["scheduled_at"] is not None


async def test_one_job_per_lock(store: PostgresJobStore, daemon_id: int, job_factory: Jobs, sql: Sql) -> None:
    """Of the jobs with one lock the first in claim order runs alone; the others wait until it has ended."""
    ids = [job_factory(lock="a"), job_factory(lock="a"), job_factory(lock="b"), job_factory()]
    assert [job.id for job in await store.claim("upload", daemon_id, 10)] == [ids[0], ids[2], ids[3]]
    assert await store.claim("upload", daemon_id, 10) == []
    sql.execute("UPDATE jobdaemon.procrastinate_jobs SET status = 'succeeded' WHERE id = %s", [ids[0]])
    assert [job.id for job in await store.claim("upload", daemon_id, 10)] == [ids[1]]


async def test_locks_hold_over_racing_claimers(
    stores: list[PostgresJobStore], daemon_id: int, job_factory: Jobs, sql: Sql
) -> None:
    """Claimers that race for jobs of one lock never run two of them, and none fails."""
    for _ in range(40):
        job_factory(lock="only")
    ran = 0
    for _ in range(10):
        claims = await asyncio.gather(*(store.claim("upload", daemon_id, 2) for store in stores))
        assert sum(map(len, claims)) <= 1
        ran += sum(map(len, claims))
        sql.execute("UPDATE jobdaemon.procrastinate_jobs SET status = 'succeeded' WHERE status = 'doing'")
    assert ran >= 5


async def test_claim_of_a_removed_daemon_says_so(store: PostgresJobStore, daemon_id: int, job_factory: Jobs, sql: Sql) -> None:
    """A daemon whose row somebody removed learns it from its claim, and no job is lost to it."""
    job_id = job_factory()
    sql.execute("DELETE FROM jobdaemon.procrastinate_workers WHERE id = %s", [daemon_id])
    with pytest.raises(LeaseLostError):
        await store.claim("upload", daemon_id, 1)
    assert job_factory.row(job_id)["status"] == "todo"


async def test_unknown_queue_gives_nothing(store: PostgresJobStore, daemon_id: int, job_factory: Jobs) -> None:
    """A queue without a row of its own is not served."""
    job_factory("mail", "send")
    assert await store.claim("mail", daemon_id, 1) == []


def test_stock_fetch_never_gets_our_jobs(sql: Sql, job_factory: Jobs, order_factory: Orders) -> None:
    """Procrastinate's own fetch, with and without a list of queues, passes our jobs by and finds those of other queues."""
    order_factory("Free")
    worker = sql.execute("SELECT * FROM jobdaemon.procrastinate_register_worker_v1()").fetchone()
    assert worker is not None
    [worker_id] = worker.values()
    for queues in (None, ["beautify"], ["beautify", "mail"]):
        row = sql.execute("SELECT id FROM jobdaemon.procrastinate_fetch_job_v2(%s::text[], %s)", [queues, worker_id]).fetchone()
        assert row is not None
        assert row["id"] is None
    mail = job_factory("mail", "send")
    row = sql.execute("SELECT id FROM jobdaemon.procrastinate_fetch_job_v2(NULL, %s)", [worker_id]).fetchone()
    assert row == {"id": mail}


async def test_stock_worker_works_beside_us(engine_database: str, order_factory: Orders) -> None:
    """A stock worker in our schema runs its own queue's jobs and leaves ours waiting."""
    order_id = order_factory("Free")
    connector = procrastinate.PsycopgConnector(conninfo=engine_database, kwargs={"options": "-c search_path=jobdaemon"})
    app = procrastinate.App(connector=connector)
    ran: list[str] = []

    @app.task(name="send", queue="mail")
    async def send(to: str) -> None:
        ran.append(to)

    async with app.open_async():
        await send.defer_async(to="ann")
        await app.run_worker_async(wait=False, install_signal_handlers=False, listen_notify=False)
    assert ran == ["ann"]
    [job] = order_factory.jobs(order_id)
    assert job["status"] == "todo"


def test_claim_needs_no_search_path(engine_database: str, job_factory: Jobs) -> None:
    """An INSERT, a claim and a DELETE work for callers with any search_path, triggers included."""
    job_factory("mail", "send", delay=timedelta(hours=1))
    with psycopg.connect(engine_database, autocommit=True) as app:
        app.execute("SET search_path = pg_temp")
        app.execute("UPDATE jobdaemon.procrastinate_jobs SET status = 'cancelled'")
        app.execute("DELETE FROM jobdaemon.procrastinate_jobs")
        assert app.execute("SELECT count(*) FROM jobdaemon.procrastinate_events").fetchone() == (0,)
