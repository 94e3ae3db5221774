"""Three roles, each with what it needs and no more."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest
from psycopg import errors

from jobdaemon.db import DatabaseAddress
from jobdaemon.domain.keys import ProviderKey
from jobdaemon.domain.outcome import End, Signal, Transition, Verdict
from jobdaemon.domain.write import OrderStarted
from jobdaemon.queue.photo_links import DeletionRules
from jobdaemon.queue.store import PostgresJobStore
from tests.factories import PLANS, QUEUES, SOURCE, Sql, open_call, prewarmed

TABLES = (
    "provider_keys",
    "cache",
    "cache_counts",
    "prewarmed",
    "photo_links",
    "plans",
    "queues",
    "orders",
    "images",
    "attempts",
    "provider_calls",
    "daemons",
    "procrastinate_jobs",
    "_yoyo_migration",
)
VIEWS = (
    "queue_depth",
    "order_progress",
    "running_jobs",
    "stage_timings",
    "throughput",
    "failures",
    "workers",
    "keys",
    "cache_stats",
    "prewarm_stats",
    "spend",
)


@pytest.fixture
def login(postgres: Any, engine_database: str) -> Iterator[Callable[[str], str]]:
    """Makes a login role that is a member of one group; gives its URL."""
    names: list[str] = []

    def make(group: str) -> str:
        name = f"test_{uuid.uuid4().hex[:12]}"
        postgres.admin.execute(f"CREATE ROLE {name} LOGIN IN ROLE {group}")
        names.append(name)
        user = urlsplit(engine_database).username
        return engine_database.replace(f"//{user}@", f"//{name}@", 1)

    yield make
    for name in names:
        postgres.admin.execute(f"DROP ROLE {name}")


def test_producer_calls_functions_and_reads_nothing(login: Callable[[str], str]) -> None:
    """A producer enqueues, cancels and steers; tables, views and the engine's own functions are closed to it."""
    with psycopg.connect(login("jobdaemon_producer"), autocommit=True) as app:
        row = app.execute("SELECT order_id FROM jobdaemon.enqueue_order('Free', %s)", [SOURCE]).fetchone()
        assert row is not None
        assert app.execute("SELECT jobdaemon.cancel_order(%s)", [row[0]]).fetchone() == ("cancelled",)
        app.execute("SELECT jobdaemon.pause_queue('upload')")
        assert app.execute("SELECT created FROM jobdaemon.prewarm(%s)", [SOURCE]).fetchone() == (True,)
        with pytest.raises(psycopg.Error, match="unknown job"):
            app.execute("SELECT jobdaemon.cancel_prewarm(77)")
        assert app.execute("SELECT jobdaemon.clear_cache()").fetchone() == (0,)
        for call in ("pause_key('nobody', 'a')", "resume_key('nobody', 'a')"):
            with pytest.raises(psycopg.Error, match="unknown key"):
                app.execute(f"SELECT jobdaemon.{call}".encode())
        for name in (*TABLES, *VIEWS):
            with pytest.raises(errors.InsufficientPrivilege):
                app.execute(f"SELECT * FROM jobdaemon.{name}".encode())
        for call in (
            "claim_jobs('upload', 1, 1)",
            "lock_keys('{}', '{}', '{}')",
            "promote_jobs(1)",
            "grant_roles()",
            "procrastinate_register_worker_v1()",
            "procrastinate_cancel_job_v1(1, true, true)",
        ):
            with pytest.raises(errors.InsufficientPrivilege):
                app.execute(f"SELECT jobdaemon.{call}".encode())
        with pytest.raises(errors.InsufficientPrivilege):
            app.execute("CREATE TABLE jobdaemon.mine ()")


def test_reader_reads_views_only(login: Callable[[str], str]) -> None:
    """A reader sees every view, no table, and changes nothing."""
    with psycopg.connect(login("jobdaemon_reader"), autocommit=True) as app:
        for view in VIEWS:
            app.execute(f"SELECT * FROM jobdaemon.{view}".encode())
        for table in TABLES:
            with pytest.raises(errors.InsufficientPrivilege):
                app.execute(f"SELECT * FROM jobdaemon.{table}".encode())
        calls = (
            f"enqueue_order('Free', '{SOURCE}')",
            f"prewarm('{SOURCE}')",
            "pause_queue('upload')",
            "cancel_order(1)",
            "clear_cache()",
        )
        for call in calls:
            with pytest.raises(errors.InsufficientPrivilege):
                app.execute(f"SELECT jobdaemon.{call}".encode())
        with pytest.raises(errors.InsufficientPrivilege):
            app.execute("UPDATE jobdaemon.queue_depth SET paused = true")


async def test_daemon_runs_the_engine(login: Callable[[str], str], sql: Sql) -> None:
    """The daemon's role, without owning anything, can run every statement of the engine."""
    sql.execute("SELECT * FROM jobdaemon.enqueue_order('Free', %s)", [SOURCE])
    store = PostgresJobStore(DatabaseAddress(login("jobdaemon_daemon")))
    try:
        assert len(await store.applied_migrations()) > 4
        await store.ensure_rows([*QUEUES, "generate.new"], PLANS, [ProviderKey("new", "a")])
        daemon_id = await store.register(host="h", pid=1, version="0", queues={"beautify": 1})
        [job] = await store.claim("beautify", daemon_id, 1)
        assert job.order_id is not None
        started = Transition(job, End.CHECKPOINT, writes=(OrderStarted(job.order_id),))
        dead = Transition(job, End.RETRY, error="x")
        for transition in (started, dead):
            assert (await store.commit([transition], daemon_id=daemon_id)).verdicts == [Verdict.ACCEPTED]
        await store.promote()
        await store.queue_rows(QUEUES, 0)
        assert await store.heartbeat(daemon_id, lease=timedelta(seconds=15), timeout=timedelta(seconds=5))
        await store.lost_jobs(daemon_id, [], lease=timedelta(seconds=15))
        await store.adopt_jobs(daemon_id, [job])
        assert await store.locked_jobs([job]) == set()
        await store.tell_orders([job.order_id])
        assert await store.orders.load_order(job.order_id) is not None
        assert len(await store.orders.load_images(job.order_id)) == 2
        assert await open_call(store, job.order_id, job.id) is None
        assert await store.answers(timeout=timedelta(seconds=5))
        assert await store.other_deaths(job, None, lease=timedelta(seconds=1)) == 0
        assert await store.open_orders(after=0, limit=9) == {job.order_id: False}
        sql.execute("DELETE FROM jobdaemon.procrastinate_jobs")
        assert len(await store.mend_orders([job.order_id], lambda provider: 1)) == 1
        sql.execute("UPDATE jobdaemon.procrastinate_jobs SET queue_name = 'generate.new', status = 'todo', scheduled_at = NULL")
        [job] = (await store.take_slots("generate.new", daemon_id, 1, ["a"])).jobs
        refused = Transition(job, End.SNOOZE, signal=Signal.KEY)
        assert len((await store.commit([refused], daemon_id=daemon_id)).news) == 1
        moment = timedelta(seconds=1)
        assert await store.missing_keys() == []
        await store.cache.take("new", "a", 1, {1: "0" * 64}, hold=moment, ttl=moment)
        await store.cache.release(1, [1])
        await store.cache.forget(1)
        await store.cache.begin_copies(1, 1.0)
        await store.cache.end_copy(1)
        await store.cache.drop(1)
        await store.cache.trim(moment, 1, 1)
        await store.cache.dropped(0, 1)
        await store.cache.remove([1])
        assert await store.cache.is_empty()
        await store.set_daemon_status(daemon_id, "stopped")
    finally:
        await store.close()


async def test_daemon_keeps_prewarmed_photos(login: Callable[[str], str], sql: Sql) -> None:
    """The daemon's role runs a prewarm and all that is asked of what it made."""
    sql.execute("SELECT jobdaemon.prewarm(%s)", [SOURCE])
    store = PostgresJobStore(DatabaseAddress(login("jobdaemon_daemon")))
    try:
        daemon_id = await store.register(host="h", pid=1, version="0", queues={"beautify": 1})
        [job] = await store.claim("beautify", daemon_id, 1)
        made = prewarmed(1)
        await store.prewarmed.announce(made)
        await store.commit([Transition(job, End.SUCCEEDED, writes=(made,))], daemon_id=daemon_id)
        found = await store.prewarmed.find(made.photo, made.backend)
        assert found is not None
        await store.prewarmed.used(found.id)
        await store.prewarmed.forget(found.id)
        assert await store.prewarmed.trim(timedelta(seconds=1), 1, 1) == 0
        assert list(await store.prewarmed.dropped(0, 1)) == [found.id]
        await store.prewarmed.remove([found.id])
    finally:
        await store.close()


async def test_daemon_clears_away(login: Callable[[str], str], sql: Sql) -> None:
    """The daemon's role retires and removes orders; a producer, whose orders they are, may only hold a photo for another one."""
    source = f"artifact:sources/00/{0:064}.jpg"
    with psycopg.connect(login("jobdaemon_producer"), autocommit=True) as app:
        assert app.execute("SELECT jobdaemon.hold_source(%s)", [source]).fetchone() == (True,)
        app.execute("SELECT jobdaemon.enqueue_order('Free', %s)", [source])
        for call in ("retire_orders(1, 1)", "prune_jobs(0, 1, 1)", "sources_to_delete(0, 1)", "remove_orders(1, 1)"):
            with pytest.raises(errors.InsufficientPrivilege):
                app.execute(f"SELECT jobdaemon.{call}".encode())
        with pytest.raises(errors.InsufficientPrivilege):
            app.execute("SELECT * FROM jobdaemon.idle_sources")
    sql.execute("UPDATE jobdaemon.procrastinate_jobs SET status = 'succeeded'")
    sql.execute("UPDATE jobdaemon.procrastinate_events SET at = now() - interval '1 day'")
    sql.execute("UPDATE jobdaemon.orders SET status = 'failed', finished_at = now() - interval '1 day'")
    sql.execute("UPDATE jobdaemon.idle_sources SET idle_since = now() - interval '1 day'")
    store = PostgresJobStore(DatabaseAddress(login("jobdaemon_daemon")))
    hour, none = timedelta(hours=1), timedelta(0)
    try:
        assert await store.retention.sources_to_delete(hour, 1) == []
        assert await store.retention.retire(hour, 1) == 1
        [order_id] = await store.retention.retired(0, 1)
        await store.retention.pruned([order_id])
        await store.retention.prune_jobs(0, hour, 10)
        assert await store.retention.sources_to_delete(none, 1) == [source]
        await store.retention.sources_not_deleted([source])
        assert await store.retention.sources_to_delete(none, 1) == [source]
        await store.retention.sources_deleted([source])
        assert await store.retention.remove(hour, 1) == 1
    finally:
        await store.close()
    for table in ("orders", "images", "procrastinate_jobs", "procrastinate_events", "idle_sources"):
        assert sql.execute(f"SELECT FROM jobdaemon.{table}".encode()).fetchall() == [], table


async def test_daemon_keeps_photo_links(login: Callable[[str], str]) -> None:
    """The daemon's role notes where photos lie, finds and deletes them."""
    store = PostgresJobStore(DatabaseAddress(login("jobdaemon_daemon")))
    links, photo, hour = store.photo_links, "work/7/photo.jpg", timedelta(hours=1)
    try:
        await links.note(photo, "https://bed.example/1")
        assert await links.find(photo, max_age=hour) is not None
        assert await links.forget(photo)
        [left] = await links.begin_deletions(1, DeletionRules())
        await links.deletion_failed(left.id, "away")
        await links.end_deletion(left.link)
    finally:
        await store.close()


def test_everybody_else_gets_nothing(login: Callable[[str], str], postgres: Any) -> None:
    """A role without our groups cannot even look into the schema."""
    with psycopg.connect(login("pg_monitor"), autocommit=True) as app, pytest.raises(errors.InsufficientPrivilege):
        app.execute("SELECT * FROM jobdaemon.enqueue_order('Free', %s)", [SOURCE])
