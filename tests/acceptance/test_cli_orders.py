"""Enqueueing, reading and ending orders through the command line, on a real database."""

from __future__ import annotations

import hashlib
import json
import struct
import subprocess
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.rows import dict_row
from typer.testing import CliRunner

from jobdaemon.cli.program import app
from jobdaemon.cli.rows import write_rows
from jobdaemon.settings import load_settings
from tests.acceptance.conftest import PORTRAIT, Command

URL = "https://photos.example/a.jpg"
Sql = psycopg.Connection[dict[str, Any]]
Cli = Callable[..., Any]
VIEW_COLUMNS = "SELECT attname FROM pg_attribute WHERE attrelid = %s::regclass AND attnum > 0 ORDER BY attnum"


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

    def run(*arguments: object, stdin: bytes | None = None) -> Any:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)
        assert "Traceback" not in result.stderr
        assert "internal error" not in result.stderr
        return result

    return run


def png_header(width: int, height: int) -> bytes:
    """A small file that claims to be a large picture."""
    header = b"IHDR" + struct.pack("!IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"")
    chunks = (struct.pack("!I", len(chunk) - 4) + chunk + struct.pack("!I", zlib.crc32(chunk)) for chunk in (header, data))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def columns_of(sql: Sql, view: str) -> list[str]:
    return [row["attname"] for row in sql.execute(VIEW_COLUMNS, [f"jobdaemon.{view}"])]


def count(sql: Sql, table: str) -> int:
    row = sql.execute(f"SELECT count(*) AS n FROM jobdaemon.{table}").fetchone()
    assert row is not None
    n: int = row["n"]
    return n


# -- enqueue ----------------------------------------------------------------------------------------------------------------


def test_a_photo_is_stored_under_its_digest_and_ordered(cli: Cli, sql: Sql, tmp_path: Path) -> None:
    """The file's bytes lie in the store before the order names them; the same key is the same order."""
    arguments = ("enqueue", PORTRAIT, "--plan", "Start", "--customer", "ada", "--key", "k", "--images", 3, "--group", "g")
    first = cli(*arguments, "--prompt", "one", "--prompt", "two", "--params", '{"seed": 7}', "--json")
    assert first.exit_code == 0, first.stderr
    answer = json.loads(first.stdout)
    assert answer.keys() == {"order_id", "created"}
    row = sql.execute("SELECT * FROM jobdaemon.orders").fetchone()
    assert row is not None
    assert (row["id"], row["customer"], row["group"], row["params"]) == (answer["order_id"], "ada", "g", {"seed": 7})
    sha256 = hashlib.sha256(PORTRAIT.read_bytes()).hexdigest()
    assert row["source"] == f"artifact:sources/{sha256[:2]}/{sha256}.png"
    stored = tmp_path / "data" / "artifacts" / row["source"].removeprefix("artifact:")
    assert stored.read_bytes() == PORTRAIT.read_bytes()
    again = cli(*arguments)
    assert again.exit_code == 0
    assert again.stdout == f"Order {answer['order_id']} was there already.\n"


def test_a_later_order_waits_by_the_databases_clock(cli: Cli, sql: Sql) -> None:
    """--at +10min schedules the first job ten minutes from the database's now."""
    assert cli("enqueue", URL, "--at", "+10min").exit_code == 0
    row = sql.execute("SELECT extract(epoch FROM scheduled_at - now()) AS s FROM jobdaemon.procrastinate_jobs").fetchone()
    assert row is not None
    assert 570 < row["s"] <= 600


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "there is no such file"),
        (b"", "The file is empty"),
        (b"this is text, whatever the name says", "The file is no picture we know"),
        (PORTRAIT.read_bytes()[:100_000], "truncated"),
        (png_header(50_000, 50_000), "50000 x 50000"),
    ],
    ids=["missing", "empty", "text", "truncated", "bomb"],
)
def test_a_bad_photo_is_refused_before_anything_is_written(
    cli: Cli, sql: Sql, tmp_path: Path, content: bytes | None, words: str
) -> None:
    """A photo that cannot be used is one sentence with its name and exit code 4; no artifact, no order."""
    photo = tmp_path / "photo.jpg"
    if content is not None:
        photo.write_bytes(content)
    result = cli("enqueue", photo)
    assert result.exit_code == 4
    assert result.stderr.startswith(f"{photo}: ")
    assert words in result.stderr
    assert result.stderr.count("\n") == 1
    assert count(sql, "orders") == 0
    assert not (tmp_path / "data" / "artifacts" / "sources").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["/dev/zero"], "/dev/zero is not a file"),
        (["/etc"], "/etc is a folder"),
        (["/etc/passwd"], "The file is no picture we know"),
        (["http://127.0.0.1/"], "Bad source"),
        (["file:///etc/passwd"], "Bad source"),
        (["artifact:../../etc/passwd"], "Bad source"),
        ([URL, "--plan", "Gold"], 'Unknown plan "Gold"; the plans are Free, Start, Pro.'),
        ([URL, "--provider", "nobody"], 'Unknown provider "nobody"'),
        ([URL, "--prompt", ""], "Prompt 1 is empty."),
        ([URL, "--prompt", "x" * 100_000], "Prompt 1 is 100000 bytes long; at most 4000 are allowed."),
        ([URL, *["--prompt", "p"] * 10_000], "10000 prompts for 2 images: give 1 to 2 prompts."),
        ([URL, "--images", "3"], "Plan Free gives 1 to 2 images, not 3."),
        ([URL, "--images", str(10**12)], "images must be a whole number"),
        ([URL, "--customer", "a\x00b"], "customer must not contain the character NUL"),
        ([URL, "--customer", "\udcff"], "customer is not valid Unicode"),
        ([URL, "--params", '{"a": "\\u0000"}'], "params must not contain the character NUL"),
    ],
)
def test_a_bad_wish_is_refused_in_one_sentence(cli: Cli, sql: Sql, arguments: list[str], words: str) -> None:
    """What the door refuses is one sentence and exit code 4, and leaves no row."""
    result = cli("enqueue", *arguments)
    assert result.exit_code == 4
    assert words in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""
    assert count(sql, "orders") == count(sql, "procrastinate_jobs") == 0


def test_a_full_queue_is_refused(cli: Cli, sql: Sql) -> None:
    """When a plan has as many open orders as it may, the next one is refused with exit code 4."""
    sql.execute("UPDATE jobdaemon.plans SET max_open_orders = 1")
    assert cli("enqueue", URL).exit_code == 0
    result = cli("enqueue", URL)
    assert (result.exit_code, result.stderr) == (4, "Queue full: plan Free has 1 open orders already.\n")


def test_a_store_that_does_not_work_is_named(cli: Cli, sql: Sql, tmp_path: Path) -> None:
    """A photo that cannot be stored makes no order, and the sentence says where."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "artifacts").write_text("a file where the folder should be")
    result = cli("enqueue", PORTRAIT)
    assert result.exit_code == 1
    assert "artifacts" in result.stderr
    assert result.stderr.count("\n") == 1
    assert count(sql, "orders") == 0


def test_json_lines_answer_each_line_and_a_bad_one_stops_nobody(cli: Cli, sql: Sql) -> None:
    """Each line of `enqueue -` is an order of its own; a bad one gets its error and code, and the exit code tells."""
    lines: list[object] = [
        {"source": URL, "customer": "c1", "key": "k"},
        {"photo": str(PORTRAIT), "plan": "Start", "images": 3, "prompts": ["a", "b"], "at": "+1h", "params": {"x": 1}},
        {"source": URL, "plan": "Gold"},
        {"source": "/etc/passwd"},
        {"photo": "/nowhere.jpg"},
        {"source": URL, "colour": "red"},
        {"source": URL, "plan": 5},
        {"source": URL, "prompts": "one"},
        {"source": URL, "prompts": ["p"] * 10_000},
        {"source": URL, "at": "soon"},
        {"source": URL, "provider": "nobody"},
        {"source": URL, "photo": str(PORTRAIT)},
        [],
        {"source": URL, "customer": "c1", "key": "k", "plan": None},
    ]
    stdin = b"\n".join(json.dumps(line).encode() for line in lines) + b"\n\n  \nnot json\n\xff\xfe\n" + b"[" * 9_000_000 + b"\n"
    stdin += json.dumps({"source": URL}).encode()  # the last line has no end
    result = cli("enqueue", "-", "--plan", "Free", "--group", "batch", stdin=stdin)
    assert result.exit_code == 4
    assert result.stderr == ""
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    codes = [answer.get("code") for answer in answers]
    bad = "JD004"
    assert codes == [None, None, "JD001", bad, bad, bad, bad, bad, bad, bad, "JD005", bad, bad, None, bad, bad, bad, None]
    assert all(answer.keys() == {"error", "code"} for answer in answers if "code" in answer)
    assert answers[13] == {"order_id": answers[0]["order_id"], "created": False}
    assert "'colour'" in answers[5]["error"]
    assert "longer than" in answers[16]["error"]
    rows = sql.execute('SELECT plan, "group" FROM jobdaemon.orders ORDER BY id').fetchall()
    assert [(row["plan"], row["group"]) for row in rows] == [("Free", "batch"), ("Start", "batch"), ("Free", "batch")]


def test_json_lines_that_are_all_good_end_with_0(cli: Cli) -> None:
    """The exit code of good lines, and of none at all, is 0."""
    assert cli("enqueue", "-", stdin=json.dumps({"source": URL}).encode()).exit_code == 0
    assert cli("enqueue", "-", stdin=b"").exit_code == 0


# -- reading ----------------------------------------------------------------------------------------------------------------


def test_json_has_exactly_the_columns_of_the_views(cli: Cli, sql: Sql) -> None:
    """What a script learns from SQL holds for --json, and the other way round."""
    for customer in ("ada", "bob"):
        cli("enqueue", URL, "--customer", customer, "--group", "spring")
    sql.execute("INSERT INTO jobdaemon.procrastinate_workers DEFAULT VALUES")
    sql.execute("INSERT INTO jobdaemon.daemons SELECT id, 'box', 7, '0', '{}' FROM jobdaemon.procrastinate_workers")
    orders = json.loads(cli("orders", "--json").stdout)
    assert [list(row) for row in orders] == [columns_of(sql, "order_progress")] * 2
    assert orders[0]["order_id"] > orders[1]["order_id"]
    assert orders[0]["created_at"].endswith("Z")
    order = json.loads(cli("order", orders[0]["order_id"], "--json").stdout)
    assert list(order) == [*columns_of(sql, "order_progress"), "images"]
    columns = ["index", "prompt", "status", "url", "object_key", "sha256", "bytes", "width", "height", "error"]
    assert [list(image) for image in order["images"]] == [columns] * 2
    queues = json.loads(cli("queues", "--json").stdout)
    assert [list(row) for row in queues] == [columns_of(sql, "queue_depth")] * 3
    assert {row["queue"]: row["ready"] for row in queues} == {"beautify": 2, "generate.local": 0, "upload": 0}
    daemons = json.loads(cli("daemons", "--json").stdout)
    assert [list(row) for row in daemons] == [columns_of(sql, "workers")]


def test_filters(cli: Cli) -> None:
    """Orders are found by status, customer and group, jobs by queue, status and order; the newest come first, up to the limit."""
    for customer, group in (("ada", "x"), ("bob", "x"), ("ada", "y")):
        cli("enqueue", URL, "--customer", customer, "--group", group)
    cli("cancel", 3)

    def ids(*arguments: object) -> list[int]:
        rows = json.loads(cli(*arguments, "--json").stdout)
        return [row.get("order_id") for row in rows]

    assert ids("orders") == [3, 2, 1]
    assert ids("orders", "--customer", "ada") == [3, 1]
    assert ids("orders", "--group", "x", "--limit", 1) == [2]
    assert ids("orders", "--status", "cancelled") == [3]
    assert ids("orders", "--customer", "nobody") == []
    assert ids("jobs") == [3, 2, 1]
    assert ids("jobs", "--status", "todo", "--queue", "beautify") == [2, 1]
    assert ids("jobs", "--order", 2) == [2]
    assert ids("jobs", "--queue", "upload") == []
    assert cli("orders", "--customer", "nobody").stdout == "There are no such orders.\n"


def test_an_order_and_its_job_for_people(cli: Cli, sql: Sql) -> None:
    """People see status, images and what is waited for; of a job its arguments, failed attempts with errors, and its events."""
    cli("enqueue", URL, "--customer", "\x1b[31mada")
    sql.execute(
        "INSERT INTO jobdaemon.attempts (job_id, order_id, queue, attempt, outcome, error_kind, error)"
        " VALUES (1, 1, 'beautify', 1, 'retry', 'StoreUnavailableError', 'The disk is full.')"
    )
    order = cli("order", 1).stdout
    assert "\x1b" not in order
    assert "no daemon serves queue beautify" in order
    assert order.count("pending") == 2
    job = cli("job", 1).stdout
    assert "\x1b" not in job
    for words in ('"order_id": 1', "StoreUnavailableError", "The disk is full.", "deferred"):
        assert words in job
    document = json.loads(cli("job", 1, "--json").stdout)
    assert document["args"] == {"order_id": 1, "customer": "\x1b[31mada"}
    assert [event["type"] for event in document["events"]] == ["deferred"]
    assert document["failed_attempts"][0]["error"] == "The disk is full."


def test_a_stopped_daemon_can_be_listed(cli: Cli, sql: Sql) -> None:
    """A stopped daemon, whose last heartbeat is -infinity, is shown with --all only, without a heartbeat."""
    sql.execute("INSERT INTO jobdaemon.procrastinate_workers (last_heartbeat) VALUES ('-infinity')")
    sql.execute("INSERT INTO jobdaemon.daemons SELECT id, 'box', 7, '0', '{}', 'stopped' FROM jobdaemon.procrastinate_workers")
    assert json.loads(cli("daemons", "--json").stdout) == []
    (row,) = json.loads(cli("daemons", "--all", "--json").stdout)
    assert (row["host"], row["status"], row["last_heartbeat"]) == ("box", "stopped", None)


@pytest.mark.parametrize(
    "arguments", [["order", "77"], ["order", "77", "--watch"], ["job", "77"], ["cancel", "77"], ["redrive", "77"]]
)
def test_an_unknown_order_or_job_is_one_sentence(cli: Cli, arguments: list[str]) -> None:
    """What does not exist is named, with exit code 1."""
    result = cli(*arguments)
    assert result.exit_code == 1
    assert result.stderr in ("Unknown order 77.\n", "Unknown job 77.\n")


# -- ending -----------------------------------------------------------------------------------------------------------------


def test_cancel_goes_on_after_an_unknown_order(cli: Cli, sql: Sql) -> None:
    """Each order is cancelled on its own; the exit code tells that one was unknown; doing it twice is no error."""
    cli("enqueue", URL)
    cli("enqueue", URL)
    result = cli("cancel", 1, 77, 2)
    assert result.exit_code == 1
    assert result.stdout == "Order 1 is cancelled.\nOrder 2 is cancelled.\n"
    assert result.stderr == "Unknown order 77.\n"
    assert cli("cancel", 1, "--remove-images").exit_code == 0
    statuses = sql.execute(
        "SELECT DISTINCT status::text FROM jobdaemon.procrastinate_jobs WHERE queue_name = 'beautify'"
    ).fetchall()
    assert statuses == [{"status": "cancelled"}]
    assert count(sql, "procrastinate_jobs") == 3  # and one that removes the images


def test_redrive_gives_failed_jobs_new_attempts(cli: Cli, sql: Sql) -> None:
    """A failed order is opened again by order or by job; where nothing failed it says so."""
    for _ in range(2):
        cli("enqueue", URL)
    assert cli("redrive", 1).stdout == "Order 1 has nothing to redrive: no job of it has failed.\n"
    sql.execute("UPDATE jobdaemon.procrastinate_jobs SET status = 'doing'")
    sql.execute("UPDATE jobdaemon.procrastinate_jobs SET status = 'failed', attempts = 3")
    sql.execute("UPDATE jobdaemon.images SET status = 'failed', error = 'x'")
    sql.execute("UPDATE jobdaemon.orders SET status = 'failed', finished_at = now(), images_failed = 2, error = 'x'")
    assert cli("redrive", 1).stdout == "1 job gets new attempts.\n"
    assert cli("redrive", 2, "--job").exit_code == 0
    rows = json.loads(cli("orders", "--json").stdout)
    assert [(row["status"], row["images_failed"]) for row in rows] == [("queued", 0)] * 2


def test_watching_an_order_that_ended_tells_by_the_exit_code(cli: Cli, sql: Sql) -> None:
    """--watch ends at once when the order has ended: 0 for completed, 1 for everything else."""
    for status, code in (("completed", 0), ("partial", 1), ("failed", 1), ("cancelled", 1)):
        cli("enqueue", URL)
        sql.execute("UPDATE jobdaemon.orders SET status = %s, finished_at = now() WHERE status = 'queued'", [status])
        row = sql.execute("SELECT max(id) AS id FROM jobdaemon.orders").fetchone()
        assert row is not None
        result = cli("order", row["id"], "--watch", "--json")
        assert result.exit_code == code
        assert json.loads(result.stdout)["status"] == status


def test_wait_follows_an_order_to_its_end(
    database: str, sql: Sql, jobdaemon: Command, start: Callable[..., subprocess.Popen[str]]
) -> None:
    """With a daemon at work, `enqueue --wait` ends with the order: 0 when it completed, 1 when it failed."""
    start("run", JOBDAEMON_DATABASE_URL=database)
    good = jobdaemon("enqueue", PORTRAIT, "--wait", "--json", JOBDAEMON_DATABASE_URL=database)
    assert good.returncode == 0, good.stderr
    document = json.loads(good.stdout)
    assert document["created"] is True
    assert [image["status"] for image in document["images"]] == ["stored", "stored"]
    bad = jobdaemon("enqueue", "artifact:sources/00/none.jpg", "--wait", JOBDAEMON_DATABASE_URL=database)
    assert bad.returncode == 1
    assert "failed" in bad.stdout
    assert "\x1b" not in bad.stdout
