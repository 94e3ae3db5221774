"""The command line without a database: what it loads, how it refuses, what it prints."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import psycopg
import pytest
import typer
from typer.testing import CliRunner

from jobdaemon import errors
from jobdaemon.cli import check, output
from jobdaemon.cli.errors import ExitCode, explain, sentence
from jobdaemon.cli.findings import Finding
from jobdaemon.cli.program import Program, app
from jobdaemon.cli.times import parse_moment
from jobdaemon.errors import JobdaemonError, RefusedError

VERBS = ["process", "run", "enqueue", "orders", "order", "cancel", "redrive", "queues", "jobs", "job", "daemons", "config"]
VERBS += ["keys", "migrate", "check", "sandbox", "version"]
HEAVY = ["torch", "cv2", "aioboto3", "botocore", "moto", "PIL", "numpy", "psycopg", "asyncpg", "procrastinate", "pydantic"]


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def test_what_psycopg_ignores_is_no_concern_of_a_user() -> None:
    """Ctrl-C in the middle of a statement leaves a connection that cannot roll back; psycopg's word on that is not printed."""
    program = """
import logging, sys
sys.argv = ["jobdaemon", "version"]
from jobdaemon.cli.program import run_program
run_program()
logging.getLogger("psycopg").warning("error ignored in rollback")
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.startswith("jobdaemon ")
    assert result.stderr == ""


def test_help_is_quick_and_loads_nothing_heavy() -> None:
    """Importing the command line and showing its help loads no library that a verb needs, and takes well under a second."""
    program = """
import json, sys, time
import jobdaemon.cli
light = sorted(sys.modules)
from jobdaemon.cli.program import app
app(["--help"], standalone_mode=False)
print(json.dumps([light, sorted(sys.modules), time.process_time()]))
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    imported, with_help, cpu_s = json.loads(result.stdout.splitlines()[-1])
    assert not {"typer", "rich", *HEAVY} & set(imported)
    assert not set(HEAVY) & set(with_help)
    assert cpu_s < 1.5  # 0.4 s where nothing else runs


def test_every_verb_has_help() -> None:
    """Every verb is listed, and explains itself."""
    listed = run("--help").stdout
    for verb in VERBS:
        assert verb in listed
        assert run(verb, "--help").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["enqueu"], "No such command 'enqueu'"),
        (["enqueue"], "Missing argument"),
        (["orders", "--nope"], "No such option: --nope"),
        (["orders", "--status", "todo"], "'todo' is not one of"),
        (["order", "seven"], "valid integer"),
        (["order", str(2**63)], str(2**63 - 1)),
        (["enqueue", "https://x.example/a.jpg", "--params", "{"], "--params is not valid JSON"),
        (["enqueue", "https://x.example/a.jpg", "--params", "[1]"], "--params must be a JSON object"),
        (["enqueue", "https://x.example/a.jpg", "--at", "soon"], "--at is neither a time"),
        (["enqueue", "-", "--key", "k"], "--key and --wait are for one order"),
        (["migrate", "--pre", "--post"], "--pre and --post exclude each other"),
        (["config"], "Missing command"),
        (["--config", "/nowhere.toml", "orders"], "/nowhere.toml: cannot be read"),
        (["orders", "--config", "/nowhere.toml"], "/nowhere.toml: cannot be read"),
        (["--config", "/nowhere.toml", "config", "show"], "/nowhere.toml: cannot be read"),
        (["--config", "/nowhere.toml", "keys"], "/nowhere.toml: cannot be read"),
        (["--config", "/nowhere.toml", "keys", "pause", "x", "y"], "/nowhere.toml: cannot be read"),
        (["keys", "--config", "/nowhere.toml"], "/nowhere.toml: cannot be read"),
        (["keys", "pause", "x"], "Missing argument"),
        (["keys", "nope"], "No such command 'nope'"),
    ],
)
def test_wrong_usage_is_one_sentence_and_exit_code_2(arguments: list[str], words: str) -> None:
    """A wrong command line or settings file is named in one line on standard error, with nothing on standard output."""
    result = run(*arguments)
    assert result.exit_code == 2
    assert words in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_wrong_settings_are_named_with_their_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong variable is named, and ends every verb with exit code 2."""
    monkeypatch.setenv("JOBDAEMON_ENGINE__LEASE", "soon")
    result = run("queues")
    assert result.exit_code == 2
    assert result.stderr.startswith("JOBDAEMON_ENGINE__LEASE: engine.lease")


def test_config_show_names_each_origin_and_masks_secrets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`config show` says for each value whether it is a default, a variable or a line of the file; a password never appears."""
    file = tmp_path / "jobdaemon.toml"
    file.write_text('[engine]\nlease = "40s"\n')
    monkeypatch.setenv("JOBDAEMON_DATABASE_URL", "postgresql://app:hunter2@db.example/app")
    for arguments in (["--config", str(file), "config", "show", "--json"], ["config", "show", "--json", "--config", str(file)]):
        result = run(*arguments)
        assert result.exit_code == 0
        assert "hunter2" not in result.stdout
        rows = {row["key"]: row for row in json.loads(result.stdout)}
        assert rows["engine.lease"] == {"key": "engine.lease", "value": "40s", "origin": f"{file}:2"}
        assert rows["database.url"]["origin"] == "JOBDAEMON_DATABASE_URL"
        assert rows["queues.upload.team_size"] == {"key": "queues.upload.team_size", "value": 5, "origin": "default"}
    assert f'engine.lease = "40s"  # {file}:2' in run("config", "show", "--config", str(file)).stdout


def test_a_bug_is_one_sentence_and_a_traceback_only_with_debug() -> None:
    """An error nobody foresaw ends as one sentence without secrets; --debug adds where it comes from."""
    program = typer.Typer(cls=Program)

    @program.command()
    def divide() -> None:
        raise ZeroDivisionError("password=hunter2")

    @program.callback()
    def options() -> None:
        pass

    result = CliRunner().invoke(program, ["divide"])
    assert result.exit_code == 1
    assert result.stderr.startswith("internal error: ZeroDivisionError")
    assert result.stderr.count("\n") == 1
    assert "hunter2" not in result.stderr
    debugged = run("--debug", "--config", "/nowhere.toml", "orders")
    assert "Traceback" in debugged.stderr
    assert debugged.stderr.splitlines()[-1].startswith("/nowhere.toml: cannot be read")


def test_without_a_verb_the_help_is_shown() -> None:
    """No verb is wrong usage, answered by the help."""
    result = run()
    assert result.exit_code == 2
    assert "Commands" in result.stdout


def test_version_as_verb_and_as_option() -> None:
    """`version` and `--version` say the same."""
    assert run("version").stdout == run("--version").stdout
    assert run("version").stdout.startswith("jobdaemon ")


def _family(kind: type[JobdaemonError]) -> list[type[JobdaemonError]]:
    return [kind, *(found for child in kind.__subclasses__() for found in _family(child))]


@pytest.mark.parametrize("kind", [kind for kind in _family(JobdaemonError) if kind.__module__ == errors.__name__])
def test_every_error_of_ours_has_its_sentence(kind: type[JobdaemonError]) -> None:
    """No error that we raise on purpose is called internal, and none ends with exit code 0."""
    needed: dict[type[JobdaemonError], dict[str, Any]] = {
        RefusedError: {"sqlstate": "JD001"},
        errors.DownloadRefusedError: {"status": 404},
    }
    more = needed.get(kind, {})
    error = kind("what happened", **more)
    code, text = explain(error)
    assert code is not ExitCode.DONE
    assert "internal" not in text
    assert "hat happened" in text


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RefusedError("unknown plan", sqlstate="JD001"), ExitCode.REFUSED),
        (RefusedError("queue full", sqlstate="JD002"), ExitCode.REFUSED),
        (RefusedError("unknown order 7", sqlstate="JD005"), ExitCode.FAILED),
        (RefusedError("out of date", sqlstate="JD006"), ExitCode.DATABASE),
        (errors.SettingsError("x"), ExitCode.USAGE),
        (errors.DatabaseUnavailableError("x"), ExitCode.DATABASE),
        (errors.SchemaVersionError("x"), ExitCode.DATABASE),
        (errors.UnsupportedImageError("x"), ExitCode.REFUSED),
        (errors.StoreUnavailableError("x"), ExitCode.FAILED),
        (KeyboardInterrupt(), ExitCode.INTERRUPTED),
        (PermissionError(13, "Permission denied", "/x"), ExitCode.FAILED),
        *((psycopg.errors.lookup(state)("x"), ExitCode.DATABASE) for state in ("08006", "57P01", "28P01", "53300", "25006")),
        *((psycopg.errors.lookup(state)("x"), ExitCode.DATABASE) for state in ("42P01", "42883", "42501")),
        (psycopg.errors.lookup("23514")("x"), ExitCode.USAGE),
        (psycopg.OperationalError("the connection is closed"), ExitCode.DATABASE),
        (ZeroDivisionError(), ExitCode.FAILED),
    ],
)
def test_exit_codes(error: BaseException, code: ExitCode) -> None:
    """Each kind of error has the exit code that design and docs promise."""
    assert explain(error)[0] is code


@pytest.mark.parametrize("text", ["two\nlines", "tabs\tand \x1b[31mred\x1b[0m", "done.", "a\x00b\r"])
def test_a_sentence_is_one_printable_line(text: str) -> None:
    """Whatever an error says, it is one line without control characters, ended once."""
    told = sentence(text)
    assert told.isprintable()
    assert told.endswith(".")
    assert not told.endswith("..")


def test_moments() -> None:
    """--at takes ISO times, naive ones in this machine's zone, and waits."""
    assert parse_moment("+10min") == timedelta(minutes=10)
    assert parse_moment("2026-05-01T09:00+02:00") == datetime(2026, 5, 1, 7, tzinfo=UTC)
    assert parse_moment("2026-05-01T07:00Z") == datetime(2026, 5, 1, 7, tzinfo=UTC)
    assert parse_moment(" 2026-05-01 09:00 ") == datetime(2026, 5, 1, 9).astimezone()
    for wrong in ("", "+", "soon", "+soon", "-5min", "2026-13-01"):
        with pytest.raises(ValueError, match="is "):
            parse_moment(wrong)


def test_json_has_utc_times_and_survives_any_locale(capsys: pytest.CaptureFixture[str]) -> None:
    """JSON is one ASCII document; times are ISO 8601 in UTC."""
    moment = datetime.fromisoformat("2026-05-01T09:00:00.5+02:00")
    output.print_json({"at": moment, "name": "Zoë", "wait": timedelta(seconds=2), "cost": Decimal("0.5")})
    printed = capsys.readouterr().out
    assert printed.isascii()
    assert json.loads(printed) == {"at": "2026-05-01T07:00:00.500000Z", "name": "Zoë", "wait": 2.0, "cost": 0.5}


def test_a_piped_table_is_plain_text(capsys: pytest.CaptureFixture[str]) -> None:
    """Where nobody looks, a table is aligned text without colours, frames or a customer's control characters."""
    rows = [{"id": 1, "customer": "\x1b[31mred", "at": None}, {"id": 20, "customer": "x" * 300, "at": None}]
    output.print_rows(rows, ("id", "customer", "at"), as_json=False, empty="none")
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert lines[0] == "id  customer"  # the empty column is left out
    assert lines[1] == "1   \N{REPLACEMENT CHARACTER}[31mred"
    assert lines[2] == f"20  {'x' * 300}"
    output.print_rows([], ("id",), as_json=False, empty="none")
    output.print_rows([], ("id",), as_json=True, empty="none")
    assert capsys.readouterr().out == "none\n[]\n"


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("no_color", ["", "1"])
def test_no_color_is_honoured(monkeypatch: pytest.MonkeyPatch, no_color: str) -> None:
    """On a terminal states have colours, unless NO_COLOR says no."""
    terminal = _Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("NO_COLOR", no_color)
    check._show([Finding("store", "error", "[bold]full[/bold]", "make room")])
    printed = terminal.getvalue()
    assert "[bold]full[/bold]: make room" in printed  # not taken for markup
    assert ("\x1b[31m" in printed) == (no_color == "")
