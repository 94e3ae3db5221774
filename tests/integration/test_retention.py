"""Retention: what goes of orders that ended long ago, what stays, and who needs a photo meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from threading import Barrier

import psycopg
import pytest

from jobdaemon.db import DatabaseAddress
from jobdaemon.domain.outcome import End, Transition
from jobdaemon.errors import StoreRefusedError, StoreUnavailableError
from jobdaemon.events import Event, Events, OrdersRemoved, OrdersRetired, UpkeepFailed
from jobdaemon.queue import pruner as pruner_module
from jobdaemon.queue.pruner import Pruner
from jobdaemon.queue.store import PostgresJobStore
from jobdaemon.storage.files import FilesStore
from tests.daemons import until
from tests.factories import Claimed, Jobs, Orders, Row, Sql
from tests.fakes import FakeArtifacts

MONTH, YEAR, DAY = timedelta(days=30), timedelta(days=365), timedelta(days=1)


def source_of(digest: int) -> str:
    return f"artifact:sources/{digest % 256:02x}/{digest:064x}.jpg"


def call(sql: Sql, order_id: int, job_id: int) -> None:
    """A call that nobody has heard of since it was noted."""
    sql.execute(
        "INSERT INTO jobdaemon.provider_calls (order_id, job_id, batch, provider, images, external_task_id)"
        " VALUES (%s, %s, 1, 'local', '{1}', 'task')",
        [order_id, job_id],
    )


def end(sql: Sql, order_id: int, days: float, status: str = "completed") -> None:
    """As if it had ended so many days ago, all its jobs done, and everything else of it had been as long ago."""
    sql.execute(
        "UPDATE jobdaemon.procrastinate_jobs SET status = %s::jobdaemon.procrastinate_job_status"
        " WHERE args ->> 'order_id' = %s::text AND status IN ('todo', 'doing')",
        ["failed" if status == "failed" else "succeeded", str(order_id)],
    )
    sql.execute(
        "UPDATE jobdaemon.orders SET status = %s, finished_at = now() - make_interval(hours => (24 * %s)::integer) WHERE id = %s",
        [status, days, order_id],
    )
    sql.execute(
        "UPDATE jobdaemon.procrastinate_events SET at = at - make_interval(hours => (24 * %s)::integer) WHERE job_id IN"
        " (SELECT id FROM jobdaemon.procrastinate_jobs WHERE args ->> 'order_id' = %s::text)",
        [days, str(order_id)],
    )


@pytest.fixture(autouse=True)
def failures() -> Iterator[list[UpkeepFailed]]:
    """What retention could not do; a test that expects any takes it and clears it."""
    _FAILURES.clear()
    yield _FAILURES
    assert _FAILURES == []


_FAILURES: list[UpkeepFailed] = []


def _note_failure(event: Event) -> None:
    if isinstance(event, UpkeepFailed):
        _FAILURES.append(event)


def pruner(
    store: PostgresJobStore,
    artifacts: FakeArtifacts | FilesStore,
    events: Events | None = None,
    *,
    photos: timedelta | None = MONTH,
    orders: timedelta | None = None,
    wait: timedelta = DAY,
) -> Pruner:
    events = events or Events()
    events.subscribe(_note_failure)
    return Pruner(store.retention, artifacts, events, photos=photos, orders=orders, sources_wait=wait)


async def prune(looking: Pruner) -> None:
    """Let it look until it has done all it can."""
    while await looking.look():
        pass


def count(sql: Sql, table: str) -> int:
    row = sql.execute(f"SELECT count(*) AS n FROM jobdaemon.{table}".encode()).fetchone()
    assert row is not None
    return int(row["n"])


def idle(sql: Sql) -> list[str]:
    return [row["source"] for row in sql.execute("SELECT source FROM jobdaemon.idle_sources ORDER BY source").fetchall()]


def hold(sql: Sql, source: str) -> bool:
    row: Row | None = sql.execute("SELECT jobdaemon.hold_source(%s) AS held", [source]).fetchone()
    assert row is not None
    return bool(row["held"])


def age_sources(sql: Sql) -> None:
    sql.execute(
        "UPDATE jobdaemon.idle_sources"
        " SET idle_since = idle_since - interval '1 day', deleting_at = deleting_at - interval '1 day'"
    )


# -- orders and their jobs


async def test_what_goes_and_what_stays(store: PostgresJobStore, claimed_job_factory: Claimed, sql: Sql) -> None:
    """Of an order that ended a month ago go photos, jobs and errors; it and its images stay. Others lose nothing."""
    orders = Orders(sql)
    job = await claimed_job_factory.beautify(plan="Free")
    old = job.order_id or 0
    await store.commit([Transition(job, End.RETRY, error_kind="Oops", error="it broke")], daemon_id=None)
    young, still_open = orders("Free"), orders("Free")
    end(sql, old, 31)
    end(sql, young, 29)
    kept = {
        f"work/{young}/beautified-1.jpg",
        f"work/{still_open}/beautified-2.jpg",
        f"work/{old}1/001.jpg",
        f"orders/{old}/001.jpg",
    }
    artifacts = FakeArtifacts(dict.fromkeys(kept | {f"work/{old}/beautified-0.jpg", f"work/{old}/002-ff.png"}, b"x"))
    events = Events()
    seen: list[Event] = []
    events.subscribe(seen.append)
    assert count(sql, "attempts") == 1

    await prune(pruner(store, artifacts, events))
    assert set(artifacts.objects) == kept
    assert [event for event in seen if isinstance(event, OrdersRetired)] == [OrdersRetired(count=1)]
    assert orders.jobs(old) == []
    assert [len(orders.jobs(order_id)) for order_id in (young, still_open)] == [1, 1]
    assert count(sql, "attempts") == 0
    jobs = [
        row["job_id"] for row in sql.execute("SELECT DISTINCT job_id FROM jobdaemon.procrastinate_events ORDER BY 1").fetchall()
    ]
    assert jobs == [orders.jobs(young)[0]["id"], orders.jobs(still_open)[0]["id"]]
    assert orders.row(old)["status"] == "completed"
    assert len(orders.images(old)) == 2
    assert orders.row(old)["pruned_at"] is not None
    assert orders.row(young)["retired_at"] is None

    before = orders.row(old)
    await prune(pruner(store, artifacts, events))
    assert orders.row(old) == before


async def test_a_retired_order_is_not_opened_again(store: PostgresJobStore, order_factory: Orders, sql: Sql) -> None:
    """Its dead letters can be redriven until it is retired, and from then on not, before and after its jobs are gone."""
    order_id = order_factory("Free")
    end(sql, order_id, 31, "failed")
    [job] = order_factory.jobs(order_id)
    assert await store.retention.retire(MONTH, 10) == 1
    for arguments in ({"order_id": order_id}, {"job_id": job["id"]}):
        [(name, value)] = arguments.items()
        with pytest.raises(psycopg.Error, match=f"order {order_id} ended so long ago that its photos are gone") as caught:
            sql.execute(f"SELECT jobdaemon.redrive({name} => %s)".encode(), [value])
        assert caught.value.sqlstate == "JD005"
    await prune(pruner(store, FakeArtifacts()))
    with pytest.raises(psycopg.Error, match="its photos are gone"):
        sql.execute("SELECT jobdaemon.redrive(order_id => %s)", [order_id])
    assert order_factory.row(order_id)["status"] == "failed"


async def test_a_redrive_wins_or_comes_too_late(
    engine_database: str, store: PostgresJobStore, order_factory: Orders, sql: Sql
) -> None:
    """An order that somebody redrives at this moment is left to them."""
    order_id = order_factory("Free")
    end(sql, order_id, 31, "failed")
    with psycopg.connect(engine_database) as other:
        other.execute("SELECT jobdaemon.redrive(order_id => %s)", [order_id])
        assert await store.retention.retire(MONTH, 10) == 0
    assert await store.retention.retire(MONTH, 10) == 0
    assert order_factory.row(order_id)["status"] == "queued"


async def test_open_jobs_are_waited_for(store: PostgresJobStore, order_factory: Orders, sql: Sql) -> None:
    """An ended order that still has something to do, images to remove, is retired when that is done."""
    order_id = order_factory("Free")
    sql.execute("SELECT jobdaemon.cancel_order(%s, remove_images => true)", [order_id])
    sql.execute("UPDATE jobdaemon.orders SET finished_at = now() - interval '31 days'")
    artifacts = FakeArtifacts({f"work/{order_id}/a.jpg": b"x"})
    await prune(pruner(store, artifacts))
    assert len(artifacts.objects) == 1
    sql.execute("UPDATE jobdaemon.procrastinate_jobs SET status = 'succeeded' WHERE status = 'todo'")
    await prune(pruner(store, artifacts))
    assert artifacts.objects == {}


async def test_calls_of_dead_letters_are_closed(store: PostgresJobStore, claimed_job_factory: Claimed, sql: Sql) -> None:
    """A call that waited for a redrive ends as unknown, asks no provider anything, and stays in the books."""
    job = await claimed_job_factory.beautify(plan="Free")
    order_id = job.order_id or 0
    call(sql, order_id, job.id)
    end(sql, order_id, 31, "failed")
    await prune(pruner(store, FakeArtifacts()))
    await store.abandon_calls(100)
    [row] = sql.execute("SELECT outcome, finished_at FROM jobdaemon.provider_calls").fetchall()
    assert row["outcome"] == "unknown"
    assert row["finished_at"] is not None
    assert count(sql, "procrastinate_jobs") == 0


async def test_rows_go_when_that_is_wanted(store: PostgresJobStore, order_factory: Orders, sql: Sql) -> None:
    """After ``retention.orders`` the order, its images and its calls are gone, and its key is free."""
    events = Events()
    seen: list[Event] = []
    events.subscribe(seen.append)
    first, second = order_factory("Free", key="first"), order_factory("Free", key="second")
    call(sql, first, order_factory.jobs(first)[0]["id"])
    end(sql, first, 366)
    end(sql, second, 364)
    await prune(pruner(store, FakeArtifacts(), events, orders=YEAR))
    assert [row["id"] for row in sql.execute("SELECT id FROM jobdaemon.orders").fetchall()] == [second]
    assert (count(sql, "images"), count(sql, "provider_calls"), count(sql, "procrastinate_jobs")) == (2, 0, 0)
    assert OrdersRemoved(count=1) in seen
    assert order_factory("Free", key="second") == second
    assert order_factory("Free", key="first") > second


async def test_nothing_is_retired_without_an_age(store: PostgresJobStore, order_factory: Orders, sql: Sql) -> None:
    """``photos = "never"`` keeps everything."""
    order_id = order_factory("Free")
    end(sql, order_id, 3000)
    artifacts = FakeArtifacts({f"work/{order_id}/a.jpg": b"x"})
    await prune(pruner(store, artifacts, photos=None))
    assert len(artifacts.objects) == len(order_factory.jobs(order_id)) == 1


async def test_other_jobs_are_left_alone(store: PostgresJobStore, job_factory: Jobs, order_factory: Orders, sql: Sql) -> None:
    """Other applications' jobs stay; a prewarm goes by its own age, the job of an order that is gone at once."""
    foreign = job_factory("mail", "app.send", args={"order_id": 1})
    old, young, waits = (
        sql.execute("SELECT job_id FROM jobdaemon.prewarm(%s)", [source_of(number)]).fetchone() for number in range(3)
    )
    assert old is not None
    assert young is not None
    assert waits is not None
    orphan = order_factory("Free")
    sql.execute("DELETE FROM jobdaemon.orders WHERE id = %s", [orphan])
    newest = order_factory("Free")
    sql.execute(
        "UPDATE jobdaemon.procrastinate_jobs SET status = 'succeeded' WHERE id <> %s AND args ->> 'order_id' IS DISTINCT FROM %s",
        [waits["job_id"], str(newest)],
    )
    sql.execute("UPDATE jobdaemon.procrastinate_events SET at = now() - interval '31 days' WHERE job_id <= %s", [old["job_id"]])
    sql.execute("UPDATE jobdaemon.procrastinate_events SET at = now() - interval '29 days' WHERE job_id = %s", [young["job_id"]])
    step = pruner(store, FakeArtifacts())
    # In pages of one job each, as far as the last one is old; the whole in one page counts as young as its last job.
    after: int | None = 0
    while after is not None:
        after = await store.retention.prune_jobs(after, MONTH, 1)
    await prune(step)
    left = {row["id"] for row in sql.execute("SELECT id FROM jobdaemon.procrastinate_jobs").fetchall()}
    assert left == {foreign, young["job_id"], waits["job_id"], *(job["id"] for job in order_factory.jobs(newest))}
    assert idle(sql) == [source_of(0)]


@pytest.mark.parametrize(
    "args", ['{"order_id": "a"}', '{"order_id": 1.5}', '{"order_id": 1e30}', '{"order_id": [1]}', '["order_id"]', "7"]
)
async def test_odd_jobs_stop_nothing(store: PostgresJobStore, order_factory: Orders, sql: Sql, args: str) -> None:
    """A job under a name like ours that is for no order goes by its age, and those behind it go."""
    sql.execute(
        "INSERT INTO jobdaemon.procrastinate_jobs (queue_name, task_name, status, args)"
        " VALUES ('q', 'jobdaemon.x', 'succeeded', %s)",
        [args],
    )
    old = order_factory("Free")
    end(sql, old, 31)
    young = order_factory("Free")
    await prune(pruner(store, FakeArtifacts()))
    assert order_factory.jobs(old) == []
    sql.execute("UPDATE jobdaemon.procrastinate_events SET at = now() - interval '31 days'")
    await prune(pruner(store, FakeArtifacts()))
    assert count(sql, "procrastinate_jobs") == len(order_factory.jobs(young)) == 1


async def test_many_at_once(engine_database: str, store: PostgresJobStore, order_factory: Orders, sql: Sql) -> None:
    """Three daemons clear away 300 orders together: each is counted once, and nothing is left over."""
    order_ids = [order_factory("Free", source=source_of(number // 3)) for number in range(300)]
    for order_id in order_ids:
        end(sql, order_id, 31)
    artifacts = FakeArtifacts({f"work/{order_id}/a.jpg": b"x" for order_id in order_ids})
    artifacts.objects |= {source_of(number).removeprefix("artifact:"): b"x" for number in range(100)}
    events = Events()
    seen: list[Event] = []
    events.subscribe(seen.append)
    stores = [PostgresJobStore(DatabaseAddress(engine_database)) for _ in range(3)]
    try:
        while any(order is None for order in [order_factory.row(order_id)["pruned_at"] for order_id in order_ids]):
            await asyncio.gather(*(prune(pruner(one, artifacts, events)) for one in stores))
    finally:
        for one in stores:
            await one.close()
    assert sum(event.count for event in seen if isinstance(event, OrdersRetired)) == 300
    assert len(idle(sql)) == 100
    age_sources(sql)
    await prune(pruner(store, artifacts))  # one that begins its walk through the jobs when all are retired
    assert count(sql, "procrastinate_jobs") == count(sql, "procrastinate_events") == 0
    assert artifacts.objects == {}
    assert idle(sql) == []


# -- source photos


async def test_a_source_goes_with_the_last_that_needs_it(store: PostgresJobStore, order_factory: Orders, sql: Sql) -> None:
    """A photo that two orders share stays until both are retired, and then for a day; a prewarm that waits needs it too."""
    source = source_of(7)
    first, second = order_factory("Free", source=source), order_factory("Free", source=source)
    artifacts = FakeArtifacts({source.removeprefix("artifact:"): b"x"})
    end(sql, first, 31)
    await prune(pruner(store, artifacts))
    assert idle(sql) == []
    prewarm = sql.execute("SELECT job_id FROM jobdaemon.prewarm(%s)", [source]).fetchone()
    assert prewarm is not None
    end(sql, second, 31)
    await prune(pruner(store, artifacts))
    assert idle(sql) == []
    sql.execute("UPDATE jobdaemon.procrastinate_jobs SET status = 'succeeded'")
    sql.execute("UPDATE jobdaemon.procrastinate_events SET at = now() - interval '31 days'")
    await prune(pruner(store, artifacts))
    assert idle(sql) == [source]
    await prune(pruner(store, artifacts))
    assert len(artifacts.objects) == 1
    age_sources(sql)
    await prune(pruner(store, artifacts))
    assert artifacts.objects == {}
    assert idle(sql) == []


@pytest.mark.parametrize(
    "source", ["https://p.example/a.jpg", "artifact:sources/mine.jpg", "artifact:uploads/a.jpg", "artifact:" + "sources/x" * 400]
)
async def test_other_peoples_photos_stay(source: str, store: PostgresJobStore, order_factory: Orders, sql: Sql) -> None:
    """What somebody put into the store under a name of his own is his."""
    order_id = order_factory("Free", source=source)
    end(sql, order_id, 31)
    artifacts = FakeArtifacts({source.removeprefix("artifact:"): b"x"})
    await prune(pruner(store, artifacts, wait=timedelta(0)))
    await prune(pruner(store, artifacts, wait=timedelta(0)))
    assert len(artifacts.objects) == 1
    assert order_factory.row(order_id)["pruned_at"] is not None


async def test_an_order_takes_an_idle_source_back(store: PostgresJobStore, order_factory: Orders, sql: Sql) -> None:
    """A new order for a photo that was about to go keeps it; so does holding it, for a day."""
    source = source_of(7)
    artifacts = FakeArtifacts({source.removeprefix("artifact:"): b"x"})
    end(sql, order_factory("Free", source=source), 31)
    await prune(pruner(store, artifacts))
    age_sources(sql)
    assert hold(sql, source)
    await prune(pruner(store, artifacts))
    assert idle(sql) == [source]
    age_sources(sql)
    order_factory("Free", source=source)
    await prune(pruner(store, artifacts))
    assert len(artifacts.objects) == 1
    assert idle(sql) == []


async def test_a_photo_that_was_never_ordered_goes(store: PostgresJobStore, sql: Sql) -> None:
    """Stored, and then the queue was full: a day later it is gone."""
    source = source_of(7)
    artifacts = FakeArtifacts({source.removeprefix("artifact:"): b"x"})
    assert hold(sql, source)
    await prune(pruner(store, artifacts))
    assert len(artifacts.objects) == 1
    age_sources(sql)
    await prune(pruner(store, artifacts))
    assert artifacts.objects == {}


async def test_an_order_that_is_being_made_keeps_its_source(
    engine_database: str, store: PostgresJobStore, order_factory: Orders, sql: Sql
) -> None:
    """A caller's open transaction with an order for an idle photo holds it, committed or not; rolled back, the photo goes."""
    source = source_of(7)
    artifacts = FakeArtifacts({source.removeprefix("artifact:"): b"x"})
    end(sql, order_factory("Free", source=source), 31)
    await prune(pruner(store, artifacts))
    age_sources(sql)
    enqueue = "SELECT jobdaemon.enqueue_order('Free', %s)"
    with psycopg.connect(engine_database) as caller:
        caller.execute(enqueue, [source])
        await prune(pruner(store, artifacts))
        assert len(artifacts.objects) == 1
        caller.rollback()
        assert await store.retention.sources_to_delete(DAY, 10) == [source]
        # Too late for a caller; whoever has the photo asks first, and waits.
        assert not hold(sql, source)
        caller.execute(enqueue, [source])
        caller.rollback()
    await store.retention.sources_deleted([source])
    assert idle(sql) == []
    assert hold(sql, source)


async def test_an_order_made_while_its_source_was_found_idle(
    engine_database: str, store: PostgresJobStore, order_factory: Orders, sql: Sql
) -> None:
    """An order whose transaction began before its photo was found idle, and ended afterwards, keeps the photo."""
    source = source_of(7)
    end(sql, order_factory("Free", source=source), 31)
    with psycopg.connect(engine_database) as caller:
        caller.execute("SELECT jobdaemon.enqueue_order('Free', %s)", [source])
        assert await store.retention.retire(MONTH, 10) == 1
        assert idle(sql) == [source]
    age_sources(sql)
    assert await store.retention.sources_to_delete(DAY, 10) == []
    assert idle(sql) == []


# -- when things break


class _BrokenStore(FakeArtifacts):
    async def delete(self, key: str) -> None:
        raise StoreUnavailableError("the store is away")


async def test_a_store_that_is_away_costs_nothing(
    store: PostgresJobStore, order_factory: Orders, sql: Sql, failures: list[UpkeepFailed]
) -> None:
    """What could not be deleted is deleted when the store is back; all else goes on meanwhile, and the log says why."""
    source = source_of(7)
    order_id = order_factory("Free", source=source)
    end(sql, order_id, 31)
    objects = {source.removeprefix("artifact:"): b"x", f"work/{order_id}/a.jpg": b"x"}
    broken = _BrokenStore(objects)
    running = asyncio.create_task(pruner(store, broken, wait=timedelta(0)).run())
    await until(lambda: len(failures) >= 2)
    running.cancel()
    await asyncio.wait([running])
    assert {failure.chore for failure in failures} == {"retention"}
    failures.clear()
    assert order_factory.jobs(order_id) == []
    assert order_factory.row(order_id)["pruned_at"] is None
    assert hold(sql, source)
    mended = FakeArtifacts(objects)
    await prune(pruner(store, mended, wait=timedelta(0)))
    assert mended.objects == {}
    assert order_factory.row(order_id)["pruned_at"] is not None


async def test_what_may_not_be_deleted_stands_in_nobodys_way(
    store: PostgresJobStore, order_factory: Orders, sql: Sql, monkeypatch: pytest.MonkeyPatch, failures: list[UpkeepFailed]
) -> None:
    """However many folders and photos the store keeps back, those behind them go; it is told, and tried again."""
    monkeypatch.setattr(pruner_module, "_ORDERS", 3)
    monkeypatch.setattr(pruner_module, "_SOURCES", 3)
    sources = [source_of(number) for number in range(10)]
    order_ids = [order_factory("Free", source=source) for source in sources]
    for order_id in order_ids:
        end(sql, order_id, 31)
    keys = [f"work/{order_id}/a.jpg" for order_id in order_ids] + [source.removeprefix("artifact:") for source in sources]
    kept = {*keys[:5], *keys[10:15]}

    class Stubborn(FakeArtifacts):
        async def delete(self, key: str) -> None:
            if key in kept:
                raise StoreRefusedError(f"{key} may not be deleted")
            await super().delete(key)

    artifacts = Stubborn(dict.fromkeys(keys, b"x"))
    step = pruner(store, artifacts)
    for _ in range(12):
        age_sources(sql)
        await prune(step)
    assert set(artifacts.objects) == kept
    assert all("may not be deleted" in failure.error for failure in failures)
    kept.clear()
    failures.clear()
    age_sources(sql)
    await prune(pruner(store, artifacts))
    assert artifacts.objects == {}


async def test_a_folder_that_cannot_be_deleted_keeps_none_behind_it(
    store: PostgresJobStore, order_factory: Orders, sql: Sql, monkeypatch: pytest.MonkeyPatch, failures: list[UpkeepFailed]
) -> None:
    """A fault of the disk looks as if the whole store were away: what comes after it goes all the same."""
    monkeypatch.setattr(pruner_module, "_ORDERS", 3)
    order_ids = [order_factory("Free") for _ in range(10)]
    for order_id in order_ids:
        end(sql, order_id, 31)
    broken = {f"work/{order_id}" for order_id in order_ids[:4]}

    class Faulty(FakeArtifacts):
        async def delete_folder(self, folder: str) -> None:
            if folder in broken:
                raise StoreUnavailableError("input/output error")
            await super().delete_folder(folder)

    artifacts = Faulty({f"work/{order_id}/a.jpg": b"x" for order_id in order_ids})
    step = pruner(store, artifacts)
    for _ in range(8):
        await prune(step)
    assert set(artifacts.objects) == {f"{folder}/a.jpg" for folder in broken}
    assert all("input/output error" in failure.error for failure in failures)
    broken.clear()
    failures.clear()
    await prune(pruner(store, artifacts))
    assert artifacts.objects == {}


async def test_a_deletion_that_was_broken_off_may_still_happen(
    store: PostgresJobStore, sql: Sql, monkeypatch: pytest.MonkeyPatch, failures: list[UpkeepFailed]
) -> None:
    """What a store may still be about to delete is not to be stored anew; all that it had not begun with is."""
    monkeypatch.setattr(pruner_module, "_DELETION_S", 0.1)
    for number in range(3):
        hold(sql, source_of(number))
    age_sources(sql)

    class Hanging(FakeArtifacts):
        async def delete(self, key: str) -> None:
            await asyncio.Event().wait()

    await prune(pruner(store, Hanging()))
    [failure] = failures
    assert "TimeoutError" in failure.error
    failures.clear()
    held = [hold(sql, source_of(number)) for number in range(3)]
    assert sorted(held) == [False, True, True]


async def test_a_clock_that_is_set_back_keeps_nobody_waiting(store: PostgresJobStore, sql: Sql) -> None:
    """A source whose deletion began in what is the future now is given out again."""
    source = source_of(1)
    hold(sql, source)
    age_sources(sql)
    assert await store.retention.sources_to_delete(DAY, 10) == [source]
    sql.execute("UPDATE jobdaemon.idle_sources SET deleting_at = now() + interval '40 days'")
    assert await store.retention.sources_to_delete(DAY, 10) == [source]


async def test_a_deletion_that_broke_off_is_done_again(store: PostgresJobStore, order_factory: Orders, sql: Sql) -> None:
    """A daemon that died over it leaves the source to the next one, ten minutes later; an order that came meanwhile keeps it."""
    first, second = source_of(1), source_of(2)
    for source in (first, second):
        hold(sql, source)
    age_sources(sql)
    assert sorted(await store.retention.sources_to_delete(DAY, 10)) == [first, second]
    assert await store.retention.sources_to_delete(DAY, 10) == []
    order_factory("Free", source=second)
    sql.execute("UPDATE jobdaemon.idle_sources SET deleting_at = now() - interval '11 minutes'")
    assert await store.retention.sources_to_delete(DAY, 10) == [first]
    assert idle(sql) == [first]


async def test_a_folder_goes_with_what_is_half_written(
    tmp_path: Path, store: PostgresJobStore, order_factory: Orders, sql: Sql
) -> None:
    """On a real folder: everything below ``work/<order>``, and the folder; nothing beside it."""
    artifacts = FilesStore(tmp_path)
    order_id, other = order_factory("Free"), order_factory("Free")
    end(sql, order_id, 31)
    await artifacts.put(f"work/{order_id}/a.jpg", b"x", "image/jpeg")
    await artifacts.put(f"work/{other}/a.jpg", b"x", "image/jpeg")
    (tmp_path / "work" / str(order_id) / "~jobdaemon-0123").write_bytes(b"half")
    await prune(pruner(store, artifacts))
    await artifacts.close()
    assert [path.name for path in (tmp_path / "work").iterdir()] == [str(other)]


def test_who_holds_and_orders_at_once_waits_for_nobody_long(engine_database: str, sql: Sql) -> None:
    """Twenty callers hold and order the same photo at one moment, while upkeep looks: no deadlock, and nothing left idle."""
    source = source_of(7)
    begin = Barrier(20)

    def caller(number: int) -> None:
        with psycopg.connect(engine_database, autocommit=True, options="-c lock_timeout=30s") as connection:
            begin.wait()
            if number % 4 == 0:
                connection.execute("SELECT jobdaemon.sources_to_delete(86400, 10)")
            connection.execute("SELECT jobdaemon.hold_source(%s)", [source])
            connection.execute("SELECT jobdaemon.enqueue_order('Free', %s)", [source])

    with ThreadPoolExecutor(20) as pool:
        list(pool.map(caller, range(20)))
    age_sources(sql)
    assert sql.execute("SELECT jobdaemon.sources_to_delete(86400, 10)").fetchall() == []
    assert idle(sql) == []


# -- what somebody holds


@pytest.mark.parametrize(
    "held",
    [
        "SELECT FROM jobdaemon.orders WHERE id = %(order)s FOR UPDATE",
        "SELECT FROM jobdaemon.images WHERE order_id = %(order)s FOR UPDATE",
        "SELECT FROM jobdaemon.provider_calls WHERE order_id = %(order)s FOR UPDATE",
        "SELECT FROM jobdaemon.attempts WHERE order_id = %(order)s FOR UPDATE",
        "SELECT FROM jobdaemon.procrastinate_jobs WHERE args ->> 'order_id' = %(order)s::text FOR UPDATE",
        "SELECT jobdaemon.enqueue_order('Free', %(source)s)",
    ],
)
@pytest.mark.parametrize("step", ["retire", "clear away", "remove"])
async def test_what_somebody_holds_is_passed_by(
    engine_database: str, store: PostgresJobStore, claimed_job_factory: Claimed, sql: Sql, held: str, step: str
) -> None:
    """An operator's, or a caller's, open transaction keeps what it holds: nothing waits for it, and all else goes."""
    order_ids = []
    sources = [source_of(1), source_of(2)]
    artifacts = FakeArtifacts({source.removeprefix("artifact:"): b"x" for source in sources})
    for source in sources:
        job = await claimed_job_factory.beautify(plan="Free", source=source)
        order_id = job.order_id or 0
        call(sql, order_id, job.id)
        await store.commit([Transition(job, End.RETRY, error_kind="Oops", error="it broke")], daemon_id=None)
        end(sql, order_id, 366)
        order_ids.append(order_id)
    if step != "retire":
        assert await store.retention.retire(MONTH, 10) == 2
        age_sources(sql)
    if step == "remove":
        await store.retention.pruned(order_ids)
    clearing = pruner(store, artifacts, orders=YEAR)
    with psycopg.connect(engine_database) as other:
        other.execute(held.encode(), {"order": order_ids[0], "source": sources[0]})
        began = asyncio.get_running_loop().time()
        await prune(clearing)
        # Far less than what a statement of upkeep waits at most.
        assert asyncio.get_running_loop().time() - began < 20
        assert order_ids[1] not in {row["id"] for row in sql.execute("SELECT id FROM jobdaemon.orders").fetchall()}
        other.rollback()
    await prune(clearing)
    assert count(sql, "orders") == count(sql, "images") == count(sql, "provider_calls") == 0
    await prune(pruner(store, artifacts, orders=YEAR))  # the jobs, from the first one on
    assert count(sql, "attempts") == count(sql, "procrastinate_jobs") == 0


async def test_what_cannot_be_passed_by_is_left_soon(
    engine_database: str, store: PostgresJobStore, order_factory: Orders, sql: Sql, failures: list[UpkeepFailed]
) -> None:
    """A photo that somebody holds within a transaction: retiring says so, and keeps upkeep for an instant only."""
    order_id = order_factory("Free", source=source_of(1))
    end(sql, order_id, 31)
    with psycopg.connect(engine_database) as other:
        other.execute("SELECT jobdaemon.hold_source(%s)", [source_of(1)])
        await prune(pruner(store, FakeArtifacts()))
        other.rollback()
    assert failures == [UpkeepFailed(error="retention waits: somebody holds what has to be written", chore="retention")]
    failures.clear()
    await prune(pruner(store, FakeArtifacts()))
    assert order_factory.row(order_id)["pruned_at"] is not None


def test_callers_do_not_wait_for_each_other(engine_database: str, sql: Sql) -> None:
    """Two that order the same idle photos in transactions of their own, the one the other way round: both get through at once."""
    sources = [source_of(1), source_of(2)]
    for source in sources:
        hold(sql, source)
    age_sources(sql)
    enqueue = "SELECT jobdaemon.enqueue_order('Free', %s)"
    with psycopg.connect(engine_database) as one, psycopg.connect(engine_database) as other:
        for connection in (one, other):
            connection.execute("SET lock_timeout = '20s'")
        one.execute(enqueue, [sources[0]])
        other.execute(enqueue, [sources[1]])
        one.execute(enqueue, [sources[1]])
        other.execute(enqueue, [sources[0]])
        # Nor does somebody who has one of the photos and is about to order it.
        sql.execute("SET lock_timeout = '20s'")
        assert hold(sql, sources[0])
        one.rollback()
        age_sources(sql)
        assert sql.execute("SELECT jobdaemon.sources_to_delete(86400, 10)").fetchall() == []
    assert sql.execute("SELECT jobdaemon.sources_to_delete(86400, 10)").fetchall() == []
    assert idle(sql) == []
