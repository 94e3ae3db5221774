"""Rows that the settings speak of too: which of them differ, and in which words that is told."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from jobdaemon.domain.rows import DifferingRow, differing_rows
from jobdaemon.settings import load_settings
from jobdaemon.settings_rows import cure_of, instead_of_defaults, overruled, wanted_rows

FREE, PRO = ("plan", "Free"), ("plan", "Pro")
Rows = dict[tuple[str, str], dict[str, Any]]
KEYS = """
[[generate.openai_images.keys]]
alias = "main"
key = "hunter2"
concurrency = 4
"""


def rows_of(text: str, tmp_path: Path, changes: Rows) -> list[DifferingRow]:
    """What differs when rows that were made of these settings are changed like that."""
    path = tmp_path / "jobdaemon.toml"
    path.write_text(text)
    path.chmod(0o600)
    wanted = wanted_rows(load_settings(path, {}))
    rows: Rows = {(row.kind, row.name): {name: _as_json(value) for name, value in row.values.items()} for row in wanted}
    assert list(differing_rows(wanted, rows)) == []
    for place, columns in changes.items():
        rows[place] |= columns
    return list(differing_rows(wanted, rows))


def _as_json(value: object) -> object:
    if isinstance(value, timedelta):
        return value.total_seconds()
    return list(value) if isinstance(value, tuple) else value


def test_a_row_that_overrules_the_file_is_told_in_a_sentence(tmp_path: Path) -> None:
    """Both values, the setting's name and the cure stand in it; each row has its own."""
    text = '[orders]\nprovider = "openai_images"\n[plans.Free]\nlift_after = "1h"\n' + KEYS
    changes = {"provider": "local"}
    rows = rows_of(text, tmp_path, {FREE: changes | {"lift_after": 300}, PRO: changes})
    assert [row.title for row in rows] == ["plan Free", "plan Pro"]
    assert ": ".join(overruled(rows[0])) == (
        "lift_after is 5min, not 1h as plans.Free.lift_after says; "
        'provider is "local", not "openai_images" as orders.provider says; rows win over settings: '
        "`jobdaemon config apply --force` overwrites it"
    )


def test_what_the_settings_do_not_name_is_no_wish(tmp_path: Path) -> None:
    """An operator's value where the file is silent differs from a default only, of plans, of their prompts and of keys."""
    changes = {"images": 5, "prompts": ["mine"], "stage_priority": {"upload": 500}}
    rows = rows_of(KEYS, tmp_path, {PRO: changes, ("key", "openai_images/main"): {"daily_budget": 700}})
    assert [row.named for row in rows] == [(), ()]
    plan, key = rows
    assert instead_of_defaults(key) == "daily_budget is 700, which the settings do not name (default none)"
    told = instead_of_defaults(plan)
    assert "images is 5, which the settings do not name (default 70)" in told
    assert "stage_priority is {upload = 500}" in told
    assert 'prompts is 1 prompt with "mine"' in told


@pytest.mark.parametrize("level", ["upload", "generate.local", "generate"])
def test_a_resized_queue_overrules_a_team_size_that_is_written_down(tmp_path: Path, level: str) -> None:
    """And the cure is to take the row's away, since each daemon has its own; a row without one leaves it to the settings."""
    path = tmp_path / "jobdaemon.toml"
    path.write_text(f"[queues.{level}]\nteam_size = 4\n")
    wanted = wanted_rows(load_settings(path, {}))
    queue = "upload" if level == "upload" else "generate.local"
    assert list(differing_rows(wanted, {("queue", queue): {"team_size": None}})) == []
    [row] = differing_rows(wanted, {("queue", queue): {"team_size": 8}})
    assert overruled(row)[0] == f"team_size is 8, not 4 as queues.{level}.team_size says; rows win over settings"
    assert cure_of(row) == f"`jobdaemon resize {queue} none` leaves it to each daemon's settings"


def test_a_queue_that_nobody_sized_or_works_differs_in_nothing(tmp_path: Path) -> None:
    """A default is no wish, and where this daemon does not work a queue its row's team size means nothing to it."""
    path = tmp_path / "jobdaemon.toml"
    path.write_text("[queues.upload]\nteam_size = 0\nattempts = 2\n[queues.beautify]\nattempts = 2\n")
    wanted = wanted_rows(load_settings(path, {}))
    rows: Rows = {("queue", name): {"team_size": 8} for name in ("beautify", "generate.local", "upload")}
    assert list(differing_rows(wanted, rows)) == []


def test_a_row_that_is_missing_differs_in_nothing(tmp_path: Path) -> None:
    """It will be inserted; one with a value that no setting could have differs all the same."""
    path = tmp_path / "jobdaemon.toml"
    path.write_text('[plans.Free]\nlift_after = "1h"\n')
    [free, *_] = wanted_rows(load_settings(path, {}))
    assert list(differing_rows([free], {})) == []
    rows: Rows = {("plan", "Free"): {name: _as_json(value) for name, value in free.values.items()}}
    for far in ("Infinity", 10**18):
        rows["plan", "Free"]["lift_after"] = far
        [row] = differing_rows([free], rows)
        assert "not 1h as plans.Free.lift_after says" in overruled(row)[0]


def test_prompts_are_told_by_their_number_and_the_first_that_differs(tmp_path: Path) -> None:
    """Whole prompts would bury the rest."""
    text = '[orders.prompts]\nFree = ["A new one for all, in the best light there is"]\n'
    [row] = rows_of(text, tmp_path, {FREE: {"prompts": ["An old one"]}})
    told, _ = overruled(row)
    assert told.startswith(
        'prompts is 1 prompt with "An old one", not 1 prompt with "A new one for all, in the best light the…" as'
    )
