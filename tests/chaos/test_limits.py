"""The cluster limit at the provider's own door: daemons in real processes, killed and frozen, and a referee that counts."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.limits import Figures, Plan, run_chaos
from tests.factories import Sql

#: Everything that ``scripts/chaos --only limits`` does, in seconds instead of minutes.
SHORT = Plan(
    seconds=9,
    seed=20,
    lease_s=2.0,
    latency_s=0.45,
    change_every_s=0.7,
    kill_every=(2.0, 4.0),
    freeze_every=(1.5, 2.5),
    backlog=15,
    drain_s=120,
    at_least=6,
)


def _check(figures: Figures) -> None:
    assert figures.above_limit == 0, figures.violations
    assert figures.stored_twice == 0
    assert figures.failed_by_kill == 0
    assert figures.completed == figures.orders


@pytest.mark.timeout(300)
async def test_the_limit_holds_through_kills_and_freezes(engine_database: str, tmp_path: Path) -> None:
    """While the limit moves and daemons die and freeze, no call starts above it, no image is stored twice, no order is lost."""
    figures = await run_chaos(SHORT, engine_database, tmp_path)
    _check(figures)
    assert figures.starts > 30
    assert figures.at_limit > 6, "the limit never bound: nothing was tested"
    assert figures.kills > 0
    assert figures.freezes > 0


@pytest.mark.chaos
@pytest.mark.timeout(600)
async def test_the_limit_holds_for_minutes(engine_database: str, tmp_path: Path) -> None:
    """The same for two minutes, at a provider that fails now and then."""
    plan = Plan(seconds=120, seed=21, faults="429=0.02,500=0.02,reset=0.02,slow=0.02")
    _check(await run_chaos(plan, engine_database, tmp_path))


@pytest.mark.chaos
@pytest.mark.timeout(180)
async def test_the_referee_sees_a_limit_that_leaks(engine_database: str, sql: Sql, tmp_path: Path) -> None:
    """With a claim that counts but does not wait for its neighbours, the referee finds starts above the limit."""
    [row] = sql.execute("SELECT pg_get_functiondef('jobdaemon.claim_jobs'::regproc) AS definition").fetchall()
    leaky = row["definition"].replace("pg_advisory_xact_lock(", "pg_advisory_xact_lock_shared(")
    assert leaky != row["definition"]
    sql.execute(leaky)
    figures = await run_chaos(SHORT, engine_database, tmp_path)
    assert figures.above_limit > 0
