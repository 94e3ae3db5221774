"""Live control and explain through the command line, on a real database."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from psycopg.rows import dict_row
from typer.testing import CliRunner

from jobdaemon.cli.program import app
from jobdaemon.cli.rows import write_rows
from jobdaemon.domain.job import Task
from jobdaemon.ports import Attempt
from jobdaemon.settings import load_settings
from tests.daemons import Stages, running_daemon, until

Cli = Callable[..., Any]
Sql = psycopg.Connection[dict[str, Any]]


@pytest.fixture
def cli(database: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Cli:
    """Run one verb in this process, on a database with the rows of the default settings."""
    with psycopg.connect(database, autocommit=True) as writer:
        write_rows(writer, load_settings())
    monkeypatch.setenv("JOBDAEMON_DATABASE_URL", database)
    monkeypatch.setenv("JOBDAEMON_DATA_DIR", str(tmp_path / "data"))

    def run(*arguments: object) -> Any:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert "Traceback" not in result.stderr
        assert "internal error" not in result.stderr
        return result

    return run


@pytest.fixture
def sql(database: str) -> Any:
    """A look from outside."""
    with psycopg.connect(database, autocommit=True, row_factory=dict_row) as connection:
        yield connection


def _daemon(sql: Sql) -> int:
    row = sql.execute("INSERT INTO jobdaemon.procrastinate_workers DEFAULT VALUES RETURNING id").fetchone()
    assert row is not None
    sql.execute(
        "INSERT INTO jobdaemon.daemons (id, host, pid, version, queues) VALUES (%s, 'box', 1, '0', %s)",
        [row["id"], json.dumps({"beautify": 1, "upload": 5})],
    )
    return int(row["id"])


def _order(cli: Cli) -> int:
    result = cli("enqueue", "https://photos.example/a.jpg", "--json")
    assert result.exit_code == 0, result.stderr
    return int(json.loads(result.stdout)["order_id"])


def test_resize_sets_and_unsets(cli: Cli, sql: Sql) -> None:
    """Each limit is set by its own argument and taken away by none; the answer says how the queue is now."""
    served = "Queue upload is open: team size 8, cluster limit 20, fair share 3"
    _daemon(sql)
    result = cli("resize", "upload", 8, "--cluster", 20, "--fair-share", 3)
    assert (result.exit_code, result.stdout) == (0, served + ".\n"), result.stderr
    result = cli("resize", "upload", "none", "--cluster", "none")
    assert result.stdout == "Queue upload is open: each daemon's own team size, no cluster limit, fair share 3.\n"
    row = sql.execute("SELECT team_size, cluster_limit, fair_share FROM jobdaemon.queues WHERE name = 'upload'").fetchone()
    assert row == {"team_size": None, "cluster_limit": None, "fair_share": 3}


def test_keys_are_shown_paused_and_resumed(cli: Cli, sql: Sql) -> None:
    """The listing has the view's columns; pause and resume answer with the key as it is, and an unknown one is an error."""
    assert cli("keys").stdout == "There are no provider keys.\n"
    assert json.loads(cli("keys", "--json").stdout) == []
    sql.execute("INSERT INTO jobdaemon.provider_keys (provider, alias, concurrency) VALUES ('painter', 'one', 3)")
    result = cli("keys", "pause", "painter", "one")
    told = "Key one of painter is paused: concurrency 3, no rate, no daily budget.\n"
    assert (result.exit_code, result.stdout) == (0, told), result.stderr
    [row] = json.loads(cli("keys", "--json").stdout)
    columns = [column.name for column in sql.execute("SELECT * FROM jobdaemon.keys LIMIT 0").description or []]
    assert list(row) == columns
    assert row["paused"] is True
    assert cli("keys").stdout.splitlines()[1].split() == ["painter", "one", "0", "3", "0", "yes"]
    assert cli("keys", "resume", "painter", "one").stdout.startswith("Key one of painter is open: ")
    result = cli("keys", "resume", "painter", "two")
    assert (result.exit_code, result.stderr) == (1, 'Unknown key "two" of provider "painter".\n')


def test_the_cache_is_shown_and_cleared(cli: Cli, sql: Sql) -> None:
    """The listing has the view's columns; clear says how many images it gave up, of what was named."""
    assert cli("cache").stdout == "The cache is empty.\n"
    assert json.loads(cli("cache", "--json").stdout) == []
    sql.execute(
        "INSERT INTO jobdaemon.cache"
        " (key, provider, order_id, index, claimed_at, claimed_until, made_at, copied_at, artifact, bytes)"
        " SELECT repeat(n::text, 64), 'painter', n, 1, now(), now(), now(), now(), 'cache/' || n, 500"
        " FROM generate_series(1, 3) n"
    )
    sql.execute("SELECT jobdaemon.count_cache('painter', 1, 2)")
    [row] = json.loads(cli("cache", "--json").stdout)
    assert row == {"provider": "painter", "entries": 3, "bytes": 1500, "hits": 1, "misses": 2, "hit_rate": 0.3333}
    assert cli("cache").stdout.splitlines()[1].split()[:2] == ["painter", "3"]
    for arguments, told in (
        (["nobody"], "The cache gave up 0 images.\n"),
        (["painter", "--order", 2], "The cache gave up 1 image.\n"),
        ([], "The cache gave up 2 images.\n"),
    ):
        result = cli("cache", "clear", *arguments)
        assert (result.exit_code, result.stdout) == (0, told), result.stderr


def test_a_queue_nobody_serves_is_changed_with_a_warning(cli: Cli) -> None:
    """What nobody serves now may be served later: the change is made, and the answer says so."""
    result = cli("resize", "upload", 0)
    assert result.exit_code == 0
    assert result.stdout == "Queue upload is open: team size 0, no cluster limit; no daemon serves it now.\n"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["resize", "upload"], 2, "say what to change: N, --cluster or --fair-share"),
        (["resize", "upload", "many"], 2, "'many' is neither a whole number nor none"),
        (["resize", "upload", "1.5"], 2, "'1.5' is neither a whole number nor none"),
        (["resize", "upload", "9" * 40], 2, "is neither a whole number nor none"),
        (["resize", "upload", "-1"], 4, "A team size must be 0 to 10000, not -1."),
        (["resize", "upload", "10001"], 4, "A team size must be 0 to 10000, not 10001."),
        (["resize", "upload", "--cluster", "-1"], 4, "A cluster limit must be 0 to 100000, not -1."),
        (["resize", "upload", "--fair-share", "0"], 4, "A fair share must be 1 to 100000, not 0."),
        (["resize", "nope", "3"], 1, 'Unknown queue "nope".'),
        (["resize", "", "3"], 1, 'Unknown queue "".'),
        (["resize", "upload", "--cluster", "100001"], 4, "A cluster limit must be 0 to 100000, not 100001."),
        (["resize", "upload", "--cluster", ""], 2, "'' is neither a whole number nor none"),
        (["resize", "upload", "--fair-share", "99999999999"], 4, "A fair share must be 1 to 100000, not 99999999999."),
        (["cancel", "0"], 2, "greater than or equal to 1"),
        (["redrive", "9" * 30], 2, "less than or equal to"),
        (["explain", "-1"], 2, "-1"),
        (["pause", "nope"], 1, 'Unknown queue "nope".'),
        (["resume", "nope"], 1, 'Unknown queue "nope".'),
        (["drain", "77"], 1, "Unknown daemon 77."),
        (["drain", "0"], 2, "greater than or equal to 1"),
        (["prioritize", "77", "5"], 1, "Unknown order 77."),
        (["prioritize", "1", "9" * 30], 2, "less than or equal to 1000000"),
        (["explain", "77"], 1, "Unknown order 77."),
        (["explain", "77", "--job"], 1, "Unknown job 77."),
    ],
)
def test_wrong_values_are_one_sentence(cli: Cli, arguments: list[str], code: int, words: str) -> None:
    """One line on standard error, nothing on standard output, and an exit code that says what kind of mistake it is."""
    result = cli(*arguments)
    assert (result.exit_code, result.stdout) == (code, "")
    assert words in result.stderr
    assert result.stderr.count("\n") == 1


def test_pause_and_resume_several(cli: Cli, sql: Sql) -> None:
    """Every queue that is there is changed, an unknown one is told and costs exit code 1."""
    _daemon(sql)
    result = cli("pause", "upload", "nope", "beautify")
    assert result.exit_code == 1
    assert result.stdout.splitlines() == [
        f"Queue {name} is paused: each daemon's own team size, no cluster limit." for name in ("upload", "beautify")
    ]
    assert result.stderr == 'Unknown queue "nope".\n'
    assert cli("resume", "upload", "beautify").exit_code == 0
    assert sql.execute("SELECT count(*) AS n FROM jobdaemon.queues WHERE paused").fetchone() == {"n": 0}


def test_drain_and_its_undoing(cli: Cli, sql: Sql) -> None:
    """A daemon drains, shows it, claims again when that is undone, and a stopped one says what it is."""
    daemon = _daemon(sql)
    assert cli("drain", daemon).stdout == f"Daemon {daemon} claims nothing more; nothing of its own runs.\n"
    assert json.loads(cli("daemons", "--json").stdout)[0]["status"] == "draining"
    assert cli("drain", daemon, "--undo").stdout == f"Daemon {daemon} claims jobs again.\n"
    sql.execute("UPDATE jobdaemon.daemons SET status = 'stopped'")
    assert cli("drain", daemon).stdout == f"Daemon {daemon} is stopped: it claims nothing more anyway.\n"


def test_prioritize(cli: Cli, sql: Sql) -> None:
    """Any whole number, a negative one too, becomes the priority of the order and of its jobs."""
    order_id = _order(cli)
    result = cli("prioritize", order_id, -5)
    assert (result.exit_code, result.stdout) == (0, f"Order {order_id} has priority -5; one of its jobs waits.\n"), result.stderr
    row = sql.execute("SELECT o.priority, j.priority AS jobs FROM jobdaemon.orders o, jobdaemon.procrastinate_jobs j").fetchone()
    assert row == {"priority": -5, "jobs": -5}
    cli("cancel", order_id)
    result = cli("prioritize", order_id, 5)
    assert (result.exit_code, result.stderr) == (1, f"Order {order_id} has ended: it is cancelled.\n")


def test_explain_an_order_and_a_job(cli: Cli, sql: Sql) -> None:
    """Text for people and JSON for scripts tell the same: what it waits for, and each reason with its numbers."""
    first, second = _order(cli), _order(cli)
    result = cli("explain", second)
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        f"Order {second} is queued. Why it waits: no daemon serves queue beautify.",
        "Job 2 (beautify, todo):",
        "  no daemon serves queue beautify",
        "  1 job goes first in queue beautify",
    ]
    document = json.loads(cli("explain", second, "--json").stdout)
    reasons = [
        {"reason": "no_daemon", "told": "no daemon serves queue beautify", "draining": 0},
        {"reason": "behind", "told": "1 job goes first in queue beautify", "jobs": 1, "or_more": False},
    ]
    job = {"job_id": 2, "queue": "beautify", "task": "jobdaemon.beautify", "status": "todo", "reasons": reasons}
    assert document == {"order_id": second, "status": "queued", "waiting_for": "no daemon serves queue beautify", "jobs": [job]}
    assert json.loads(cli("explain", 2, "--job", "--json").stdout) == job
    assert cli("explain", 2, "--job").stdout.splitlines()[0] == "Job 2 (beautify, todo):"
    cli("cancel", first)
    assert cli("explain", first).stdout == f"Order {first} is cancelled.\n"


async def test_explain_a_cluster_at_work(cli: Cli, sql: Sql, database: str) -> None:
    """Of an order that is at work it tells what runs and where, and why the rest waits; jobs that wait alike stand together."""
    uploading, go_on = [], asyncio.Event()

    async def hold(attempt: Attempt) -> None:
        if attempt.job.task == Task.UPLOAD:
            uploading.append(attempt.job.id)
            await go_on.wait()

    def waiting() -> int:
        row = sql.execute("SELECT count(*) AS n FROM jobdaemon.procrastinate_jobs WHERE queue_name = 'upload'").fetchone()
        return 0 if row is None else int(row["n"])

    async with running_daemon(database, Stages(gate=hold), team_size=1):
        first = await asyncio.to_thread(_order, cli)
        await until(lambda: len(uploading) == 1 and waiting() == 2)
        second = await asyncio.to_thread(_order, cli)
        await until(lambda: waiting() == 4)
        told = [(await asyncio.to_thread(cli, "explain", order_id)).stdout for order_id in (first, second)]
        document = json.loads((await asyncio.to_thread(cli, "explain", second, "--json")).stdout)
        go_on.set()
        await until(lambda: sql.execute("SELECT FROM jobdaemon.orders WHERE finished_at IS NULL").fetchone() is None)
    jobs = [job["job_id"] for job in document["jobs"]]
    busy = r"every worker of queue upload is busy \(running 1, slots 1\)"
    lines = [
        rf"Order {first} is uploading: 1 of its jobs runs, 1 waits\.",
        rf"Job {uploading[0]} \(upload, doing\):",
        r"  it runs on \S+ \(daemon 1\) since \d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ",
        rf"Job {uploading[0] + 1} \(upload, todo\):",
        f"  {busy}",
        "",
    ]
    assert re.fullmatch("\n".join(lines), told[0])
    lines = [
        rf"Order {second} is uploading\. Why it waits: {busy}; 1 job goes first\.",
        rf"Jobs {jobs[0]}, {jobs[1]} \(upload, todo\):",
        f"  {busy}",
        f"  before job {jobs[0]}: 1 job goes first in queue upload",
        "",
    ]
    assert re.fullmatch("\n".join(lines), told[1])
    assert [[reason["reason"] for reason in job["reasons"]] for job in document["jobs"]] == [["slots", "behind"]] * 2
    finished = await asyncio.to_thread(cli, "explain", second)
    assert finished.stdout == f"Order {second} is completed.\n"
