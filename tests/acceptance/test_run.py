"""`jobdaemon run`, as systemd and operators use it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psycopg
import pytest

from jobdaemon.embedded import EmbeddedPostgres
from tests.acceptance.conftest import PORTRAIT, Command
from tests.scratch import scratch_root

Start = Callable[..., "subprocess.Popen[str]"]


@contextmanager
def notify_socket(path: Path) -> Iterator[tuple[socket.socket, Callable[[str], str]]]:
    """Systemd's end of the notify protocol; the function waits for a message that holds some words."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(str(path))
        server.settimeout(60)

        def receive(words: str) -> str:
            while True:
                message = server.recv(4096).decode()
                if words in message:
                    return message

        yield server, receive


def test_systemd_hears_ready_watchdog_and_stopping(start: Start, tmp_path: Path) -> None:
    """READY when the daemon can work, WATCHDOG while its loops turn, STOPPING on SIGTERM, and exit code 0."""
    address = tmp_path / "notify"
    with notify_socket(address) as (_, receive):
        daemon = start("run", NOTIFY_SOCKET=str(address), WATCHDOG_USEC="400000")
        receive("READY=1")
        receive("WATCHDOG=1")
        receive("WATCHDOG=1")
        daemon.send_signal(signal.SIGHUP)
        receive("RELOADING=1")
        receive("READY=1")
        daemon.send_signal(signal.SIGTERM)
        receive("STOPPING=1")
        assert daemon.wait(timeout=60) == 0


def test_a_frozen_daemon_feeds_no_watchdog(start: Start, tmp_path: Path) -> None:
    """A daemon that stands still is not said to be alive."""
    address = tmp_path / "notify"
    with notify_socket(address) as (server, receive):
        daemon = start("run", NOTIFY_SOCKET=str(address), WATCHDOG_USEC="200000")
        receive("WATCHDOG=1")
        daemon.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, daemon.pid, os.WSTOPPED)
        silence(server)
        daemon.send_signal(signal.SIGCONT)
        receive("WATCHDOG=1")


def silence(server: socket.socket) -> None:
    """Read what was sent before; then nothing must come for several watchdog intervals."""
    server.settimeout(0)
    with suppress(BlockingIOError):
        while server.recv(4096):
            pass
    server.settimeout(1)
    with pytest.raises(TimeoutError):
        server.recv(4096)
    server.settimeout(60)


def test_orders_enqueued_by_sql_are_made_by_the_daemon(jobdaemon: Command, start: Start, tmp_path: Path, data_dir: Path) -> None:
    """Psql's way in: a transaction that is rolled back leaves nothing, one that is committed is made."""
    address = tmp_path / "notify"
    with EmbeddedPostgres(data_dir) as server, notify_socket(address) as (_, receive):
        url = server.acquire()
        daemon = start("run", NOTIFY_SOCKET=str(address))
        receive("READY=1")
        key = store_portrait(data_dir)
        with psycopg.connect(url) as connection:
            enqueue(connection, key)
            connection.rollback()
            [order_id] = enqueue(connection, key)
            connection.commit()
        result = jobdaemon("order", order_id, "--watch")
        assert result.returncode == 0, result.stderr
        with psycopg.connect(url) as connection:
            row = connection.execute("SELECT count(*), min(status) FROM jobdaemon.orders WHERE customer = 'psql'").fetchone()
            assert row == (1, "completed")
        daemon.send_signal(signal.SIGTERM)
        assert daemon.wait(timeout=60) == 0


def store_portrait(data_dir: Path) -> str:
    key = "sources/portrait.png"
    target = data_dir / "artifacts" / key
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(PORTRAIT, target)
    return key


def enqueue(connection: psycopg.Connection[tuple[object, ...]], key: str) -> tuple[object, ...]:
    row = connection.execute("SELECT order_id FROM jobdaemon.enqueue_order('Free', %s, 'psql')", [f"artifact:{key}"]).fetchone()
    assert row is not None
    return row


def test_run_waits_for_a_database_that_is_down(start: Start, tmp_path: Path) -> None:
    """A daemon that starts before its database says so, asks systemd for time, and works once the database is there."""
    folder = Path(tempfile.mkdtemp(prefix="jobdaemon-test-", dir=scratch_root()))
    folder.chmod(0o755)
    try:
        server = EmbeddedPostgres(folder)
        url = server.acquire()
        migrate(url)
        server.release()
        address = tmp_path / "notify"
        with notify_socket(address) as (_, receive):
            daemon = start("run", NOTIFY_SOCKET=str(address), JOBDAEMON_DATABASE_URL=url)
            receive("EXTEND_TIMEOUT_USEC")
            server = EmbeddedPostgres(folder)
            server.acquire()
            receive("READY=1")
            daemon.send_signal(signal.SIGTERM)
            assert daemon.wait(timeout=60) == 0
            server.release()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def migrate(url: str) -> None:
    from jobdaemon.schema import migrate

    migrate(url)


@pytest.mark.parametrize("migration", ["9999_post_takes_something_away", None], ids=["future", "empty"])
def test_a_schema_that_does_not_fit_is_refused(jobdaemon: Command, empty_database: str, migration: str | None) -> None:
    """Past a post migration the program does not know, or never migrated: exit code 3 and what to run."""
    if migration is not None:
        migrate(empty_database)
        with psycopg.connect(empty_database) as connection:
            connection.execute(
                "INSERT INTO jobdaemon._yoyo_migration (migration_hash, migration_id) VALUES (%s, %s)", [migration, migration]
            )
    result = jobdaemon("run", JOBDAEMON_DATABASE_URL=empty_database)
    assert result.returncode == 3, result.stderr
    assert ("upgrade jobdaemon" if migration else "run `jobdaemon migrate`") in result.stderr
    result = jobdaemon("process", PORTRAIT, JOBDAEMON_DATABASE_URL=empty_database)
    assert result.returncode == 3


def test_process_says_that_the_database_is_down(jobdaemon: Command, tmp_path: Path) -> None:
    """Every verb but run says so at once: one sentence, exit code 3."""
    result = jobdaemon("process", PORTRAIT, JOBDAEMON_DATABASE_URL=f"postgresql://nobody@/none?host={tmp_path}")
    assert result.returncode == 3
    assert len(result.stderr.strip().splitlines()) == 1
    assert "database" in result.stderr


def test_json_logs_hold_one_line_per_event(start: Start, tmp_path: Path) -> None:
    """Where standard error is no terminal, every line is a JSON object."""
    address = tmp_path / "notify"
    with notify_socket(address) as (_, receive):
        daemon = start("run", NOTIFY_SOCKET=str(address))
        receive("READY=1")
        daemon.send_signal(signal.SIGTERM)
        _, errors = daemon.communicate(timeout=60)
    assert [json.loads(line)["event"] for line in errors.splitlines()][:2] == ["daemon started", "daemon ready"]


def test_an_embedded_postgres_that_is_killed_comes_back(
    jobdaemon: Command, start: Start, tmp_path: Path, cold_data_dir: Path
) -> None:
    """The daemon alone starts it again, and makes the order that was enqueued before."""
    address = tmp_path / "notify"
    with notify_socket(address) as (_, receive):
        daemon = start("run", NOTIFY_SOCKET=str(address))
        receive("READY=1")
        result = jobdaemon("enqueue", PORTRAIT, "--plan", "Start", "--images", "6", "--json")
        order_id = json.loads(result.stdout)["order_id"]
        os.kill(postmaster(cold_data_dir), signal.SIGKILL)
        assert daemon.stderr is not None
        for line in daemon.stderr:
            if json.loads(line)["event"] == "database back":
                break
        result = jobdaemon("order", order_id, "--watch")
        assert result.returncode == 0, result.stderr
        daemon.send_signal(signal.SIGTERM)
        daemon.communicate(timeout=60)
        assert daemon.returncode == 0


def postmaster(data_dir: Path) -> int:
    """The first line of Postgres's own pid file."""
    [pid_file] = (data_dir / "postgres").rglob("postmaster.pid")
    return int(pid_file.read_text().split()[0])
