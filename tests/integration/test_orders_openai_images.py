"""Whole orders through the OpenAI image provider: a real daemon, a real database, the sandbox for the service."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.rows import dict_row

from jobdaemon.app import Daemon, open_daemon
from jobdaemon.domain.artifact import source_key
from jobdaemon.domain.order import NewOrder
from jobdaemon.enqueue import enqueue
from jobdaemon.events import DaemonReady, Events
from jobdaemon.sandbox import Behaviour, Sandbox
from jobdaemon.settings import Settings, load_settings
from tests.daemons import until

pytestmark = pytest.mark.newest_postgres

PORTRAIT = Path(__file__).parents[1] / "data" / "astronaut.png"
API = "openai_images"


def settings_for(sandbox: Sandbox, folder: Path, **generate: str) -> Settings:
    """Embedded defaults but for this provider, which lives in the sandbox."""
    section = {"base_url": f"{sandbox.url}/v1", "api_key": "sk-orders-test"} | generate
    return load_settings(
        environ=dict(os.environ)
        | {
            "JOBDAEMON_DATA_DIR": str(folder),
            "JOBDAEMON_ENGINE__HEARTBEAT": "200ms",
            "JOBDAEMON_ENGINE__LEASE": "20s",
            "JOBDAEMON_ENGINE__POLL": "300ms",
            "JOBDAEMON_PHOTOS__ALLOWED_HOSTS": sandbox.url.removeprefix("http://"),
            "JOBDAEMON_QUEUES__GENERATE__TEAM_SIZE": "1",
            **{f"JOBDAEMON_GENERATE__OPENAI_IMAGES__{name.upper()}": value for name, value in section.items()},
        }
    )


@asynccontextmanager
async def daemon(settings: Settings, url: str) -> AsyncIterator[Daemon]:
    """A daemon at work; what runs when the block ends is cut off and handed back."""
    events = Events()
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
    """An order of six images, three of each of two prompts, and what became of it."""

    def __init__(self, url: str) -> None:
        self._connection = psycopg.connect(url, autocommit=True, row_factory=dict_row)
        self.id = 0

    async def place(self, daemon: Daemon) -> None:
        content = PORTRAIT.read_bytes()
        key = source_key(hashlib.sha256(content).hexdigest(), "png")
        await daemon.artifacts.put(key, content, "image/png")
        order = NewOrder(plan="Start", source=f"artifact:{key}", prompts=("by a window", "in a wood"), images=6, provider=API)
        self.id = enqueue(self._connection, order).order_id

    def rows(self, query: str) -> list[dict[str, Any]]:
        """*query*, which has one place for the order's id."""
        return self._connection.execute(query.encode(), [self.id]).fetchall()

    def has_ended(self) -> bool:
        return bool(self.rows("SELECT FROM jobdaemon.orders WHERE id = %s AND finished_at IS NOT NULL"))

    def stored(self) -> list[str]:
        """Digests of the stored images; fails unless all are."""
        [order] = self.rows("SELECT status, error FROM jobdaemon.orders WHERE id = %s")
        assert order == {"status": "completed", "error": None}
        images = self.rows("SELECT sha256 FROM jobdaemon.images WHERE order_id = %s AND status = 'stored'")
        return [image["sha256"] for image in images]

    def calls(self) -> list[tuple[str, int]]:
        """Outcome and number of images of each call."""
        rows = self.rows("SELECT outcome, images FROM jobdaemon.provider_calls WHERE order_id = %s ORDER BY id")
        return [(row["outcome"], len(row["images"])) for row in rows]

    def close(self) -> None:
        self._connection.close()


@pytest.fixture
def order(database: str) -> Any:
    """Not placed yet."""
    order = Order(database)
    yield order
    order.close()


@pytest.mark.parametrize("model", ["gpt-image-2", "gemini-2.5-flash-image"], ids=["inline", "links"])
async def test_an_order_completes(database: str, order: Order, tmp_path: Path, model: str) -> None:
    """Six images of two prompts are two calls, six different images stored, and nothing bought twice."""
    async with Sandbox(Behaviour(latency_s=0.02)) as sandbox:
        async with daemon(settings_for(sandbox, tmp_path, model=model), database) as running:
            await order.place(running)
            await until(order.has_ended, timeout_s=60)
        assert len(set(order.stored())) == 6
        assert order.calls() == [("succeeded", 3), ("succeeded", 3)]
        report = sandbox.report()["apis"][API]
    assert (report["calls"], report["images_bought"], report["peak_concurrency"]) == (2, 6, 1)


async def test_a_daemon_cut_off_in_a_call_buys_nothing_twice(database: str, order: Order, tmp_path: Path) -> None:
    """What the first call made stays; the call that was cut off is listed as unknown, and made again by the next daemon."""
    async with Sandbox(Behaviour(latency_s=0.02)) as sandbox:
        settings = settings_for(sandbox, tmp_path)
        account = sandbox.shop.account(API, "sk-orders-test")
        async with daemon(settings, database) as running:
            sandbox.behaviour.latency_s = 1.0
            await order.place(running)
            await until(lambda: account.calls == 2 and account.open == 1, timeout_s=60)
        assert not order.has_ended()
        sandbox.behaviour.latency_s = 0.02
        async with daemon(settings, database):
            await until(order.has_ended, timeout_s=60)
        assert len(set(order.stored())) == 6
        assert order.calls() == [("succeeded", 3), ("unknown", 3), ("succeeded", 3)]
        assert order.rows("SELECT images FROM jobdaemon.unknown_submits WHERE order_id = %s") == [{"images": [4, 5, 6]}]
        assert sandbox.report()["apis"][API]["images_bought"] == 6
