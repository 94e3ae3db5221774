"""Steering daemons at work: limits, cancelled and expired orders, slots that a stopping daemon leaves to others."""

from __future__ import annotations

import asyncio
import statistics
from dataclasses import replace
from datetime import timedelta

from jobdaemon.domain.job import Task
from jobdaemon.events import JobFinished, JobStarted, OrderSettled
from jobdaemon.ports import Attempt
from jobdaemon.queue.supervisor import EngineRules
from tests.daemons import NO_POLL, Stages, running_daemon, until
from tests.factories import RULES, Jobs, Orders, Sql

#: Promised to whoever cancels is 1 s. Two rounds of five may be late on a busy machine, but the poll is a minute away.
PROMISED_S, ROUNDS, LATE_S = 1.0, 5, 20.0


class Doors:
    """A gate that holds generate attempts until it is opened, and says when one has come."""

    def __init__(self, task: str = Task.GENERATE) -> None:
        self.came = asyncio.Event()
        self.open = asyncio.Event()
        self._task = task

    async def __call__(self, attempt: Attempt) -> None:
        """Let every other task through at once."""
        if attempt.job.task == self._task:
            self.came.set()
            await self.open.wait()


async def test_cancel_stops_what_runs_within_a_second(engine_database: str, order_factory: Orders, sql: Sql) -> None:
    """A running generate attempt hears of its order's end at once, and its job ends aborted, whatever it would have made."""
    seconds: list[float] = []
    loop = asyncio.get_running_loop()
    for _ in range(ROUNDS):
        doors = Doors()
        async with running_daemon(engine_database, Stages(gate=doors), engine=NO_POLL) as daemon:
            order_id = order_factory("Free")
            await asyncio.wait_for(doors.came.wait(), 15)
            ended = daemon.events.expect(JobFinished, lambda event: event.outcome == "cancelled")
            began = loop.time()
            # In a thread: it may wait for an order that a commit on this event loop holds.
            await asyncio.to_thread(sql.execute, "SELECT jobdaemon.cancel_order(%s)", [order_id])
            assert (await ended.wait(LATE_S)).order_id == order_id
            seconds.append(loop.time() - began)
        statuses = {job["task_name"]: job["status"] for job in order_factory.jobs(order_id)}
        assert statuses == {Task.BEAUTIFY: "succeeded", Task.GENERATE: "aborted"}
        assert order_factory.row(order_id)["status"] == "cancelled"
    assert statistics.median(seconds) < PROMISED_S, seconds


async def test_an_upload_runs_out_when_its_order_is_cancelled(engine_database: str, order_factory: Orders, sql: Sql) -> None:
    """An attempt that is not abortable ends by itself; what it wanted to write is dropped."""
    doors = Doors(Task.UPLOAD)
    async with running_daemon(
        engine_database, Stages(gate=doors), engine=NO_POLL, rules=replace(RULES, is_abortable=False)
    ) as daemon:
        order_id = order_factory("Free")
        await asyncio.wait_for(doors.came.wait(), 15)
        ended = daemon.events.expect(JobFinished, lambda event: event.outcome == "cancelled")
        # In a thread: it may wait for an order that a commit on this event loop holds.
        await asyncio.to_thread(sql.execute, "SELECT jobdaemon.cancel_order(%s)", [order_id])
        doors.open.set()
        await ended.wait(60)
    assert {image["status"] for image in order_factory.images(order_id)} == {"cancelled"}


async def test_an_expired_order_ends_with_its_reason(engine_database: str, order_factory: Orders, sql: Sql) -> None:
    """An order whose time is up ends: what waits is cancelled, what runs is stopped, each missing image says why."""
    doors = Doors()
    async with running_daemon(engine_database, Stages(gate=doors)) as daemon:
        order_id = order_factory("Free")
        await asyncio.wait_for(doors.came.wait(), 15)
        settled = daemon.events.expect(OrderSettled)
        aborted = daemon.events.expect(JobFinished, lambda event: event.outcome == "cancelled")
        await asyncio.to_thread(sql.execute, "UPDATE jobdaemon.orders SET expires_at = now() WHERE id = %s", [order_id])
        assert await settled.wait(60) == OrderSettled(order_id, "failed")
        await aborted.wait(60)
    assert "expired" in order_factory.row(order_id)["error"]
    assert all("expired" in image["error"] for image in order_factory.images(order_id))
    assert sql.execute("SELECT count(*) AS n FROM jobdaemon.procrastinate_jobs WHERE status IN ('todo', 'doing')").fetchone() == {
        "n": 0
    }


async def test_a_raised_limit_is_used_at_once(engine_database: str, job_factory: Jobs, sql: Sql) -> None:
    """A daemon that waits at the cluster limit hears that it was raised; no poll is needed."""
    doors = Doors(Task.UPLOAD)
    sql.execute("UPDATE jobdaemon.queues SET cluster_limit = 0 WHERE name = 'upload'")
    async with running_daemon(engine_database, Stages(gate=doors), engine=NO_POLL) as daemon:
        job_factory("upload")
        await asyncio.sleep(0.3)  # nothing must start
        assert not doors.came.is_set()
        started = daemon.events.expect(JobStarted)
        await asyncio.to_thread(sql.execute, "UPDATE jobdaemon.queues SET cluster_limit = 1 WHERE name = 'upload'")
        await started.wait(LATE_S)
        doors.open.set()


async def test_a_slot_freed_by_a_stopping_daemon_is_used_by_another(engine_database: str, job_factory: Jobs, sql: Sql) -> None:
    """Under a cluster limit of one, the job that waits starts on the other daemon when the stopping one ends its own."""
    sql.execute("UPDATE jobdaemon.queues SET cluster_limit = 1 WHERE name = 'upload'")
    one, two = Doors(Task.UPLOAD), Doors(Task.UPLOAD)
    slow = EngineRules(NO_POLL.heartbeat, NO_POLL.lease, NO_POLL.poll, timedelta(seconds=20))
    async with running_daemon(engine_database, Stages(gate=two), engine=slow, team_size=0) as other:
        async with running_daemon(engine_database, Stages(gate=one), engine=slow) as first:
            job_factory("upload")
            await asyncio.wait_for(one.came.wait(), 15)
            job_factory("upload")
            other.supervisor.resize({"upload": 2})
            first.supervisor.stop("test")
            # Only then: a daemon that does not stop yet would take the next job itself.
            await until(lambda: daemon_status(sql, first.supervisor.daemon_id) == "stopping")
            one.open.set()
            await first.task
        await asyncio.wait_for(two.came.wait(), 5)
        two.open.set()


def daemon_status(sql: Sql, daemon_id: int) -> str:
    row = sql.execute("SELECT status FROM jobdaemon.daemons WHERE id = %s", [daemon_id]).fetchone()
    assert row is not None
    return str(row["status"])
