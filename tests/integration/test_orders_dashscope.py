"""Whole orders through DashScope: a real daemon, a real database, the sandbox for the service."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
import pytest_asyncio
from psycopg.rows import dict_row

from jobdaemon.app import Daemon, open_daemon
from jobdaemon.domain.artifact import source_key
from jobdaemon.domain.order import NewOrder
from jobdaemon.enqueue import enqueue
from jobdaemon.errors import SettingsError
from jobdaemon.events import DaemonReady, Event, Events
from jobdaemon.sandbox import Behaviour, Sandbox, parse_faults
from jobdaemon.settings import Settings, load_settings
from tests.daemons import until

pytestmark = pytest.mark.newest_postgres

PORTRAIT = Path(__file__).parents[1] / "data" / "astronaut.png"
API, KEY = "dashscope", "sk-orders-test-0123456789"


def settings_for(url: str, folder: Path, **section: str) -> Settings:
    """Embedded defaults but for this provider, which lives at *url*."""
    section = {"base_url": url, "api_key": KEY, "poll": "20ms"} | section
    return load_settings(
        environ=dict(os.environ)
        | {
            "JOBDAEMON_DATA_DIR": str(folder),
            "JOBDAEMON_ENGINE__HEARTBEAT": "200ms",
            "JOBDAEMON_ENGINE__LEASE": "20s",
            "JOBDAEMON_ENGINE__POLL": "300ms",
            "JOBDAEMON_QUEUES__GENERATE__BACKOFF": "50ms",
            "JOBDAEMON_PHOTOS__ALLOWED_HOSTS": url.removeprefix("http://"),
            **{f"JOBDAEMON_GENERATE__DASHSCOPE__{name.upper()}": value for name, value in section.items()},
        }
    )


@asynccontextmanager
async def daemon(settings: Settings, url: str, seen: list[Event] | None = None) -> AsyncIterator[Daemon]:
    """A daemon at work; what runs when the block ends is cut off and handed back."""
    events = Events()
    if seen is not None:
        events.subscribe(seen.append)
    ready = events.expect(DaemonReady)
    async with open_daemon(settings, url, events) as daemon:
        task = asyncio.ensure_future(daemon.supervisor.run(wait_for_database=True))
        try:
            await ready.wait(60)
            yield daemon
        finally:
            daemon.supervisor.stop("the test is over")
            daemon.supervisor.stop("the test is over")
            async with asyncio.timeout(30):
                await task


class Order:
    """Six images, three of each of two prompts."""

    def __init__(self, url: str) -> None:
        self.connection = psycopg.connect(url, autocommit=True, row_factory=dict_row)
        self.id = 0

    async def place(self, daemon: Daemon) -> None:
        content = PORTRAIT.read_bytes()
        key = source_key(hashlib.sha256(content).hexdigest(), "png")
        await daemon.artifacts.put(key, content, "image/png")
        order = NewOrder(plan="Start", source=f"artifact:{key}", prompts=("by a window", "in a wood"), images=6, provider=API)
        self.id = enqueue(self.connection, order).order_id

    def rows(self, query: str) -> list[dict[str, Any]]:
        """*query*, which has one place for the order's id."""
        return self.connection.execute(query.encode(), [self.id]).fetchall()

    def has_ended(self) -> bool:
        return bool(self.rows("SELECT FROM jobdaemon.orders WHERE id = %s AND finished_at IS NOT NULL"))

    def accepted(self) -> int:
        """Calls under way whose task is known."""
        query = "SELECT FROM jobdaemon.provider_calls WHERE order_id = %s AND outcome IS NULL AND external_task_id IS NOT NULL"
        return len(self.rows(query))

    def calls(self) -> list[tuple[str, int]]:
        """Outcome and number of images of each call."""
        rows = self.rows("SELECT outcome, images FROM jobdaemon.provider_calls WHERE order_id = %s ORDER BY id")
        return [(row["outcome"], len(row["images"])) for row in rows]

    def require_complete(self) -> None:
        """Six different images are stored."""
        [order] = self.rows("SELECT status, error FROM jobdaemon.orders WHERE id = %s")
        assert order == {"status": "completed", "error": None}
        images = self.rows("SELECT sha256 FROM jobdaemon.images WHERE order_id = %s AND status = 'stored'")
        assert len({image["sha256"] for image in images}) == 6

    def close(self) -> None:
        self.connection.close()


@pytest.fixture
def order(database: str) -> Iterator[Order]:
    """Not placed yet."""
    order = Order(database)
    yield order
    order.close()


@pytest_asyncio.fixture
async def sandbox() -> AsyncIterator[Sandbox]:
    """A quick one."""
    async with Sandbox(Behaviour(latency_s=0.02)) as sandbox:
        yield sandbox


@pytest.mark.parametrize("model", ["wan2.5-i2i-preview", "qwen-image-edit-plus"], ids=["tasks", "at once"])
async def test_an_order_completes(database: str, order: Order, sandbox: Sandbox, tmp_path: Path, model: str) -> None:
    """Six images of two prompts are two calls, six different images stored, and nothing is bought twice."""
    async with daemon(settings_for(sandbox.url, tmp_path, model=model), database) as running:
        await order.place(running)
        await until(order.has_ended, timeout_s=60)
    order.require_complete()
    assert order.calls() == [("succeeded", 3), ("succeeded", 3)]
    report = sandbox.report()["apis"][API]
    assert (report["calls"], report["images_bought"]) == (2, 6)


async def test_a_daemon_cut_off_goes_on_with_its_tasks(database: str, order: Order, sandbox: Sandbox, tmp_path: Path) -> None:
    """What a daemon had submitted when it was stopped is collected by the next one; nothing is bought again."""
    settings = settings_for(sandbox.url, tmp_path)
    sandbox.behaviour.latency_s = 2.5
    async with daemon(settings, database) as running:
        await order.place(running)
        await until(lambda: order.accepted() == 2, timeout_s=60)
    assert not order.has_ended()
    async with daemon(settings, database):
        await until(order.has_ended, timeout_s=60)
    order.require_complete()
    assert order.calls() == [("succeeded", 3), ("succeeded", 3)]
    report = sandbox.report()["apis"][API]
    assert (report["calls"], report["images_bought"]) == (2, 6)


async def test_an_image_that_failed_is_asked_for_alone(database: str, order: Order, sandbox: Sandbox, tmp_path: Path) -> None:
    """Of a task that made two of three images the third is bought in a call of its own."""
    sandbox.behaviour.faults = parse_faults("partial=1")

    def heal() -> bool:
        if int(sandbox.report()["apis"].get(API, {}).get("images_bought", 0)) == 4:
            sandbox.behaviour.faults = parse_faults("")
        return order.has_ended()

    async with daemon(settings_for(sandbox.url, tmp_path), database) as running:
        await order.place(running)
        await until(heal, timeout_s=60)
    order.require_complete()
    calls = order.calls()
    assert sorted(calls[:2]) == [("partial", 3)] * 2
    assert calls[-2:] == [("succeeded", 1)] * 2
    assert sandbox.report()["apis"][API]["images_bought"] == 6


async def test_what_was_charged_for_is_in_the_view(database: str, order: Order, sandbox: Sandbox, tmp_path: Path) -> None:
    """Of two tasks that made two of three images each and of the calls for the rest every image costs its price, once."""
    sandbox.behaviour.faults = parse_faults("partial=1")

    def heal() -> bool:
        if int(sandbox.report()["apis"].get(API, {}).get("images_bought", 0)) == 4:
            sandbox.behaviour.faults = parse_faults("")
        return order.has_ended()

    async with daemon(settings_for(sandbox.url, tmp_path, price_per_image="0.14"), database) as running:
        await order.place(running)
        await until(heal, timeout_s=60)
    rows = order.connection.execute(
        "SELECT provider, alias, calls, open, unknown, images, cost::text FROM jobdaemon.spend"
    ).fetchall()
    assert rows == [{"provider": API, "alias": None, "calls": 4, "open": 0, "unknown": 0, "images": 6, "cost": "0.84"}]
    rows = order.rows(
        "SELECT price::text, images_made, cost::text, usage FROM jobdaemon.provider_calls WHERE order_id = %s ORDER BY id"
    )
    assert rows[0] == {"price": "0.14", "images_made": 2, "cost": "0.28", "usage": {"image_count": 2}}


async def test_lost_submits_are_found(database: str, order: Order, sandbox: Sandbox, tmp_path: Path) -> None:
    """Submits whose answers were lost are found in the list of tasks: nothing is bought again, none is unknown."""
    sandbox.behaviour.faults = parse_faults("reset=1")

    def heal() -> bool:
        if sandbox.shop.account(API, KEY).calls == 2:
            sandbox.behaviour.faults = parse_faults("")
        return order.has_ended()

    async with daemon(settings_for(sandbox.url, tmp_path), database) as running:
        await order.place(running)
        await until(heal, timeout_s=60)
    order.require_complete()
    assert order.calls() == [("succeeded", 3), ("succeeded", 3)]
    assert order.rows("SELECT FROM jobdaemon.unknown_submits WHERE order_id = %s") == []
    assert sandbox.report()["apis"][API]["images_bought"] == 6


async def test_a_model_nobody_knows_stops_the_start(database: str, tmp_path: Path) -> None:
    """A daemon that could only fail every order says so instead of starting."""
    settings = settings_for("http://127.0.0.1:1", tmp_path, model="wan25-i2i")
    with pytest.raises(SettingsError, match="wan25-i2i"):
        async with daemon(settings, database):
            pass
