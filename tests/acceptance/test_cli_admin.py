"""Migrating, applying settings, checking; databases that are down or do not fit; interruptions."""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
from typer.testing import CliRunner

from jobdaemon.cli.program import app
from tests.acceptance.conftest import Command

URL = "https://photos.example/a.jpg"
Cli = Callable[..., Any]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Cli:
    """Run one verb in this process, on the database it is told."""
    monkeypatch.setenv("JOBDAEMON_DATA_DIR", str(tmp_path / "data"))

    def run(url: str, *arguments: object) -> Any:
        monkeypatch.setenv("JOBDAEMON_DATABASE_URL", url)
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert "Traceback" not in result.stderr
        assert "internal error" not in result.stderr
        return result

    return run


def execute(url: str, statement: str) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(statement)


def findings(result: Any) -> dict[str, dict[str, str]]:
    return {row["check"]: row for row in json.loads(result.stdout)}


def test_migrate_makes_an_empty_database_ready_and_may_run_twice(cli: Cli, empty_database: str) -> None:
    """After `migrate` on an empty database an order can be enqueued; a second run does nothing."""
    refused = cli(empty_database, "enqueue", URL)
    assert refused.exit_code == 3
    assert "run `jobdaemon migrate`" in refused.stderr
    first = cli(empty_database, "migrate", "--json")
    assert first.exit_code == 0, first.stderr
    assert "0001_pre_orders" in json.loads(first.stdout)["applied"]
    assert cli(empty_database, "enqueue", URL).exit_code == 0
    assert cli(empty_database, "migrate").stdout == "Nothing to do: the schema is up to date.\n"


def test_a_schema_from_the_future_is_refused_and_left_alone(cli: Cli, database: str) -> None:
    """Past a post migration it does not know, no verb works, and `migrate` changes nothing; one sentence says what to do."""
    execute(database, "INSERT INTO jobdaemon._yoyo_migration (migration_hash, migration_id) VALUES ('f', '9999_post_future')")
    for verb in ("migrate", "orders"):
        result = cli(database, verb)
        assert result.exit_code == 3
        assert "newer than this program (it has 9999_post_future): upgrade jobdaemon" in result.stderr
        assert result.stderr.count("\n") == 1
    schema = findings(cli(database, "check", "--json"))["schema"]
    assert (schema["state"], schema["action"]) == ("error", "upgrade jobdaemon on this machine")


def test_config_apply_respects_an_operators_rows_unless_forced(cli: Cli, database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Missing rows are inserted; an operator's stay until --force, and then in all but what the settings name; queues always."""
    nothing = "Nothing to do: every plan and queue is there, and says what the settings say.\n"
    first = json.loads(cli(database, "config", "apply", "--json").stdout)
    assert first["plans_inserted"] == ["Free", "Start", "Pro"]
    assert first["queues_inserted"] == ["beautify", "generate.local", "upload"]
    assert cli(database, "config", "apply").stdout == nothing
    execute(database, "UPDATE jobdaemon.plans SET images = 5 WHERE name = 'Free'")
    execute(database, "UPDATE jobdaemon.queues SET paused = true")
    stays = "plan Free is left alone: images is 5, which the settings do not name (default 2)\n"
    assert cli(database, "config", "apply", "--force").stdout == stays
    monkeypatch.setenv("JOBDAEMON_PLANS__FREE__IMAGES", "3")
    assert "plan Free: images stays 5, not 3 as plans.Free.images says" in cli(database, "config", "apply").stdout
    forced = "plan Free: images was 5, is now 3 as plans.Free.images says\n"
    assert cli(database, "config", "apply", "--force").stdout == forced
    assert cli(database, "config", "apply", "--force").stdout == nothing
    monkeypatch.setenv("JOBDAEMON_PLANS__START__STAGE_PRIORITY__UPLOAD", "500")
    forced = "plan Start: stage_priority was {}, is now {upload = 500} as plans.Start.stage_priority says\n"
    assert cli(database, "config", "apply", "--force").stdout == forced
    monkeypatch.setenv("JOBDAEMON_PLANS__START__STAGE_PRIORITY__UPLOAD", "200")
    assert "is now {upload = 200}" in cli(database, "config", "apply", "--force").stdout
    with psycopg.connect(database) as connection:
        assert connection.execute("SELECT name, images FROM jobdaemon.plans ORDER BY images").fetchall() == [
            ("Free", 3),
            ("Start", 30),
            ("Pro", 70),
        ]
        assert connection.execute("SELECT DISTINCT paused FROM jobdaemon.queues").fetchall() == [(True,)]


def test_check_finds_nothing_wrong_but_that_nobody_works(cli: Cli, database: str) -> None:
    """On a database that is ready every part is ok, except that no daemon runs, which is a warning and no error."""
    cli(database, "config", "apply")
    result = cli(database, "check", "--json")
    assert result.exit_code == 0
    found = findings(result)
    assert {name for name, row in found.items() if row["state"] != "ok"} == {"daemons"}
    assert found["daemons"]["action"] == "start one with `jobdaemon run`"
    assert found.keys() >= {"settings", "database", "schema", "tuning", "plans", "roles", "connections", "store", "backend"}
    execute(database, "INSERT INTO jobdaemon.procrastinate_workers DEFAULT VALUES")
    daemon = """SELECT id, 'box', 7, '0', '{"beautify": 1, "upload": 5}' FROM jobdaemon.procrastinate_workers"""
    execute(database, f"INSERT INTO jobdaemon.daemons {daemon}")
    daemons = findings(cli(database, "check", "--json"))["daemons"]
    assert (daemons["state"], daemons["message"]) == ("warning", "1 running, none works generate.local")
    table = cli(database, "check").stdout
    assert "1 running, none works generate.local: give it a team_size" in table


STOCK_TRIGGER = (
    "CREATE TRIGGER procrastinate_trigger_status_events_update_v1 AFTER UPDATE ON jobdaemon.procrastinate_jobs "
    "FOR EACH ROW EXECUTE FUNCTION suppress_redundant_updates_trigger()"
)


@pytest.mark.parametrize(
    ("damage", "part", "words", "action"),
    [
        ("DROP INDEX jobdaemon.jobs_ready_idx", "tuning", "index jobs_ready_idx is missing", "jobdaemon migrate"),
        ("DROP TRIGGER jobs_inserted ON jobdaemon.procrastinate_jobs", "tuning", "jobs_inserted is missing", "jobdaemon migrate"),
        (STOCK_TRIGGER, "tuning", "procrastinate_trigger_status_events_update_v1 is back", "jobdaemon migrate"),
        ("ALTER FUNCTION jobdaemon.cancel_order RESET ALL", "tuning", "cancel_order has no search_path", "jobdaemon migrate"),
        ("DELETE FROM jobdaemon.plans WHERE name = 'Pro'", "plans", "no plan Pro", "jobdaemon config apply"),
        ("DELETE FROM jobdaemon.queues WHERE name = 'upload'", "plans", "no queue upload", "jobdaemon config apply"),
        ("DELETE FROM jobdaemon._yoyo_migration", "schema", "never set up", "jobdaemon migrate"),
    ],
)
def test_check_names_what_is_broken_and_the_cure(
    cli: Cli, database: str, damage: str, part: str, words: str, action: str
) -> None:
    """Each kind of damage is an error of its part, with the command that mends it, and exit code 1."""
    cli(database, "config", "apply")
    execute(database, damage)
    result = cli(database, "check", "--json")
    assert result.exit_code == 1
    found = findings(result)[part]
    assert found["state"] == "error"
    assert words in found["message"]
    assert action in found["action"]


def test_check_looks_at_the_rest_when_one_part_is_down(cli: Cli, tmp_path: Path) -> None:
    """A database that is down, and a data folder and a store that cannot be written, are errors of one report."""
    (tmp_path / "data").write_text("a file where the folder should be")
    result = cli("postgresql://u:hunter2@127.0.0.1:1/x", "check", "--json")
    assert result.exit_code == 1
    assert "hunter2" not in result.stdout
    states = {name: row["state"] for name, row in findings(result).items()}
    assert states == {
        "settings": "ok",
        "database": "error",
        "spool": "error",
        "store": "error",
        "backend": "ok",
        "providers": "ok",
    }


def test_check_reports_wrong_settings(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong settings are a finding too, so that a script that reads the report gets one."""
    monkeypatch.setenv("JOBDAEMON_LOG__LEVEL", "loud")
    result = cli("postgresql://127.0.0.1:1/x", "check", "--json")
    assert result.exit_code == 1
    assert "JOBDAEMON_LOG__LEVEL" in findings(result)["settings"]["message"]


@contextmanager
def server_that_refuses_the_password() -> Iterator[int]:
    """What libpq meets when the password is wrong, without a cluster of its own for it."""
    fields = b'SFATAL\0VFATAL\0C28P01\0Mpassword authentication failed for user "app"\0\0'
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        server.settimeout(10)

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b"E" + struct.pack("!i", len(fields) + 4) + fields)

        thread = threading.Thread(target=answer)
        thread.start()
        yield server.getsockname()[1]
        thread.join(timeout=10)


def test_a_wrong_password_is_one_sentence_that_does_not_repeat_it(cli: Cli) -> None:
    """A refused login ends with exit code 3 and the server's reason."""
    with server_that_refuses_the_password() as port:
        result = cli(f"postgresql://app:hunter2@127.0.0.1:{port}/app?sslmode=disable", "orders")
    assert result.exit_code == 3
    assert 'password authentication failed for user "app"' in result.stderr
    assert "hunter2" not in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("url", ["postgresql://127.0.0.1:1/x?nonsense=1", "postgresql://u:p%zzsecret@h/d"])
def test_a_url_that_cannot_be_read_is_a_wrong_setting(cli: Cli, url: str) -> None:
    """It is named, and no part of it is repeated: it may be the password."""
    for verb in ("orders", "check"):
        result = cli(url, verb)
        assert result.exit_code in (1, 2), result.stderr
        assert "database.url" in result.output + result.stderr
        assert "zzsecret" not in result.output + result.stderr


@pytest.mark.parametrize("url", ["postgresql://127.0.0.1:1/x", "postgresql:///x?host=/nowhere"])
def test_a_database_that_is_down_is_one_sentence(cli: Cli, url: str) -> None:
    """Every verb that needs the database says that it cannot be reached, with exit code 3."""
    for arguments in (["orders"], ["enqueue", URL], ["migrate"], ["config", "apply"]):
        result = cli(url, *arguments)
        assert result.exit_code == 3, result.stderr
        assert result.stderr.startswith("The database cannot be reached: ")
        assert result.stderr.count("\n") == 1


def test_a_login_with_only_a_role_of_ours_can_work(cli: Cli, database: str) -> None:
    """A producer may enqueue and cancel, a reader look, a daemon do its work; what neither may do is refused in one sentence."""
    cli(database, "config", "apply")
    with psycopg.connect(database, autocommit=True) as connection:
        name = connection.info.dbname
        for role in ("producer", "reader", "daemon"):
            connection.execute(f"CREATE ROLE {name}_{role} LOGIN IN ROLE jobdaemon_{role}")
    try:
        as_producer = database.replace("//jobdaemon@", f"//{name}_producer@", 1)
        as_reader = database.replace("//jobdaemon@", f"//{name}_reader@", 1)
        assert cli(as_producer, "enqueue", URL).stdout == "Order 1 is enqueued.\n"
        assert json.loads(cli(as_reader, "orders", "--json").stdout)[0]["order_id"] == 1
        assert cli(as_reader, "queues").exit_code == 0
        refused = cli(as_producer, "orders")
        assert refused.exit_code == 3
        assert "permission denied" in refused.stderr
        assert refused.stderr.count("\n") == 1
        assert cli(as_producer, "cancel", 1).exit_code == 0
        as_daemon = database.replace("//jobdaemon@", f"//{name}_daemon@", 1)
        for arguments in (["check"], ["order", "1"], ["config", "apply", "--force"]):
            assert cli(as_daemon, *arguments).exit_code == 0
        roles = findings(cli(as_reader, "check", "--json"))
        assert roles["database"]["state"] == "error"
    finally:
        for role in ("producer", "reader", "daemon"):
            execute(database, f"DROP ROLE {name}_{role}")


def test_check_names_every_role_that_is_missing(cli: Cli, database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who cannot make roles hands the whole list to somebody who may, once."""
    cli(database, "config", "apply")
    monkeypatch.setattr("jobdaemon.cli.database_findings.ROLES", ("jobdaemon_a", "jobdaemon_producer", "jobdaemon_b"))
    roles = findings(cli(database, "check", "--json"))["roles"]
    assert (roles["state"], roles["message"]) == ("warning", "jobdaemon_a, jobdaemon_b are missing")
    assert "CREATE ROLE jobdaemon_a NOLOGIN; CREATE ROLE jobdaemon_b NOLOGIN; then run `jobdaemon migrate`" in roles["action"]


@pytest.mark.usefixtures("cold_data_dir")
def test_a_fresh_machine_needs_nothing(jobdaemon: Command) -> None:
    """Without settings a reading verb starts the embedded server, finds no order, and stops the server again."""
    result = jobdaemon("orders", "--json")
    assert (result.returncode, result.stdout, result.stderr) == (0, "[]\n", "")


def test_ctrl_c_is_one_sentence_and_exit_code_5(database: str, cli: Cli, start: Callable[..., subprocess.Popen[str]]) -> None:
    """Whoever waits for an order may go; the order stays."""
    cli(database, "config", "apply")
    process = start("enqueue", URL, "--wait", JOBDAEMON_DATABASE_URL=database)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("order 1: queued")
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert (process.returncode, stderr) == (5, "Interrupted.\n")
    assert json.loads(cli(database, "order", 1, "--json").stdout)["status"] == "queued"


def test_ctrl_c_leaves_a_script_its_order(database: str, cli: Cli, start: Callable[..., subprocess.Popen[str]]) -> None:
    """With --json too it learns on the way out which order it was."""
    cli(database, "config", "apply")
    process = start("enqueue", URL, "--wait", "--json", JOBDAEMON_DATABASE_URL=database)
    listens = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND query LIKE '%order_progress WHERE%'"
    with psycopg.connect(database, autocommit=True) as connection:
        deadline = time.monotonic() + 30
        while not connection.execute(f"{listens} AND pid <> pg_backend_pid()".encode()).fetchone():
            assert time.monotonic() < deadline
            time.sleep(0.05)  # nothing tells that it waits
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=30)
    assert (process.returncode, stderr, json.loads(stdout)) == (5, "Interrupted.\n", {"order_id": 1, "created": True})


def test_a_reader_who_goes_away_hears_nothing(database: str, cli: Cli) -> None:
    """A closed pipe (`jobdaemon orders | head`) is no error to talk about."""
    cli(database, "config", "apply")
    read_end, write_end = os.pipe()
    os.close(read_end)
    result = subprocess.run(
        [sys.executable, "-m", "jobdaemon", "queues"],
        env={**os.environ, "JOBDAEMON_DATABASE_URL": database},
        stdout=write_end,
        stderr=subprocess.PIPE,
        check=False,
        timeout=60,
    )
    os.close(write_end)
    assert (result.returncode, result.stderr) == (5, b"")
