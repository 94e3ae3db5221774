"""
A daemon in a process of its own, whose attempts do nothing for a while: for tests that look from outside.

    python -m tests.integration.crew_member POSTGRES TEAM_SIZE SECONDS [HEARTBEAT LEASE]

SECONDS is how long an attempt takes, HEARTBEAT and LEASE are the engine's.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from dataclasses import replace
from datetime import timedelta

from jobdaemon.ports import Attempt
from jobdaemon.queue.supervisor import EngineRules
from tests.daemons import NO_POLL, Stages, running_daemon


async def _work(url: str, team_size: int, seconds: float, engine: EngineRules) -> None:
    async def gate(attempt: Attempt) -> None:
        await asyncio.sleep(seconds)

    async with running_daemon(url, Stages(gate), engine=engine, team_size=team_size) as daemon:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, daemon.supervisor.stop, "SIGTERM")
        await daemon.task


if __name__ == "__main__":
    rules = NO_POLL
    if beats := [timedelta(seconds=float(seconds)) for seconds in sys.argv[4:]]:
        rules = replace(rules, heartbeat=beats[0], lease=beats[1])
    asyncio.run(_work(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), rules))
