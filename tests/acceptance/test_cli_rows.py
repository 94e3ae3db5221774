"""Rows that say something else than the settings: told by `check`, by `config apply` and by a daemon that starts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest
from typer.testing import CliRunner

from jobdaemon import app
from jobdaemon.cli.program import app as program
from jobdaemon.events import DaemonReady, Event, Events, SettingsOverruled
from jobdaemon.logs import level_of, line_of
from jobdaemon.settings import load_settings

Cli = Callable[..., Any]
FORCE = "`jobdaemon config apply --force` overwrites it"
KEY = '[{"alias": "main", "key": "hunter2", "concurrency": 4}]'


@pytest.fixture
def cli(database: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Cli:
    """Run one verb in this process, on a database that has the rows of the default settings."""
    monkeypatch.setenv("JOBDAEMON_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("JOBDAEMON_DATABASE_URL", database)

    def run(*arguments: str, exit_code: int = 0) -> Any:
        result = CliRunner().invoke(program, list(arguments))
        assert result.exit_code == exit_code, result.output
        assert "hunter2" not in result.output
        return result

    run("config", "apply")
    return run


def execute(url: str, statement: str) -> list[tuple[Any, ...]]:
    with psycopg.connect(url, autocommit=True) as connection:
        cursor = connection.execute(statement.encode())
        return cursor.fetchall() if cursor.description else []


def rows_found(cli: Cli, exit_code: int = 0) -> list[tuple[str, str, str]]:
    found = json.loads(cli("check", "--json", exit_code=exit_code).stdout)
    return [(row["state"], row["message"], row["action"]) for row in found if row["check"] == "rows"]


def choose_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JOBDAEMON_ORDERS__PROVIDER", "openai_images")
    monkeypatch.setenv("JOBDAEMON_GENERATE__OPENAI_IMAGES__KEYS", KEY)


def test_a_provider_chosen_for_an_existing_database_is_not_ignored_in_silence(
    cli: Cli, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`check` warns of each plan's row, plain `apply` says that it stays, `--force` what it was and is; then all agree."""
    assert rows_found(cli) == [("ok", "they say what the settings say", "")]
    choose_provider(monkeypatch)
    says = 'provider is "local", not "openai_images" as orders.provider says; rows win over settings'
    # The queue of that provider is missing too, which is an error: hence the exit code.
    assert rows_found(cli, exit_code=1) == [("warning", f"plan {name}: {says}", FORCE) for name in ("Free", "Start", "Pro")]
    assert cli("config", "apply").stdout.splitlines() == [
        "queues inserted: generate.openai_images",
        "keys inserted: openai_images/main",
        *(
            f'plan {name}: provider stays "local", not "openai_images" as orders.provider says: {FORCE}'
            for name in ("Free", "Start", "Pro")
        ),
    ]
    assert cli("config", "apply", "--force").stdout.splitlines() == [
        f'plan {name}: provider was "local", is now "openai_images" as orders.provider says' for name in ("Free", "Start", "Pro")
    ]
    assert execute(database, "SELECT DISTINCT provider FROM jobdaemon.plans") == [("openai_images",)]
    assert rows_found(cli) == [("ok", "they say what the settings say", "")]


def test_force_leaves_alone_what_the_settings_do_not_name(cli: Cli, database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key's budget that an operator set stays while its limit is written, and both are told; so with plans."""
    choose_provider(monkeypatch)
    cli("config", "apply", "--force")
    execute(database, "UPDATE jobdaemon.provider_keys SET concurrency = 9, rate = 0.5, daily_budget = 500")
    execute(database, "UPDATE jobdaemon.plans SET images = 5, prompts = '{mine}', lift_after = '1 month' WHERE name = 'Pro'")
    cli("config", "apply")
    document = json.loads(cli("config", "apply", "--force", "--json").stdout)
    assert (document["plans_overwritten"], document["keys_overwritten"]) == ([], ["openai_images/main"])
    done = {(row["row"], row["column"]): (row["in_database"], row["in_settings"], row["done"]) for row in document["differences"]}
    key = "key openai_images/main"
    assert done[key, "concurrency"] == (9, 4, "overwritten")
    assert done[key, "rate"] == (0.5, None, "left")
    assert done[key, "daily_budget"] == (500, None, "left")
    assert done["plan Pro", "images"] == (5, 70, "left")
    assert done["plan Pro", "lift_after"] == ("720h", "30min", "left")
    assert execute(database, "SELECT concurrency, rate, daily_budget FROM jobdaemon.provider_keys") == [(4, 0.5, 500)]
    assert execute(database, "SELECT images, prompts FROM jobdaemon.plans WHERE name = 'Pro'") == [(5, ["mine"])]
    told = "daily_budget is 500, which the settings do not name (default none)"
    assert any(line.startswith(f"{key} is left alone: ") and told in line for line in cli("config", "apply").stdout.splitlines())
    states = {message.partition(":")[0]: (state, action) for state, message, action in rows_found(cli)}
    assert states == {"plan Pro": ("ok", ""), key: ("ok", "")}


def test_every_column_can_be_overwritten(cli: Cli, database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is named is written whatever its type is, and found again as it was meant."""
    execute(
        database,
        "UPDATE jobdaemon.plans SET images = 9, priority = 9, lift_after = '9 s', expires_after = '9 h',"
        " stage_priority = '{}', max_open_orders = 9, max_open_orders_per_customer = 9, prompts = '{nine}' WHERE name = 'Free'",
    )
    values = {
        "images": "3",
        "priority": "7",
        "lift_after": "3min",
        "expires_after": "2d",
        "stage_priority__upload": "500",
        "max_open_orders": "4",
        "max_open_orders_per_customer": "1",
    }
    for name, value in values.items():
        monkeypatch.setenv(f"JOBDAEMON_PLANS__FREE__{name.upper()}", value)
    monkeypatch.setenv("JOBDAEMON_ORDERS__PROMPTS__FREE", '["one", "two"]')
    choose_provider(monkeypatch)
    assert cli("config", "apply", "--force").stdout.count("plan Free: ") == 9
    assert rows_found(cli) == [("ok", "they say what the settings say", "")]


def test_a_resized_queue_stays(cli: Cli, database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A queue's row is an operator's switch: it is told with its own cure, and never overwritten."""
    cli("resize", "upload", "8")
    assert rows_found(cli) == [("ok", "they say what the settings say", "")]
    monkeypatch.setenv("JOBDAEMON_QUEUES__UPLOAD__TEAM_SIZE", "4")
    cure = "`jobdaemon resize upload none` leaves it to each daemon's settings"
    [(state, message, action)] = rows_found(cli)
    assert (state, action) == ("warning", cure)
    assert message.startswith("queue upload: team_size is 8, not 4 as queues.upload.team_size says")
    forced = cli("config", "apply", "--force").stdout
    assert forced == f"queue upload: team_size stays 8, not 4 as queues.upload.team_size says: {cure}\n"
    cli("resize", "upload", "none")
    assert rows_found(cli) == [("ok", "they say what the settings say", "")]


def test_force_that_makes_no_plan_is_refused_and_changes_nothing(
    cli: Cli, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fewer images than an operator's prompts: one sentence, and all rows stay as they were."""
    execute(database, "UPDATE jobdaemon.plans SET images = 30, prompts = '{a, b, c, d, e, f, g, h}' WHERE name = 'Start'")
    monkeypatch.setenv("JOBDAEMON_PLANS__FREE__IMAGES", "3")
    monkeypatch.setenv("JOBDAEMON_PLANS__START__IMAGES", "7")
    refused = cli("config", "apply", "--force", exit_code=2)
    assert refused.stderr == (
        "plan Start was not overwritten, nor was any other row: plans.Start.images would not fit what the settings do not name"
        " (a plan has at least as many images as prompts)\n"
    )
    assert execute(database, "SELECT name, images FROM jobdaemon.plans ORDER BY images") == [
        ("Free", 2),
        ("Start", 30),
        ("Pro", 70),
    ]


async def test_a_daemon_tells_at_its_start_which_rows_overrule_its_settings(
    cli: Cli, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One warning for each row, with what holds, what was written, and the cure; nothing where only a default differs."""
    execute(database, "UPDATE jobdaemon.plans SET images = 5 WHERE name = 'Free'")
    choose_provider(monkeypatch)
    events, told = Events(), list[Event]()
    events.subscribe(told.append)
    async with app.open_daemon(load_settings(), database, events) as daemon:
        events.subscribe(lambda event: daemon.supervisor.stop("seen") if isinstance(event, DaemonReady) else None)
        await daemon.supervisor.run(wait_for_database=False)
    overruled = [event for event in told if isinstance(event, SettingsOverruled)]
    assert [event.row for event in overruled] == ["plan Free", "plan Start", "plan Pro"]
    reason = f'provider is "local", not "openai_images" as orders.provider says; rows win over settings: {FORCE}'
    assert {event.reason for event in overruled} == {reason}
    assert line_of(overruled[0]) == ("settings overruled", {"row": "plan Free", "reason": reason})
    assert level_of(overruled[0]) == "warning"
