"""Daemons in real processes, killed at the worst moments: the order completes, every image once, and no attempt is spent."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest

from jobdaemon.storage.files import TEMPORARY_PREFIX
from tests.factories import Orders, Sql

PORTRAIT = Path(__file__).parents[1] / "data" / "astronaut.png"
SOURCE = "artifact:sources/portrait.png"
QUICK = {
    "JOBDAEMON_ENGINE__HEARTBEAT": "300ms",
    "JOBDAEMON_ENGINE__LEASE": "1s",
    "JOBDAEMON_ENGINE__POLL": "300ms",
}
Start = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """A data directory with a portrait in its store."""
    source = tmp_path / "data" / "artifacts" / SOURCE.removeprefix("artifact:")
    source.parent.mkdir(parents=True)
    shutil.copyfile(PORTRAIT, source)
    return tmp_path / "data"


@pytest.fixture
def start(engine_database: str, data_dir: Path, tmp_path: Path) -> Iterator[Start]:
    """Starts a daemon; whatever still runs at the end is killed."""
    environ = {**os.environ, **QUICK, "JOBDAEMON_DATA_DIR": str(data_dir), "JOBDAEMON_DATABASE_URL": engine_database}
    started: list[subprocess.Popen[bytes]] = []
    with (tmp_path / "daemons.log").open("ab") as log:

        def begin(**variables: str) -> subprocess.Popen[bytes]:
            command = [sys.executable, "-m", "jobdaemon", "run"]
            process = subprocess.Popen(command, env=environ | variables, cwd=tmp_path, stdout=log, stderr=log)
            started.append(process)
            return process

        yield begin
        for process in started:
            if process.poll() is None:
                process.kill()
            process.wait(timeout=60)
    print((tmp_path / "daemons.log").read_text(errors="replace"))  # noqa: T201 - shown when the test fails


def _until(condition: Callable[[], bool], what: str, timeout_s: float = 100.0, pause_s: float = 0.01) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {timeout_s} s"
        time.sleep(pause_s)


def _is_running(sql: Sql, queue: str) -> bool:
    found = sql.execute(
        "SELECT FROM jobdaemon.procrastinate_jobs WHERE queue_name = %s AND status = 'doing' LIMIT 1", [queue]
    ).fetchone()
    return found is not None


def _commit_waits(sql: Sql) -> bool:
    found = sql.execute(
        "SELECT FROM pg_stat_activity WHERE application_name = 'jobdaemon finish' AND wait_event_type = 'Lock'"
        " AND datname = current_database()"
    ).fetchone()
    return found is not None


def _check(orders: Orders, order_ids: list[int], data_dir: Path) -> None:
    """Every order is completed, every image is stored once, and no attempt was spent."""
    for order_id in order_ids:
        order = orders.row(order_id)
        assert (order["status"], order["error"]) == ("completed", None)
        images = orders.images(order_id)
        assert [image["status"] for image in images] == ["stored"] * order["images_total"]
        folder = data_dir / "artifacts" / "orders" / str(order_id)
        # What was being written when its process was killed is no image; the store clears it away a day later.
        files = sorted(path.name for path in folder.iterdir() if not path.name.startswith(TEMPORARY_PREFIX))
        assert files == sorted(image["object_key"].rpartition("/")[2] for image in images)
        jobs = orders.jobs(order_id)
        assert {(job["status"], job["attempts"]) for job in jobs} == {("succeeded", 1)}
        uploads = [job["args"]["image"] for job in jobs if job["queue_name"] == "upload"]
        assert sorted(uploads) == [image["index"] for image in images]
    spent = orders.sql.execute("SELECT * FROM jobdaemon.attempts WHERE outcome IN ('retry', 'failed', 'cancelled')").fetchall()
    assert spent == []


def test_killed_in_one_stage_after_the_other(
    start: Start, sql: Sql, order_factory: Orders, engine_database: str, data_dir: Path
) -> None:
    """SIGKILL in each stage of one order, each time a new daemon goes on from there: the last one completes the order."""
    stages = {"beautify": "at work", "generate.local": "at work", "upload": "committing"}
    for queue in stages:
        sql.execute("SELECT jobdaemon.pause_queue(%s)", [queue])
    order_id = order_factory("Start", source=SOURCE, images=4, prompts=["studio portrait", "film portrait"])
    for queue, moment in stages.items():
        _killed_in(start(), sql, engine_database, order_id, queue, moment)
    start()
    _until(lambda: orders_done(order_factory, [order_id]), "the order's end")
    _until(lambda: not any(_is_running(sql, queue) for queue in stages), "the last commit")
    _check(order_factory, [order_id], data_dir)


def _killed_in(first: subprocess.Popen[bytes], sql: Sql, url: str, order_id: int, queue: str, moment: str) -> None:
    """Kill that daemon in this stage, whose queue is paused until there is something to do."""
    _until(lambda: _is_ready(sql, queue), f"a ready job in {queue}")
    with psycopg.connect(url) as locker:
        if moment == "committing":
            locker.execute("SELECT FROM jobdaemon.orders WHERE id = %s FOR UPDATE", [order_id])
        sql.execute("SELECT jobdaemon.resume_queue(%s)", [queue])
        _until(lambda: _is_running(sql, queue), f"a job of {queue}", pause_s=0.0)
        if moment == "committing":
            _until(lambda: _commit_waits(sql), "a commit")
        first.kill()
        first.wait(timeout=60)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["at work", "committing"])
@pytest.mark.parametrize("queue", ["beautify", "generate.local", "upload"])
def test_killed_in_each_stage(
    start: Start, sql: Sql, order_factory: Orders, engine_database: str, data_dir: Path, queue: str, moment: str
) -> None:
    """SIGKILL while a job of the stage works, or while its commit is under way: another daemon completes the order."""
    sql.execute("SELECT jobdaemon.pause_queue(%s)", [queue])
    first = start()
    order_id = order_factory("Start", source=SOURCE, images=4, prompts=["studio portrait", "film portrait"])
    _killed_in(first, sql, engine_database, order_id, queue, moment)
    start()
    _until(lambda: orders_done(order_factory, [order_id]), "the order's end")
    _until(lambda: not any(_is_running(sql, name) for name in ("beautify", "generate.local", "upload")), "the last commit")
    _check(order_factory, [order_id], data_dir)


def _is_ready(sql: Sql, queue: str) -> bool:
    row = sql.execute("SELECT ready FROM jobdaemon.queue_depth WHERE queue = %s", [queue]).fetchone()
    return row is not None and row["ready"] > 0


def orders_done(orders: Orders, order_ids: list[int]) -> bool:
    """Whether all of them have ended."""
    return all(orders.row(order_id)["finished_at"] is not None for order_id in order_ids)


def test_terminated_within_the_grace(start: Start, sql: Sql, order_factory: Orders, data_dir: Path) -> None:
    """SIGTERM while a job runs: it finishes within the grace, the daemon exits with 0, and the next goes on from there."""
    first = start()
    order_id = order_factory("Free", source=SOURCE)
    _until(lambda: _is_running(sql, "beautify"), "a job of beautify", pause_s=0.0)
    first.send_signal(signal.SIGTERM)
    assert first.wait(timeout=60) == 0
    [job] = [job for job in order_factory.jobs(order_id) if job["queue_name"] == "beautify"]
    assert (job["status"], job["attempts"]) == ("succeeded", 1)
    row = sql.execute("SELECT status FROM jobdaemon.workers").fetchone()
    assert row == {"status": "stopped"}
    start()
    _until(lambda: orders_done(order_factory, [order_id]), "the order's end")
    _check(order_factory, [order_id], data_dir)


def test_terminated_without_grace_hands_back(start: Start, sql: Sql, order_factory: Orders, data_dir: Path) -> None:
    """With no grace what runs is handed back at once, unspent, and no death is counted."""
    first = start(JOBDAEMON_ENGINE__STOP_GRACE="0s")
    order_id = order_factory("Free", source=SOURCE)
    _until(lambda: _is_running(sql, "beautify"), "a job of beautify", pause_s=0.0)
    first.send_signal(signal.SIGTERM)
    assert first.wait(timeout=60) == 0
    [job] = order_factory.jobs(order_id)
    assert (job["status"], job["attempts"], job["deaths"], job["scheduled_at"]) == ("todo", 0, None, None)
    outcomes = sql.execute("SELECT outcome FROM jobdaemon.attempts").fetchall()
    assert outcomes == [{"outcome": "handed_back"}]
    start()
    _until(lambda: orders_done(order_factory, [order_id]), "the order's end")
    _check(order_factory, [order_id], data_dir)


@pytest.mark.chaos
@pytest.mark.timeout(600)
def test_killed_again_and_again(start: Start, sql: Sql, order_factory: Orders, data_dir: Path) -> None:
    """Three daemons, one of them killed at random every second or so while orders keep coming: all complete, exactly."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")  # noqa: T201
    dice = random.Random(seed)
    orders: list[int] = []
    daemons = [start() for _ in range(3)]
    for _ in range(25):
        images = dice.randrange(1, 7)
        orders.append(order_factory("Start", source=SOURCE, images=images, prompts=["p"]))
        time.sleep(dice.uniform(0.3, 2.5))
        place = dice.randrange(3)
        daemons[place].kill()
        daemons[place].wait(timeout=10)
        daemons[place] = start()
    _until(lambda: orders_done(order_factory, orders), "the end of every order", timeout_s=300, pause_s=0.2)
    _until(lambda: not any(_is_running(sql, name) for name in ("beautify", "generate.local", "upload")), "the last commit")
    _check(order_factory, orders, data_dir)
