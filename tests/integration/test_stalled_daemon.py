"""A daemon whose lease has lapsed: what it may do before its next heartbeat."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import psycopg

from jobdaemon.events import DatabaseLost, JobFinished
from jobdaemon.queue.supervisor import EngineRules
from tests.daemons import Stages, running_daemon, until
from tests.factories import Jobs, Sql

LEASE_S = 2.0
ENGINE = EngineRules(
    heartbeat=timedelta(seconds=0.3),
    lease=timedelta(seconds=LEASE_S),
    poll=timedelta(seconds=60),
    stop_grace=timedelta(seconds=5),
)
SILENT = "SELECT clock_timestamp() - last_heartbeat > %s * interval '1 second' AS is_lost FROM jobdaemon.procrastinate_workers"


async def test_nothing_is_claimed_under_a_lapsed_lease(engine_database: str, sql: Sql, job_factory: Jobs) -> None:
    """A job claimed under a lapsed lease would be another daemon's at once while it runs here: the heartbeat comes first."""
    sql.execute("CREATE TABLE public.claims (silent_s float8)")
    sql.execute(
        """
        CREATE FUNCTION public.note() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            INSERT INTO public.claims SELECT extract(epoch FROM clock_timestamp() - w.last_heartbeat)
                FROM jobdaemon.procrastinate_workers w WHERE w.id = NEW.worker_id;
            RETURN NEW;
        END $$
        """
    )
    sql.execute(
        "CREATE TRIGGER note BEFORE UPDATE ON jobdaemon.procrastinate_jobs FOR EACH ROW"
        " WHEN (OLD.status = 'todo' AND NEW.status = 'doing') EXECUTE FUNCTION public.note()"
    )
    async with running_daemon(engine_database, Stages(), engine=ENGINE) as daemon:
        lost = daemon.events.expect(DatabaseLost)
        finished = daemon.events.expect(JobFinished)
        with psycopg.connect(engine_database) as locker:
            # Heartbeats wait for this lock, claims do not.
            await asyncio.to_thread(locker.execute, "SELECT FROM jobdaemon.procrastinate_workers FOR NO KEY UPDATE")
            await lost.wait(60)
            await until(lambda: sql.execute(SILENT, [LEASE_S]).fetchall() == [{"is_lost": True}])
            job_factory(task="jobdaemon.unknown")
            await asyncio.sleep(0.3)  # a claim would take a few milliseconds
        await finished.wait(60)
    [claim] = sql.execute("SELECT silent_s FROM public.claims").fetchall()
    assert claim["silent_s"] < LEASE_S
