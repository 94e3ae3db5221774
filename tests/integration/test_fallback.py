"""When a provider fails: whole orders that go on with another one, with real daemons, a real database, and the sandbox."""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
from collections.abc import AsyncIterator, Collection, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
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
from jobdaemon.events import DaemonReady, Event, Events, ProviderChanged
from jobdaemon.sandbox import Behaviour, Sandbox
from jobdaemon.sandbox.faults import Fault, Faults
from jobdaemon.sandbox.shop import prompt_digest
from jobdaemon.settings import Settings, load_settings
from tests.daemons import until

pytestmark = pytest.mark.newest_postgres

ROOT = Path(__file__).parents[2]
PORTRAIT = ROOT / "tests" / "data" / "astronaut.png"
GOOD, BAD = "by a window", "in a wood"
OPENAI, COMFYUI, DASHSCOPE = "openai_images", "comfyui", "dashscope"
BOTH_WAYS = '{"openai_images": ["comfyui"], "comfyui": ["openai_images"]}'


@dataclass(frozen=True, slots=True)
class BrokenFor(Faults):
    """One API answers 500 to one prompt, each time; everything else works."""

    api: str = OPENAI
    prompt: str = BAD

    def drawn(self, name: str, among: Collection[Fault] | None = None) -> Fault | None:
        is_it = name.startswith(f"{self.api}:{prompt_digest(self.prompt)}:")
        return Fault.ERROR if is_it and (among is None or Fault.ERROR in among) else None


def settings_for(sandbox: Sandbox, folder: Path, **more: str) -> Settings:
    """Two providers in the sandbox, each the other's fallback: OpenAI makes five images a call, one ComfyUI server two."""
    variables = {
        "DATA_DIR": str(folder),
        "ENGINE__HEARTBEAT": "200ms",
        "ENGINE__LEASE": "20s",
        "ENGINE__POLL": "200ms",
        "QUEUES__GENERATE__ATTEMPTS": "2",
        "QUEUES__GENERATE__BACKOFF": "20ms",
        "QUEUES__GENERATE__JITTER": "0",
        "ORDERS__FALLBACK": BOTH_WAYS,
        "GENERATE__OPENAI_IMAGES__BASE_URL": f"{sandbox.url}/v1",
        "GENERATE__OPENAI_IMAGES__API_KEY": "sk-fallback-test",
        "GENERATE__COMFYUI__SERVERS": f'["{sandbox.url}/comfyui/one"]',
        "GENERATE__COMFYUI__WORKFLOW": str(ROOT / "config" / "comfyui-example.json"),
        "GENERATE__COMFYUI__IMAGES_PER_CALL": "2",
        "GENERATE__COMFYUI__POLL": "100ms",
        "GENERATE__COMFYUI__WIDTH": "64",
        "GENERATE__COMFYUI__HEIGHT": "64",
    } | more
    return load_settings(environ=dict(os.environ) | {f"JOBDAEMON_{name}": value for name, value in variables.items()})


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
    """An order, and what became of it."""

    def __init__(self, url: str) -> None:
        self.connection = psycopg.connect(url, autocommit=True, row_factory=dict_row)
        self.id = 0

    async def place(self, daemon: Daemon, provider: str, *, images: int = 6, plan: str = "Start") -> None:
        """Half of its images of the good prompt, half of the bad one; of the good one alone if there is one."""
        with Image.open(PORTRAIT) as portrait:
            out = io.BytesIO()
            portrait.resize((384, 384)).save(out, "PNG")
        key = source_key(hashlib.sha256(out.getvalue()).hexdigest(), "png")
        await daemon.artifacts.put(key, out.getvalue(), "image/png")
        prompts = (GOOD, BAD) if images > 1 else (GOOD,)
        order = NewOrder(plan=plan, source=f"artifact:{key}", prompts=prompts, images=images, provider=provider)
        self.id = enqueue(self.connection, order).order_id

    def rows(self, query: str) -> list[dict[str, Any]]:
        """*query*, which has one place for the order's id."""
        return self.connection.execute(query.encode(), [self.id]).fetchall()

    def has_ended(self) -> bool:
        return bool(self.rows("SELECT FROM jobdaemon.orders WHERE id = %s AND finished_at IS NOT NULL"))

    def ended(self) -> tuple[str, str | None]:
        [order] = self.rows("SELECT status, error FROM jobdaemon.orders WHERE id = %s")
        return order["status"], order["error"]

    def makers(self) -> list[str | None]:
        """Who made each image, by index; fails where a stored image has no maker."""
        rows = self.rows("SELECT provider, status FROM jobdaemon.images WHERE order_id = %s ORDER BY index")
        assert all(row["provider"] for row in rows if row["status"] == "stored")
        return [row["provider"] for row in rows]

    def calls(self) -> list[tuple[str, str | None, list[int]]]:
        rows = self.rows("SELECT provider, outcome, images FROM jobdaemon.provider_calls WHERE order_id = %s ORDER BY id")
        return [(row["provider"], row["outcome"], row["images"]) for row in rows]

    def moves(self) -> list[str]:
        query = "SELECT error FROM jobdaemon.failures WHERE order_id = %s AND outcome = 'moved' ORDER BY ended_at"
        return [row["error"] for row in self.rows(query)]

    def explained(self) -> list[dict[str, Any]]:
        return self.rows("SELECT queue, reason, told, numbers FROM jobdaemon.explain_order(%s)")


@pytest.fixture
def order(database: str) -> Iterator[Order]:
    """Not placed yet."""
    order = Order(database)
    yield order
    order.connection.close()


def _bought(sandbox: Sandbox, api: str) -> dict[str, int]:
    """Images bought from an API, by prompt."""
    bought = sandbox.shop.report().get(api, {}).get("bought", {})
    return {prompt: bought[prompt_digest(prompt)] for prompt in (GOOD, BAD) if prompt_digest(prompt) in bought}


async def test_what_is_out_of_attempts_is_made_by_the_next_provider(database: str, order: Order, tmp_path: Path) -> None:
    """Three images of a batch that keeps failing become two calls, of two and of one, elsewhere; nothing is bought twice."""
    seen: list[Event] = []
    async with Sandbox(Behaviour(latency_s=0.05, faults=BrokenFor())) as sandbox:
        async with daemon(settings_for(sandbox, tmp_path), database, seen) as running:
            await asyncio.to_thread(order.connection.execute, "SELECT jobdaemon.pause_queue('generate.comfyui')")
            await order.place(running, OPENAI)
            await until(lambda: bool(order.moves()), timeout_s=60)
            told = order.explained()
            await asyncio.to_thread(order.connection.execute, "SELECT jobdaemon.resume_queue('generate.comfyui')")
            await until(order.has_ended, timeout_s=60)
        assert (_bought(sandbox, OPENAI), _bought(sandbox, COMFYUI)) == ({GOOD: 3}, {BAD: 3})
    assert order.ended() == ("completed", None)
    assert order.makers() == [OPENAI] * 3 + [COMFYUI] * 3
    assert sorted(call for call in order.calls() if call[0] == COMFYUI) == [
        (COMFYUI, "succeeded", [4, 5]),
        (COMFYUI, "succeeded", [6]),
    ]
    [moved] = order.moves()
    assert moved.startswith("moved from openai_images to comfyui: ")
    [event] = [event for event in seen if isinstance(event, ProviderChanged)]
    assert (event.order_id, event.was, event.provider, event.reason) == (order.id, OPENAI, COMFYUI, moved)
    waiting = [row for row in told if row["queue"] == "generate.comfyui"]
    assert [row["reason"] for row in waiting if row["reason"] != "behind"] == ["paused", "moved"] * 2
    assert {row["told"] for row in waiting if row["reason"] == "moved"} == {f"it was {moved}"}
    assert {tuple(row["numbers"]["tried"]) for row in waiting if row["reason"] == "moved"} == {(OPENAI,)}


async def test_the_end_of_the_chain_fails_the_images(database: str, order: Order, tmp_path: Path) -> None:
    """When the last provider is out of attempts too, its reason is the images'; a redrive tries there again, and only there."""
    async with Sandbox(Behaviour(latency_s=0.02, faults=BrokenFor(api=COMFYUI))) as sandbox:
        settings = settings_for(sandbox, tmp_path, GENERATE__OPENAI_IMAGES__BASE_URL="http://127.0.0.1:9/v1")
        async with daemon(settings, database) as running:
            await order.place(running, COMFYUI)
            await until(order.has_ended, timeout_s=60)
            assert order.ended()[0] == "partial"
            assert order.makers() == [COMFYUI] * 3 + [None] * 3
            assert len(order.moves()) == 2
            errors = order.rows("SELECT error FROM jobdaemon.images WHERE order_id = %s AND status = 'failed'")
            assert all("127.0.0.1:9" in row["error"] for row in errors)
            await asyncio.to_thread(order.connection.execute, "SELECT jobdaemon.pause_queue('generate.openai_images')")
            assert await asyncio.to_thread(order.rows, "SELECT jobdaemon.redrive(order_id => %s) AS jobs") == [{"jobs": 2}]
            open_jobs = order.rows(
                "SELECT queue_name, args -> 'images' AS images FROM jobdaemon.procrastinate_jobs"
                " WHERE (args ->> 'order_id')::bigint = %s AND status IN ('todo', 'doing')"
            )
            assert sorted(index for row in open_jobs for index in row["images"]) == [4, 5, 6]
            assert {row["queue_name"] for row in open_jobs} == {"generate.openai_images"}


async def test_a_plan_without_fallback_fails(database: str, order: Order, tmp_path: Path) -> None:
    """A plan's own list replaces its provider's: an empty one asks nobody else."""
    async with Sandbox(Behaviour(latency_s=0.02, faults=BrokenFor())) as sandbox:
        settings = settings_for(sandbox, tmp_path, PLANS__START__FALLBACK="[]")
        async with daemon(settings, database) as running:
            await order.place(running, OPENAI)
            await until(order.has_ended, timeout_s=60)
        assert _bought(sandbox, COMFYUI) == {}
    assert (order.ended()[0], order.moves()) == ("partial", [])


async def test_what_waits_behind_an_open_circuit_goes_elsewhere(database: str, order: Order, tmp_path: Path) -> None:
    """Batches of a provider that is not there are made by the next one soon after its circuit opened, cut to its calls."""
    async with Sandbox(Behaviour(latency_s=0.02)) as sandbox:
        settings = settings_for(sandbox, tmp_path, ORDERS__FALLBACK_AFTER="300ms", QUEUES__GENERATE__ATTEMPTS="1000")
        async with daemon(settings, database) as running:
            await asyncio.to_thread(
                order.connection.execute,
                "UPDATE jobdaemon.queues SET circuit = 'open', circuit_until = now() + interval '1 hour'"
                " WHERE name = 'generate.openai_images'",
            )
            await order.place(running, OPENAI)
            await until(order.has_ended, timeout_s=60)
        assert OPENAI not in sandbox.shop.report()
        assert _bought(sandbox, COMFYUI) == {GOOD: 3, BAD: 3}
    assert order.ended() == ("completed", None)
    assert order.makers() == [COMFYUI] * 6
    assert sorted(call[2] for call in order.calls()) == [[1, 2], [3], [4, 5], [6]]
    assert order.moves() == ["moved from openai_images to comfyui: its circuit has been open for 0.3 s"] * 2


async def test_a_running_task_is_stopped_before_the_next_provider_is_asked(database: str, order: Order, tmp_path: Path) -> None:
    """A task that takes too long is interrupted at its server, never finished, and its image made by the next provider."""
    async with Sandbox(Behaviour(latency_s=0.05)) as sandbox:
        settings = settings_for(
            sandbox, tmp_path, GENERATE__COMFYUI__TASK_TIMEOUT="300ms", GENERATE__COMFYUI__IMAGES_PER_CALL="1"
        )
        async with daemon(settings, database) as running:
            sandbox.behaviour.latency_s = 10.0
            await order.place(running, COMFYUI, images=1)
            await until(lambda: bool(order.moves()), timeout_s=60)
            sandbox.behaviour.latency_s = 0.05
            await until(order.has_ended, timeout_s=60)
        assert (_bought(sandbox, COMFYUI), _bought(sandbox, OPENAI)) == ({}, {GOOD: 1})
    assert (order.ended()[0], order.makers()) == ("completed", [OPENAI])
    assert order.calls() == [(COMFYUI, "cancelled", [1]), (OPENAI, "succeeded", [1])]


@pytest.mark.parametrize("provider", [COMFYUI, DASHSCOPE])
async def test_a_late_result_is_used(database: str, order: Order, tmp_path: Path, provider: str) -> None:
    """A task that ended after its batch was out of attempts is fetched, and nobody else is asked."""
    async with Sandbox(Behaviour(latency_s=1.0)) as sandbox:
        settings = settings_for(
            sandbox,
            tmp_path,
            ORDERS__FALLBACK=f'{{"{provider}": ["openai_images"]}}',
            PHOTOS__ALLOWED_HOSTS=sandbox.url.removeprefix("http://"),
            GENERATE__COMFYUI__TASK_TIMEOUT="200ms",
            GENERATE__DASHSCOPE__BASE_URL=sandbox.url,
            GENERATE__DASHSCOPE__API_KEY="sk-fallback-test-0123456789",
            GENERATE__DASHSCOPE__POLL="50ms",
            GENERATE__DASHSCOPE__TASK_TIMEOUT="200ms",
            QUEUES__GENERATE__ATTEMPTS="1",
            QUEUES__GENERATE__BACKOFF="2s",
        )
        async with daemon(settings, database) as running:
            await order.place(running, provider, images=1)
            await until(order.has_ended, timeout_s=60)
        assert (_bought(sandbox, provider), _bought(sandbox, OPENAI)) == ({GOOD: 1}, {})
    assert (order.ended()[0], order.makers(), order.moves()) == ("completed", [provider], [])
    assert order.calls() == [(provider, "succeeded", [1])]


async def test_no_key_that_may_start_a_call_is_a_provider_that_failed(database: str, order: Order, tmp_path: Path) -> None:
    """Keys whose accounts are empty rest until tomorrow: what waits for them goes to the next provider."""
    async with Sandbox(Behaviour(latency_s=0.02)) as sandbox:
        keys = '[{"alias": "main", "key": "sk-fallback-test"}]'
        more = {"GENERATE__OPENAI_IMAGES__API_KEY": "", "GENERATE__OPENAI_IMAGES__KEYS": keys}
        async with daemon(settings_for(sandbox, tmp_path, **more), database) as running:
            await asyncio.to_thread(
                order.connection.execute,
                "UPDATE jobdaemon.provider_keys SET rested_until = now() + interval '5 hours',"
                " rest_reason = 'its account is out of money'",
            )
            await order.place(running, OPENAI)
            await until(order.has_ended, timeout_s=60)
        assert OPENAI not in sandbox.shop.report()
    assert (order.ended()[0], order.makers()) == ("completed", [COMFYUI] * 6)
    reason = "no key of it can start a call within 120 s: main rests (its account is out of money)"
    assert order.moves() == [f"moved from openai_images to comfyui: {reason}"] * 2


async def test_two_of_three_are_down(database: str, order: Order, tmp_path: Path) -> None:
    """The first one's keys rest, the second does not answer: the third makes every image, once, and its rows say so."""
    async with Sandbox(Behaviour(latency_s=0.02)) as sandbox:
        more = {
            "ORDERS__FALLBACK": '{"openai_images": ["dashscope", "comfyui"]}',
            "GENERATE__OPENAI_IMAGES__API_KEY": "",
            "GENERATE__OPENAI_IMAGES__KEYS": '[{"alias": "main", "key": "sk-fallback-test"}]',
            "GENERATE__DASHSCOPE__BASE_URL": "http://127.0.0.1:9",
            "GENERATE__DASHSCOPE__API_KEY": "sk-fallback-test-0123456789",
        }
        async with daemon(settings_for(sandbox, tmp_path, **more), database) as running:
            await asyncio.to_thread(
                order.connection.execute, "UPDATE jobdaemon.provider_keys SET rested_until = now() + interval '5 hours'"
            )
            await order.place(running, OPENAI)
            await until(order.has_ended, timeout_s=60)
        assert (OPENAI in sandbox.shop.report(), _bought(sandbox, COMFYUI)) == (False, {GOOD: 3, BAD: 3})
    assert (order.ended(), order.makers()) == (("completed", None), [COMFYUI] * 6)
    assert {outcome for provider, outcome, _ in order.calls() if provider == DASHSCOPE} <= {"failed"}


@pytest.mark.parametrize("is_gone", [False, True], ids=["at work", "gone"])
async def test_a_cancelled_orders_task_is_stopped(database: str, order: Order, tmp_path: Path, is_gone: bool) -> None:
    """Within seconds, by a daemon that never saw it if the one that began it is gone; what it would have made is not bought."""
    async with Sandbox(Behaviour(latency_s=60.0)) as sandbox:
        settings = settings_for(sandbox, tmp_path)
        server = sandbox.shop.account(COMFYUI, "comfyui/one")
        async with daemon(settings, database) as running:
            await order.place(running, COMFYUI, images=1)
            await until(lambda: server.open == 1, timeout_s=60)
            if not is_gone:
                await asyncio.to_thread(order.connection.execute, "SELECT jobdaemon.cancel_order(%s)", [order.id])
                await until(lambda: server.open == 0 and order.calls() == [(COMFYUI, "cancelled", [1])], timeout_s=60)
        if is_gone:
            assert server.open == 1
            order.connection.execute("SELECT jobdaemon.cancel_order(%s)", [order.id])
            async with daemon(settings, database):
                await until(lambda: server.open == 0 and order.calls() == [(COMFYUI, "cancelled", [1])], timeout_s=60)
        assert _bought(sandbox, COMFYUI) == {}
    assert order.ended() == ("cancelled", None)
    assert order.rows("SELECT FROM jobdaemon.explain_order(%s)") == []


async def test_an_expired_orders_task_is_stopped(database: str, order: Order, tmp_path: Path) -> None:
    """An order whose time is up leaves nothing running at its provider."""
    async with Sandbox(Behaviour(latency_s=60.0)) as sandbox:
        server = sandbox.shop.account(COMFYUI, "comfyui/one")
        async with daemon(settings_for(sandbox, tmp_path), database) as running:
            await order.place(running, COMFYUI, images=1)
            await until(lambda: server.open == 1, timeout_s=60)
            await asyncio.to_thread(order.rows, "UPDATE jobdaemon.orders SET expires_at = now() WHERE id = %s RETURNING id")
            await until(lambda: server.open == 0 and order.calls() == [(COMFYUI, "cancelled", [1])], timeout_s=60)
    assert order.ended()[0] == "failed"
