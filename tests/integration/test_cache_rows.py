"""The rows of the cache: what is a hit, whose claim counts and for how long, and what upkeep copies and gives up."""

from __future__ import annotations

import asyncio
import hashlib
import tracemalloc
from datetime import timedelta
from pathlib import Path

import psycopg
import pytest
from psycopg.rows import dict_row

from jobdaemon.db import DatabaseAddress
from jobdaemon.errors import StoreRefusedError
from jobdaemon.events import Events, UpkeepFailed
from jobdaemon.ports import Taken
from jobdaemon.queue.image_cache import CacheKeeper
from jobdaemon.queue.store import PostgresJobStore
from jobdaemon.spool import Spool
from jobdaemon.storage.files import FilesStore
from tests.daemons import until
from tests.factories import Orders, Row, Sql
from tests.fakes import FakeArtifacts

HOUR, WEEK = timedelta(hours=1), timedelta(days=7)
PROVIDER = "local"
A, B, C = (f"{number:064x}" for number in (0xA, 0xB, 0xC))


async def take(
    store: PostgresJobStore, order_id: int, images: dict[int, str], *, hold: timedelta = HOUR, ttl: timedelta = WEEK
) -> Taken:
    return await store.cache.take(PROVIDER, None, order_id, images, hold=hold, ttl=ttl)


def make(sql: Sql, order_id: int, index: int, content: bytes | None = None, *, provider: str = PROVIDER) -> str:
    """The image is generated now, and stored when there is *content*; its key."""
    key = f"orders/{order_id}/{index:03d}.jpg"
    sql.execute(
        "UPDATE jobdaemon.images SET status = 'generated', provider = %s, generated_at = now()"
        " WHERE order_id = %s AND index = %s",
        [provider, order_id, index],
    )
    if content is not None:
        sql.execute(
            "UPDATE jobdaemon.images SET status = 'stored', object_key = %s, sha256 = %s, bytes = %s, media_type = 'image/jpeg',"
            " stored_at = now() WHERE order_id = %s AND index = %s",
            [key, hashlib.sha256(content).hexdigest(), len(content), order_id, index],
        )
    return key


def rows(sql: Sql, columns: str = "key, order_id, index, dropped_at IS NOT NULL AS dropped") -> list[Row]:
    return sql.execute(f"SELECT {columns} FROM jobdaemon.cache ORDER BY id".encode()).fetchall()


def keeper(store: PostgresJobStore, artifacts: FakeArtifacts, *, ttl: timedelta = WEEK, max_bytes: int = 1000) -> CacheKeeper:
    return CacheKeeper(
        store.cache,
        artifacts,
        Events(),
        is_on=True,
        ttl=ttl,
        max_bytes=max_bytes,
        max_image_bytes=1000,
        poll=timedelta(seconds=0.05),
    )


async def test_a_claim_is_one_orders(store: PostgresJobStore, order_factory: Orders) -> None:
    """What one order has claimed another has to wait for, until it is released; the claimer may ask again."""
    first, second = order_factory(), order_factory()
    assert (await take(store, first, {1: A, 2: B})).claimed == {1, 2}
    assert (await take(store, first, {1: A, 2: B})).claimed == {1, 2}
    taken = await take(store, second, {1: B})
    assert (taken.claimed, taken.hits, taken.ask_again_in) == (frozenset(), {}, timedelta(seconds=1))
    await store.cache.release(first, [2])
    assert (await take(store, second, {1: B})).claimed == {1}


async def test_nothing_is_claimed_beside_what_is_busy(store: PostgresJobStore, order_factory: Orders, sql: Sql) -> None:
    """While one image of a batch is being made for another order, the rest of the batch is claimed by nobody."""
    first, second, third = order_factory(), order_factory(), order_factory()
    await take(store, first, {1: A})
    assert (await take(store, second, {1: A, 2: B})).ask_again_in is not None
    assert [row["key"] for row in rows(sql)] == [A]
    assert (await take(store, third, {1: B})).claimed == {1}


@pytest.mark.parametrize("end", ["time", "failed", "cancelled", "deleted"])
async def test_a_claim_ends(store: PostgresJobStore, order_factory: Orders, sql: Sql, end: str) -> None:
    """A claim counts for no longer than its time, and only while its image is on its way."""
    first, second = order_factory(), order_factory()
    await take(store, first, {1: A}, hold=timedelta(seconds=0.01) if end == "time" else HOUR)
    if end == "time":
        sql.execute("SELECT pg_sleep(0.02)")
    elif end == "deleted":
        sql.execute("DELETE FROM jobdaemon.images WHERE order_id = %s", [first])
    else:
        sql.execute("UPDATE jobdaemon.images SET status = %s WHERE order_id = %s", [end, first])
    assert (await take(store, second, {3: A})).claimed == {3}
    assert [(row["order_id"], row["index"]) for row in rows(sql)] == [(second, 3)]


async def test_many_at_once(store: PostgresJobStore, engine_database: str, order_factory: Orders, sql: Sql) -> None:
    """Of many that ask for overlapping images at the same moment each image is claimed by one, and nobody meets a deadlock."""
    orders = [order_factory() for _ in range(12)]
    stale = order_factory()
    await take(store, stale, {1: A, 2: B}, hold=timedelta(0))
    wishes = [{1: A, 2: B}, {2: C, 1: A}, {5: B, 4: C}, {1: C, 2: B, 3: A}] * 3

    def ask(order_id: int, images: dict[int, str]) -> dict[int, str]:
        with psycopg.connect(engine_database, autocommit=True, row_factory=dict_row) as connection:
            found = connection.execute(
                "SELECT image, state FROM jobdaemon.take_from_cache(%s, NULL, %s, %s, %s, 60, 60)",
                [PROVIDER, order_id, list(images), list(images.values())],
            ).fetchall()
        return {row["image"]: row["state"] for row in found}

    answers = await asyncio.gather(*(asyncio.to_thread(ask, *pair) for pair in zip(orders, wishes, strict=True)))
    claimed = [
        wish[image] for wish, answer in zip(wishes, answers, strict=True) for image in answer if answer[image] == "claimed"
    ]
    assert len(claimed) == len(set(claimed)) > 0
    held = {row["key"]: row["order_id"] for row in rows(sql)}
    for order_id, wish, answer in zip(orders, wishes, answers, strict=True):
        assert set(answer) == set(wish)
        for image, state in answer.items():
            assert (held.get(wish[image]) == order_id) == (state == "claimed")


async def test_who_waits_for_a_row_sees_what_it_became(
    store: PostgresJobStore, engine_database: str, order_factory: Orders, sql: Sql
) -> None:
    """Of two that find the same lapsed claim, and wait for its row together, one gets it and the other sees that."""
    stale, *both = order_factory(), order_factory(), order_factory()
    await take(store, stale, {1: A}, hold=timedelta(0))
    other = PostgresJobStore(DatabaseAddress(engine_database))
    blocked = "SELECT FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    try:
        with psycopg.connect(engine_database) as locker:
            locker.execute("SELECT FROM jobdaemon.cache FOR UPDATE")
            answers = [
                asyncio.ensure_future(take(asker, order, {1: A})) for asker, order in zip((store, other), both, strict=True)
            ]
            await until(lambda: len(sql.execute(blocked).fetchall()) == 2)
        claimed = [order for order, answer in zip(both, answers, strict=True) if (await answer).claimed]
    finally:
        await other.close()
    assert [row["order_id"] for row in rows(sql)] == claimed


async def test_a_stored_image_is_a_hit_before_it_is_copied(store: PostgresJobStore, order_factory: Orders, sql: Sql) -> None:
    """A generated image is still busy; once stored it is given from the order's own key."""
    first, second = order_factory(), order_factory()
    await take(store, first, {1: A})
    make(sql, first, 1)
    assert (await take(store, second, {1: A})).ask_again_in is not None
    key = make(sql, first, 1, b"image")
    hit = (await take(store, second, {1: A})).hits[1]
    assert (hit.artifact, hit.sha256, hit.media_type) == (key, hashlib.sha256(b"image").hexdigest(), "image/jpeg")


@pytest.mark.parametrize("wrong", ["provider", "late", "settings"])
async def test_only_what_was_claimed_gets_in(store: PostgresJobStore, order_factory: Orders, sql: Sql, wrong: str) -> None:
    """An image of another provider, of after the claim's time, or asked for anew under other settings is not what was claimed."""
    first, second = order_factory(), order_factory()
    await take(store, first, {1: A}, hold=timedelta(0) if wrong == "late" else HOUR)
    if wrong == "settings":
        await take(store, first, {1: B})
    make(sql, first, 1, b"image", provider="other" if wrong == "provider" else PROVIDER)
    assert [copy for copy in await store.cache.begin_copies(9, 60) if A in copy.artifact] == []
    taken = await take(store, second, {1: A})
    assert (set(taken.claimed), set(taken.hits)) == ({1}, set())


async def test_copies_are_made_once(store: PostgresJobStore, order_factory: Orders, sql: Sql) -> None:
    """A stored image is copied under a key of its own; what is missing or damaged at its source is given up."""
    order = order_factory()
    await take(store, order, {1: A, 2: B, 3: C})
    artifacts = FakeArtifacts({make(sql, order, 1, b"one"): b"one", make(sql, order, 2, b"two"): b"other"})
    make(sql, order, 3, b"three")
    copies = keeper(store, artifacts)
    await copies.copy()
    [row, *bad] = rows(sql, "id, artifact, copied_at IS NOT NULL AS copied, dropped_at IS NOT NULL AS dropped")
    assert (row["copied"], row["dropped"]) == (True, False)
    assert [entry["dropped"] for entry in bad] == [True, True]
    assert row["artifact"] == f"cache/{A[:2]}/{A}-{row['id']}.jpg"
    assert artifacts.objects[row["artifact"]] == b"one"
    artifacts.objects.clear()
    await copies.copy()
    assert artifacts.objects == {}
    assert (await take(store, order_factory(), {1: A})).hits[1].artifact == row["artifact"]


async def test_a_copier_that_dies_is_followed(store: PostgresJobStore, order_factory: Orders, sql: Sql) -> None:
    """A copy that was begun is nobody else's until its time is over; then it is made under the same key."""
    order = order_factory()
    await take(store, order, {1: A})
    make(sql, order, 1, b"one")
    [begun] = await store.cache.begin_copies(9, 60)
    assert await store.cache.begin_copies(9, 60) == []
    assert (await take(store, order_factory(), {1: A})).hits[1].artifact == begun.source
    sql.execute("UPDATE jobdaemon.cache SET copying_until = now()")
    assert await store.cache.begin_copies(9, 60) == [begun]


async def _keep(store: PostgresJobStore, orders: Orders, sql: Sql, artifacts: FakeArtifacts, *keys: str) -> None:
    """Copies of ten bytes each, the first one the longest not asked for."""
    order = orders()
    await take(store, order, dict(enumerate(keys, 1)))
    for index, _ in enumerate(keys, 1):
        artifacts.objects[make(sql, order, index, b"0123456789")] = b"0123456789"
    await keeper(store, artifacts).copy()
    for place, key in enumerate(keys):
        sql.execute("UPDATE jobdaemon.cache SET last_hit_at = now() - %s WHERE key = %s", [HOUR - timedelta(minutes=place), key])


def _kept(artifacts: FakeArtifacts) -> list[str]:
    """Keys of the copies that lie in the store."""
    return sorted(name.split("/")[2].partition("-")[0] for name in artifacts.objects if name.startswith("cache/"))


async def test_the_size_is_bounded(store: PostgresJobStore, order_factory: Orders, sql: Sql) -> None:
    """Above max_bytes what was not asked for the longest goes, rows and files; a hit makes an image young."""
    artifacts = FakeArtifacts()
    await _keep(store, order_factory, sql, artifacts, A, B, C)
    await keeper(store, artifacts, max_bytes=30).trim()
    assert _kept(artifacts) == [A, B, C]
    assert (await take(store, order_factory(), {1: A})).hits.keys() == {1}
    await keeper(store, artifacts, max_bytes=29).trim()
    assert _kept(artifacts) == [A, C]
    assert [row["key"] for row in rows(sql)] == [A, C]
    await keeper(store, artifacts, max_bytes=1).trim()
    assert (_kept(artifacts), rows(sql)) == ([], [])


async def test_age_is_bounded(store: PostgresJobStore, order_factory: Orders, sql: Sql) -> None:
    """What is older than ttl is no hit even before upkeep comes by, and then it goes from rows and store."""
    artifacts = FakeArtifacts()
    await _keep(store, order_factory, sql, artifacts, A, B)
    sql.execute("UPDATE jobdaemon.cache SET made_at = now() - interval '2 hours' WHERE key = %s", [A])
    taken = await take(store, order_factory(), {1: A, 2: B}, ttl=HOUR)
    assert (set(taken.claimed), set(taken.hits)) == ({1}, {2})
    sql.execute("UPDATE jobdaemon.cache SET made_at = now() - interval '2 hours' WHERE key = %s", [B])
    await keeper(store, artifacts, ttl=HOUR).trim()
    assert _kept(artifacts) == []
    assert [(row["key"], row["dropped"]) for row in rows(sql)] == [(A, False)]


async def test_what_cannot_be_deleted_stands_in_nobodys_way(store: PostgresJobStore, sql: Sql) -> None:
    """However many copies the store will not delete, those given up after them go; the failure is told, and tried again."""

    class Stubborn(FakeArtifacts):
        async def delete(self, key: str) -> None:
            if key.startswith("cache/1/"):
                raise StoreRefusedError(f"{key} may not be deleted")
            await super().delete(key)

    sql.execute(
        "INSERT INTO jobdaemon.cache (key, provider, order_id, index, claimed_at, claimed_until, artifact, dropped_at)"
        " SELECT repeat('a', 64), 'x', 1, n, now(), now(), format('cache/%s/%s.jpg', folder, n), now()"
        " FROM generate_series(1, 2) AS folder, generate_series(1, 250) AS n"
    )
    artifacts = Stubborn({f"cache/{folder}/{n}.jpg": b"x" for folder in (1, 2) for n in range(1, 251)})
    with pytest.raises(StoreRefusedError):
        await keeper(store, artifacts).trim()
    assert len(artifacts.objects) == len(rows(sql)) == 250


async def test_a_copy_under_way_is_not_deleted_under_the_copier(store: PostgresJobStore, order_factory: Orders, sql: Sql) -> None:
    """What is given up while it is copied leaves its row until the copier must be done, so that no file stays behind."""
    order = order_factory()
    await take(store, order, {1: A})
    make(sql, order, 1, b"one")
    [copy] = await store.cache.begin_copies(9, 60)
    assert sql.execute("SELECT jobdaemon.clear_cache()").fetchone() == {"clear_cache": 1}
    artifacts = FakeArtifacts()
    await keeper(store, artifacts).trim()
    await artifacts.put(copy.artifact, b"one", copy.media_type)
    await store.cache.end_copy(copy.id)
    assert (await take(store, order_factory(), {1: A})).claimed == {1}
    sql.execute("UPDATE jobdaemon.cache SET copying_until = now() WHERE dropped_at IS NOT NULL")
    await keeper(store, artifacts).trim()
    assert (artifacts.objects, len(rows(sql))) == ({}, 1)


async def test_clear(store: PostgresJobStore, order_factory: Orders, sql: Sql) -> None:
    """clear_cache gives up what one provider or one order left, or all, and says how many images."""
    artifacts = FakeArtifacts()
    await _keep(store, order_factory, sql, artifacts, A)
    await _keep(store, order_factory, sql, artifacts, B)
    [first, second] = [row["order_id"] for row in rows(sql)]

    def clear(arguments: str) -> object:
        [row] = sql.execute(f"SELECT jobdaemon.clear_cache({arguments}) AS count".encode()).fetchall()
        return row["count"]

    assert clear("provider => 'nobody'") == 0
    assert clear(f"order_id => {first}") == 1
    assert clear(f"'{PROVIDER}', {second}") == 1
    assert clear("") == 0
    await keeper(store, artifacts).trim()
    assert (_kept(artifacts), rows(sql)) == ([], [])


async def test_claims_that_came_to_nothing_go(store: PostgresJobStore, order_factory: Orders, sql: Sql) -> None:
    """The row of a claim that lapsed is deleted after an hour; one that holds stays."""
    order = order_factory()
    await take(store, order, {1: A, 2: B})
    sql.execute("UPDATE jobdaemon.cache SET claimed_until = now() - interval '61 minutes' WHERE key = %s", [A])
    await keeper(store, FakeArtifacts()).trim()
    assert [row["key"] for row in rows(sql)] == [B]


async def test_a_copy_takes_no_memory(store: PostgresJobStore, order_factory: Orders, sql: Sql, tmp_path: Path) -> None:
    """However large the image: it goes from the store through a file, in the settings' folder, back to the store."""
    content = bytes(range(256)) * (32 * 2**20 // 256)
    artifacts = FilesStore(tmp_path / "store")
    order = order_factory()
    await take(store, order, {1: A})
    await artifacts.put(make(sql, order, 1, content), content, "image/jpeg")
    spools: list[Spool] = []

    def spool() -> Spool:
        spools.append(Spool(tmp_path / "spool"))
        return spools[-1]

    copier = CacheKeeper(
        store.cache,
        artifacts,
        Events(),
        is_on=True,
        ttl=WEEK,
        max_bytes=2**30,
        max_image_bytes=len(content),
        poll=timedelta(seconds=0.05),
        spool=spool,
    )
    tracemalloc.start()
    try:
        await copier.copy()
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < len(content) / 4
    assert [spool.size_bytes for spool in spools] == [len(content)]
    [hit] = (await take(store, order_factory(), {1: A})).hits.values()
    assert await artifacts.get(hit.artifact, max_bytes=len(content)) == content
    assert hit.artifact.startswith("cache/")
    await artifacts.close()


async def test_a_keeper_that_is_off_ends_when_nothing_is_left(store: PostgresJobStore, order_factory: Orders, sql: Sql) -> None:
    """Switched off, what was kept still goes by its age; with nothing left the keeper ends."""
    artifacts = FakeArtifacts()
    await _keep(store, order_factory, sql, artifacts, A)
    seen: list[object] = []
    events = Events()
    events.subscribe(seen.append)
    off = CacheKeeper(
        store.cache,
        artifacts,
        events,
        is_on=False,
        ttl=timedelta(microseconds=1),
        max_bytes=1000,
        max_image_bytes=1000,
        poll=timedelta(seconds=0.05),
    )
    async with asyncio.timeout(60):
        await off.run()
    assert (_kept(artifacts), rows(sql)) == ([], [])
    assert not [event for event in seen if isinstance(event, UpkeepFailed)]
