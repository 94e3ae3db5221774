"""Fixtures for every test: a clean environment, and Postgres databases on a server of the session's own."""

from __future__ import annotations

import fcntl
import itertools
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psycopg
import pytest
from hypothesis import HealthCheck, settings
from psycopg import sql

from jobdaemon.embedded import EmbeddedPostgres, binaries
from tests.scratch import scratch_root

# Read here because the environment is cleaned before each test.
_OTHER_BIN_DIR = os.environ.get("JOBDAEMON_TEST_PG_BIN")

_SERVER_OPTIONS = {
    # No test outlives a power cut.
    "fsync": "off",
    "full_page_writes": "off",
    "autovacuum": "off",  # plans and timings must not depend on when it came by
    "max_connections": "300",
    "max_wal_size": "256MB",
}

# Started in the background by a script, the session ignores SIGINT, and so would every program that tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A busy machine is no failure: nothing is judged by how long an example took. Thorough is what scripts/test --slow asks for
# (--hypothesis-profile thorough); tests whose examples cost more than a millisecond say how many with tests/effort.py.
settings.register_profile("quick", max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("thorough", settings.get_profile("quick"), max_examples=500)
settings.load_profile("quick")


_PREFIX = "jobdaemon-test-"
#: A test may stop a server and start it again: nobody has the lock of its folder meanwhile. No test takes so long.
_LEFT_OVER_AFTER_S = 3600


@dataclass(slots=True)
class PostgresServer:
    """
    The session's server (one per pytest-xdist worker).

    Attributes:
        bin_dir: the PostgreSQL programs it runs.
        admin: an autocommit connection to its own database, for tests that look from outside.
    """

    base_url: str
    bin_dir: Path
    admin: psycopg.Connection[tuple[object, ...]]
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def url(self, database: str) -> str:
        """A URL that psycopg and asyncpg understand."""
        return self.base_url.replace("@/jobdaemon?", f"@/{database}?", 1)

    def create_database(self, template: str = "template1") -> str:
        """Make a database that is a copy of *template* and return its name."""
        name = f"test_{next(self._numbers)}"
        self.admin.execute(sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(sql.Identifier(name), sql.Identifier(template)))
        return name

    def drop_database(self, name: str) -> None:
        """Drop it, whoever is still connected."""
        self.admin.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))


def _clear_up_after_killed_sessions() -> None:
    """Stop servers of sessions that were killed a while ago, and remove them; one without living users has a free lock."""
    old = time.time() - _LEFT_OVER_AFTER_S
    for folder in scratch_root().glob(f"{_PREFIX}*"):
        with suppress(OSError):
            if folder.stat().st_mtime < old:
                _remove_unused(folder)


def _remove_unused(folder: Path) -> None:
    with (folder / "postgres" / "users.lock").open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with suppress(FileNotFoundError, ProcessLookupError):
            # SIGQUIT: it goes at once; nobody wants its data.
            os.kill(int((folder / "postgres" / "cluster" / "postmaster.pid").read_text().split()[0]), signal.SIGQUIT)
        shutil.rmtree(folder, ignore_errors=True)


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """On another Postgres a module that is about the newest as a whole is not even imported: that takes seconds for nothing."""
    is_module = _OTHER_BIN_DIR and collection_path.suffix == ".py"
    return True if is_module and "\npytestmark = pytest.mark.newest_postgres\n" in collection_path.read_text("utf-8") else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """On another Postgres only what depends on it runs again: tests that use it, but for those that it tells nothing new."""
    if not _OTHER_BIN_DIR:
        return
    left_out = [
        item
        for item in items
        if "postgres" not in getattr(item, "fixturenames", ()) or item.get_closest_marker("newest_postgres")
    ]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in set(left_out)]


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """The session's Postgres; another installation's with JOBDAEMON_TEST_PG_BIN."""
    _clear_up_after_killed_sessions()
    bin_dir = Path(_OTHER_BIN_DIR) if _OTHER_BIN_DIR else None
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=scratch_root()))
    # As root the server is another user's, who must get through; the cluster itself stays closed.
    folder.chmod(0o711)
    try:
        with (
            EmbeddedPostgres(folder, bin_dir=bin_dir, options=_SERVER_OPTIONS) as server,
            psycopg.connect(server.acquire(), autocommit=True) as admin,
        ):
            yield PostgresServer(server.acquire(), binaries(bin_dir), admin)
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def empty_database(postgres: PostgresServer) -> Iterator[str]:
    """URL of a fresh, empty database."""
    name = postgres.create_database()
    yield postgres.url(name)
    postgres.drop_database(name)


@pytest.fixture(scope="session")
def migrated_template(postgres: PostgresServer) -> str:
    """Name of a database with all migrations, to be cloned and never connected to."""
    from jobdaemon.schema import migrate

    name = postgres.create_database()
    migrate(postgres.url(name))
    return name


@pytest.fixture
def database(postgres: PostgresServer, migrated_template: str) -> Iterator[str]:
    """URL of a database with all migrations and no rows but theirs."""
    name = postgres.create_database(template=migrated_template)
    yield postgres.url(name)
    postgres.drop_database(name)


@pytest.fixture(scope="session")
def _homes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("homes")
    numbers = itertools.count()
    return (folder / str(number) for number in numbers)


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch, _homes: Iterator[Path]) -> None:
    """No setting of the machine or of another test reaches a test: JOBDAEMON_*, libpq's PG*, keys, proxies, the home folder."""
    for name in list(os.environ):
        if name.startswith(("JOBDAEMON_", "PG", "AWS_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    home = next(_homes)
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    for name, folder in {"DATA": ".local/share", "CONFIG": ".config", "CACHE": ".cache", "STATE": ".local/state"}.items():
        monkeypatch.setenv(f"XDG_{name}_HOME", str(home / folder))
    # torch's threads wait for each other without turning meanwhile: beside other tests that takes a third of the time off.
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
