"""Photos at Superbed are deleted once their order has ended: the rows, their keeper, and whole daemons against the sandbox."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from pathlib import Path

import pytest
import pytest_asyncio

from jobdaemon.app import open_store
from jobdaemon.domain.artifact import Artifact, beautified_key
from jobdaemon.errors import DatabaseUnavailableError, ProviderUnavailableError
from jobdaemon.events import Event, Events, PhotoLeft
from jobdaemon.http import GuardedClient
from jobdaemon.ports import UploadedPhotos
from jobdaemon.providers.photo_links import SuperbedLinks
from jobdaemon.providers.superbed import Superbed
from jobdaemon.queue.photo_links import DeletionRules, PhotoLinkKeeper
from jobdaemon.queue.store import PostgresJobStore
from jobdaemon.sandbox import Behaviour, Sandbox, parse_faults
from jobdaemon.settings_generate import SuperbedSettings
from tests.daemons import until
from tests.factories import Orders, Sql
from tests.fakes import FakeUploaded
from tests.integration.test_orders_jimeng import Order, daemon, order, settings_for

__all__ = ["order"]

HOUR = timedelta(hours=1)
PNG = b"\x89PNG\r\n\x1a\n" + bytes(200)
#: No rest that a test would notice.
AT_ONCE = DeletionRules(tries=3, rest=timedelta(0), longest_rest=timedelta(0))


def photo_of(order_id: int) -> Artifact:
    return Artifact(beautified_key(order_id, "ab" * 32), "ab" * 32, len(PNG), "image/png")


async def load() -> bytes:
    return PNG


def is_there(link: str) -> bool:
    """Whether anybody can still fetch it."""
    try:
        urllib.request.urlopen(link, timeout=10).close()
    except urllib.error.HTTPError as error:
        error.close()
        return False
    return True


def end(sql: Sql, order_id: int) -> None:
    sql.execute("SELECT jobdaemon.cancel_order(%s)", [order_id])


def rows(sql: Sql) -> list[tuple[int, int]]:
    """Order and tries of every link."""
    found = sql.execute("SELECT order_id, tries FROM jobdaemon.photo_links ORDER BY id").fetchall()
    return [(row["order_id"], row["tries"]) for row in found]


# ---------------------------------------------------------------- the rows


@pytest.fixture(params=["fake", "rows"])
def uploaded(request: pytest.FixtureRequest, store: PostgresJobStore) -> UploadedPhotos:
    """Both that know what was uploaded."""
    return FakeUploaded() if request.param == "fake" else store.photo_links


async def test_a_link_is_found_until_it_is_old_or_forgotten(uploaded: UploadedPhotos) -> None:
    """The newest link of a photo is found, another photo's is not; a forgotten one is no more."""
    photo, other = photo_of(1).key, photo_of(2).key
    assert await uploaded.find(photo, max_age=HOUR) is None
    await uploaded.note(photo, "https://bed.example/1")
    assert await uploaded.find(photo, max_age=HOUR) == "https://bed.example/1"
    assert await uploaded.find(photo, max_age=timedelta(0)) is None
    assert await uploaded.find(other, max_age=HOUR) is None
    await uploaded.note(photo, "https://bed.example/2")
    assert await uploaded.find(photo, max_age=HOUR) == "https://bed.example/2"
    await uploaded.forget(photo)
    assert await uploaded.find(photo, max_age=HOUR) is None


async def test_forgetting_says_whether_another_link_may_help(uploaded: UploadedPhotos) -> None:
    """One that was given only once never worked, and no other will; one that was given again, or is gone, may have."""
    photo = photo_of(1).key
    await uploaded.note(photo, "https://bed.example/1")
    assert not await uploaded.forget(photo)
    await uploaded.note(photo, "https://bed.example/2")
    await uploaded.find(photo, max_age=HOUR)
    assert await uploaded.forget(photo)
    assert await uploaded.forget(photo)


async def test_links_of_open_orders_stay(store: PostgresJobStore, sql: Sql, order_factory: Orders) -> None:
    """Only links that no open order has are begun, forgotten ones too, each by one daemon; an order that is no more has ended."""
    first, second = order_factory("Free"), order_factory("Free")
    links = store.photo_links
    for order_id, name in ((first, "a"), (first, "shared"), (second, "shared"), (second, "b"), (999, "c")):
        await links.note(photo_of(order_id).key, f"https://bed.example/{name}")
    await links.forget(photo_of(second).key)
    end(sql, first)
    begun = await asyncio.gather(*(links.begin_deletions(10, DeletionRules()) for _ in range(2)))
    found = sorted((one.order_id, one.link[-1], one.tries) for ones in begun for one in ones)
    assert found == [(first, "a", 1), (999, "c", 1)]
    # Whoever goes on with the order gets no link that is being deleted.
    assert await links.find(photo_of(first).key, max_age=HOUR) == "https://bed.example/shared"
    end(sql, second)
    await links.end_deletion("https://bed.example/shared")
    assert rows(sql) == [(first, 1), (second, 0), (999, 1)]


async def test_tries_rest_longer_each_time(store: PostgresJobStore, sql: Sql) -> None:
    """A deletion that failed rests ten seconds, then four times as long each time, up to six hours; at last it is left."""
    await store.photo_links.note(photo_of(999).key, "https://bed.example/a")
    rests: list[int] = []
    for _ in range(DeletionRules().tries):
        [one] = await store.photo_links.begin_deletions(10, DeletionRules())
        assert one.tries == len(rests) + 1
        assert await store.photo_links.begin_deletions(10, DeletionRules()) == []
        row = sql.execute(
            "SELECT round(extract(epoch FROM try_at - clock_timestamp())) AS s FROM jobdaemon.photo_links"
        ).fetchone()
        assert row is not None
        rests.append(int(row["s"]))
        sql.execute("UPDATE jobdaemon.photo_links SET try_at = now()")
    assert rests[:6] == [10, 40, 160, 640, 2560, 10240]
    assert set(rests[6:]) == {21600}
    assert await store.photo_links.begin_deletions(10, DeletionRules()) == []


# ---------------------------------------------------------------- the keeper and Superbed


@pytest_asyncio.fixture
async def sandbox() -> AsyncIterator[Sandbox]:
    async with Sandbox(Behaviour(latency_s=0.01, image_px=(64, 64))) as sandbox:
        yield sandbox


@pytest_asyncio.fixture
async def opened(sandbox: Sandbox) -> AsyncIterator[Callable[[str], Superbed]]:
    """Opens the account of a token."""
    client = GuardedClient(allowed_hosts=[sandbox.url.removeprefix("http://")])

    def open_account(token: str) -> Superbed:
        section = {"url": f"{sandbox.url}/superbed/upload", "token": token, "timeout": "3s"}
        return Superbed(SuperbedSettings.model_validate(section), client)

    yield open_account
    await client.close()


@pytest.fixture
def superbed(opened: Callable[[str], Superbed]) -> Superbed:
    """An account whose calls may go wrong."""
    return opened("faulty-token")


@pytest.mark.newest_postgres
async def test_superbed_deletes(superbed: Superbed, opened: Callable[[str], Superbed]) -> None:
    """What a link gives is gone afterwards; the older way of asking is taken where the newer one is refused."""
    link = await superbed.upload("a.png", PNG, "image/png")
    assert await asyncio.to_thread(is_there, link)
    await superbed.delete(link)
    assert not await asyncio.to_thread(is_there, link)
    await superbed.delete(link)
    older = opened("older-token")
    link = await older.upload("a.png", PNG, "image/png")
    await older.delete(link)
    assert not await asyncio.to_thread(is_there, link)


@pytest.mark.newest_postgres
@pytest.mark.parametrize("fault", ["429", "500", "html", "reset", "timeout"])
async def test_a_failed_deletion_shows_no_link(fault: str, superbed: Superbed, sandbox: Sandbox) -> None:
    """Whatever becomes of a deletion is one error of ours, without the link, which anybody could open, and the token."""
    link = await superbed.upload("a.png", PNG, "image/png")
    sandbox.behaviour.faults = parse_faults(f"{fault}=1")
    with pytest.raises(ProviderUnavailableError if fault != "429" else Exception) as caught:
        await superbed.delete(link)
    item = link.rpartition("/")[2].partition(".")[0]
    assert item not in str(caught.value)
    assert "faulty-token" not in str(caught.value)


async def test_superbed_is_away(
    store: PostgresJobStore, sql: Sql, order_factory: Orders, superbed: Superbed, sandbox: Sandbox
) -> None:
    """A deletion that fails is tried again, and one that fails in all tries is said once, and left to be looked up."""
    seen: list[Event] = []
    events = Events()
    events.subscribe(seen.append)
    keeper = PhotoLinkKeeper(store.photo_links, superbed.delete, events, poll=HOUR, rules=AT_ONCE)
    order_id = order_factory("Free")
    links = SuperbedLinks(superbed, store.photo_links)
    link = await links.link(photo_of(order_id), load)
    await keeper.sweep()
    assert rows(sql) == [(order_id, 0)]
    end(sql, order_id)
    sandbox.behaviour.faults = parse_faults("500=1")
    await store.photo_links.note(photo_of(999).key, "https://bed.example/another")
    await keeper.sweep()
    # The other one is not even tried in that round.
    assert (rows(sql), seen) == ([(order_id, 1), (999, 0)], [])
    sandbox.behaviour.faults = parse_faults("")
    await keeper.sweep()
    assert rows(sql) == []
    assert not await asyncio.to_thread(is_there, link)

    link = await links.link(photo_of(order_id), load)
    sandbox.behaviour.faults = parse_faults("500=1")
    for _ in range(5):
        await keeper.sweep()
    assert rows(sql) == [(order_id, 3)]
    assert [(event.order_id, event.tries) for event in seen if isinstance(event, PhotoLeft)] == [(order_id, 3)]
    row = sql.execute("SELECT link, error FROM jobdaemon.photo_links").fetchone()
    assert row is not None
    assert (row["link"], "cannot delete the photo now" in row["error"]) == (link, True)


@pytest.mark.newest_postgres
async def test_a_photo_whose_link_cannot_be_noted_is_taken_back(superbed: Superbed, sandbox: Sandbox) -> None:
    """Postgres goes away during the upload: the photo is deleted at once, since nobody would know of it."""
    kept: list[str] = []

    class Away(FakeUploaded):
        async def note(self, photo: str, link: str) -> None:
            kept.append(link)
            raise DatabaseUnavailableError("away")

    with pytest.raises(DatabaseUnavailableError):
        await SuperbedLinks(superbed, Away()).link(photo_of(1), load)
    assert not await asyncio.to_thread(is_there, kept[0])


@pytest.mark.newest_postgres
async def test_a_cancelled_upload_is_noted(superbed: Superbed, sandbox: Sandbox) -> None:
    """An attempt that is cut off while its photo is on the way waits for it, so that it is deleted with the order."""
    sandbox.behaviour.latency_s = 4.0  # an upload takes a fortieth
    known = FakeUploaded()
    upload = asyncio.ensure_future(SuperbedLinks(superbed, known).link(photo_of(1), load))
    await until(lambda: sandbox.report()["apis"].get("superbed", {}).get("calls") == 1)
    upload.cancel()
    with pytest.raises(asyncio.CancelledError):
        await upload
    assert list(known.links) == [photo_of(1).key]


# ---------------------------------------------------------------- whole daemons


def link_of(placed: Order) -> str | None:
    found = placed.rows("SELECT link FROM jobdaemon.photo_links WHERE order_id = %s")
    return str(found[0]["link"]) if found else None


async def linked(placed: Order) -> str:
    await until(lambda: link_of(placed) is not None)
    return link_of(placed) or ""


@pytest.mark.newest_postgres
@pytest.mark.parametrize(
    ("status", "prompts"),
    [
        ("completed", ("by a window", "in a wood")),
        ("partial", ("by a window", "sandbox:result=50413")),
        ("failed", ("sandbox:result=50413",)),
        ("cancelled", ("by a window",)),
    ],
)
async def test_an_order_that_ends_takes_its_link_along(
    status: str, prompts: tuple[str, ...], database: str, order: Order, tmp_path: Path
) -> None:
    """However an order ends, its photo is gone from Superbed soon after, and not before."""
    async with Sandbox(Behaviour(latency_s=0.3)) as sandbox, daemon(settings_for(sandbox, tmp_path), database) as running:
        await order.place(running.artifacts, *prompts)
        link = await linked(order)
        assert await asyncio.to_thread(is_there, link)
        if status == "cancelled":
            # In a thread: it may wait for a transaction of the daemon, which runs in this one.
            await asyncio.to_thread(order.rows, "SELECT jobdaemon.cancel_order(%s)")
        await until(order.has_ended)
        await until(lambda: link_of(order) is None)
        assert not await asyncio.to_thread(is_there, link)
    assert order.status() == status


@pytest.mark.newest_postgres
async def test_the_order_does_not_wait_for_superbed(database: str, order: Order, tmp_path: Path) -> None:
    """Superbed fails once the photo is there: the order completes all the same, and the deletion is tried until it works."""
    async with Sandbox(Behaviour(latency_s=0.05)) as sandbox:
        settings = settings_for(sandbox, tmp_path)
        settings = settings.model_copy(
            update={"superbed": SuperbedSettings.model_validate(settings.superbed.model_dump() | {"token": "faulty-token"})}
        )
        async with daemon(settings, database) as running:
            await asyncio.to_thread(order._connection.execute, "SELECT jobdaemon.pause_queue('upload')")
            await order.place(running.artifacts)
            link = await linked(order)
            await until(lambda: [image["status"] for image in order.images()] == ["generated"] * 4)
            sandbox.behaviour.faults = parse_faults("500=1")
            await asyncio.to_thread(order._connection.execute, "SELECT jobdaemon.resume_queue('upload')")
            await until(order.has_ended)
            assert order.status() == "completed"
            tries = "SELECT FROM jobdaemon.photo_links WHERE order_id = %s AND tries = 1 AND error IS NOT NULL"
            await until(lambda: bool(order.rows(tries)))
            assert await asyncio.to_thread(is_there, link)
            sandbox.behaviour.faults = parse_faults("")
            await asyncio.to_thread(
                order.rows, "UPDATE jobdaemon.photo_links SET try_at = now() WHERE order_id = %s RETURNING id"
            )
            await until(lambda: link_of(order) is None)
            assert not await asyncio.to_thread(is_there, link)


@pytest.mark.newest_postgres
async def test_a_daemon_that_died_leaves_no_photo(database: str, order: Order, tmp_path: Path) -> None:
    """SIGKILL between the upload and the order's end: whichever daemon runs next deletes the photo."""
    async with Sandbox(Behaviour(latency_s=10.0)) as sandbox:
        settings = settings_for(sandbox, tmp_path)
        environ = os.environ | {
            "JOBDAEMON_DATABASE_URL": database,
            "JOBDAEMON_DATA_DIR": str(tmp_path),
            "JOBDAEMON_PHOTOS__ALLOWED_HOSTS": sandbox.url.removeprefix("http://"),
            "JOBDAEMON_SUPERBED__URL": f"{sandbox.url}/superbed/upload",
            "JOBDAEMON_SUPERBED__TOKEN": "orders-token",
            "JOBDAEMON_GENERATE__JIMENG__BASE_URL": sandbox.url,
            "JOBDAEMON_GENERATE__JIMENG__ACCESS_KEY_ID": "AKorders",
            "JOBDAEMON_GENERATE__JIMENG__SECRET_ACCESS_KEY": "SKorders==",
            "JOBDAEMON_GENERATE__JIMENG__PHOTO": "superbed",
        }
        silent = subprocess.DEVNULL
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "jobdaemon", "run", env=environ, stdout=silent, stderr=silent
        )
        artifacts = open_store(settings)
        try:
            await until(lambda: bool(order.rows("SELECT FROM jobdaemon.workers WHERE status = 'running' OR %s IS NULL")))
            await order.place(artifacts)
            link = await linked(order)
        finally:
            process.kill()
            await process.wait()
            await artifacts.close()
        await asyncio.to_thread(order.rows, "SELECT jobdaemon.cancel_order(%s)")
        assert await asyncio.to_thread(is_there, link)
        async with daemon(settings, database):
            await until(lambda: link_of(order) is None)
        assert not await asyncio.to_thread(is_there, link)
