"""Paid calls of a daemon that is not sure of its lease: stopped where the database is there, left alone where it is away."""

from __future__ import annotations

import asyncio
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import psycopg
import pytest

from jobdaemon.errors import ProviderRefusedError
from jobdaemon.events import DatabaseBack, DatabaseLost, LeaseInDoubt
from jobdaemon.ports import Attempt
from jobdaemon.queue import heartbeat
from tests.daemons import QUICK, RunningDaemon, Stages, running_daemon, until
from tests.factories import Jobs, Row, Sql

pytestmark = pytest.mark.newest_postgres

PAID, FREE = "generate.local", "upload"
#: A machine that stands still for a second is not to be a lapse of its own.
ENGINE = replace(QUICK, lease=timedelta(seconds=2))
LEASE_S = ENGINE.lease.total_seconds()


@dataclass(slots=True)
class Calls:
    """
    Attempts that wait for bytes of a server, as those of a provider do, and then go on to their next call.

    Attributes:
        waiting: queues whose attempt waits.
        went_on: queues whose attempt got its answer and went on.
        stopped: queues whose attempt was cancelled.
    """

    waiting: list[str] = field(default_factory=list)
    went_on: list[str] = field(default_factory=list)
    stopped: list[str] = field(default_factory=list)
    _servers: list[socket.socket] = field(default_factory=list)

    async def gate(self, attempt: Attempt) -> None:
        """Wait for an answer; each attempt ends as a dead letter, since no order stands behind it."""
        server, client = socket.socketpair()
        self._servers.append(server)
        reader, writer = await asyncio.open_connection(sock=client)
        try:
            self.waiting.append(attempt.job.queue)
            await reader.readline()
            self.went_on.append(attempt.job.queue)
        except asyncio.CancelledError:
            self.stopped.append(attempt.job.queue)
            raise
        finally:
            writer.close()
        raise ProviderRefusedError("the test is over")

    def answer(self) -> None:
        """Every server answers now."""
        for server in self._servers:
            server.sendall(b"done\n")

    def close(self) -> None:
        """Hang up."""
        for server in self._servers:
            server.close()


@pytest.fixture
def calls() -> Iterator[Calls]:
    """No call yet."""
    calls = Calls()
    yield calls
    calls.close()


async def _at_work(calls: Calls, job_factory: Jobs) -> tuple[int, int]:
    """Start a paid and a free attempt; their jobs."""
    jobs = job_factory(PAID, "jobdaemon.generate"), job_factory(FREE)
    await until(lambda: sorted(calls.waiting) == sorted([PAID, FREE]))
    return jobs


def _doubts(daemon: RunningDaemon) -> list[LeaseInDoubt]:
    return [event for event in daemon.seen if isinstance(event, LeaseInDoubt)]


def _attempts(sql: Sql, job_id: int) -> list[Row]:
    return sql.execute("SELECT outcome, error FROM jobdaemon.attempts WHERE job_id = %s ORDER BY id", [job_id]).fetchall()


async def test_a_standstill_stops_paid_calls_before_they_go_on(
    engine_database: str, calls: Calls, job_factory: Jobs, sql: Sql
) -> None:
    """A process that stood still aborts its paid calls before they read the answer that waits for them; free work goes on."""
    async with running_daemon(engine_database, Stages(calls.gate), paid=[PAID], engine=ENGINE) as daemon:
        paid, _ = await _at_work(calls, job_factory)
        doubt = daemon.events.expect(LeaseInDoubt)
        calls.answer()
        time.sleep(1.5 * LEASE_S)  # noqa: ASYNC251 - the whole process stands still, as after SIGSTOP
        assert (await doubt.wait(60)).aborted == 1
        await until(lambda: FREE in calls.went_on and calls.waiting.count(PAID) == 2)
        assert (calls.stopped, calls.went_on) == ([PAID], [FREE])
        assert _attempts(sql, paid) == [{"outcome": "handed_back", "error": "this process stood still for most of its lease"}]
        assert len(_doubts(daemon)) == 1


async def test_a_standstill_stops_no_call_that_is_over(engine_database: str, job_factory: Jobs, sql: Sql) -> None:
    """What the provider has made is here: the fence decides whether it may be kept; it is not thrown away and bought anew."""
    is_over, kept = asyncio.Event(), asyncio.Event()

    async def gate(attempt: Attempt) -> None:
        await attempt.free_slot()
        is_over.set()
        await kept.wait()

    async with running_daemon(engine_database, Stages(gate), paid=[PAID], engine=ENGINE) as daemon:
        paid = job_factory(PAID, "jobdaemon.generate", args={"order_id": None, "images": []})
        await is_over.wait()
        doubt = daemon.events.expect(LeaseInDoubt)
        time.sleep(1.5 * LEASE_S)  # noqa: ASYNC251 - see above
        assert (await doubt.wait(60)).aborted == 0
        kept.set()
        await until(lambda: job_factory.row(paid)["status"] == "succeeded")
        assert _attempts(sql, paid) == []


async def test_sleep_of_the_machine_stops_paid_calls(
    engine_database: str, calls: Calls, job_factory: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that slept, which the event loop's own clock does not count, aborts its paid calls before it beats again."""
    async with running_daemon(engine_database, Stages(calls.gate), paid=[PAID], engine=ENGINE) as daemon:
        await _at_work(calls, job_factory)
        doubt = daemon.events.expect(LeaseInDoubt)
        awake = heartbeat.elapsed_s
        monkeypatch.setattr(heartbeat, "elapsed_s", lambda: awake() + LEASE_S)
        assert (await doubt.wait(10)).aborted == 1
        await until(lambda: calls.waiting.count(PAID) == 2)
        assert (calls.stopped, calls.went_on) == ([PAID], [])


def test_the_clock_of_a_lease_counts_sleep() -> None:
    """Where the system has a clock that goes on while the machine sleeps, that is the one."""
    if sys.platform != "linux":
        pytest.skip("Python names that clock on Linux only")
    before = time.clock_gettime(time.CLOCK_BOOTTIME)
    assert before <= heartbeat.elapsed_s() <= time.clock_gettime(time.CLOCK_BOOTTIME)


async def test_a_short_standstill_stops_nothing(engine_database: str, calls: Calls, job_factory: Jobs) -> None:
    """Half a lease without a beat is no reason to throw a paid call away."""
    async with running_daemon(engine_database, Stages(calls.gate), paid=[PAID], engine=ENGINE) as daemon:
        await _at_work(calls, job_factory)
        time.sleep(0.4 * LEASE_S)  # noqa: ASYNC251 - see above
        calls.answer()
        await until(lambda: len(calls.went_on) == 2)
        assert (calls.stopped, _doubts(daemon)) == ([], [])


async def test_beats_that_do_not_get_through_stop_paid_calls(
    engine_database: str, calls: Calls, job_factory: Jobs, sql: Sql
) -> None:
    """Where Postgres answers but no beat gets through, paid calls are aborted about when the lease ends; free work runs on."""
    async with running_daemon(engine_database, Stages(calls.gate), paid=[PAID], engine=ENGINE) as daemon:
        paid, free = await _at_work(calls, job_factory)
        doubt = daemon.events.expect(LeaseInDoubt)
        with psycopg.connect(engine_database) as locker:
            await asyncio.to_thread(locker.execute, "SELECT FROM jobdaemon.procrastinate_workers FOR NO KEY UPDATE")
            assert (await doubt.wait(60)).aborted == 1
            [silent] = sql.execute(
                "SELECT extract(epoch FROM clock_timestamp() - max(w.last_heartbeat))::float8 AS s"
                " FROM jobdaemon.procrastinate_workers w"
            ).fetchall()
            assert 0.7 * LEASE_S < silent["s"] < 2 * LEASE_S
            await until(lambda: job_factory.row(paid)["status"] == "todo")
            assert [row["outcome"] for row in _attempts(sql, paid)] == ["handed_back"]
        assert (calls.stopped, job_factory.row(free)["status"]) == ([PAID], "doing")
        await until(lambda: calls.waiting.count(PAID) == 2)  # claimed again when the lease holds again


async def test_while_postgres_is_away_nothing_is_stopped(
    postgres: Any, engine_database: str, calls: Calls, job_factory: Jobs, sql: Sql
) -> None:
    """Paid calls outlive an outage of Postgres, however long, and its end: nobody else can have their jobs."""
    [row] = sql.execute("SELECT current_database() AS name").fetchall()
    name = row["name"]
    async with running_daemon(engine_database, Stages(calls.gate), paid=[PAID], engine=ENGINE) as daemon:
        await _at_work(calls, job_factory)
        lost, back = daemon.events.expect(DatabaseLost), daemon.events.expect(DatabaseBack)
        postgres.admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        postgres.admin.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s AND application_name LIKE 'jobdaemon %%'",
            [name],
        )
        await lost.wait(60)
        await asyncio.sleep(2 * LEASE_S)
        postgres.admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
        await back.wait(60)
        calls.answer()
        await until(lambda: sorted(calls.went_on) == sorted([PAID, FREE]))
        assert (calls.stopped, _doubts(daemon)) == ([], [])
