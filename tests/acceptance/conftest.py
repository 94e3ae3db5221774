"""Real commands in real processes, each against a data directory of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jobdaemon.embedded import EmbeddedPostgres
from jobdaemon.schema import migrate
from tests.scratch import scratch_root

PORTRAIT = Path(__file__).parents[1] / "data" / "astronaut.png"

#: A dead daemon's work is taken up again after four seconds instead of fifteen.
QUICK = {
    "JOBDAEMON_ENGINE__HEARTBEAT": "200ms",
    "JOBDAEMON_ENGINE__LEASE": "4s",
    "JOBDAEMON_ENGINE__POLL": "300ms",
}

Command = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def warm_data_dir() -> Iterator[Path]:
    """A data directory whose database runs and is up to date, for tests that do not care who else uses it."""
    with _data_dir() as folder, EmbeddedPostgres(folder) as server:
        migrate(server.acquire())
        yield folder


@pytest.fixture
def cold_data_dir() -> Iterator[Path]:
    """A data directory nobody has used yet."""
    with _data_dir() as folder:
        yield folder


@contextlib.contextmanager
def _data_dir() -> Iterator[Path]:
    """A folder that Postgres's own user can reach; its server is stopped in the end, whoever was killed."""
    folder = Path(tempfile.mkdtemp(prefix="jobdaemon-test-", dir=scratch_root()))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        if (folder / "postgres").exists():
            with EmbeddedPostgres(folder) as server:
                server.acquire()
        shutil.rmtree(folder)


@pytest.fixture
def data_dir(request: pytest.FixtureRequest) -> Path:
    """The data directory of this test's commands: its own cold one when the test asks for that, else the warm one."""
    name = "cold_data_dir" if "cold_data_dir" in request.fixturenames else "warm_data_dir"
    folder: Path = request.getfixturevalue(name)
    return folder


@pytest.fixture
def environ(data_dir: Path) -> dict[str, str]:
    """The environment of a command."""
    return {**os.environ, **QUICK, "JOBDAEMON_DATA_DIR": str(data_dir)}


@pytest.fixture
def jobdaemon(environ: dict[str, str], tmp_path: Path) -> Command:
    """Run one command to its end."""

    def run(*arguments: object, timeout: float = 200, **variables: str) -> subprocess.CompletedProcess[str]:
        result = subprocess.run(
            [sys.executable, "-m", "jobdaemon", *map(str, arguments)],
            env=environ | variables,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert "Traceback" not in result.stderr, result.stderr
        return result

    return run


@pytest.fixture
def start(environ: dict[str, str], tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start one command; whatever still runs at the end is killed."""
    started: list[subprocess.Popen[str]] = []

    def begin(*arguments: object, **variables: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "jobdaemon", *map(str, arguments)],
            env=environ | variables,
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
