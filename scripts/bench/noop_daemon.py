"""
A daemon whose jobs do nothing: the real supervisor in a process of its own, with one stage that returns at once.

    python scripts/bench/noop_daemon.py --url POSTGRES --slots 64 QUEUE...
"""

from __future__ import annotations

import argparse
import asyncio
import signal
from datetime import timedelta

from jobdaemon import schema_version
from jobdaemon.db import DatabaseAddress
from jobdaemon.domain.outcome import Done
from jobdaemon.domain.retry import RetryPolicy
from jobdaemon.events import Events
from jobdaemon.logs import configure_logs, log_events
from jobdaemon.ports import Attempt
from jobdaemon.queue.attempt import AttemptRules
from jobdaemon.queue.store import PostgresJobStore
from jobdaemon.queue.supervisor import EngineRules, QueueRules, Supervisor

#: Its jobs belong to no order: what remains is the engine's own work.
TASK = "bench.noop"
RULES = AttemptRules(
    timedelta(seconds=30), RetryPolicy(attempts=3, backoff=timedelta(seconds=1), cap=timedelta(seconds=5), jitter=0.2)
)
#: The daemon's own defaults.
ENGINE = EngineRules(
    heartbeat=timedelta(seconds=5), lease=timedelta(seconds=15), poll=timedelta(seconds=5), stop_grace=timedelta(seconds=60)
)


class Noop:
    """A stage that returns at once."""

    async def run(self, _attempt: Attempt) -> Done:
        """Do nothing."""
        return Done()


async def work(url: str, slots: int, queues: list[str]) -> None:
    """Run until SIGTERM."""
    events = Events()
    log_events(events)
    store = PostgresJobStore(DatabaseAddress(url))

    async def discard(keys: tuple[str, ...]) -> None:
        """Nothing is kept here."""

    supervisor = Supervisor(
        store=store,
        stages={TASK: Noop()},
        queues={name: QueueRules(slots, RULES) for name in queues},
        engine=ENGINE,
        events=events,
        version="bench",
        require_schema=lambda applied: schema_version.compare(applied).require_usable(),
        ensure_rows=lambda: store.ensure_rows(queues, ()),
        discard=discard,
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, supervisor.stop, number.name)
    try:
        await supervisor.run(wait_for_database=True)
    finally:
        await store.close()


def main() -> None:
    """Parse the command line and work."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True)
    parser.add_argument("--slots", type=int, default=64, help="of each queue")
    parser.add_argument("queues", nargs="+", metavar="QUEUE")
    arguments = parser.parse_args()
    # A line for each of thousands of jobs would be measured too.
    configure_logs("json", "warning")
    asyncio.run(work(arguments.url, arguments.slots, arguments.queues))


if __name__ == "__main__":
    main()
