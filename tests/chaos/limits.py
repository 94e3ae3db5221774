"""
Chaos for the cluster limit: daemons are killed and frozen while the limit changes, and the referee counts.

Four daemons × 64 slots work one provider's queue whose limit moves between 2 and 10 every second; every 5 to 20 s one of them
gets SIGKILL and is started again; now and then one stands still, for less than its lease (then nothing is excused) or for longer.
Orders keep coming, so that the limit binds. Afterwards everything gets time to end.
"""

from __future__ import annotations

import asyncio
import json
import random
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg

ROOT = Path(__file__).resolve().parents[2]
QUEUE = "generate.local"
_READY_TIMEOUT_S = 60.0

_HAS_OPEN_ORDERS = "SELECT EXISTS (SELECT FROM jobdaemon.orders WHERE finished_at IS NULL)"
_IS_BUSY_SINCE = """
SELECT EXISTS (SELECT FROM pg_stat_activity WHERE datname = current_database() AND backend_type = 'client backend'
    AND state = 'active' AND xact_start < $1 AND pid <> pg_backend_pid())
"""


#: Slow calls take ten times the latency: they outlast a lease.
SLOW = "slow=0.05"


@dataclass(frozen=True, slots=True)
class Plan:
    """
    What to do to them. Times in seconds.

    Attributes:
        kill_every: from, to.
        freeze_every: from, to; every second freeze lasts longer than the lease.
        backlog: how many jobs wait at the provider's queue, at least.
        drain_s: how long all that is left may take in the end.
        at_least: starts that fill the limit, five times as many in all, a kill and a freeze: on a busy machine it goes on for
            *patience_s* more until there were so many. 0: what comes in *seconds* is enough.
    """

    seconds: float
    seed: int
    daemons: int = 4
    slots: int = 64
    lease_s: float = 2.5
    latency_s: float = 0.6
    faults: str = SLOW
    change_every_s: float = 1.0
    kill_every: tuple[float, float] = (5.0, 20.0)
    freeze_every: tuple[float, float] = (8.0, 25.0)
    backlog: int = 40
    drain_s: float = 90.0
    at_least: int = 0
    patience_s: float = 60.0


@dataclass(slots=True)
class Figures:
    """
    What came of it. The first six are the promise; starts, above_limit and stored_twice are the referee's.

    Attributes:
        failed_by_kill: orders that ended otherwise than completed, and dead letters.
        at_limit: starts that filled the limit.
        apart: calls of daemons frozen beyond their lease, that nobody judges.
        made_again: images paid for twice.
        used_share: jobs that hold a slot as a share of the limit, 0.0 to 1.0, on average while jobs were ready; what a dead or
            frozen daemon holds counts.
    """

    starts: int = 0
    above_limit: int = 0
    stored_twice: int = 0
    failed_by_kill: int = 0
    orders: int = 0
    completed: int = 0
    at_limit: int = 0
    apart: int = 0
    made_again: int = 0
    kills: int = 0
    freezes: int = 0
    changes: int = 0
    rescued: int = 0
    used_share: float = 0.0
    seed: int = 0
    violations: list[dict[str, Any]] = field(default_factory=list)

    def holds(self) -> bool:
        """Whether every promise was kept."""
        broken = self.above_limit or self.stored_twice or self.failed_by_kill
        return not broken and self.completed == self.orders > 0 and self.starts > 0


@dataclass(slots=True)
class Daemon:
    """One place for a daemon, and the process that is there now."""

    place: int
    process: subprocess.Popen[bytes]
    name: str
    is_busy: bool = False  # being killed, started or frozen


class Chaos:
    """One run; see the module docstring."""

    def __init__(self, plan: Plan, url: str, referee_url: str, http: aiohttp.ClientSession, folder: Path) -> None:
        self._plan = plan
        self._url = url
        self._referee_url = referee_url
        self._http = http
        self._folder = folder
        self._dice = random.Random(plan.seed)
        self._daemons: list[Daemon] = []
        self._starts = 0
        self._samples: list[float] = []
        self._limit = 0
        self.figures = Figures(seed=plan.seed)

    async def run(self) -> Figures:
        """Do it all; the daemons are gone afterwards."""
        async with asyncpg.create_pool(self._url, min_size=1, max_size=6, statement_cache_size=0) as pool:
            try:
                self._daemons = [self._start(place) for place in range(self._plan.daemons)]
                await self._until_ready(pool, self._plan.daemons)
                await self._change_limit(pool)
                await self._torment(pool)
                await self._drain(pool)
            finally:
                self._end_all()
            await self._count(pool)
        return self.figures

    # Daemons

    def _start(self, place: int) -> Daemon:
        self._starts += 1
        name = f"d{place}.{self._starts}"
        arguments = ["--url", self._url, "--referee", self._referee_url, "--name", name]
        arguments += ["--slots", str(self._plan.slots), "--lease", str(self._plan.lease_s)]
        command = [sys.executable, "-m", "tests.chaos.worker", *arguments]
        with (self._folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        return Daemon(place, process, name)

    async def _until_ready(self, pool: asyncpg.Pool[asyncpg.Record], count: int) -> None:
        async with asyncio.timeout(_READY_TIMEOUT_S):
            while await pool.fetchval("SELECT count(*) FROM jobdaemon.daemons WHERE status = 'running'") < count:
                if any(daemon.process.poll() is not None for daemon in self._daemons):
                    raise RuntimeError(f"a daemon ended by itself; see its log in {self._folder}")
                await asyncio.sleep(0.05)

    def _end_all(self) -> None:
        for daemon in self._daemons:
            daemon.process.send_signal(signal.SIGCONT)
            daemon.process.send_signal(signal.SIGTERM)
        for daemon in self._daemons:
            try:
                daemon.process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                daemon.process.kill()
                daemon.process.wait()

    # What is done to them

    async def _torment(self, pool: asyncpg.Pool[asyncpg.Record]) -> None:
        plan = self._plan
        troubles = [
            self._every(lambda: plan.change_every_s, lambda: self._change_limit(pool)),
            self._every(lambda: self._dice.uniform(*plan.kill_every), self._kill),
            self._every(lambda: self._dice.uniform(*plan.freeze_every), lambda: self._freeze(pool)),
            self._every(lambda: 0.2, lambda: self._feed(pool)),
            self._every(lambda: 0.05, lambda: self._sample(pool)),
        ]
        is_over = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            for trouble in troubles:
                group.create_task(trouble(is_over))
            await asyncio.sleep(plan.seconds)
            with suppress(TimeoutError):
                async with asyncio.timeout(plan.patience_s):
                    while not await self._has_seen_enough():  # noqa: ASYNC110 - the referee gives no signal
                        await asyncio.sleep(0.3)
            is_over.set()

    async def _has_seen_enough(self) -> bool:
        at_least, figures = self._plan.at_least, self.figures
        if not at_least:
            return True
        async with self._http.get("/_sandbox/report") as answer:
            report = await answer.json()
        is_busy = report["starts"] > 5 * at_least and report["queues"][QUEUE]["at_limit"] > at_least
        return is_busy and figures.kills > 0 and figures.freezes > 0

    def _every(self, pause_s: Callable[[], float], act: Callable[[], Any]) -> Callable[[asyncio.Event], Any]:
        async def repeat(is_over: asyncio.Event) -> None:
            while not is_over.is_set():
                with suppress(TimeoutError):
                    await asyncio.wait_for(is_over.wait(), pause_s())
                    return
                await act()

        return repeat

    async def _change_limit(self, pool: asyncpg.Pool[asyncpg.Record], limit: int | None = None) -> None:
        """Announce, change as an operator would, wait until every claim that may have seen the old limit is over, settle."""
        limit = self._dice.randint(2, 10) if limit is None else limit
        await self._tell("/limit", queue=QUEUE, limit=limit)
        await pool.execute("UPDATE jobdaemon.queues SET cluster_limit = $2 WHERE name = $1", QUEUE, limit)
        changed_at = await pool.fetchval("SELECT clock_timestamp()")
        # A claim is one statement: one that began before is active until it is over. Frozen daemons' transactions are idle.
        while await pool.fetchval(_IS_BUSY_SINCE, changed_at):  # noqa: ASYNC110 - the server gives no signal
            await asyncio.sleep(0.002)
        await self._tell("/limit", queue=QUEUE, token=await self._last_token(pool))
        self._limit = limit
        self.figures.changes += 1

    async def _kill(self) -> None:
        daemon = self._choose()
        if daemon is None:
            return
        daemon.is_busy = True
        daemon.process.kill()
        await asyncio.to_thread(daemon.process.wait)
        self.figures.kills += 1
        self._daemons[daemon.place] = self._start(daemon.place)

    async def _freeze(self, pool: asyncpg.Pool[asyncpg.Record]) -> None:
        daemon = self._choose()
        row = await pool.fetchval("SELECT max(id) FROM jobdaemon.daemons WHERE pid = $1", daemon.process.pid) if daemon else None
        if daemon is None or row is None:
            return
        daemon.is_busy = True
        self.figures.freezes += 1
        lease_s = self._plan.lease_s
        try:
            daemon.process.send_signal(signal.SIGSTOP)
            if self.figures.freezes % 2 == 0:
                # The last heartbeat is a fifth of the lease old at most, or somewhat more on a busy machine.
                await asyncio.sleep(lease_s * self._dice.uniform(0.1, 0.5))
                return
            await asyncio.sleep(0.05)  # a heartbeat may be on its way
            left_s = await pool.fetchval(
                "SELECT extract(epoch FROM last_heartbeat - clock_timestamp())::float8 + $2"
                " FROM jobdaemon.procrastinate_workers WHERE id = $1",
                row,
                lease_s,
            )
            await self._tell("/daemon", daemon=daemon.name, lapses_in_s=max(left_s, 0.0))
            await asyncio.sleep(lease_s * self._dice.uniform(1.1, 2.5))
            await self._tell("/daemon", daemon=daemon.name, token=await self._last_token(pool))
        finally:
            daemon.process.send_signal(signal.SIGCONT)
            daemon.is_busy = False

    def _choose(self) -> Daemon | None:
        """A daemon that nobody is at; at least two are left alone."""
        free = [daemon for daemon in self._daemons if not daemon.is_busy]
        return self._dice.choice(free) if len(free) > 2 else None

    async def _feed(self, pool: asyncpg.Pool[asyncpg.Record]) -> None:
        waiting = await pool.fetchval("SELECT coalesce(sum(ready), 0) FROM jobdaemon.queue_depth WHERE queue <> 'upload'")
        while waiting < self._plan.backlog:
            images = self._dice.randint(1, 8)
            await pool.fetch(
                "SELECT jobdaemon.enqueue_order('Start', 'https://photos.example/p.jpg', customer => $1, images => $2,"
                " prompts => ARRAY['p'], provider => 'local')",
                f"c{self._dice.randint(1, 9)}",
                images,
            )
            self.figures.orders += 1
            waiting += (images + 1) // 2

    async def _sample(self, pool: asyncpg.Pool[asyncpg.Record]) -> None:
        """How much of the limit is in use, while there is work."""
        row = await pool.fetchrow("SELECT ready, running, cluster_limit FROM jobdaemon.queue_depth WHERE queue = $1", QUEUE)
        if row is not None and row["ready"] > 0 and row["cluster_limit"]:
            self._samples.append(min(row["running"] / row["cluster_limit"], 1.0))

    # The end

    async def _drain(self, pool: asyncpg.Pool[asyncpg.Record]) -> None:
        await self._change_limit(pool, 10)
        with suppress(TimeoutError):
            async with asyncio.timeout(self._plan.drain_s):
                while await pool.fetchval(_HAS_OPEN_ORDERS):  # noqa: ASYNC110 - until the last commit is in, whoever makes it
                    await asyncio.sleep(0.1)

    async def _count(self, pool: asyncpg.Pool[asyncpg.Record]) -> None:
        async with self._http.get("/_sandbox/report") as answer:
            report = await answer.json()
        figures = self.figures
        figures.starts, figures.above_limit = report["starts"], report["above_limit"]
        figures.stored_twice = report["stored_twice"]
        figures.at_limit, figures.apart = report["queues"][QUEUE]["at_limit"], report["apart"]
        figures.made_again, figures.violations = report["images"]["made_again"], report["violations"]
        figures.completed = await pool.fetchval("SELECT count(*) FROM jobdaemon.orders WHERE status = 'completed'")
        figures.orders = await pool.fetchval("SELECT count(*) FROM jobdaemon.orders")
        figures.failed_by_kill = await pool.fetchval(
            "SELECT (SELECT count(*) FROM jobdaemon.orders WHERE status IN ('partial', 'failed', 'cancelled'))"
            # A worker that died between its last image and its end leaves a job that the rescue drops: its order is complete.
            " + (SELECT count(*) FROM jobdaemon.procrastinate_jobs j WHERE j.status IN ('failed', 'cancelled')"
            "  OR j.status = 'aborted' AND NOT EXISTS (SELECT FROM jobdaemon.orders o"
            "   WHERE o.id = (j.args ->> 'order_id')::bigint AND o.status = 'completed'))"
        )
        figures.rescued = await pool.fetchval("SELECT count(*) FROM jobdaemon.attempts WHERE outcome = 'interrupted'")
        figures.used_share = round(sum(self._samples) / max(len(self._samples), 1), 3)

    async def _last_token(self, pool: asyncpg.Pool[asyncpg.Record]) -> int:
        token: int = await pool.fetchval("SELECT last_value FROM jobdaemon.attempt_token_seq")
        return token

    async def _tell(self, path: str, **body: Any) -> None:
        async with self._http.post(path, json=body, raise_for_status=True):
            pass


@asynccontextmanager
async def running_sandbox(plan: Plan) -> AsyncIterator[str]:
    """The sandbox in a process of its own; yields its URL."""
    arguments = ["--port", "0", "--scale", "1", "--latency", f"{plan.latency_s}s", "--seed", str(plan.seed), "--json"]
    command = [sys.executable, "-m", "jobdaemon", "sandbox", *arguments, "--faults", plan.faults]
    process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    try:
        async with asyncio.timeout(_READY_TIMEOUT_S):
            line = await process.stdout.readline()
        yield json.loads(line)["url"]
    finally:
        if process.returncode is None:
            process.terminate()
        await process.communicate()


async def run_chaos(plan: Plan, url: str, folder: Path) -> Figures:
    """
    Args:
        url: a migrated database of its own.
        folder: for the daemons' logs.
    """
    async with AsyncExitStack() as stack:
        referee_url = await stack.enter_async_context(running_sandbox(plan))
        http = await stack.enter_async_context(aiohttp.ClientSession(referee_url))
        return await Chaos(plan, url, referee_url, http, folder).run()


def as_json(figures: Figures) -> str:
    """One line; the promise first."""
    return json.dumps(asdict(figures))


__all__ = ["SLOW", "Chaos", "Figures", "Plan", "as_json", "run_chaos"]
