"""Settings: what may be written where, what is refused and how, and that the example tells the truth."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import ValidationError

from jobdaemon import settings as module
from jobdaemon.errors import SettingsError
from jobdaemon.settings import Settings, load_settings, setting_keys
from jobdaemon.settings_rows import plans
from jobdaemon.settings_values import cores
from jobdaemon.units import MAX_DURATION, MAX_SIZE_BYTES, format_duration, format_size, parse_duration, parse_size

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "config" / "jobdaemon.toml"
QUEUES = ("beautify", "generate.local", "generate.comfyui", "generate.other", "upload")
Write = Callable[[str], Path]
_ODD_VALUES = [
    '""', '"x"', "-1", "0", "1e300", "nan", "inf", "true", "[]", "{}", "[1]", "{a = 1}", '"\\u0000"', "1979-05-27",
    '"~nobody-there/x"',
    '"-5s"', "99999999999999999999999", '["a", []]', '"cores"', '"https://[::1"', '"https://h:99999/"', '"\\ud7ff"', "0x10",
]  # fmt: skip


@pytest.fixture(autouse=True)
def no_config_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "SYSTEM_CONFIG", tmp_path / "etc" / "jobdaemon.toml")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg-config"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "xdg-data"))


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(text: str) -> Path:
        path = tmp_path / "jobdaemon.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def problems(path: Path | None = None, **environ: str) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        load_settings(path, environ)
    return str(caught.value).splitlines()


class TestUnits:
    @pytest.mark.parametrize(
        ("written", "seconds"),
        [
            ("5s", 5),
            ("15 min", 900),
            ("24h", 86400),
            ("250ms", 0.25),
            ("1h 30min", 5400),
            ("2d", 172800),
            ("7", 7),
            (0.5, 0.5),
            (0, 0),
        ],
    )
    def test_reads_durations(self, written: object, seconds: float) -> None:
        """A duration is a number with a unit, several of them, or plain seconds."""
        assert parse_duration(written) == timedelta(seconds=seconds)

    @pytest.mark.parametrize(
        "written",
        [
            "",
            "5 fortnights",
            "-5s",
            "5 10s",
            "5s 10",
            "1e3s",
            "٣s",
            True,
            None,
            [],
            float("nan"),
            float("inf"),
            -1,
            "9" * 15 + "d",
            10**400,
        ],
    )
    def test_refuses_what_is_no_duration(self, written: object) -> None:
        """Anything else is refused with a sentence, never with an overflow."""
        with pytest.raises(ValueError, match=r"duration|must lie between"):
            parse_duration(written)

    @given(st.timedeltas(timedelta(0), MAX_DURATION))
    def test_durations_survive_writing(self, duration: timedelta) -> None:
        """A duration written for people is read back exactly."""
        assert parse_duration(format_duration(duration)) == duration

    @given(st.integers(0, MAX_SIZE_BYTES))
    def test_sizes_survive_writing(self, size: int) -> None:
        """A size written for people is read back exactly."""
        assert parse_size(format_size(size)) == size

    @pytest.mark.parametrize(
        ("written", "size"), [("50 MB", 50_000_000), ("64 MiB", 64 << 20), ("1.5kB", 1500), (7, 7), ("7", 7), ("1 b", 1)]
    )
    def test_reads_sizes(self, written: object, size: int) -> None:
        """MB is a million bytes, MiB two to the twentieth."""
        assert parse_size(written) == size

    @pytest.mark.parametrize("written", ["", "50 apples", "0.3 B", -1, True, 1.5, "2000 GB"])
    def test_refuses_what_is_no_size(self, written: object) -> None:
        """Fractions of a byte, negative numbers and other units are refused."""
        with pytest.raises(ValueError, match=r"size|bytes|must lie between"):
            parse_size(written)


class TestExample:
    def test_example_equals_defaults(self, tmp_path: Path) -> None:
        """The example with every key uncommented loads and equals the defaults."""
        example = load_settings(_uncommented(tmp_path), {})
        assert example.model_dump(exclude={"queues"}) == load_settings(None, {}).model_dump(exclude={"queues"})
        for name in QUEUES:
            assert example.queue(name) == load_settings(None, {}).queue(name)
        assert example.warnings() == []

    def test_example_as_shipped_loads(self) -> None:
        """The example as it lies there changes nothing."""
        assert load_settings(EXAMPLE, {}).model_dump() == load_settings(None, {}).model_dump() | {
            "queues": dict.fromkeys(load_settings(EXAMPLE, {}).queues, dict.fromkeys(module.QueueOverrides.model_fields))
        }

    def test_no_key_is_missing(self, tmp_path: Path) -> None:
        """Every key of the tree stands in the example, with a comment above or beside its first mention."""
        example = load_settings(_uncommented(tmp_path), {})
        for path in setting_keys():
            names = ("beautify", "generate", "upload") if "*" in path else ("",)
            for name in names:
                assert example.origin(".".join(path).replace("*", name)) != "default", path

    def test_docs_list_every_key(self) -> None:
        """The table in docs/configure.md has exactly the keys of the tree."""
        text = (ROOT / "docs" / "configure.md").read_text(encoding="utf-8")
        table = text.partition("<!-- keys -->")[2].partition("<!-- /keys -->")[0]
        listed = set(re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE))
        keys = {".".join(path) for path in setting_keys()}
        assert listed == {re.sub(r"^queues\.\*", "queues.<name>", re.sub(r"^plans\.\w+", "plans.<plan>", key)) for key in keys}


class TestUnit:
    UNIT = (ROOT / "systemd" / "jobdaemon.service").read_text(encoding="utf-8")

    def test_stop_timeout_is_above_the_grace(self) -> None:
        """The manager waits longer than the daemon's own grace, so that it never kills a stop that goes well."""
        found = re.search(r"^TimeoutStopSec=(\d+)$", self.UNIT, re.MULTILINE)
        assert found is not None
        assert timedelta(seconds=int(found[1])) >= load_settings(None, {}).engine.stop_grace + timedelta(seconds=20)

    def test_variables_of_the_unit_are_settings(self) -> None:
        """Every variable the unit sets or suggests is one that exists."""
        names = re.findall(r"^#?Environment=(JOBDAEMON_\w+)=", self.UNIT, re.MULTILINE)
        assert len(names) == 3
        for name in names:
            assert "is not a setting" not in "".join(problems(None, **{name: "/nonexistent/file"}))

    def test_data_lies_in_the_state_directory(self) -> None:
        """With the unit's XDG_DATA_HOME the data directory is the unit's StateDirectory."""
        assert "\nEnvironment=XDG_DATA_HOME=%S\n" in self.UNIT
        assert "\nStateDirectory=jobdaemon\n" in self.UNIT
        assert load_settings(None, {"XDG_DATA_HOME": "/var/lib"}).data_dir == Path("/var/lib/jobdaemon")

    def test_drop_in_allows_the_manager_socket(self) -> None:
        """The hardening leaves Unix sockets, without which neither sd_notify nor a local Postgres is reached."""
        families = re.search(r"^RestrictAddressFamilies=(.*)$", (ROOT / "systemd/hardening.conf").read_text(), re.MULTILINE)
        assert families is not None
        assert {"AF_UNIX", "AF_INET", "AF_INET6"} <= set(families[1].split())


def _uncommented(tmp_path: Path) -> Path:
    path = tmp_path / "example.toml"
    lines = EXAMPLE.read_text(encoding="utf-8").splitlines()
    value = re.compile(r'# (\w+ = |  "|\])')
    path.write_text("\n".join(line[2:] if value.match(line) else line for line in lines), encoding="utf-8")
    return path


class TestSources:
    def test_environment_wins(self, write: Write) -> None:
        """A variable wins over the file, the file over the default, and each value knows where it came from."""
        path = write('[engine]\npoll = "7s"\nstop_grace = "1 min"\n')
        settings = load_settings(path, {"JOBDAEMON_ENGINE__POLL": "9s"})
        assert settings.engine.poll == timedelta(seconds=9)
        assert settings.engine.stop_grace == timedelta(minutes=1)
        assert settings.origin("engine.poll") == "JOBDAEMON_ENGINE__POLL"
        assert settings.origin("engine.stop_grace") == f"{path}:3"
        assert settings.origin("engine.lease") == "default"

    def test_file_is_found(self, tmp_path: Path) -> None:
        """--config, then $JOBDAEMON_CONFIG, then the system's file, then the user's; the first one is the only one read."""
        places = [
            tmp_path / "option.toml",
            tmp_path / "variable.toml",
            module.SYSTEM_CONFIG,
            tmp_path / "xdg-config/jobdaemon/jobdaemon.toml",
        ]
        for attempts, place in enumerate(places, start=4):
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(f"[queues.upload]\nattempts = {attempts}\n")
        environ = {"JOBDAEMON_CONFIG": str(places[1])}
        assert load_settings(places[0], environ).queue("upload").attempts == 4
        assert load_settings(None, environ).queue("upload").attempts == 5
        assert load_settings(None, {}).queue("upload").attempts == 6
        places[2].unlink()
        assert load_settings(None, {}).queue("upload").attempts == 7
        places[3].unlink()
        assert load_settings(None, {}).queue("upload").attempts == 3

    def test_missing_file_is_an_error(self, tmp_path: Path) -> None:
        """A file that was asked for and is not there is an error that names it."""
        missing = str(tmp_path / "no.toml")
        assert problems(Path(missing)) == [f"{missing}: cannot be read (No such file or directory)"]
        assert problems(JOBDAEMON_CONFIG=missing) == [f"{missing}: cannot be read (No such file or directory)"]
        assert problems(tmp_path) == [f"{tmp_path}: cannot be read (Is a directory)"]

    @pytest.mark.parametrize(
        ("text", "line"),
        [("[engine]\nlease = 5 s\n", 2), ("[engine\n", 1), ("a = 1\na = 2\n", 2), ('x = "abc', None), ("\x00", 1)],
    )
    def test_broken_toml(self, write: Write, text: str, line: int | None) -> None:
        """A file that is no TOML is one problem with its line."""
        path = write(text)
        (problem,) = problems(path)
        assert problem.startswith(f"{path}:{line}: is not valid TOML" if line else f"{path}: is not valid TOML")

    @pytest.mark.parametrize("value", ["1" * 5000, "[" * 5000 + "]" * 5000])
    def test_monstrous_values(self, write: Write, value: str) -> None:
        """What even the TOML reader cannot hold is a problem of the file, not a traceback."""
        path = write(f"x = {value}\n")
        assert problems(path) == [f"{path}: holds a number that is too long, or is nested too deeply"]

    @given(st.data())
    @hypothesis_settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
    def test_any_value_anywhere(self, tmp_path: Path, data: st.DataObject) -> None:
        """Whatever stands at any key, the settings load or a SettingsError names the file; nothing else comes out."""
        lines = [line for line in _uncommented(tmp_path).read_text(encoding="utf-8").splitlines() if not line.endswith(" = [")]
        lines = [line for line in lines if not line.startswith(('  "', "]"))]
        at = data.draw(st.sampled_from([index for index, line in enumerate(lines) if " = " in line]))
        lines[at] = f"{lines[at].partition(' = ')[0]} = {data.draw(st.sampled_from(_ODD_VALUES))}"
        path = tmp_path / "odd.toml"
        path.write_text("\n".join(lines), encoding="utf-8")
        try:
            settings = load_settings(path, {})
        except SettingsError as error:
            assert str(error).count(f"{path}:") >= 1  # noqa: PT017 - either outcome is right
        else:
            assert settings.shown()
            assert settings.warnings() is not None

    @pytest.mark.parametrize("key", ["_env_file", "_origins", "model_config", "__class__"])
    def test_keys_that_look_internal(self, write: Write, key: str) -> None:
        """A key of the file can never reach an attribute or an option of the classes behind the settings."""
        (problem,) = problems(write(f'{key} = "x"\n'))
        assert problem.endswith(f":1: {key}: is not a setting")

    def test_odd_encodings(self, tmp_path: Path) -> None:
        """A byte order mark and Windows line ends are fine; text that is not UTF-8 is an error, not a traceback."""
        path = tmp_path / "odd.toml"
        path.write_bytes(b"\xef\xbb\xbf[log]\r\n\r\nlevel = 'debug'\r\n")
        assert load_settings(path, {}).log.level == "debug"
        assert load_settings(path, {}).origin("log.level") == f"{path}:3"
        path.write_bytes(b"[log]\nlevel = '\xff'\n")
        assert problems(path) == [f"{path}: is not UTF-8 text"]

    def test_lines_of_odd_layouts(self, write: Write) -> None:
        """Values in inline tables, dotted keys and after arrays and texts of many lines know their lines."""
        path = write(
            'engine = { poll = "6s", lease = """\n20s""" }\norders.prompts.Free = [\n "a",\n]\n\n[log]\nlevel = "debug"\n'
        )
        settings = load_settings(path, {})
        assert settings.engine.lease == timedelta(seconds=20)
        lines = [settings.origin(key) for key in ("engine.lease", "orders.prompts.Free", "log.level")]
        assert lines == [f"{path}:{line}" for line in (1, 3, 8)]

    def test_all_problems_at_once(self, write: Write) -> None:
        """Every problem of file and environment has a line of its own, with its place and its key."""
        path = write(
            'wrong = 1\n[engine]\nleese = "15s"\npoll = "soon"\n'
            "[queues.upload]\nattempts = 0\nteamsize = 1\n[queues.paint]\nattempts = 3\n"
        )
        found = problems(
            path, JOBDAEMON_LOG__LEVEL="loud", JOBDAEMON_DATABSE_URL="x", JOBDAEMON_ENGINE="x", JOBDAEMON_TEST_DSN="fine"
        )
        assert found == [
            "JOBDAEMON_DATABSE_URL: is not a setting of jobdaemon",
            "JOBDAEMON_ENGINE: is not a setting of jobdaemon",
            f'{path}:4: engine.poll: is not a duration: write one such as "5s", "15 min", "24h", "250ms"',
            f"{path}:3: engine.leese: is not a setting: did you mean lease?",
            f"{path}:6: queues.upload.attempts: must be greater than or equal to 1, not 0",
            f"{path}:7: queues.upload.teamsize: is not a setting: did you mean team_size?",
            f"{path}:8: queues.paint: is not a queue: there are beautify, upload, generate and generate.<provider>",
            "JOBDAEMON_LOG__LEVEL: log.level: must be 'debug', 'info', 'warning' or 'error'",
            f"{path}:1: wrong: is not a setting",
        ]

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("engine = 5", "engine: must be a table"),
            ("[queues]\nupload = 3", "queues.upload: must be a table"),
            ("[queues.upload]\nteam_size = true", "queues.upload.team_size: must be a number"),
            ("[queues.upload]\nteam_size = -1", "queues.upload.team_size: must be greater than or equal to 0, not -1"),
            ("[queues.upload]\nteam_size = 10001", "queues.upload.team_size: must be less than or equal to 10000, not 10001"),
            ("[queues.upload]\nteam_size = 99999999999999999999", "queues.upload.team_size: must be less than or equal to 10000"),
            ("[queues.upload]\nteam_size = ''", "queues.upload.team_size: must be a valid integer"),
            ("[queues.upload]\ncluster_limit = 5", "queues.upload.cluster_limit: is not a setting"),
            ("[queues.upload]\njitter = nan", "queues.upload.jitter: must be a finite number, not nan"),
            ("data_dir = 5", "data_dir: must be"),
            ("data_dir = '~nobody-of-that-name/x'", "data_dir: names a home directory that does not exist"),
            ("[database]\nurl = 5", "database.url: must be a valid string"),
            ("[store.files]\npublic_url = 'https://u:p@h/'", "store.files.public_url: must be a web address"),
            ("[photos]\nallowed_hosts = ['http://a/']", "photos.allowed_hosts: must name hosts only"),
            ("[photos]\nallowed_hosts = [1]", "photos.allowed_hosts: must be an array of host names"),
            ("[photos]\nmax_bytes = 0", "photos.max_bytes: must be greater than 0, not 0"),
            ("[store.r2]\nprefix = '/abs'", "store.r2.prefix: has characters that are not allowed here"),
            ("[orders.prompts]\nFree = []", "orders.prompts.Free: "),
            ("[orders.prompts]\nFree = 'one'", "orders.prompts.Free: must be an array"),
            ("[plans.Pro]\nstage_priority = {uplaod = 5}", "stage_priority.uplaod: is not a setting: did you mean upload?"),
            ("[plans.Pro]\nstage_priority = 5", "plans.Pro.stage_priority: must be a table"),
            ("[plans.Pro]\nstage_priority.upload = 1000001", "stage_priority.upload: must be less than or equal to 1000000"),
            ("[plans.Pro]\nstage_priority.upload = 1.5", "plans.Pro.stage_priority.upload: must be a valid integer"),
            ("[plans.Pro]\nstage_priority.upload = true", "plans.Pro.stage_priority.upload: must be a number"),
            ("[plans.Pro]\nstage_priority.upload = [5]", "plans.Pro.stage_priority.upload: must be a valid integer"),
            ("[plans.free]\nimages = 1", "plans.free: is not a setting: did you mean Free?"),
            ("[queues.upload]\nattempts = 2\n[[queues.beautify]]\nattempts = 1", "queues.beautify: must be a table"),
        ],
    )
    def test_wrong_values(self, write: Write, text: str, says: str) -> None:
        """A value of the wrong type or range is a problem at its line, in words about settings."""
        path = write(text)
        assert any(line.startswith(f"{path}:") and says in line for line in problems(path)), problems(path)

    def test_priorities_of_stages(self, write: Write) -> None:
        """A plan's map may be given in the file and one by one in variables, which win; what is not named is not in it."""
        path = write("[plans.Pro]\nstage_priority = {upload = 500, generate = -1}\n")
        settings = load_settings(path, {"JOBDAEMON_PLANS__PRO__STAGE_PRIORITY__UPLOAD": "7"})
        assert settings.plans.Pro.stage_priority.named() == {"generate": -1, "upload": 7}
        assert settings.plans.Free.stage_priority.named() == {}
        assert settings.origin("plans.Pro.stage_priority.generate") == f"{path}:2"
        assert [one.stage_priority for one in plans(settings) if one.name == "Pro"] == [{"generate": -1, "upload": 7}]

    def test_queue_names_with_dots(self, write: Write) -> None:
        """[queues.generate.local] and [queues."generate.local"] are the same table, and so is the variable."""
        for header in ("queues.generate.local", 'queues."generate.local"'):
            path = write(f"[{header}]\nteam_size = 9\n")
            assert load_settings(path, {}).queue("generate.local").team_size == 9
            assert load_settings(path, {}).origin('queues."generate.local".team_size') == f"{path}:2"
        settings = load_settings(None, {"JOBDAEMON_QUEUES__GENERATE__LOCAL__TEAM_SIZE": "8"})
        assert settings.queue("generate.local").team_size == 8

    def test_same_queue_twice(self, write: Write) -> None:
        """A key given in both spellings of a queue's name is refused, not silently dropped."""
        path = write('[queues.generate.local]\nteam_size = 1\n[queues."generate.local"]\nteam_size = 2\n')
        assert problems(path) == [f"{path}:4: queues.generate.local.team_size: was already given at {path}:2"]

    def test_same_variable_twice(self) -> None:
        """The short and the long name of the database URL together are refused."""
        (problem,) = problems(JOBDAEMON_DATABASE_URL="postgresql:///a", JOBDAEMON_DATABASE__URL="postgresql:///b")
        assert problem.endswith("is already set by JOBDAEMON_DATABASE_URL: unset one of them")

    def test_lists_in_variables(self) -> None:
        """Lists are written as JSON arrays in variables; hosts may also be separated by commas."""
        prompts = {
            "JOBDAEMON_ORDERS__PROMPTS__START": '["one, two", "three"]',
            "JOBDAEMON_PHOTOS__ALLOWED_HOSTS": "A.example, 10.0.0.5",
        }
        settings = load_settings(None, prompts)
        assert settings.orders.prompts.Start == ("one, two", "three")
        assert settings.photos.allowed_hosts == ("a.example", "10.0.0.5")

    def test_empty_means_not_given(self, write: Write) -> None:
        """Empty variables and empty optional values count as not set."""
        settings = load_settings(
            write('data_dir = ""\n[database]\nurl = ""\n'), {"JOBDAEMON_DATABASE_URL": "", "JOBDAEMON_ENGINE__POLL": " "}
        )
        assert settings.database.url is None
        assert settings.engine.poll == timedelta(seconds=5)
        assert settings.data_dir.name == "jobdaemon"

    def test_paths(self, write: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """Paths in a file are relative to its folder, in variables to the current one; ~ is the home directory."""
        monkeypatch.chdir("/")
        monkeypatch.setenv("HOME", "/home/someone")
        path = write('data_dir = "state"\n[store.files]\nroot = "~/images"\n')
        settings = load_settings(path, {})
        assert (settings.data_dir, settings.store.files.root) == (tmp_path / "state", Path("/home/someone/images"))
        settings = load_settings(None, {"JOBDAEMON_DATA_DIR": "srv/jobs"})
        assert (settings.data_dir, settings.store.files.root) == (Path("/srv/jobs"), Path("/srv/jobs/artifacts"))
        assert load_settings(None, {"XDG_DATA_HOME": "/elsewhere"}).data_dir == Path("/elsewhere/jobdaemon")


class TestTree:
    def test_frozen(self) -> None:
        """Nothing in the tree can be changed."""
        with pytest.raises(ValidationError, match="frozen"):
            load_settings(None, {}).engine.poll = timedelta(0)

    def test_team_sizes(self) -> None:
        """Team sizes default by queue: what is written for a queue, for its stage, then what is built in."""
        sizes = {name: load_settings(None, {}).queue(name).team_size for name in QUEUES}
        assert sizes == {"beautify": 1, "generate.local": cores(), "generate.comfyui": 10, "generate.other": 3, "upload": 5}
        settings = load_settings(
            None, {"JOBDAEMON_QUEUES__GENERATE__TEAM_SIZE": "7", "JOBDAEMON_QUEUES__GENERATE__LOCAL__TEAM_SIZE": "cores"}
        )
        assert [settings.queue(name).team_size for name in QUEUES] == [1, cores(), 7, 7, 5]

    def test_retry_defaults(self) -> None:
        """Attempts, waits and timeouts are those of the design."""
        shown = load_settings(None, {}).shown()["queues"]
        common = {"attempts": 3, "jitter": 0.2}
        assert shown["beautify"] == {"team_size": 1, "backoff": "2s", "backoff_cap": "10s", "run_timeout": "5min", **common}
        assert shown["upload"] == {"team_size": 5, "backoff": "1s", "backoff_cap": "5s", "run_timeout": "30s", **common}
        assert load_settings(None, {}).queue("generate.x").run_timeout == timedelta(seconds=600)

    @pytest.mark.parametrize("name", ["", "generate", "generate.", "beautify.x", "generate.A", "Upload", "upload\n"])
    def test_no_such_queue(self, name: str) -> None:
        """Asking for a queue that cannot exist is an error."""
        with pytest.raises(SettingsError, match="is not a queue"):
            load_settings(None, {}).queue(name)

    def test_default_prompts(self) -> None:
        """Free has one default prompt, Start six and Pro fourteen, none twice, so that at five per call calls are full."""
        settings = load_settings(None, {})
        assert [len(settings.orders.prompts[name]) for name, _ in settings.plans.items()] == [1, 6, 14]
        assert [(plan.images, plan.priority) for _, plan in settings.plans.items()] == [(2, 300), (30, 200), (70, 100)]
        assert len(set(settings.orders.prompts.Pro)) == 14

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("[engine]\nheartbeat = '6s'", "engine.lease: must be at least three times engine.heartbeat, that is 18s"),
            ("[store]\nkind = 'r2'", 'store.r2.bucket: must be set, because store.kind is "r2"'),
            ("[queues.upload]\nbackoff = '6s'", "queues.upload.backoff: leaves backoff longer than backoff_cap (6s, 5s)"),
            (
                "[queues.generate]\nbackoff_cap = '1s'",
                "queues.generate.backoff_cap: leaves backoff longer than backoff_cap (2s, 1s)",
            ),
            ("[plans.Pro]\nexpires_after = '30 min'", "plans.Pro.lift_after: must be shorter than plans.Pro.expires_after"),
            ("[plans.Start]\nimages = 5", "orders.prompts.Start: holds 6 prompts, more than plans.Start.images allows"),
            ("[orders.prompts]\nFree = [' ']", "orders.prompts.Free: has a prompt that is empty"),
            ("[retention]\norders = '1d'", "retention.orders: must not be shorter than retention.photos"),
            ("[retention]\nphotos = ''\norders = '900d'", "retention.orders: must be never where retention.photos is"),
            ("[cache]\nproviders = ['local']", "cache.providers: names local, which makes its images on this machine"),
            ("[cache]\nproviders = ['nobody']", "cache.providers: there is no provider 'nobody'; there is"),
            ("[database]\nurl = 'mysql://u:secret@h/d'", "database.url: must start with postgresql://"),
            ('[beautify]\nbackend = "gfpgan"', 'beautify.weights: must be set, because beautify.backend is "gfpgan"'),
            ('[beautify]\nbackend = "none"', "beautify.backend: there is no backend 'none'"),
            ('[beautify]\nweights_sha256 = "abc"', "beautify.weights_sha256: has characters that are not allowed here"),
            ('[beautify]\ndevice = "tpu"', "beautify.device: has characters that are not allowed here"),
            ("[beautify]\nbatch = 65", "beautify.batch: must be less than or equal to 64, not 65"),
        ],
    )
    def test_contradictions(self, write: Write, text: str, says: str) -> None:
        """Settings that cannot both hold are refused, with the place of one of them."""
        path = write(text)
        found = problems(path)
        assert any(line.startswith(f"{path}:") and says in line for line in found) or any(
            line.startswith(says) for line in found
        ), found
        assert "u:secret" not in "".join(found)

    def test_never_can_be_said_in_a_variable(self, write: Write) -> None:
        """An empty variable is none at all: who means to keep everything says never, there and in the file."""
        variable = "JOBDAEMON_RETENTION__PHOTOS"
        assert load_settings(None, {variable: ""}).retention.photos == timedelta(days=30)
        assert load_settings(None, {variable: "never"}).retention.photos is None
        for word in ("", "never"):
            assert load_settings(write(f'[retention]\nphotos = "{word}"'), {}).retention.photos is None

    def test_all_problems_are_told_at_once(self, write: Write) -> None:
        """What settings mean together is looked at though another value is wrong, and each problem keeps its place."""
        path = write(
            "[log]\nlevel = 'loud'\n[beautify]\nbackend = 'foo'\nstrength = 7\n[orders]\nprovider = 'nobody'\n"
            "[engine]\nlease = '6s'\n[plans.Pro]\nimages = 0\nlift_after = '25h'\n[queues.upload]\nbackoff = '6s'\n"
        )
        assert [line.removeprefix(f"{path}:").split(": ")[:2] for line in problems(path)] == [
            ["11", "plans.Pro.images"],
            ["5", "beautify.strength"],
            ["2", "log.level"],
            ["9", "engine.lease"],
            ["14", "queues.upload.backoff"],
            ["7", "orders.provider"],
            ["4", "beautify.backend"],
            ["12", "plans.Pro.lift_after"],
        ]

    @pytest.mark.parametrize(
        ("text", "count"),
        [
            ("[engine]\nlease = '6s'\nheartbeat = 'often'", 1),
            ("[queues.upload]\nbackoff = '6s'\nbackoff_cap = 'long'", 1),
            ("[queues.generate]\nbackoff_cap = 'short'\n[queues.generate.local]\nbackoff = '20s'", 1),
            ("[store]\nkind = 'r2'\n[store.r2]\nbucket = 5\nendpoint_url = 'https://o.example'", 3),
            ("[orders]\nprovider = 'openai_images'\n[[generate.openai_images.keys]]\nalias = 'a'\nkey = 'k'\nrate = 'fast'", 1),
            ("[orders]\nfallback = {local = ['comfyui']}\n[generate.comfyui]\nservers = 5\nworkflow = 'w.json'", 1),
            ("[plans.Pro]\nlift_after = '25h'\nexpires_after = 'never'", 1),
            ("[plans]\nPro = 5", 1),
        ],
    )
    def test_nothing_is_told_that_only_follows(self, write: Write, text: str, count: int) -> None:
        """A value that cannot be read gives no second problem with what depends on it."""
        assert len(found := problems(write(text))) == count, found

    def test_warnings(self, write: Write) -> None:
        """What is allowed but hardly meant is a warning, not an error."""
        path = write(
            "[store]\nkind = 'r2'\n[store.r2]\nendpoint_url = 'http://objects.example'\nbucket = 'b'\n"
            "access_key_id = 'i'\nsecret_access_key = 's'\n"
            "[queues]\nbeautify.team_size = 0\ngenerate.local.team_size = 0\nupload.team_size = 0\n"
        )
        path.chmod(0o644)
        warnings = load_settings(path, {}).warnings()
        assert sum("everyone on this machine can read it" in line for line in warnings) == 2
        assert sum("is not https" in line or "no public address" in line or "will do no work" in line for line in warnings) == 3
        path.chmod(0o640)
        assert len(load_settings(path, {}).warnings()) == 3

    def test_one_photo_at_a_time_warns_on_a_gpu(self, write: Write) -> None:
        """A team of one, or one thread, leaves the device idle; more of both, or another backend or device, is no cause."""
        gfpgan = '[beautify]\nbackend = "gfpgan"\nweights = "GFPGANv1.4.pth"\n'
        team, threads = load_settings(write(gfpgan), {}).warnings()
        assert "jobdaemon.toml:2: queues.beautify.team_size: is 1: one photo at a time" in team
        assert "jobdaemon.toml:2: beautify.threads: is 1: " in threads
        many = "threads = 8\n[queues.beautify]\nteam_size = 8\n"
        assert load_settings(write(gfpgan + many), {}).warnings() == []
        assert load_settings(write(f'{gfpgan}device = "cpu"\n'), {}).warnings() == []

    def test_one_photo_at_a_time_warns_where_a_gpu_may_be_picked(self, write: Write) -> None:
        """With weights, auto picks gfpgan where a device is, and then the same holds; without them it never does."""
        assert len(load_settings(write('[beautify]\nweights = "GFPGANv1.4.pth"\n'), {}).warnings()) == 2
        assert load_settings(write(""), {}).warnings() == []

    def test_import_is_light(self) -> None:
        """Importing the settings loads no driver, no HTTP client and no compute library."""
        code = "import sys, jobdaemon.settings; print(*sys.modules)"
        loaded = set(
            subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT).stdout.split()
        )
        assert not loaded & {
            "asyncpg",
            "psycopg",
            "httpx",
            "cv2",
            "numpy",
            "torch",
            "aioboto3",
            "procrastinate",
            "structlog",
            "asyncio",
        }
        ours = {name for name in loaded if name.startswith("jobdaemon.")}
        sections = {f"settings_{name}" for name in ("beautify", "generate", "orders", "sources", "values")}
        assert ours <= {f"jobdaemon.{name}" for name in {"errors", "redact", "settings", "units"} | sections}


class TestSecrets:
    URL = "postgresql://app:hunter2@db.example:5432/jobs?sslpassword=hunter2&application_name=x"

    @pytest.fixture
    def url_file(self, tmp_path: Path) -> Iterator[Path]:
        path = tmp_path / "database-url"
        path.write_text(f"{self.URL}\n")
        path.chmod(0o600)
        yield path
        path.unlink(missing_ok=True)

    def test_masked_everywhere(self, tmp_path: Path) -> None:
        """A secret is masked in repr, in dumps and in what config show prints; the rest of the URL stays readable."""
        settings = load_settings(
            None,
            {
                "JOBDAEMON_DATABASE_URL": self.URL,
                "JOBDAEMON_STORE__R2__SECRET_ACCESS_KEY": "hunter2",
                "JOBDAEMON_DATA_DIR": str(tmp_path),
            },
        )
        for text in (
            repr(settings),
            str(settings),
            str(settings.model_dump()),
            settings.model_dump_json(),
            str(settings.shown()),
        ):
            assert "hunter2" not in text
        assert settings.shown()["database"]["url"] == (
            "postgresql://app:********@db.example:5432/jobs?sslpassword=********&application_name=x"
        )
        assert settings.database.url is not None
        assert settings.database.url.get_secret_value() == self.URL

    def test_from_file(self, write: Write, url_file: Path) -> None:
        """A secret may lie in a file, named in the configuration file (relative to it) or by a variable."""
        path = write('[database]\nurl_file = "database-url"\n')
        for settings in (load_settings(path, {}), load_settings(None, {"JOBDAEMON_DATABASE__URL_FILE": str(url_file)})):
            assert settings.database.url is not None
            assert settings.database.url.get_secret_value() == self.URL
            assert settings.warnings() == []
        assert load_settings(path, {}).origin("database.url") == f"{url_file} (named by {path}:2)"

    def test_world_readable_file_warns(self, url_file: Path) -> None:
        """A secret that everyone can read is a warning with its path."""
        url_file.chmod(0o644)
        (warning,) = load_settings(None, {"JOBDAEMON_DATABASE__URL_FILE": str(url_file)}).warnings()
        assert str(url_file) in warning

    def test_both_forms(self, write: Write, url_file: Path) -> None:
        """A secret and its file together in one source contradict each other; in two sources the environment wins."""
        path = write('[database]\nurl_file = "database-url"\nurl = "postgresql://x:hunter2@h/d"\n')
        assert problems(path) == [f"{path}:2: database.url_file: cannot be given together with database.url"]
        path = write('[database]\nurl_file = "database-url"\n')
        settings = load_settings(path, {"JOBDAEMON_DATABASE_URL": "postgresql:///other"})
        assert settings.shown()["database"]["url"] == "postgresql:///other"
        assert settings.origin("database.url") == "JOBDAEMON_DATABASE_URL"

    @pytest.mark.parametrize("content", [b"", b"\n", b"\xff\xfe", b"two\nlines", b"x" * 70_000, None])
    def test_unusable_file(self, tmp_path: Path, content: bytes | None) -> None:
        """A secret's file that is missing, empty, too large or no line of text is one error that names it."""
        path = tmp_path / "secret"
        if content is not None:
            path.write_bytes(content)
        environ = {
            "JOBDAEMON_STORE__KIND": "r2",
            "JOBDAEMON_STORE__R2__ENDPOINT_URL": "https://h",
            "JOBDAEMON_STORE__R2__BUCKET": "b",
        }
        environ |= {"JOBDAEMON_STORE__R2__ACCESS_KEY_ID": "i", "JOBDAEMON_STORE__R2__SECRET_ACCESS_KEY_FILE": str(path)}
        (problem,) = problems(None, **environ)
        assert problem.startswith(
            f"JOBDAEMON_STORE__R2__SECRET_ACCESS_KEY_FILE: store.r2.secret_access_key_file: {path} cannot be used: "
        )

    def test_errors_do_not_echo(self, write: Write) -> None:
        """No error repeats a secret, not even one written in the wrong place, and none is kept in the exception's context."""
        path = write(
            "[database]\nurl = ['hunter2-hunter2']\npasword = 'hunter2-hunter2'\n"
            "[store]\nkind = 'hunter2-hunter2'\n[engine]\npoll = 'hunter2-hunter2'\n"
        )
        with pytest.raises(SettingsError) as caught:
            load_settings(path, {"JOBDAEMON_STORE__R2__SECRET": "hunter2-hunter2"})
        assert len(str(caught.value).splitlines()) == 5
        assert "hunter2-" not in str(caught.value)
        assert (caught.value.__cause__, caught.value.__context__) == (None, None)

    def test_settings_made_directly(self) -> None:
        """A tree made without a file shows no input in its validation error either."""
        with pytest.raises(ValidationError) as caught:
            Settings(database={"url": 12345678})  # type: ignore[arg-type,call-arg]
        assert "12345678" not in str(caught.value)

    def test_numbers_are_not_echoed_either(self, write: Write) -> None:
        """A secret that happens to be a number is not repeated."""
        (problem,) = problems(write("[database]\nurl = 12345678\n"))
        assert "12345678" not in problem


class TestFallback:
    USABLE = '[generate.openai_images]\napi_key = "k"\n[generate.comfyui]\nservers = ["http://a"]\nworkflow = "w.json"\n'

    def test_who_takes_over(self, write: Write) -> None:
        """A table of lists by provider, two of which may name each other, and a list of a plan's own; all shown as written."""
        chains = '[orders]\nfallback = { openai_images = ["comfyui", "local"], comfyui = ["openai_images"] }\n'
        settings = load_settings(write(f"{chains}[plans.Free]\nfallback = []\n{self.USABLE}"), {})
        assert settings.orders.fallback == {"openai_images": ("comfyui", "local"), "comfyui": ("openai_images",)}
        assert (settings.plans.Free.fallback, settings.plans.Pro.fallback) == ((), None)
        shown = settings.shown()
        assert shown["orders"]["fallback"] == {"openai_images": ["comfyui", "local"], "comfyui": ["openai_images"]}
        assert "fallback" not in shown["plans"]["Pro"]
        assert settings.origin("orders.fallback.comfyui").endswith("jobdaemon.toml:2")

    def test_as_variables(self) -> None:
        """JSON, and the empty text for none."""
        chain = {"JOBDAEMON_ORDERS__FALLBACK": '{"comfyui": ["local"]}', "JOBDAEMON_PLANS__PRO__FALLBACK": '["local"]'}
        settings = load_settings(None, chain)
        assert settings.orders.fallback == {"comfyui": ("local",)}
        assert settings.plans.Pro.fallback == ("local",)
        assert problems(None, JOBDAEMON_ORDERS__FALLBACK="[1]") == [
            'JOBDAEMON_ORDERS__FALLBACK: orders.fallback: must be a table of arrays: {"one": ["two"]}'
        ]

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ('[orders.fallback]\nnobody = ["local"]', ":2: orders.fallback.nobody: there is no provider 'nobody'"),
            ('[orders.fallback]\ncomfyui = ["nobody"]', ":2: orders.fallback.comfyui: there is no provider 'nobody'"),
            ('[orders.fallback]\nlocal = ["comfyui"]', ":2: orders.fallback.local: names comfyui, but generate.comfyui lacks"),
            ('[orders.fallback]\nlocal = ["local"]', ":2: orders.fallback.local: names local as its own fallback"),
            ('[orders.fallback]\ncomfyui = ["local", "local"]', ":2: orders.fallback.comfyui: names local more than once"),
            ('[plans.Pro]\nfallback = ["nobody"]', ":2: plans.Pro.fallback: there is no provider 'nobody'"),
            ('[orders.fallback]\ncomfyui = "local"', ":2: orders.fallback.comfyui: must be an array"),
        ],
    )
    def test_chains_that_cannot_work(self, write: Write, text: str, says: str) -> None:
        """Unknown or unusable providers, oneself, and the same one twice are told with their place."""
        path = write(text + "\n")
        assert any(problem.startswith(f"{path}{says}") for problem in problems(path))
