"""The cache in whole orders: real daemons, a real database, the sandbox for the service that is paid."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.rows import dict_row

from jobdaemon.app import Daemon
from jobdaemon.domain.artifact import source_key
from jobdaemon.domain.order import NewOrder
from jobdaemon.enqueue import enqueue
from jobdaemon.sandbox import Behaviour, Sandbox
from tests.daemons import until
from tests.factories import Row
from tests.integration.test_orders_openai_images import API, PORTRAIT, daemon, settings_for

pytestmark = pytest.mark.newest_postgres


class Shop:
    """Orders of one photo, and what became of them."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url = url
        self.folder = folder
        self.sql = psycopg.connect(url, autocommit=True, row_factory=dict_row)

    def order(
        self, *, images: int = 2, prompts: Sequence[str] = ("by a window",), source: Path = PORTRAIT, params: Any = None
    ) -> int:
        """Place one; the photo must be in the store."""
        digest = hashlib.sha256(source.read_bytes()).hexdigest()
        values: Any = {"params": params} if params is not None else {}
        order = NewOrder(
            plan="Start",
            source=f"artifact:{source_key(digest, source.suffix[1:])}",
            prompts=tuple(prompts),
            images=images,
            provider=API,
            **values,
        )
        return enqueue(self.sql, order).order_id

    def store_photo(self, source: Path = PORTRAIT) -> None:
        """Where orders name it."""
        target = self.folder / "artifacts" / source_key(hashlib.sha256(source.read_bytes()).hexdigest(), source.suffix[1:])
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())

    def rows(self, query: str, *values: object) -> list[Row]:
        return self.sql.execute(query.encode(), values).fetchall()

    async def ended(self, *order_ids: int) -> None:
        """Wait for these orders; all must be completed."""
        ids = list(order_ids)
        await until(
            lambda: not self.rows("SELECT FROM jobdaemon.orders WHERE id = ANY (%s) AND finished_at IS NULL", ids), timeout_s=60
        )
        for row in self.rows("SELECT id, status, error FROM jobdaemon.orders WHERE id = ANY (%s)", ids):
            assert row == {"id": row["id"], "status": "completed", "error": None}

    async def kept(self, count: int) -> None:
        """Wait until the cache has copies of so many images."""
        query = "SELECT count(*) AS n FROM jobdaemon.cache WHERE copied_at IS NOT NULL AND dropped_at IS NULL"
        await until(lambda: self.rows(query) == [{"n": count}])

    def files(self, order_id: int) -> dict[int, tuple[str, bytes]]:
        """Key and bytes of each stored image, as they lie in the store."""
        query = "SELECT index, object_key, sha256 FROM jobdaemon.images WHERE order_id = %s AND status = 'stored'"
        files = {}
        for row in self.rows(query, order_id):
            content = (self.folder / "artifacts" / row["object_key"]).read_bytes()
            assert hashlib.sha256(content).hexdigest() == row["sha256"]
            files[row["index"]] = (row["object_key"], content)
        return files

    def copies(self) -> list[Path]:
        """What lies in the cache's part of the store."""
        return [path for path in (self.folder / "artifacts" / "cache").rglob("*") if path.is_file()]

    def calls(self, order_id: int) -> list[list[int]]:
        """The images that each call for this order asked for."""
        query = "SELECT images FROM jobdaemon.provider_calls WHERE order_id = %s ORDER BY id"
        return [row["images"] for row in self.rows(query, order_id)]

    def stats(self) -> Row:
        """Its row of cache_stats."""
        [row] = self.rows("SELECT entries, hits, misses, hit_rate FROM jobdaemon.cache_stats WHERE provider = %s", API)
        return row


@pytest.fixture
def shop(database: str, tmp_path: Path) -> Iterator[Shop]:
    """Its photo lies in the store."""
    shop = Shop(database, tmp_path)
    shop.store_photo()
    yield shop
    shop.sql.close()


@pytest.fixture
def cache_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """What settings_for reads says that the provider's images are cached."""
    monkeypatch.setenv("JOBDAEMON_CACHE__PROVIDERS", f'["{API}"]')


@asynccontextmanager
async def at_work(shop: Shop, **generate: str) -> AsyncIterator[tuple[Sandbox, Daemon]]:
    """A daemon, and the service that it buys from."""
    async with (
        Sandbox(Behaviour(latency_s=0.02)) as sandbox,
        daemon(settings_for(sandbox, shop.folder, **generate), shop.url) as d,
    ):
        yield sandbox, d


def bought(sandbox: Sandbox) -> int:
    """Images that cost money."""
    count: int = sandbox.report()["apis"][API]["images_bought"]
    return count


@pytest.mark.usefixtures("cache_on")
async def test_an_equal_order_buys_nothing(shop: Shop) -> None:
    """The second of two equal orders gets copies of its own without a call, whatever becomes of the first one's files."""
    async with at_work(shop) as (sandbox, _):
        first = shop.order()
        await shop.ended(first)
        await shop.kept(2)
        second = shop.order()
        await shop.ended(second)
        assert (bought(sandbox), shop.calls(first), shop.calls(second)) == (2, [[1, 2]], [])
        was, now = shop.files(first), shop.files(second)
        assert [content for _, content in was.values()] == [content for _, content in now.values()]
        assert {key for key, _ in was.values()}.isdisjoint(key for key, _ in now.values())
        assert len(shop.copies()) == 2
        for key, _ in was.values():
            (shop.folder / "artifacts" / key).unlink()
        third = shop.order()
        await shop.ended(third)
        assert shop.files(third)[1][1] == now[1][1]
        assert bought(sandbox) == 2
        assert shop.stats() == {"entries": 2, "hits": 4, "misses": 2, "hit_rate": 0.6667}


@pytest.mark.usefixtures("cache_on")
async def test_what_was_not_made_before_is_bought_alone(shop: Shop) -> None:
    """An order for two images more gets two from the cache and buys two; another prompt or other params are other images."""
    async with at_work(shop) as (sandbox, _):
        first = shop.order(images=2)
        await shop.ended(first)
        longer = shop.order(images=4)
        await shop.ended(longer)
        assert (bought(sandbox), shop.calls(longer)) == (4, [[3, 4]])
        assert len({content for _, content in shop.files(longer).values()}) == 4
        others = [shop.order(prompts=["in a wood"]), shop.order(params={"seed": 7})]
        await shop.ended(*others)
        assert [shop.calls(order) for order in others] == [[[1, 2]], [[1, 2]]]


@pytest.mark.usefixtures("cache_on")
async def test_other_settings_are_other_images(shop: Shop) -> None:
    """A daemon with another model or quality finds nothing of what was made before."""
    async with at_work(shop) as (_, _):
        await shop.ended(shop.order())
    async with at_work(shop, quality="high") as (sandbox, _):
        await shop.ended(shop.order())
        assert bought(sandbox) == 2


@pytest.mark.usefixtures("cache_on")
async def test_an_order_may_stay_out(shop: Shop) -> None:
    """With {"cache": false} an order takes nothing from the cache and leaves nothing there."""
    async with at_work(shop) as (sandbox, _):
        await shop.ended(shop.order(params={"cache": False}))
        await shop.ended(shop.order())
        await shop.ended(shop.order(params={"cache": False}))
        assert bought(sandbox) == 6
        await shop.kept(2)


@pytest.mark.usefixtures("cache_on")
@pytest.mark.parametrize("damage", ["missing", "changed"])
async def test_a_bad_copy_is_made_anew(shop: Shop, damage: str) -> None:
    """What is missing in the cache, or is not what was stored, is forgotten and bought, and no attempt is spent."""
    async with at_work(shop) as (sandbox, _):
        first = shop.order()
        await shop.ended(first)
        await shop.kept(2)
        bad, _ = shop.copies()
        bad.unlink()
        if damage == "changed":
            bad.write_bytes(b"\x89PNG\r\n\x1a\nsomething else")
        second = shop.order()
        await shop.ended(second)
        assert bought(sandbox) == 3
        assert len(shop.files(second)) == 2
        query = "SELECT outcome, error_kind FROM jobdaemon.attempts WHERE order_id = %s"
        assert shop.rows(query, second) == [{"outcome": "snooze", "error_kind": "PutOffError"}]
        await shop.kept(2)
        assert shop.stats() == {"entries": 2, "hits": 1, "misses": 3, "hit_rate": 0.25}


@pytest.mark.usefixtures("cache_on")
async def test_at_once_one_buys(shop: Shop) -> None:
    """Of equal orders on two daemons at the same moment one buys; the others wait without spending an attempt and copy."""
    async with Sandbox(Behaviour(latency_s=1.0)) as sandbox:
        settings = settings_for(sandbox, shop.folder)
        async with daemon(settings, shop.url), daemon(settings, shop.url):
            orders = [shop.order() for _ in range(4)]
            await shop.ended(*orders)
        assert bought(sandbox) == 2
        assert sorted(map(len, map(shop.calls, orders))) == [0, 0, 0, 1]
        contents = {order: [content for _, content in shop.files(order).values()] for order in orders}
        assert len({tuple(files) for files in contents.values()}) == 1
        query = "SELECT DISTINCT outcome, error_kind FROM jobdaemon.attempts"
        assert shop.rows(query) == [{"outcome": "snooze", "error_kind": "PutOffError"}]


@pytest.mark.usefixtures("cache_on")
async def test_hits_cost_no_budget(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes from the cache gives the key's daily budget back what the batch took; waiting for another order does too."""
    keys = json.dumps([{"alias": "main", "key": "sk-orders-test", "daily_budget": 100}])
    monkeypatch.setenv("JOBDAEMON_GENERATE__OPENAI_IMAGES__KEYS", keys)
    async with Sandbox(Behaviour(latency_s=1.0)) as sandbox:
        settings = settings_for(sandbox, shop.folder, api_key="")
        async with daemon(settings, shop.url), daemon(settings, shop.url):
            orders = [shop.order() for _ in range(3)]
            await shop.ended(*orders)
        assert bought(sandbox) == 2
        assert shop.rows("SELECT spent_today FROM jobdaemon.keys") == [{"spent_today": 2}]


async def test_off_nothing_looks_at_it(shop: Shop) -> None:
    """Without [cache] an order completes while both tables of the cache are locked against everybody."""
    async with at_work(shop) as (sandbox, _):
        await shop.ended(shop.order())
        with psycopg.connect(shop.url) as locker:
            locker.execute("SET lock_timeout = '5s'")
            locker.execute("LOCK TABLE jobdaemon.cache, jobdaemon.cache_counts IN ACCESS EXCLUSIVE MODE")
            await shop.ended(shop.order())
        assert bought(sandbox) == 4
        assert (shop.rows("SELECT FROM jobdaemon.cache"), shop.copies()) == ([], [])


@pytest.mark.usefixtures("cache_on")
async def test_removed_images_leave_the_cache(shop: Shop) -> None:
    """What a cancelled order had stored goes from the cache with the order's own files."""
    async with at_work(shop) as (sandbox, _):
        sandbox.behaviour.latency_s = 1.0
        order = shop.order(images=4, prompts=["by a window", "in a wood"])
        await until(lambda: sandbox.shop.account(API, "sk-orders-test").calls == 1)
        await asyncio.to_thread(shop.rows, "SELECT jobdaemon.pause_queue(%s)", f"generate.{API}")
        await shop.kept(2)
        await asyncio.to_thread(shop.rows, "SELECT jobdaemon.cancel_order(%s, remove_images => true)", order)
        await shop.kept(0)
        query = "SELECT FROM jobdaemon.images WHERE order_id = %s AND status <> 'cancelled'"
        await until(lambda: not shop.rows(query, order))


@pytest.fixture
def spawn(shop: Shop) -> Iterator[Callable[[Sandbox], None]]:
    """Starts a daemon in a process of its own; whatever still runs at the end is killed."""
    members: list[subprocess.Popen[bytes]] = []

    def start(sandbox: Sandbox) -> None:
        environment = os.environ | {
            "JOBDAEMON_DATABASE_URL": shop.url,
            "JOBDAEMON_DATA_DIR": str(shop.folder),
            "JOBDAEMON_ENGINE__HEARTBEAT": "200ms",
            "JOBDAEMON_ENGINE__LEASE": "20s",
            "JOBDAEMON_ENGINE__POLL": "300ms",
            "JOBDAEMON_GENERATE__OPENAI_IMAGES__BASE_URL": f"{sandbox.url}/v1",
            "JOBDAEMON_GENERATE__OPENAI_IMAGES__API_KEY": "sk-orders-test",
        }
        members.append(subprocess.Popen([sys.executable, "-m", "jobdaemon", "run"], env=environment, stderr=subprocess.DEVNULL))

    yield start
    for member in members:
        member.kill()
        member.wait()


@pytest.mark.slow
@pytest.mark.usefixtures("cache_on")
async def test_killed_while_it_buys(shop: Shop, spawn: Callable[[Sandbox], None]) -> None:
    """A daemon that is killed in the call for an image that others wait for: its order goes on, and no other order buys."""
    async with Sandbox(Behaviour(latency_s=2.0)) as sandbox:
        spawn(sandbox)
        spawn(sandbox)
        await until(lambda: len(shop.rows("SELECT FROM jobdaemon.workers WHERE status = 'running'")) == 2, timeout_s=60)
        orders = [shop.order() for _ in range(3)]
        account = sandbox.shop.account(API, "sk-orders-test")
        await until(lambda: account.open == 1, timeout_s=60)
        query = (
            "SELECT w.pid, r.order_id::bigint FROM jobdaemon.running_jobs r JOIN jobdaemon.workers w USING (daemon_id)"
            " WHERE r.queue = %s"
        )
        await until(lambda: len(shop.rows(query, f"generate.{API}")) == 1)
        [buyer] = shop.rows(query, f"generate.{API}")
        os.kill(buyer["pid"], signal.SIGKILL)
        sandbox.behaviour.latency_s = 0.02
        await shop.ended(*orders)
        assert {order for order in orders if shop.calls(order)} == {buyer["order_id"]}
        assert shop.calls(buyer["order_id"]) == [[1, 2], [1, 2]]
