"""Live control of three daemons in three processes, measured from outside by the database's clock."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.factories import Sql

pytestmark = pytest.mark.newest_postgres

DAEMONS = 3
TEAM_SIZE = 2
#: How long each attempt takes.
ATTEMPT_S = 0.2
ROUNDS = 5
#: Promised is 1 s. Two rounds of five may be late on a machine that runs other tests beside.
PROMISED_S, WORST_S = 1.0, 15.0


@pytest.fixture
def crew(engine_database: str, sql: Sql) -> Iterator[None]:
    """At work on more upload jobs than they will ever run, two at a time each."""
    sql.execute(
        "INSERT INTO jobdaemon.procrastinate_jobs (queue_name, task_name, args)"
        " SELECT 'upload', 'jobdaemon.generate', '{\"order_id\": null, \"images\": []}' FROM generate_series(1, 5000)"
    )
    folder = Path(__file__).parents[2]
    command = [sys.executable, "-m", "tests.integration.crew_member", engine_database, str(TEAM_SIZE), str(ATTEMPT_S)]
    members = [subprocess.Popen(command, cwd=folder) for _ in range(DAEMONS)]
    try:
        _seconds_until(lambda: _running(sql) == [TEAM_SIZE] * DAEMONS, timeout_s=60)
        yield
        for member in members:
            member.terminate()
        assert [member.wait(timeout=30) for member in members] == [0] * DAEMONS
    finally:
        for member in members:
            member.kill()
            member.wait()


def _running(sql: Sql) -> list[int]:
    """How many jobs each daemon runs that runs any."""
    rows = sql.execute(
        "SELECT count(*) AS n FROM jobdaemon.procrastinate_jobs WHERE queue_name = 'upload' AND status = 'doing'"
        " GROUP BY worker_id"
    ).fetchall()
    return [row["n"] for row in rows]


def _seconds_until(condition: Callable[[], bool], *, timeout_s: float = 15.0) -> float:
    began = time.perf_counter()
    while not condition():
        assert time.perf_counter() - began < timeout_s
        time.sleep(0.005)
    return time.perf_counter() - began


def _call(sql: Sql, call: str) -> None:
    sql.execute(f"SELECT jobdaemon.{call}".encode())


def _seconds_until_nothing_starts(sql: Sql) -> float:
    """Pause the queue; how much later the last job started, by the database's clock."""
    row = sql.execute("SELECT clock_timestamp() AS at, jobdaemon.pause_queue('upload')").fetchone()
    assert row is not None
    _seconds_until(lambda: _running(sql) == [])
    time.sleep(0.3)  # nothing must start
    assert _running(sql) == []
    last = sql.execute("SELECT max(at) AS at FROM jobdaemon.procrastinate_events WHERE type = 'started'").fetchone()
    assert last is not None
    late: float = (last["at"] - row["at"]).total_seconds()
    return max(0.0, late)


def _seconds_until_at_most(sql: Sql, most: int) -> float:
    """When every daemon has let its surplus run out, and starts no more."""
    seconds = _seconds_until(lambda: max(_running(sql), default=0) <= most)
    watched_until = time.perf_counter() + 2 * ATTEMPT_S
    while time.perf_counter() < watched_until:
        assert max(_running(sql), default=0) <= most
        time.sleep(0.01)
    return seconds


@pytest.mark.slow
@pytest.mark.usefixtures("crew")
def test_changes_reach_three_processes_within_a_second(sql: Sql) -> None:
    """resize, pause and resume are effective on every daemon within a second of the call, attempts that run out included."""
    seconds: dict[str, list[float]] = {"resize up": [], "resize down": [], "pause": [], "resume": []}
    for _ in range(ROUNDS):
        _call(sql, "resize_queue('upload', 5)")
        seconds["resize up"].append(_seconds_until(lambda: _running(sql) == [5] * DAEMONS))
        _call(sql, "resize_queue('upload', 1)")
        seconds["resize down"].append(_seconds_until_at_most(sql, 1))
        seconds["pause"].append(_seconds_until_nothing_starts(sql))
        _call(sql, "resume_queue('upload')")
        seconds["resume"].append(_seconds_until(lambda: _running(sql) == [1] * DAEMONS))
    figures = ", ".join(f"{name} {statistics.median(each):.3f} ({max(each):.3f})" for name, each in seconds.items())
    print(f"seconds on {DAEMONS} processes, median (worst) of {ROUNDS}: {figures}")  # noqa: T201 - with -s or when it fails
    for name, each in seconds.items():
        assert statistics.median(each) < PROMISED_S, f"{name}: {figures}"
        assert max(each) < WORST_S, f"{name}: {figures}"
