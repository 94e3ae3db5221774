"""Whole orders through the Jimeng provider, its photo at Superbed: a real daemon, a real database, the sandbox for both."""

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
from psycopg.rows import dict_row

from jobdaemon.app import Daemon, open_daemon
from jobdaemon.domain.artifact import source_key
from jobdaemon.domain.order import NewOrder
from jobdaemon.enqueue import enqueue
from jobdaemon.events import DaemonReady, Events
from jobdaemon.ports import ArtifactStore
from jobdaemon.sandbox import Behaviour, Sandbox, parse_faults
from jobdaemon.settings import Settings, load_settings
from tests.daemons import until

pytestmark = pytest.mark.newest_postgres

PORTRAIT = Path(__file__).parents[1] / "data" / "astronaut.png"
API = "jimeng"
KEY = "AKorders"


def settings_for(sandbox: Sandbox, folder: Path, **generate: str) -> Settings:
    """Embedded defaults but for this provider and Superbed, which live in the sandbox."""
    section = {
        "base_url": sandbox.url,
        "access_key_id": KEY,
        "secret_access_key": "SKorders==",
        "photo": "superbed",
        "poll": "20ms",
    }
    return load_settings(
        environ=dict(os.environ)
        | {
            "JOBDAEMON_DATA_DIR": str(folder),
            "JOBDAEMON_ENGINE__HEARTBEAT": "200ms",
            "JOBDAEMON_ENGINE__LEASE": "20s",
            "JOBDAEMON_ENGINE__POLL": "300ms",
            "JOBDAEMON_PHOTOS__ALLOWED_HOSTS": sandbox.url.removeprefix("http://"),
            "JOBDAEMON_QUEUES__GENERATE__TEAM_SIZE": "2",
            "JOBDAEMON_QUEUES__GENERATE__ATTEMPTS": "6",
            "JOBDAEMON_QUEUES__GENERATE__BACKOFF": "20ms",
            "JOBDAEMON_QUEUES__UPLOAD__ATTEMPTS": "6",
            "JOBDAEMON_SUPERBED__URL": f"{sandbox.url}/superbed/upload",
            "JOBDAEMON_SUPERBED__TOKEN": "orders-token",
            **{f"JOBDAEMON_GENERATE__JIMENG__{name.upper()}": value for name, value in (section | generate).items()},
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
    """An order of four images, two of each of two prompts, and what became of it."""

    def __init__(self, url: str) -> None:
        self._connection = psycopg.connect(url, autocommit=True, row_factory=dict_row)
        self.id = 0

    async def place(self, artifacts: ArtifactStore, *prompts: str) -> None:
        content = PORTRAIT.read_bytes()
        key = source_key(hashlib.sha256(content).hexdigest(), "png")
        await artifacts.put(key, content, "image/png")
        wanted = prompts or ("by a window", "in a wood")
        order = NewOrder(plan="Start", source=f"artifact:{key}", prompts=wanted, images=4, provider=API)
        self.id = enqueue(self._connection, order).order_id

    def rows(self, query: str) -> list[dict[str, Any]]:
        """*query*, which has one place for the order's id."""
        return self._connection.execute(query.encode(), [self.id]).fetchall()

    def has_ended(self) -> bool:
        return bool(self.rows("SELECT FROM jobdaemon.orders WHERE id = %s AND finished_at IS NOT NULL"))

    def status(self) -> str:
        return str(self.rows("SELECT status FROM jobdaemon.orders WHERE id = %s")[0]["status"])

    def images(self) -> list[dict[str, Any]]:
        return self.rows("SELECT index, status, sha256, error FROM jobdaemon.images WHERE order_id = %s ORDER BY index")

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
    """Four images are four tasks, each noted and bought once; the photo, which the service fetches, is uploaded once."""
    async with Sandbox(Behaviour(latency_s=0.05)) as sandbox:
        async with daemon(settings_for(sandbox, tmp_path), database) as running:
            await order.place(running.artifacts)
            await until(order.has_ended, timeout_s=60)
        report = sandbox.report()["apis"]
    assert order.status() == "completed"
    assert len({image["sha256"] for image in order.images()}) == 4
    calls = order.calls()
    assert [call["outcome"] for call in calls] == ["succeeded"] * 4
    assert all(call["external_task_id"].startswith("jimeng_t2i_v40:") for call in calls)
    assert (report[API]["calls"], report[API]["images_bought"]) == (4, 4)
    assert report[API]["peak_concurrency"] <= 2
    assert (report["superbed"]["calls"], report["superbed"]["peak_concurrency"]) == (1, 1)


async def test_a_daemon_cut_off_in_its_tasks_buys_nothing_twice(database: str, order: Order, tmp_path: Path) -> None:
    """Tasks under way when a daemon ends are asked for by the next one: each image is bought once, no submit is lost."""
    async with Sandbox(Behaviour(latency_s=0.5)) as sandbox:
        settings = settings_for(sandbox, tmp_path)
        async with daemon(settings, database) as running:
            await order.place(running.artifacts)
            await until(lambda: sum(call["external_task_id"] is not None for call in order.calls()) >= 2, timeout_s=60)
        assert not order.has_ended()
        async with daemon(settings, database):
            await until(order.has_ended, timeout_s=60)
        report = sandbox.report()["apis"][API]
    assert order.status() == "completed"
    assert (report["calls"], report["images_bought"]) == (4, 4)
    assert order.rows("SELECT FROM jobdaemon.unknown_submits WHERE order_id = %s") == []


async def test_refused_images_fail_alone(database: str, order: Order, tmp_path: Path) -> None:
    """A prompt that is refused by its task ends its images with the service's reason, and the others complete."""
    async with Sandbox(Behaviour(latency_s=0.02)) as sandbox, daemon(settings_for(sandbox, tmp_path), database) as running:
        await order.place(running.artifacts, "by a window", "sandbox:result=50413")
        await until(order.has_ended, timeout_s=60)
    assert order.status() == "partial"
    failed = [image for image in order.images() if image["status"] == "failed"]
    assert len(failed) == 2
    assert all("Post Text Risk Not Pass [50413]" in image["error"] for image in failed)


async def test_faults_cost_attempts_and_no_images(database: str, order: Order, tmp_path: Path) -> None:
    """Limits, failed and expired tasks, broken answers and expired links are got over."""
    async with Sandbox(Behaviour(latency_s=0.02, faults=parse_faults("mixed=0.3", seed=2))) as sandbox:
        async with daemon(settings_for(sandbox, tmp_path), database) as running:
            await order.place(running.artifacts)
            await until(order.has_ended, timeout_s=60)
        assert sandbox.report()["apis"][API]["faults"]
    assert order.status() == "completed"
