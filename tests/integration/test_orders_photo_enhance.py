"""Whole orders whose photos are retouched by a service: a real daemon, a real database, the sandbox as the service."""

from __future__ import annotations

import asyncio
import hashlib
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jobdaemon.app import Daemon, open_daemon
from jobdaemon.domain.artifact import source_key
from jobdaemon.domain.order import NewOrder
from jobdaemon.enqueue import enqueue
from jobdaemon.events import CircuitTurned, DaemonReady, Event, Events, JobFinished
from jobdaemon.sandbox import Behaviour, Sandbox, parse_faults
from jobdaemon.settings import Settings, load_settings
from tests.daemons import until
from tests.factories import Sql

PORTRAIT = Path(__file__).parents[1] / "data" / "astronaut.png"
API = "photo_enhance"


def settings_for(url: str, folder: Path, **more: str) -> Settings:
    """Embedded defaults but for the backend, which is at *url*."""
    return load_settings(
        environ=dict(os.environ)
        | {
            "JOBDAEMON_DATA_DIR": str(folder),
            "JOBDAEMON_ENGINE__HEARTBEAT": "200ms",
            "JOBDAEMON_ENGINE__LEASE": "20s",
            "JOBDAEMON_ENGINE__POLL": "300ms",
            "JOBDAEMON_BEAUTIFY__BACKEND": "photo_enhance",
            "JOBDAEMON_BEAUTIFY__PHOTO_ENHANCE__URL": url,
            "JOBDAEMON_BEAUTIFY__PHOTO_ENHANCE__POLL": "20ms",
            "JOBDAEMON_QUEUES__BEAUTIFY__ATTEMPTS": "20",
            "JOBDAEMON_QUEUES__BEAUTIFY__BACKOFF": "20ms",
            **more,
        }
    )


@dataclass
class Running:
    """A daemon at work, and what it said."""

    daemon: Daemon
    seen: list[Event] = field(default_factory=list)

    async def source(self) -> str:
        """The portrait, in the store."""
        content = PORTRAIT.read_bytes()
        key = source_key(hashlib.sha256(content).hexdigest(), "png")
        await self.daemon.artifacts.put(key, content, "image/png")
        return f"artifact:{key}"

    async def place(self, sql: Sql) -> int:
        """An order of two images; returns its id."""
        return enqueue(sql, NewOrder(plan="Free", source=await self.source(), images=2)).order_id


@asynccontextmanager
async def running(settings: Settings, url: str) -> AsyncIterator[Running]:
    """A daemon at work; what runs when the block ends is cut off and handed back."""
    events = Events()
    seen: list[Event] = []
    events.subscribe(seen.append)
    ready = events.expect(DaemonReady)
    async with open_daemon(settings, url, events) as daemon:
        task = asyncio.ensure_future(daemon.supervisor.run(wait_for_database=True))
        try:
            await ready.wait(20)
            yield Running(daemon, seen)
        finally:
            daemon.supervisor.stop("the test is over")
            daemon.supervisor.stop("the test is over")
            async with asyncio.timeout(30):
                await task


def order(sql: Sql, order_id: int) -> dict[str, Any]:
    row = sql.execute("SELECT * FROM jobdaemon.orders WHERE id = %s", [order_id]).fetchone()
    assert row is not None
    return row


async def completed(sql: Sql, order_id: int) -> dict[str, Any]:
    """The order's row when it has ended."""
    await until(lambda: order(sql, order_id)["finished_at"] is not None, timeout_s=60)
    row = order(sql, order_id)
    assert (row["status"], row["error"]) == ("completed", None)
    return row


async def test_an_order_completes(engine_database: str, sql: Sql, tmp_path: Path) -> None:
    """Its photo is sent once, to a service that answers nothing while it works; the row says what is known of it."""
    async with Sandbox(Behaviour(latency_s=0.3)) as sandbox:
        url = f"{sandbox.url}/photo-enhance/blocking"
        async with running(settings_for(url, tmp_path), engine_database) as now:
            row = await completed(sql, await now.place(sql))
        report = sandbox.report()["apis"][API]
    told = {name: row["beautified"][name] for name in ("faces", "unrestored", "model", "device", "width", "height")}
    assert told == {"faces": 1, "unrestored": 0, "model": "photo_enhance-1", "device": "remote", "width": 512, "height": 512}
    assert (report["tasks"], report["deleted"]) == (1, 1)
    assert "duplicates" not in report
    assert report["peak_concurrency"] == 1


async def test_faults_cost_attempts_and_no_order(engine_database: str, sql: Sql, tmp_path: Path) -> None:
    """Limits, pages, resets, failed and forgotten tasks, broken files: every order completes, its face restored."""
    async with Sandbox(Behaviour(latency_s=0.02, faults=parse_faults("mixed=0.3", seed=4))) as sandbox:
        async with running(settings_for(f"{sandbox.url}/photo-enhance/docs", tmp_path), engine_database) as now:
            for order_id in [await now.place(sql) for _ in range(4)]:
                row = await completed(sql, order_id)
                assert row["beautified"]["faces"] == 1
        report = sandbox.report()["apis"][API]
    assert sum(report["faults"].values()) >= 3
    assert "emptied" not in report


async def test_a_service_out_of_memory_prewarms_nothing(engine_database: str, sql: Sql, tmp_path: Path) -> None:
    """What it could not retouch at night is not what is ordered in the morning: the prewarm fails, and the order has its face."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    settings = settings_for(f"http://127.0.0.1:{port}/photo-enhance/one", tmp_path, JOBDAEMON_QUEUES__BEAUTIFY__ATTEMPTS="2")
    async with running(settings, engine_database) as now:
        source = await now.source()
        async with Sandbox(Behaviour(latency_s=0.02, faults=parse_faults("unrestored=1.0")), port=port):
            sql.execute("SELECT jobdaemon.prewarm(%s)", [source])
            await until(lambda: any(isinstance(event, JobFinished) and event.outcome == "failed" for event in now.seen))
        async with Sandbox(Behaviour(latency_s=0.02), port=port):
            row = await completed(sql, await now.place(sql))
    assert (row["beautified"]["faces"], row["beautified"]["unrestored"]) == (1, 0)
    failures = sql.execute("SELECT outcome, error_kind, error FROM jobdaemon.attempts ORDER BY attempt LIMIT 2").fetchall()
    told = {
        "error_kind": "NothingRetouchedError",
        "error": "photo_enhance left the face of the photo as before: there is nothing to keep.",
    }
    assert failures == [{"outcome": "retry"} | told, {"outcome": "failed"} | told]
    assert sql.execute("SELECT kept FROM jobdaemon.prewarm_stats").fetchone() == {"kept": 0}


async def test_a_service_that_is_down_opens_the_circuit(engine_database: str, sql: Sql, tmp_path: Path) -> None:
    """Nobody there costs no attempt: after some tries nothing starts, and once the service is back the order completes."""
    sql.execute("UPDATE jobdaemon.queues SET circuit_rest = '300 ms', circuit_rest_cap = '300 ms' WHERE name = 'beautify'")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    settings = settings_for(f"http://127.0.0.1:{port}/photo-enhance/one", tmp_path, JOBDAEMON_QUEUES__BEAUTIFY__ATTEMPTS="1")
    async with running(settings, engine_database) as now:
        order_id = await now.place(sql)
        await until(lambda: any(isinstance(event, CircuitTurned) and event.circuit == "open" for event in now.seen), timeout_s=30)
        async with Sandbox(Behaviour(latency_s=0.02), port=port):
            await completed(sql, order_id)
    turns = [event.circuit for event in now.seen if isinstance(event, CircuitTurned)]
    assert (turns[0], turns[-1]) == ("open", "closed")
    errors = {event.error for event in now.seen if isinstance(event, JobFinished) and event.queue == "beautify" and event.error}
    assert all("could not be reached" in str(error) for error in errors)
    outcomes = sql.execute("SELECT DISTINCT outcome FROM jobdaemon.attempts").fetchall()
    assert outcomes == [{"outcome": "snooze"}]
