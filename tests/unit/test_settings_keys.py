"""Provider keys in the settings: what another provider's section gets by having a field ``keys``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import Field

from jobdaemon import app, settings_rows
from jobdaemon import settings as module
from jobdaemon.cli.config import _flat, _toml
from jobdaemon.domain.keys import ProviderKey
from jobdaemon.errors import SettingsError
from jobdaemon.settings import Settings, load_settings
from jobdaemon.settings_generate import GenerateSettings, ProviderKeys
from jobdaemon.settings_values import Section
from tests.fakes import FakeProvider

Write = Callable[[str], Path]
VARIABLE = "JOBDAEMON_GENERATE__PAINTER__KEYS"
ONE = '[[generate.painter.keys]]\nalias = "one"\nkey = "hunter2-one"\n'


class PainterSettings(Section):
    """A provider that knows keys."""

    keys: ProviderKeys = ()


class WithPainter(GenerateSettings):
    """The providers there are, and one more."""

    painter: PainterSettings = PainterSettings()


class SettingsWithPainter(Settings):
    """The whole tree with that provider."""

    generate: WithPainter = Field(default_factory=WithPainter)


@pytest.fixture(autouse=True)
def painter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A program that has one provider more, on a machine without settings."""
    monkeypatch.setattr(module, "Settings", SettingsWithPainter)
    monkeypatch.setattr(module, "SYSTEM_CONFIG", tmp_path / "etc" / "jobdaemon.toml")


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(text: str) -> Path:
        path = tmp_path / "jobdaemon.toml"
        path.write_text(text, encoding="utf-8")
        path.chmod(0o600)
        return path

    return write


def problems(path: Path | None = None, **environ: str) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        load_settings(path, environ)
    assert "hunter2" not in str(caught.value)
    return str(caught.value).splitlines()


def secrets(settings: Settings) -> list[tuple[str, str | None]]:
    keys = settings.provider_keys().get("painter", ())
    return [(key.alias, None if key.key is None else key.key.get_secret_value()) for key in keys]


def test_no_keys_by_default(write: Write) -> None:
    """A provider without keys has none, and gives neither rows nor rules."""
    settings = load_settings(write("[generate.painter]\nkeys = []\n"), {})
    assert settings.provider_keys() == {}
    assert settings_rows.provider_keys(settings) == []


def test_keys_of_a_file(write: Write, tmp_path: Path) -> None:
    """Each [[…keys]] is a key with its own limits; a secret may lie in a file beside the configuration."""
    (tmp_path / "two").write_text("hunter2-two\n")
    (tmp_path / "two").chmod(0o600)
    path = write(
        f'{ONE}concurrency = 3\nrate = 0.5\n\n[[generate.painter.keys]]\nalias = "two"\nkey_file = "two"\ndaily_budget = 700\n'
    )
    settings = load_settings(path, {})
    assert secrets(settings) == [("one", "hunter2-one"), ("two", "hunter2-two")]
    assert settings_rows.provider_keys(settings) == [
        ProviderKey("painter", "one", 3, 0.5),
        ProviderKey("painter", "two", daily_budget=700),
    ]
    assert settings.origin("generate.painter.keys.0.rate") == f"{path}:5"
    assert settings.origin("generate.painter.keys.1.alias") == f"{path}:8"
    assert settings.origin("generate.painter.keys.1.key") == f"{tmp_path / 'two'} (named by {path}:9)"
    assert settings.warnings() == []


def test_keys_of_a_variable(write: Write, tmp_path: Path) -> None:
    """A variable holds them as a JSON array, and replaces those of the file all together."""
    (tmp_path / "three").write_text("hunter2-three")
    given = [{"alias": "three", "key_file": str(tmp_path / "three"), "concurrency": 1}]
    settings = load_settings(write(ONE + ONE.replace("one", "two")), {VARIABLE: json.dumps(given)})
    assert secrets(settings) == [("three", "hunter2-three")]
    [told] = problems(write(ONE), **{VARIABLE: '[{"alias": "a b", "key": "hunter2"}]'})
    assert told == f"{VARIABLE}: generate.painter.keys.0.alias: has characters that are not allowed here"


def test_secrets_are_masked(write: Write) -> None:
    """No printed form of the settings shows a key; everything else about it is shown."""
    settings = load_settings(write(f"{ONE}rate = 2\n"), {})
    assert "hunter2" not in f"{settings!r} {settings} {settings.model_dump()} {settings.model_dump_json()} {settings.shown()}"
    shown: dict[str, Any] = dict(_flat(settings.shown()))
    assert _toml(shown["generate.painter.keys"]) == '[{ alias = "one", key = "********", rate = 2.0 }]'


def test_a_file_everybody_can_read_warns(write: Write, tmp_path: Path) -> None:
    """A secret's file, or a configuration file with a secret, that everyone can read is a warning with its path."""
    secret = tmp_path / "secret"
    secret.write_text("hunter2")
    secret.chmod(0o644)
    path = write(f'{ONE}[[generate.painter.keys]]\nalias = "two"\nkey_file = "secret"\n')
    path.chmod(0o644)
    warnings = load_settings(path, {}).warnings()
    assert len(warnings) == 2
    assert f"generate.painter.keys.0.key: {path} holds a secret" in warnings[0]
    assert f"generate.painter.keys.1.key: {secret} holds a secret" in warnings[1]


def test_keys_in_one_line_warn_with_their_place(write: Write, tmp_path: Path) -> None:
    """An array written as a value has its own line, and each of its keys the same; given by a variable, that variable's name."""
    one = '{alias = "one", key = "hunter2-one", daily_budget = 4}'
    path = write(f'[generate.painter]\nkeys = [{one},\n {{alias = "two", key_file = "two"}}]\n')
    (tmp_path / "two").write_text("hunter2-two")
    (tmp_path / "two").chmod(0o644)
    path.chmod(0o644)
    settings = load_settings(path, {})
    assert [line.partition(" holds")[0].partition(" is smaller")[0] for line in settings.warnings()] == [
        f"{path}:2: generate.painter.keys.0.key: {path}",
        f"{tmp_path / 'two'} (named by {path}:2): generate.painter.keys.1.key: {tmp_path / 'two'}",
        f"{path}:2: generate.painter.keys.0.daily_budget:",
    ]
    assert settings.origin("generate.painter.keys") == f"{path}:2"
    assert load_settings(write(ONE), {}).origin("generate.painter.keys") == f"{path}:1"
    [warning] = load_settings(None, {VARIABLE: '[{"alias": "a", "key": "hunter2", "daily_budget": 4}]'}).warnings()
    assert warning.startswith(f"{VARIABLE}: generate.painter.keys.0.daily_budget: is smaller")


def test_a_budget_below_one_call_warns(write: Write) -> None:
    """A budget that no call of the usual size fits into is hardly meant."""
    path = write(f"{ONE}daily_budget = 4\n")
    [warning] = load_settings(path, {}).warnings()
    assert warning.startswith(f"{path}:4: generate.painter.keys.0.daily_budget: is smaller than orders.images_per_call")
    assert load_settings(write(f"{ONE}daily_budget = 0\n"), {}).warnings() == []


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ('[[generate.painter.keys]]\nalias = "x"\n', 1, "0.key: must be set (or generate.painter.keys.0.key_file)"),
        (f'{ONE}key_file = "x"\n', 4, "0.key_file: cannot be given together with generate.painter.keys.0.key"),
        (f"{ONE}{ONE}", 5, "1.alias: one is the alias of another key"),
        ('[[generate.painter.keys]]\nkey = "hunter2"\n', 1, "0.alias: Field required"),
        (ONE.replace('"one"', '"a/b"'), 2, "0.alias: has characters"),
        (f"{ONE}concurrency = -1\n", 4, "0.concurrency: must be greater than or equal to 0, not -1"),
        (f"{ONE}concurrency = 100001\n", 4, "0.concurrency: must be less than or equal to 100000, not 100001"),
        (f"{ONE}concurrency = true\n", 4, "0.concurrency: must be a number"),
        (f"{ONE}rate = 0\n", 4, "0.rate: must be greater than or equal to 0.0001, not 0"),
        (f"{ONE}rate = nan\n", 4, "0.rate: must be"),
        (f"{ONE}rate = 1e300\n", 4, "0.rate: must be less than or equal to 10000"),
        (f"{ONE}daily_budget = -5\n", 4, "0.daily_budget: must be greater than or equal to 0, not -5"),
        (f"{ONE}daily_budget = 99999999999\n", 4, "0.daily_budget: must be less than or equal to 1000000000"),
        (f"{ONE}budget = 5\n", 4, "0.budget: is not a setting"),
        (ONE.replace('"hunter2-one"', "12345678"), 3, "0.key: must be a valid string"),
        ('[[generate.painter.keys]]\nalias = "x"\nkey_file = "gone"\n', 3, "0.key_file: "),
    ],
)
def test_wrong_keys(write: Write, text: str, line: int, says: str) -> None:
    """A wrong key is one problem at its own line, and no secret, not even one that is a number, is repeated."""
    path = write(text)
    [told] = problems(path)
    assert told.startswith(f"{path}:{line}: generate.painter.keys.{says}"), told
    assert "12345678" not in told


@pytest.mark.parametrize("value", ["5", '"x"', "[1]", '["x"]', "{a = 1}"])
def test_what_is_no_array_of_tables(write: Write, value: str) -> None:
    """Anything else at that place is a problem of the setting."""
    told = problems(write(f"[generate.painter]\nkeys = {value}\n"))
    assert all("generate.painter.keys" in line for line in told)
    assert problems(None, **{VARIABLE: "one,two"})[0].startswith(f"{VARIABLE}: generate.painter.keys: must be an array of tables")


async def test_the_engine_gets_the_aliases(write: Write) -> None:
    """The team of a provider's queue claims under the keys of its section; other teams under none."""
    settings = load_settings(write(ONE), {})
    rules = app.queue_rules(settings, {"local": FakeProvider(), "painter": FakeProvider()})
    assert {name: queue.keys for name, queue in rules.items() if queue.keys} == {"generate.painter": ("one",)}
