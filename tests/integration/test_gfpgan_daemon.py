"""`jobdaemon run` with the backend gfpgan: its child dies at random, photos and daemon do not notice."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from jobdaemon import app
from jobdaemon.cli.findings import all_findings
from jobdaemon.settings import load_settings
from tests.factories import Sql
from tests.gfpgan_weights import Weights, narrow_weights

__all__ = ["narrow_weights"]

PORTRAIT = Path(__file__).parents[1] / "data" / "astronaut.png"
SOURCE = "artifact:sources/portrait.png"
pytestmark = pytest.mark.newest_postgres

Start = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """A data directory with a portrait in its store."""
    source = tmp_path / "data" / "artifacts" / SOURCE.removeprefix("artifact:")
    source.parent.mkdir(parents=True)
    shutil.copyfile(PORTRAIT, source)
    return tmp_path / "data"


@pytest.fixture
def environ(engine_database: str, data_dir: Path, narrow_weights: Weights) -> dict[str, str]:
    """A daemon that beautifies several photos at once, and makes their images another day."""
    return {
        **os.environ,
        **narrow_weights.settings(),
        "JOBDAEMON_BEAUTIFY__BATCH": "4",
        "JOBDAEMON_QUEUES__BEAUTIFY__TEAM_SIZE": "6",
        "JOBDAEMON_QUEUES__GENERATE__LOCAL__TEAM_SIZE": "0",
        "JOBDAEMON_ENGINE__HEARTBEAT": "500ms",
        "JOBDAEMON_ENGINE__LEASE": "10s",
        "JOBDAEMON_ENGINE__STOP_GRACE": "20s",
        "JOBDAEMON_DATA_DIR": str(data_dir),
        "JOBDAEMON_DATABASE_URL": engine_database,
    }


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "daemon.log"
    path.touch()
    yield path
    print(path.read_text(errors="replace"))  # noqa: T201 - shown when the test fails


@pytest.fixture
def start(environ: dict[str, str], tmp_path: Path, log: Path) -> Iterator[Start]:
    """Starts a daemon; whatever still runs at the end is killed."""
    started: list[subprocess.Popen[bytes]] = []

    def begin(**variables: str) -> subprocess.Popen[bytes]:
        with log.open("ab") as file:
            command = [sys.executable, "-m", "jobdaemon", "run"]
            process = subprocess.Popen(command, env=environ | variables, cwd=tmp_path, stdout=file, stderr=file)
        started.append(process)
        return process

    yield begin
    for process in started:
        if process.poll() is None:
            process.kill()
        process.wait(timeout=10)


def until(condition: Callable[[], object], what: str, timeout_s: float = 90.0) -> None:
    limit = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < limit, f"no {what} within {timeout_s:g} s"
        time.sleep(0.02)


def events(log: Path) -> list[dict[str, Any]]:
    return events_of(log.read_text(errors="replace"))


def events_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines() if line.startswith("{") and line.endswith("}")]


GONE, READY = "the face restorer is gone", "the face restorer is ready"


def wait_for_life(log: Path, *, lives: int) -> None:
    """Until that many children have started, and the last of them is ready."""

    def is_ready() -> bool:
        seen = [line["event"] for line in events(log) if line["event"] in (GONE, READY)]
        return seen.count(GONE) >= lives - 1 and seen[-1] == READY

    until(is_ready, "child that is ready")


def told(log: Path, event: str) -> int:
    return sum(line["event"] == event for line in events(log))


def children(pid: int) -> list[int]:
    """The children of a process that drive a device."""
    found = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, file.read_text().split()):
            with suppress(FileNotFoundError):
                if b"gfpgan.child" in Path(f"/proc/{child}/cmdline").read_bytes():
                    found.append(child)
    return found


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def enqueue(sql: Sql, count: int) -> None:
    for _ in range(count):
        sql.execute("SELECT FROM jobdaemon.enqueue_order('Free', %s, images => 1)", [SOURCE])


def beautified(sql: Sql) -> int:
    row = sql.execute(
        "SELECT count(*) AS n FROM jobdaemon.procrastinate_jobs WHERE queue_name = 'beautify' AND status = 'succeeded'"
    ).fetchone()
    assert row is not None
    return int(row["n"])


def are_done(sql: Sql, photos: int) -> bool:
    return beautified(sql) >= photos


def has_died(log: Path, times: int) -> bool:
    return told(log, GONE) >= times


def heartbeat_age_s(sql: Sql) -> float:
    row = sql.execute(
        "SELECT extract(epoch FROM clock_timestamp() - max(last_heartbeat)) AS age FROM jobdaemon.procrastinate_workers"
    ).fetchone()
    assert row is not None
    return float(row["age"])


@pytest.mark.parametrize(
    "photos",
    [
        pytest.param(8, marks=pytest.mark.timeout(300)),
        pytest.param(50, marks=[pytest.mark.slow, pytest.mark.timeout(900)]),
    ],
)
def test_killing_the_child_at_random_stops_nothing(start: Start, sql: Sql, log: Path, photos: int) -> None:
    """Every photo is beautified, by a daemon that is never restarted and always alive; hardly an attempt is spent."""
    dice = random.Random(5)
    daemon = start()
    until(lambda: told(log, READY), "child that is ready")
    enqueue(sql, photos)
    kills, oldest_s = 0, 0.0
    while (done := beautified(sql)) < photos:
        if kills and dice.random() < 1 / 4:
            time.sleep(dice.uniform(0, 1))  # while it starts
        else:
            enough = min(photos, done + dice.choice([0, 1, 2, 3, 5]))
            wait_for_life(log, lives=told(log, GONE) + 1)
            until(partial(are_done, sql, enough), "photos", timeout_s=300)
            time.sleep(dice.uniform(0, 0.4))
        assert daemon.poll() is None
        oldest_s = max(oldest_s, heartbeat_age_s(sql))
        for child in children(daemon.pid):
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
                kills += 1
        until(partial(has_died, log, kills), "death")
    print(f"{photos} photos, {kills} kills, oldest heartbeat {oldest_s:.1f} s")  # noqa: T201 - a figure to report
    assert kills >= photos // 8
    assert oldest_s < 10  # no lease was ever lost
    assert told(log, "daemon started") == 1
    rows = sql.execute("SELECT status, count(*) AS n FROM jobdaemon.orders GROUP BY status").fetchall()
    assert [(row["status"], row["n"]) for row in rows] == [("generating", photos)]
    spent = sql.execute("SELECT outcome, error FROM jobdaemon.attempts WHERE outcome NOT IN ('snooze', 'succeeded')").fetchall()
    assert len(spent) <= photos // 4, spent  # killed twice in a row while its face was alone in the child: one attempt of three
    made = sql.execute("SELECT DISTINCT beautified -> 'faces' AS faces, beautified -> 'sha256' AS sha256 FROM jobdaemon.orders")
    assert [row["faces"] for row in made.fetchall()] == [1]  # and one digest for all: what was tried again gave the same bytes
    daemon.send_signal(signal.SIGTERM)
    assert daemon.wait(timeout=30) == 0


def test_the_child_goes_with_a_killed_daemon(start: Start, sql: Sql, log: Path) -> None:
    """SIGKILL of the daemon leaves no process on the device; the next daemon does the photo."""
    first = start(JOBDAEMON_ENGINE__LEASE="2s", JOBDAEMON_ENGINE__HEARTBEAT="300ms")
    until(lambda: children(first.pid), "child")
    [child] = children(first.pid)
    until(lambda: told(log, "daemon ready"), "daemon that is ready")
    enqueue(sql, 1)
    first.kill()
    first.wait(timeout=10)
    until(lambda: not is_running(child), "end of the child", timeout_s=5)
    start(JOBDAEMON_ENGINE__LEASE="2s", JOBDAEMON_ENGINE__HEARTBEAT="300ms")
    until(lambda: beautified(sql) == 1, "photo")


def test_a_stop_finishes_what_is_on_the_device(start: Start, sql: Sql, log: Path) -> None:
    """SIGTERM to the whole process group, as a terminal or a service manager sends it, lets running photos end."""
    daemon = start()
    until(lambda: told(log, READY), "child that is ready")
    [child] = children(daemon.pid)
    enqueue(sql, 3)
    until(lambda: sql.execute("SELECT FROM jobdaemon.procrastinate_jobs WHERE status = 'doing'").fetchall(), "claim")
    for pid in (child, daemon.pid):
        os.kill(pid, signal.SIGTERM)
    assert daemon.wait(timeout=60) == 0
    assert not is_running(child)
    [stopped] = [line for line in events(log) if line["event"] == "daemon stopped"]
    assert stopped.get("handed_back") == 0
    assert beautified(sql) > 0


# -- settings -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def jobdaemon(environ: dict[str, str], tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs one command to its end."""

    def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "jobdaemon", *arguments]
        return subprocess.run(command, env=environ | variables, cwd=tmp_path, capture_output=True, text=True, check=False)

    return run


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"JOBDAEMON_BEAUTIFY__WEIGHTS": ""}, 'beautify.weights: must be set, because beautify.backend is "gfpgan"'),
        ({"JOBDAEMON_BEAUTIFY__WEIGHTS": "/none.pth"}, "There is no weights file /none.pth"),
        ({"JOBDAEMON_BEAUTIFY__WEIGHTS_SHA256": "0" * 64}, "is not the file that weights_sha256 names"),
        ({"JOBDAEMON_BEAUTIFY__DEVICE": "cuda:7"}, 'beautify.device: is "cuda:7", but torch'),
    ],
    ids=["no-weights", "no-file", "other-file", "no-device"],
)
def test_gfpgan_that_cannot_work_stops_the_start(
    jobdaemon: Callable[..., subprocess.CompletedProcess[str]], variables: dict[str, str], says: str
) -> None:
    """One sentence and exit code 2; never another backend instead."""
    ended = jobdaemon("run", **variables)
    assert ended.returncode == 2, ended.stderr
    assert says in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1


def test_check_names_model_and_device(
    jobdaemon: Callable[..., subprocess.CompletedProcess[str]], narrow_weights: Weights
) -> None:
    """What works is told with its model and device, what does not with the reason."""

    def found(**variables: str) -> tuple[str, str]:
        rows = json.loads(jobdaemon("check", "--json", **variables).stdout)
        [row] = [row for row in rows if row["check"] == "backend"]
        return row["state"], row["message"]

    assert found() == ("ok", f"gfpgan (narrow-{narrow_weights.sha256[:8]} on cpu) works")
    state, message = found(JOBDAEMON_BEAUTIFY__WEIGHTS="/none.pth")
    assert state == "error"
    assert "There is no weights file /none.pth" in message


def test_the_child_runs_nothing_of_the_current_folder(environ: dict[str, str], tmp_path: Path) -> None:
    """A module that lies where a command is called is not imported by the child either, and all it says is told whole."""
    for name in ("torch.py", "json.py"):
        (tmp_path / name).write_text("raise SystemExit('this is not what was installed')")
    command = [sys.executable, "-P", "-m", "jobdaemon", "check", "--json"]
    ended = subprocess.run(command, env=environ, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert [row["state"] for row in json.loads(ended.stdout) if row["check"] == "backend"] == ["ok"]
    assert "Traceback" not in ended.stderr
    says = environ | {"PYTHONWARNINGS": "nonsense"}  # of which Python complains at its start
    ended = subprocess.run(command, env=says, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert any("Invalid -W option ignored" in told["line"] for told in events_of(ended.stderr) if "line" in told)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"WEIGHTS": ""}, None),
        ({}, "on which gfpgan has to be asked for"),
        ({"DEVICE": "cuda", "WEIGHTS": "/none.pth"}, "there is no /none.pth"),
        ({"DEVICE": "cuda:7"}, "CUDA devices here"),
    ],
    ids=["no-weights", "cpu", "no-file", "no-device"],
)
async def test_auto_is_opencv_where_gfpgan_cannot_be(
    environ: dict[str, str], caplog: pytest.LogCaptureFixture, changes: dict[str, str], reason: str | None
) -> None:
    """And the log says why, where weights are set."""
    asked = environ | {"JOBDAEMON_BEAUTIFY__BACKEND": "auto"} | {f"JOBDAEMON_BEAUTIFY__{key}": it for key, it in changes.items()}
    settings = load_settings(None, {name: value for name, value in asked.items() if name.startswith("JOBDAEMON_")})
    backend = await app.start_backend(settings)
    await backend.close()
    assert backend.name == "opencv"
    told_why = [record.getMessage() for record in caplog.records if "because" in record.getMessage()]
    assert len(told_why) == (reason is not None)
    assert all(reason is not None and reason in line for line in told_why)


@pytest.mark.parametrize(
    ("changes", "state", "words", "damage"),
    [
        ({"WEIGHTS": ""}, "ok", "because beautify.weights is not set", None),
        ({}, "warning", 'because beautify.device is "cpu", on which gfpgan has to be asked for', None),
        ({"WEIGHTS": "/none.pth"}, "warning", "because there is no /none.pth", None),
        (
            {"WEIGHTS_SHA256": "0" * 64},
            "warning",
            'because beautify.device is "cpu"',
            "is not the file that weights_sha256 names",
        ),
        (
            {"WEIGHTS_SHA256": "", "DEVICE": "cuda:7"},
            "warning",
            "because gfpgan cannot work here: beautify.device: is",
            "is none of the released GFPGAN files",
        ),
    ],
    ids=["no-weights", "cpu", "no-file", "damaged-on-a-cpu", "damaged-without-a-device"],
)
def test_check_says_why_auto_did_not_choose_gfpgan(
    environ: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, str],
    state: str,
    words: str,
    damage: str | None,
) -> None:
    """Which backend was chosen, why not the better one, and what is wrong with the weights whatever else is missing."""
    asked = environ | {"JOBDAEMON_BEAUTIFY__BACKEND": "auto"} | {f"JOBDAEMON_BEAUTIFY__{key}": it for key, it in changes.items()}
    for name, value in asked.items():
        monkeypatch.setenv(name, value)
    found = [finding for finding in all_findings(None) if finding.check == "backend"]
    assert found[0].state == state
    assert found[0].message.startswith("opencv works; gfpgan, which is better, was not picked, because ")
    assert words in found[0].message
    assert [damage is not None and damage in finding.message for finding in found[1:]] == [True] * (damage is not None)
    assert {finding.state for finding in found[1:]} <= {"warning"}
