"""Whole orders through the ComfyUI provider: a real daemon, a real database, the sandbox for the servers."""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
from PIL import Image
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

ROOT = Path(__file__).parents[2]
PORTRAIT = ROOT / "tests" / "data" / "astronaut.png"


def _settings(sandbox: Sandbox, folder: Path) -> Settings:
    """Embedded defaults but for two servers in the sandbox."""
    variables = {
        "DATA_DIR": str(folder),
        "ENGINE__HEARTBEAT": "200ms",
        "ENGINE__LEASE": "20s",
        "ENGINE__POLL": "300ms",
        "GENERATE__COMFYUI__SERVERS": f'["{sandbox.url}/comfyui/one", "{sandbox.url}/comfyui/two"]',
        "GENERATE__COMFYUI__WORKFLOW": str(ROOT / "config" / "comfyui-example.json"),
        "GENERATE__COMFYUI__IMAGES_PER_CALL": "2",
        "GENERATE__COMFYUI__POLL": "100ms",
        "GENERATE__COMFYUI__WIDTH": "64",
        "GENERATE__COMFYUI__HEIGHT": "64",
    }
    return load_settings(environ=dict(os.environ) | {f"JOBDAEMON_{name}": value for name, value in variables.items()})


@asynccontextmanager
async def _daemon(settings: Settings, url: str) -> AsyncIterator[Daemon]:
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
    """An order of six images of two prompts, and what became of it."""

    def __init__(self, url: str) -> None:
        self._connection = psycopg.connect(url, autocommit=True, row_factory=dict_row)
        self.id = 0

    async def place(self, daemon: Daemon) -> None:
        with Image.open(PORTRAIT) as portrait:
            out = io.BytesIO()
            portrait.resize((128, 128)).save(out, "PNG")
        key = source_key(hashlib.sha256(out.getvalue()).hexdigest(), "png")
        await daemon.artifacts.put(key, out.getvalue(), "image/png")
        prompts = ("by a window", "in a wood")
        order = NewOrder(plan="Start", source=f"artifact:{key}", prompts=prompts, images=6, provider="comfyui")
        self.id = enqueue(self._connection, order).order_id

    def rows(self, query: str) -> list[dict[str, Any]]:
        """*query*, which has one place for the order's id."""
        return self._connection.execute(query.encode(), [self.id]).fetchall()

    def has_ended(self) -> bool:
        return bool(self.rows("SELECT FROM jobdaemon.orders WHERE id = %s AND finished_at IS NOT NULL"))

    def stored(self) -> set[str]:
        """Digests of the stored images; fails unless the order is complete."""
        [order] = self.rows("SELECT status, error FROM jobdaemon.orders WHERE id = %s")
        assert order == {"status": "completed", "error": None}
        images = self.rows("SELECT sha256 FROM jobdaemon.images WHERE order_id = %s AND status = 'stored'")
        return {image["sha256"] for image in images}

    def calls(self) -> list[dict[str, Any]]:
        return self.rows("SELECT outcome, external_task_id FROM jobdaemon.provider_calls WHERE order_id = %s ORDER BY id")

    def close(self) -> None:
        self._connection.close()


@pytest.fixture
def order(database: str) -> Iterator[Order]:
    """Not placed yet."""
    order = Order(database)
    yield order
    order.close()


async def test_an_order_completes(database: str, order: Order, tmp_path: Path) -> None:
    """Six images of two prompts, two a call, are four prompts over two servers: six pictures stored, none made twice."""
    async with Sandbox(Behaviour(latency_s=0.1)) as sandbox:
        async with _daemon(_settings(sandbox, tmp_path), database) as running:
            await order.place(running)
            await until(order.has_ended, timeout_s=60)
        report = sandbox.shop.report()["comfyui"]
    assert len(order.stored()) == 6
    assert {call["outcome"] for call in order.calls()} == {"succeeded"}
    assert {call["external_task_id"].rpartition("/")[2] for call in order.calls()} == {"one", "two"}
    assert (report["calls"], report["images_bought"], report["peak_concurrency"]) == (4, 6, 1)


async def test_a_daemon_cut_off_in_a_prompt_makes_nothing_twice(database: str, order: Order, tmp_path: Path) -> None:
    """What the first daemon submitted goes on without it, and the next one fetches it under the ids that were noted."""
    async with Sandbox(Behaviour(latency_s=1.5)) as sandbox:
        settings = _settings(sandbox, tmp_path)
        async with _daemon(settings, database) as running:
            await order.place(running)
            await until(lambda: sandbox.shop.report().get("comfyui", {}).get("calls") == 4, timeout_s=60)
        before = order.calls()
        assert not order.has_ended()
        assert {call["outcome"] for call in before} == {None}
        async with _daemon(settings, database):
            await until(order.has_ended, timeout_s=60)
        report = sandbox.shop.report()["comfyui"]
    assert len(order.stored()) == 6
    assert order.calls() == [{**call, "outcome": "succeeded"} for call in before]
    assert (report["calls"], report["images_bought"]) == (4, 6)
    assert order.rows("SELECT call_id FROM jobdaemon.unknown_submits WHERE order_id = %s") == []
