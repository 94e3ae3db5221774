"""Locks that somebody holds for too long: a process that stands still loses its own, and no queue waits for another one's."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import psycopg
import pytest

from jobdaemon.domain.job import Job
from jobdaemon.errors import DatabaseUnavailableError
from jobdaemon.events import JobStarted, SilentSessionsEnded
from jobdaemon.queue.store import PostgresJobStore
from tests.daemons import NO_POLL, QUICK, Stages, running_daemon
from tests.factories import Jobs, Sql

#: What queue_capacity and the steering of a queue take.
LOCK = "pg_advisory_xact_lock(1784835684, (SELECT id FROM jobdaemon.queues WHERE name = 'upload'))"
LEASE_S = 2.0
#: A process that stands still after a statement of its transaction, or in the middle of one, as a daemon may within a commit; it
#: then goes on.
FROZEN = f"""
    import asyncio, sys
    from datetime import timedelta
    from jobdaemon.db import DatabaseAddress, Session
    from jobdaemon.errors import DatabaseUnavailableError

    async def main():
        session = Session(DatabaseAddress(sys.argv[1], idle_in_transaction=timedelta(seconds={LEASE_S})), name="finish")
        try:
            async with session.use() as connection, connection.transaction():
                await connection.execute("SELECT {LOCK}")
                if "prepared" in sys.argv:
                    statement = asyncio.ensure_future(connection.fetch("SELECT 'never seen before'"))
                    await asyncio.sleep(0)  # it is on its way, to be prepared first
                print("locked", flush=True)
                sys.stdin.readline()
                await (statement if "prepared" in sys.argv else connection.execute("SELECT 1"))
        except DatabaseUnavailableError:
            print("lost", flush=True)
        async with session.use() as connection:
            print(await connection.fetchval("SELECT 'back'"), flush=True)
        await session.close()

    asyncio.run(main())
"""


@contextmanager
def _process(url: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", textwrap.dedent(FROZEN), url, *arguments]
    folder = Path(__file__).parents[2]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder) as process:
        try:
            yield process
        finally:
            process.kill()


def _go_on(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGCONT)
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def _said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.fixture
def limited(sql: Sql) -> None:
    """Claims from upload take its lock."""
    sql.execute("SELECT jobdaemon.resize_queue('upload', cluster_limit => 5)")


@pytest.mark.usefixtures("limited")
async def test_a_frozen_process_loses_its_locks_with_its_lease(
    engine_database: str,
    store: PostgresJobStore,
    daemon_id: int,
    job_factory: Jobs,
) -> None:
    """SIGSTOP in the middle of a transaction: the queue's lock is free soon after the lease; continued, the process goes on."""
    job_id = job_factory("upload")
    with _process(engine_database) as process:
        assert await asyncio.to_thread(_said, process) == "locked"
        process.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        claimed: list[Job] = []
        while not claimed:
            assert time.monotonic() - began < 60
            try:
                claimed = await store.claim("upload", daemon_id, 1)
            except DatabaseUnavailableError as error:
                assert str(error) == "queue upload is locked"  # noqa: PT017 - what a claim says while it must wait
        seconds = time.monotonic() - began
        assert [job.id for job in claimed] == [job_id]
        assert LEASE_S * 0.7 < seconds < LEASE_S + 30
        _go_on(process)
        assert [await asyncio.to_thread(_said, process) for _ in range(2)] == ["lost", "back"]


@pytest.mark.usefixtures("limited")
async def test_a_process_frozen_in_the_middle_of_a_statement_loses_its_locks(engine_database: str, job_factory: Jobs) -> None:
    """Frozen after a statement was prepared, it is not idle to the server: another daemon ends its session, and works on."""
    with _process(engine_database, "prepared") as process:
        assert await asyncio.to_thread(_said, process) == "locked"
        process.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        engine = replace(QUICK, lease=timedelta(seconds=LEASE_S))
        async with running_daemon(engine_database, Stages(), engine=engine) as daemon:
            started = daemon.events.expect(JobStarted)
            job_id = job_factory("upload", "jobdaemon.unknown")
            assert (await started.wait(60)).job_id == job_id
            assert LEASE_S * 0.7 < time.monotonic() - began < LEASE_S + 30
            assert [event for event in daemon.seen if isinstance(event, SilentSessionsEnded)] == [SilentSessionsEnded(count=1)]
        _go_on(process)
        assert [await asyncio.to_thread(_said, process) for _ in range(2)] == ["lost", "back"]


@pytest.mark.usefixtures("limited")
async def test_a_claim_gives_up_on_a_locked_queue_and_lets_others_through(
    engine_database: str, store: PostgresJobStore, daemon_id: int, job_factory: Jobs, sql: Sql
) -> None:
    """A claim waits a second for its queue's lock, keeps its connection, and another queue's claim is served right after it."""
    beautify = job_factory("beautify", "jobdaemon.beautify")
    job_factory("upload")
    claims = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'jobdaemon claim'"
    with psycopg.connect(engine_database) as locker:
        locker.execute(f"SELECT {LOCK}".encode())
        began = time.monotonic()
        locked = asyncio.ensure_future(store.claim("upload", daemon_id, 1))
        await asyncio.sleep(0.1)
        before = sql.execute(claims).fetchall()
        assert [job.id for job in await store.claim("beautify", daemon_id, 1)] == [beautify]
        assert 0.8 < time.monotonic() - began < 30
        with pytest.raises(DatabaseUnavailableError, match="queue upload is locked"):
            await locked
    assert len(await store.claim("upload", daemon_id, 1)) == 1
    assert sql.execute(claims).fetchall() == before
    assert len(before) == 1


@pytest.mark.usefixtures("limited")
async def test_a_daemon_claims_when_the_lock_is_free_again(engine_database: str, job_factory: Jobs) -> None:
    """A team whose queue was locked tries again by itself, without a notification or a poll."""
    async with running_daemon(engine_database, Stages(), engine=NO_POLL) as daemon:
        with psycopg.connect(engine_database) as locker:
            locker.execute(f"SELECT {LOCK}".encode())
            job_factory("upload", "jobdaemon.unknown")
            await asyncio.sleep(1.5)  # longer than a claim waits
            started = daemon.events.expect(JobStarted)
        await started.wait(60)
