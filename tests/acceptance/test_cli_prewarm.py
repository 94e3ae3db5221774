"""`jobdaemon prewarm`: what it stores, says and refuses, and a daemon that does it."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.rows import dict_row
from typer.testing import CliRunner

from jobdaemon.cli.program import app
from jobdaemon.cli.rows import write_rows
from jobdaemon.embedded import EmbeddedPostgres
from jobdaemon.settings import load_settings
from tests.acceptance.conftest import PORTRAIT, Command

URL = "https://photos.example/a.jpg"
Sql = psycopg.Connection[dict[str, Any]]
Cli = Callable[..., Any]


@pytest.fixture
def sql(database: str) -> Iterator[Sql]:
    """A look from outside, at a database with the plans and queues of the default settings."""
    with psycopg.connect(database, autocommit=True, row_factory=dict_row) as connection:
        with psycopg.connect(database, autocommit=True) as writer:
            write_rows(writer, load_settings())
        yield connection


@pytest.fixture
def cli(database: str, sql: Sql, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Cli:
    """Run one verb in this process."""
    monkeypatch.setenv("JOBDAEMON_DATABASE_URL", database)
    monkeypatch.setenv("JOBDAEMON_DATA_DIR", str(tmp_path / "data"))

    def run(*arguments: object) -> Any:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert "Traceback" not in result.stderr
        assert "internal error" not in result.stderr
        return result

    return run


def jobs(sql: Sql) -> list[dict[str, Any]]:
    return sql.execute("SELECT id, task_name, args, status FROM jobdaemon.procrastinate_jobs ORDER BY id").fetchall()


def test_a_photo_is_stored_under_its_digest(cli: Cli, sql: Sql, tmp_path: Path) -> None:
    """The photo's bytes lie where an order's would, and the job names them; the same photo again is the same job."""
    result = cli("prewarm", PORTRAIT)
    assert (result.exit_code, result.stdout) == (0, "The photo waits for an idle slot (job 1).\n")
    [job] = jobs(sql)
    digest = hashlib.sha256(PORTRAIT.read_bytes()).hexdigest()
    key = f"sources/{digest[:2]}/{digest}.png"
    assert (job["task_name"], job["args"]) == ("jobdaemon.prewarm", {"source": f"artifact:{key}"})
    assert (tmp_path / "data" / "artifacts" / key).read_bytes() == PORTRAIT.read_bytes()
    again = cli("prewarm", PORTRAIT)
    assert (again.exit_code, again.stdout) == (0, "The photo waited for an idle slot already (job 1).\n")
    assert json.loads(cli("prewarm", PORTRAIT, "--json").stdout) == {"job_id": 1, "created": False}


@pytest.mark.parametrize("source", [URL, "artifact:sources/a.jpg"])
def test_a_source_is_passed_on(cli: Cli, sql: Sql, source: str) -> None:
    """An address or an artifact is the job's as it is: nothing is fetched here."""
    result = cli("prewarm", source, "--json")
    assert (result.exit_code, json.loads(result.stdout)) == (0, {"job_id": 1, "created": True})
    assert jobs(sql)[0]["args"] == {"source": source}


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("nothing.jpg", "nothing.jpg: there is no such file."),
        (".", ". is a folder, not a photo."),
        ("page.jpg", "page.jpg: "),
        ("", "Bad source: it must be the path of a photo, or https://…"),
        ("http://photos.example/a.jpg", "Bad source: it must be https://… or artifact:<key>, of at most 4096 bytes."),
        ("file:///etc/passwd", "Bad source: it must be https://… or artifact:<key>, of at most 4096 bytes."),
        ("artifact:../secret", "Bad source: it must be https://… or artifact:<key>, of at most 4096 bytes."),
        ("https://photos.example/\udcff.jpg", "Bad source: it is not valid Unicode text."),
        ("https://photos.example/" + "x" * 4096, "Bad source: it must be https://… or artifact:<key>, of at most 4096 bytes."),
    ],
)
def test_bad_input_is_refused_in_a_sentence(
    cli: Cli, sql: Sql, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, told: str
) -> None:
    """No file, a folder, no picture or no source that an order could have: exit code 4, one sentence, and no job."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "page.jpg").write_text("<html>")
    result = cli("prewarm", source)
    assert (result.exit_code, result.stdout) == (4, "")
    assert result.stderr.startswith(told)
    assert result.stderr.count("\n") == 1
    assert jobs(sql) == []


def test_a_photo_above_the_limit_is_refused(cli: Cli, sql: Sql, monkeypatch: pytest.MonkeyPatch) -> None:
    """photos.max_bytes holds here too, before anything is stored."""
    monkeypatch.setenv("JOBDAEMON_PHOTOS__MAX_BYTES", "10 kB")
    result = cli("prewarm", PORTRAIT)
    assert result.exit_code == 4
    assert result.stderr.count("\n") == 1
    assert jobs(sql) == []


def test_a_full_door_is_told(cli: Cli, sql: Sql) -> None:
    """More open prewarms than allowed: exit code 4 and the database's sentence."""
    sql.execute("UPDATE jobdaemon.queues SET max_prewarms = 1 WHERE name = 'beautify'")
    assert cli("prewarm", URL).exit_code == 0
    result = cli("prewarm", "artifact:b")
    assert (result.exit_code, result.stderr) == (4, "Queue full: as many prewarms are open as may be (1).\n")


@pytest.mark.parametrize(
    ("status", "error", "told"),
    [
        ("failed", "it is no picture", "The photo was not prewarmed: it is no picture.\n"),
        ("cancelled", None, "The photo was not prewarmed: its job 1 was cancelled.\n"),
    ],
)
def test_wait_tells_how_it_ended(cli: Cli, sql: Sql, status: str, error: str | None, told: str) -> None:
    """With --wait a prewarm that came to nothing is exit code 1 and its reason, in words and as JSON."""
    sql.execute(
        "CREATE FUNCTION jobdaemon.end_at_once() RETURNS trigger LANGUAGE plpgsql AS"
        f" $$ BEGIN NEW.status := '{status}'; RETURN NEW; END $$"
    )
    sql.execute(
        "CREATE TRIGGER end_at_once BEFORE INSERT ON jobdaemon.procrastinate_jobs"
        " FOR EACH ROW EXECUTE FUNCTION jobdaemon.end_at_once()"
    )
    for job_id in (1, 2):
        if error is not None:
            sql.execute(
                "INSERT INTO jobdaemon.attempts (job_id, queue, attempt, outcome, error)"
                " VALUES (%s, 'beautify', 1, 'failed', %s)",
                [job_id, error],
            )
    result = cli("prewarm", URL, "--wait")
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", told)
    as_json = cli("prewarm", URL, "--wait", "--json")
    assert as_json.exit_code == 1
    assert json.loads(as_json.stdout) == {"job_id": 2, "created": True, "status": status, "error": error}


@pytest.mark.parametrize(
    ("options", "told"),
    [(["--json"], '{"job_id": 1, "created": true}\n'), ([], "Job 1 goes on without you.\n")],
)
def test_who_stops_waiting_keeps_the_job(
    database: str, sql: Sql, start: Callable[..., subprocess.Popen[str]], options: list[str], told: str
) -> None:
    """Ctrl-C while it waits: the job's id on standard output, one sentence, exit code 5; the prewarm stays."""
    process = start("prewarm", URL, "--wait", *options, JOBDAEMON_DATABASE_URL=database)
    looks = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    looks += " AND query LIKE '%procrastinate_events WHERE job_id%'"
    deadline = time.monotonic() + 30
    while not sql.execute(looks).fetchone():
        assert time.monotonic() < deadline
        time.sleep(0.05)  # nothing tells that it waits
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=30)
    assert (process.returncode, stdout, stderr) == (5, told, "Interrupted.\n")
    assert jobs(sql)[0]["status"] == "todo"


def test_cancel_takes_prewarms(cli: Cli, sql: Sql) -> None:
    """One that waits is dropped, one that runs is told to stop, one that ended stays; no order's job is cancelled so."""
    for number in range(3):
        cli("prewarm", f"{URL}?{number}")
    sql.execute("UPDATE jobdaemon.procrastinate_jobs SET status = 'doing' WHERE id = 2")
    sql.execute("UPDATE jobdaemon.procrastinate_jobs SET status = 'succeeded' WHERE id = 3")
    cli("enqueue", URL)
    result = cli("cancel", "--job", 1, 2, 3, 4, 99)
    assert result.exit_code == 1
    assert result.stdout.splitlines() == [
        "Prewarm 1 is cancelled.",
        "Prewarm 2 is being stopped.",
        "Prewarm 3 had ended before: it is succeeded, and so it stays.",
    ]
    assert result.stderr.splitlines() == ["Job 4 is no prewarm: cancel its order, 1.", "Unknown job 99."]
    assert [job["status"] for job in jobs(sql)] == ["cancelled", "doing", "succeeded", "todo"]
    assert cli("cancel", "--job", 1).stdout == "Prewarm 1 is cancelled.\n"
    assert cli("cancel", "--job", "--remove-images", 1).exit_code == 2


def test_a_daemon_does_it(
    jobdaemon: Command, start: Callable[..., subprocess.Popen[str]], data_dir: Path, tmp_path: Path
) -> None:
    """Real processes: a daemon prewarms a photo, whoever waits hears of it, and an order for that photo uses it."""
    photo = tmp_path / "portrait.png"
    photo.write_bytes(PORTRAIT.read_bytes() + b" of this test")
    with EmbeddedPostgres(data_dir) as server, psycopg.connect(server.acquire(), autocommit=True) as connection:
        start("run")
        assert jobdaemon("prewarm", photo, "--wait").stdout == "The photo is prewarmed.\n"
        again = json.loads(jobdaemon("prewarm", photo, "--wait", "--json").stdout)
        assert (again["created"], again["status"], again["error"]) == (True, "succeeded", None)
        jobdaemon("enqueue", photo, "--images", 1, "--wait")
        used = connection.execute("SELECT used FROM jobdaemon.prewarm_stats").fetchone()
        assert used is not None
        assert used[0] == 1
