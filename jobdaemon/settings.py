"""
Every setting, in one frozen typed tree; :func:`load_settings` is the only reader of the environment.

A section is a class, a key is a field, and its default stands beside it. Durations are timedelta, sizes whole bytes, times
of day do not occur. ``config/jobdaemon.toml`` shows every key at its default; docs/configure.md explains them.
How files and variables are read lies in :mod:`jobdaemon.settings_sources`, what a value may look like in
:mod:`jobdaemon.settings_values`.
"""

from __future__ import annotations

import difflib
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal, get_args
from urllib.parse import urlsplit

import platformdirs
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    PrivateAttr,
    SecretStr,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticCustomError

from jobdaemon.errors import SettingsError
from jobdaemon.redact import MASK, mask_url
from jobdaemon.settings_beautify import BeautifySettings, beautify_contradictions, idle_device
from jobdaemon.settings_generate import (
    CacheSettings,
    GenerateSettings,
    PrewarmSettings,
    ProviderKeySettings,
    SuperbedSettings,
    provider_contradictions,
)
from jobdaemon.settings_orders import (
    OrdersSettings,
    PlansSettings,
    RetentionSettings,
    plan_contradictions,
    retention_contradictions,
)
from jobdaemon.settings_sources import (
    Path_,
    Problem,
    Source,
    Table,
    choose_forms_of_secrets,
    dotted,
    file_form,
    get,
    overlay,
    place_of,
    put,
    read_environment,
    read_file,
    read_secret_files,
    secrets_in_arrays,
)
from jobdaemon.settings_values import (
    AbsolutePath,
    Cores,
    Duration,
    Hosts,
    LongerThanZero,
    OptionalPath,
    OptionalSecret,
    OptionalText,
    Section,
    Share,
    Size,
    WebUrl,
    Whole,
    blank,
    cores,
    lower,
)
from jobdaemon.units import format_duration, format_size

SYSTEM_CONFIG = Path("/etc/jobdaemon/jobdaemon.toml")

#: What can be chosen, as :data:`BACKENDS` can; jobdaemon.app builds each.
PROVIDERS = (
    "local",
    "openai_images",
    "comfyui",
    "dashscope",
    "jimeng",
)


class DatabaseSettings(Section):
    """
    Where the queue lives.

    Attributes:
        url: ``postgresql://…``; None means the embedded server under the data directory. Contents of *url_file*, when given.
        url_file: a file that holds the URL.
        statement_cache: False behind PgBouncer in transaction mode.
        connect_timeout: the longest one connection attempt takes.
    """

    url: OptionalSecret = None
    url_file: OptionalPath = None
    statement_cache: bool = True
    connect_timeout: LongerThanZero = timedelta(seconds=5)


class EngineSettings(Section):
    """
    How daemons keep and lose jobs.

    Attributes:
        heartbeat: how often this daemon says that it is alive.
        lease: a daemon silent for longer loses its jobs; at least three heartbeats.
        poll: the net under the notifications.
        stop_grace: how long running attempts may finish after SIGTERM; 0 hands everything back at once.
    """

    heartbeat: LongerThanZero = timedelta(seconds=5)
    lease: LongerThanZero = timedelta(seconds=15)
    poll: LongerThanZero = timedelta(seconds=5)
    stop_grace: Duration = timedelta(seconds=60)


class QueueSettings(Section):
    """
    One queue, with every default filled in; made by :meth:`Settings.queue`.

    Attributes:
        team_size: parallel attempts of this queue in this daemon; 0 means that this daemon does not work it.
        attempts: runs of a job before it is given up.
        backoff: wait before the second attempt; it doubles each time, up to *backoff_cap*.
        backoff_cap: the longest wait between attempts, before jitter.
        jitter: share by which waits vary, 0.0 to 1.0: 0.2 means ±20 %.
        run_timeout: the longest one attempt may run.
    """

    team_size: int
    attempts: int
    backoff: timedelta
    backoff_cap: timedelta
    jitter: float
    run_timeout: timedelta


class QueueOverrides(Section):
    """What a ``[queues.<name>]`` table says; the keys are those of :class:`QueueSettings`, None where it says nothing."""

    team_size: Annotated[Cores, Field(ge=0, le=10_000)] | None = None
    attempts: Annotated[Whole, Field(ge=1, le=1_000)] | None = None
    backoff: Duration | None = None
    backoff_cap: Duration | None = None
    jitter: Share | None = None
    run_timeout: LongerThanZero | None = None


class PhotosSettings(Section):
    """
    Which photos are accepted, and from where.

    Attributes:
        max_bytes: largest source photo.
        max_pixels: largest source photo, width times height.
        result_max_bytes: largest finished image.
        source_timeout: the longest fetching one source may take, all redirects included.
        allowed_hosts: private hosts that sources may be fetched from all the same (names or addresses).
    """

    max_bytes: Size = 50_000_000
    max_pixels: Annotated[Whole, Field(ge=1, le=10**12)] = 100_000_000
    result_max_bytes: Size = 50_000_000
    source_timeout: LongerThanZero = timedelta(seconds=30)
    allowed_hosts: Hosts = ()


class FilesStoreSettings(Section):
    """
    Artifacts in a folder.

    Attributes:
        root: folder of the artifacts; every daemon must see the same one. Filled in by :class:`Settings`.
        public_url: where a web server of yours serves *root*.
    """

    root: AbsolutePath
    public_url: WebUrl = None


class R2StoreSettings(Section):
    """
    An S3-compatible bucket.

    Attributes:
        endpoint_url: without the bucket.
        bucket: its name.
        access_key_id: contents of *access_key_id_file*, when given.
        access_key_id_file: a file that holds it.
        secret_access_key: contents of *secret_access_key_file*, when given.
        secret_access_key_file: a file that holds it.
        prefix: put before every key; "" or text that ends in "/".
        public_url: where the bucket is served.
    """

    endpoint_url: WebUrl = None
    bucket: OptionalText = None
    access_key_id: OptionalSecret = None
    access_key_id_file: OptionalPath = None
    secret_access_key: OptionalSecret = None
    secret_access_key_file: OptionalPath = None
    prefix: Annotated[str, Field(pattern=r"^([A-Za-z0-9._=-]+/)*$", max_length=256)] = ""
    public_url: WebUrl = None


class StoreSettings(Section):
    """
    Where artifacts live.

    Attributes:
        kind: which of the sections below counts.
    """

    kind: Literal["files", "r2"] = "files"
    files: FilesStoreSettings
    r2: R2StoreSettings = R2StoreSettings()


class LogSettings(Section):
    """
    What is written to standard error.

    Attributes:
        format: auto is text on a terminal and json elsewhere.
        level: the least important lines to show.
    """

    format: Annotated[Literal["auto", "text", "json"], BeforeValidator(lower)] = "auto"
    level: Annotated[Literal["debug", "info", "warning", "error"], BeforeValidator(lower)] = "info"


_QUEUE_NAME = re.compile(r"beautify|upload|generate(\.[a-z][a-z0-9_-]*)?")


def _queue_name(name: str) -> str:
    if not _QUEUE_NAME.fullmatch(name):
        raise ValueError("is not a queue: there are beautify, upload, generate and generate.<provider>")
    return name


#: Least specific first; the team size of generate.local is the machine's, so it is computed in queue().
_QUEUE_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "beautify": {
        "team_size": 1,
        "backoff": timedelta(seconds=2),
        "backoff_cap": timedelta(seconds=10),
        "run_timeout": timedelta(seconds=300),
    },
    "generate": {
        "team_size": 3,
        "backoff": timedelta(seconds=2),
        "backoff_cap": timedelta(seconds=10),
        "run_timeout": timedelta(seconds=600),
    },
    "generate.comfyui": {"team_size": 10},
    "upload": {
        "team_size": 5,
        "backoff": timedelta(seconds=1),
        "backoff_cap": timedelta(seconds=5),
        "run_timeout": timedelta(seconds=30),
    },
}


class Settings(Section):
    """
    The whole tree, made by :func:`load_settings`.

    ``Settings()`` alone is all defaults; it asks the environment for nothing but the home directory.

    Attributes:
        data_dir: state of the embedded server and, unless set otherwise, the artifacts.
        queues: what the configuration says about queues, by name; ask :meth:`queue` for what holds.
    """

    data_dir: AbsolutePath
    database: DatabaseSettings = DatabaseSettings()
    engine: EngineSettings = EngineSettings()
    queues: dict[Annotated[str, AfterValidator(_queue_name)], QueueOverrides] = Field(default_factory=dict)
    plans: PlansSettings = PlansSettings()
    orders: OrdersSettings = OrdersSettings()
    retention: RetentionSettings = RetentionSettings()
    beautify: BeautifySettings = BeautifySettings()
    prewarm: PrewarmSettings = PrewarmSettings()
    generate: GenerateSettings = Field(default_factory=GenerateSettings)
    cache: CacheSettings = CacheSettings()
    superbed: SuperbedSettings = SuperbedSettings()
    photos: PhotosSettings = PhotosSettings()
    store: StoreSettings
    log: LogSettings = LogSettings()

    _origins: dict[str, str] = PrivateAttr(default_factory=dict)
    #: Files that hold secrets, the configuration file included when it does; read by warnings().
    _secret_files: dict[str, Path] = PrivateAttr(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _fill_in_folders(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        data_dir = blank(data.get("data_dir")) or platformdirs.user_data_path("jobdaemon")
        data = {**data, "data_dir": data_dir}
        store = data.get("store", {})
        if isinstance(store, dict) and isinstance(files := store.get("files", {}), dict):
            # A data_dir of the wrong type is one problem, not two: any root will do then.
            root = blank(files.get("root")) or Path(data_dir if isinstance(data_dir, str | Path) else "/") / "artifacts"
            data["store"] = {**store, "files": {**files, "root": root}}
        return data

    @model_validator(mode="after")
    def _check_contradictions(self) -> Settings:
        if problems := list(_contradictions(self)):
            raise PydanticCustomError("contradiction", "{text}", {"text": "\n".join(map(str, problems)), "problems": problems})
        return self

    def loaded_from(self, places: Mapping[str, str], secret_files: Mapping[str, Path]) -> Settings:
        """Remember where the values came from: dotted key -> place, and key -> the file that holds it, for secrets."""
        self._origins.update(places)
        self._secret_files.update(secret_files)
        return self

    def queue(self, name: str) -> QueueSettings:
        """
        The settings of one queue.

        What the configuration says about *name* itself counts first, then what it says about the stage (``generate``), then
        the built-in defaults in the same order.

        Args:
            name: ``beautify``, ``upload`` or ``generate.<provider>``.

        Raises:
            SettingsError: no queue can have that name.
        """
        stage = name.partition(".")[0]
        if not _QUEUE_NAME.fullmatch(name) or name == "generate":
            raise SettingsError(f"{name!r} is not a queue: there are beautify, upload and generate.<provider>")
        values: dict[str, Any] = {"attempts": 3, "jitter": 0.2, **_QUEUE_DEFAULTS[stage]}
        values |= {"team_size": cores()} if name == "generate.local" else _QUEUE_DEFAULTS.get(name, {})
        for level in (stage, name):
            if (overrides := self.queues.get(level)) is not None:
                values |= overrides.model_dump(exclude_none=True)
        return QueueSettings(**values)

    def provider_keys(self) -> dict[str, tuple[ProviderKeySettings, ...]]:
        """The keys of each provider that has any."""
        sections = ((name, getattr(self.generate, name)) for name in type(self.generate).model_fields)
        return {name: keys for name, section in sections if (keys := getattr(section, "keys", ()))}

    def warnings(self) -> list[str]:
        """What is allowed but probably not meant, one sentence each. Looks at the rights of the files that hold secrets."""
        return [str(problem) for problem in _warnings(self, self._secret_files)]

    def origin(self, key: str) -> str:
        """
        Where a value comes from.

        Args:
            key: dotted, as in ``engine.lease`` or ``queues.generate.local.team_size``.

        Returns:
            ``file:line``, the name of a variable, or ``default``; for a secret read from a file, that file and who named it.
        """
        key = key.replace('"', "")
        if (place := self._origins.get(key)) is not None:
            return place
        # Tables in an array stand each in its own place, or together in that of the array, when it is given as one value.
        items = (name for name in self._origins if re.match(rf"{re.escape(key)}\.\d+(\.|$)", name))
        array = re.match(r"(.+?)\.\d+\.\w+$", key)
        return self._origins.get(array[1] if array else next(items, ""), "default")

    def shown(self) -> dict[str, Any]:
        """
        The tree as nested tables of text, numbers, booleans and arrays, for people and for ``config show``.

        Secrets are masked, keys without a value left out; the queues shown are those this configuration works or names.
        """
        tree = {name: _shown(getattr(self, name), name) for name in type(self).model_fields}
        names = {"beautify", f"generate.{self.orders.provider}", "upload"} | (self.queues.keys() - {"generate"})
        tree["queues"] = {name: _shown(self.queue(name), "") for name in sorted(names)}
        return tree


def _shown(value: object, key: str) -> Any:
    match value:
        case BaseModel():
            pairs = ((name, getattr(value, name)) for name in type(value).model_fields)
            return {name: _shown(item, f"{key}.{name}") for name, item in pairs if item is not None}
        case SecretStr():
            return mask_url(value.get_secret_value()) if key == "database.url" else MASK
        case timedelta():
            return format_duration(value)
        case Path():
            return str(value)
        case tuple():
            return [_shown(item, f"{key}.{number}") for number, item in enumerate(value)]
        case dict():
            return {name: _shown(item, f"{key}.{name}") for name, item in value.items()}
        case int() if key.endswith("_bytes"):
            return format_size(value)
    return value


def _contradictions(settings: Settings) -> Iterator[Problem]:
    """Every pair of settings that cannot both hold, and every need of one that another does not meet."""
    engine, orders, r2 = settings.engine, settings.orders, settings.store.r2
    if engine.lease < 3 * engine.heartbeat:
        least = format_duration(3 * engine.heartbeat)
        yield Problem("engine.lease", f"must be at least three times engine.heartbeat, that is {least}")
    if settings.database.url is not None and not re.match(r"postgres(ql)?://", settings.database.url.get_secret_value()):
        yield Problem("database.url", "must start with postgresql://", is_alone=True)
    if settings.store.kind == "r2":
        needed = ("endpoint_url", "bucket", "access_key_id", "secret_access_key")
        for key in (key for key in needed if getattr(r2, key) is None):
            or_file = f" (or store.r2.{key}_file)" if key in ("access_key_id", "secret_access_key") else ""
            yield Problem(f"store.r2.{key}", f'must be set{or_file}, because store.kind is "r2"')
    yield from _queue_contradictions(settings)
    yield from _key_contradictions(settings)
    yield from provider_contradictions(settings.generate, settings.superbed, orders.provider, settings.store.kind)
    if orders.provider not in PROVIDERS:
        yield _unknown_provider("orders.provider", orders.provider)
    yield from _fallback_contradictions(settings)
    yield from _cache_contradictions(settings)
    yield from beautify_contradictions(settings.beautify, settings.queue("beautify").run_timeout)
    yield from plan_contradictions(settings.plans, orders)
    yield from retention_contradictions(settings.retention)


def _unknown_provider(key: str, name: str) -> Problem:
    return Problem(key, f"there is no provider {name!r}; there is {', '.join(PROVIDERS)}", is_alone=True)


def _fallback_contradictions(settings: Settings) -> Iterator[Problem]:
    chains = {f"orders.fallback.{name}": chain for name, chain in settings.orders.fallback.items()}
    chains |= {f"plans.{name}.fallback": plan.fallback or () for name, plan in settings.plans.items()}
    for name in settings.orders.fallback:
        if name not in PROVIDERS:
            yield _unknown_provider(f"orders.fallback.{name}", name)
        elif name in settings.orders.fallback[name]:
            yield Problem(f"orders.fallback.{name}", f"names {name} as its own fallback", is_alone=True)
    for key, chain in chains.items():
        for name in dict.fromkeys(chain):
            if name not in PROVIDERS:
                yield _unknown_provider(key, name)
            elif name not in settings.generate.usable():
                yield Problem(key, f"names {name}, but generate.{name} lacks what it takes to call it")
            if chain.count(name) > 1:
                yield Problem(key, f"names {name} more than once", is_alone=True)


def _cache_contradictions(settings: Settings) -> Iterator[Problem]:
    for name in settings.cache.providers:
        if name == "local":
            text = "names local, which makes its images on this machine: there is nothing to save"
            yield Problem("cache.providers", text, is_alone=True)
        elif name not in PROVIDERS:
            yield _unknown_provider("cache.providers", name)


def _queue_contradictions(settings: Settings) -> Iterator[Problem]:
    for name in settings.queues:
        # "generate" is checked through a queue that has no defaults of its own.
        queue = settings.queue("generate.any" if name == "generate" else name)
        if queue.backoff > queue.backoff_cap:
            shown = f"{format_duration(queue.backoff)}, {format_duration(queue.backoff_cap)}"
            key = "backoff" if settings.queues[name].backoff is not None else "backoff_cap"
            yield Problem(f"queues.{name}.{key}", f"leaves backoff longer than backoff_cap ({shown})")


def _key_contradictions(settings: Settings) -> Iterator[Problem]:
    for provider, keys in settings.provider_keys().items():
        aliases: set[str] = set()
        for number, key in enumerate(keys):
            place = f"generate.{provider}.keys.{number}"
            if key.key is None:
                yield Problem(f"{place}.key", f"must be set (or {place}.key_file)", is_alone=True)
            if key.alias in aliases:
                yield Problem(f"{place}.alias", f"{key.alias} is the alias of another key", is_alone=True)
            aliases.add(key.alias)


def _key_warnings(settings: Settings) -> Iterator[Problem]:
    call = settings.orders.images_per_call
    for provider, keys in settings.provider_keys().items():
        for number, key in enumerate(keys):
            if key.daily_budget is not None and 0 < key.daily_budget < call:
                name = f"generate.{provider}.keys.{number}.daily_budget"
                text = f"is smaller than orders.images_per_call: no call of {call} images ever starts under {key.alias}"
                yield Problem(name, text, settings.origin(name))


def _warnings(settings: Settings, secret_files: Mapping[str, Path]) -> Iterator[Problem]:
    for key, path in secret_files.items():
        try:
            mode = path.stat().st_mode
        except OSError:
            continue  # it was there when the settings were loaded; a credential may go away once it is read
        if stat.S_ISREG(mode) and mode & stat.S_IROTH:
            yield Problem(key, f"{path} holds a secret and everyone on this machine can read it: chmod 640", settings.origin(key))
    yield from _key_warnings(settings)
    for key, text in idle_device(settings.beautify, settings.queue("beautify").team_size):
        wanted = "beautify.backend" if settings.beautify.backend == "gfpgan" else "beautify.weights"
        yield Problem(key, text, settings.origin(wanted))
    store = settings.store
    if store.kind == "r2":
        if store.r2.public_url is None:
            yield Problem("store.r2.public_url", "is not set: finished images will have no public address")
        host = urlsplit(store.r2.endpoint_url or "").hostname
        if (store.r2.endpoint_url or "").startswith("http://") and host not in ("localhost", "127.0.0.1", "::1"):
            place = settings.origin("store.r2.endpoint_url")
            yield Problem("store.r2.endpoint_url", "is not https: photos travel unencrypted", place)
    service_url = settings.beautify.photo_enhance.url or ""
    if service_url.startswith("http://") and urlsplit(service_url).hostname not in ("localhost", "127.0.0.1", "::1"):
        place = settings.origin("beautify.photo_enhance.url")
        yield Problem("beautify.photo_enhance.url", "is not https: photos travel unencrypted", place)
    if all(settings.queue(name).team_size == 0 for name in ("beautify", f"generate.{settings.orders.provider}", "upload")):
        yield Problem("queues", "every team_size is 0: this daemon will do no work")


# ── Loading ──────────────────────────────────────────────────────────────────────────────────────────────────────────────

#: Each may be given itself or as a file that holds it, under the same name with ``_file``.
SECRETS: tuple[Path_, ...] = (
    ("database", "url"),
    ("store", "r2", "access_key_id"),
    ("store", "r2", "secret_access_key"),
    ("generate", "openai_images", "api_key"),
    ("generate", "dashscope", "api_key"),
    ("generate", "jimeng", "access_key_id"),
    ("generate", "jimeng", "secret_access_key"),
    ("superbed", "token"),
)


def load_settings(path: Path | None = None, environ: Mapping[str, str] | None = None) -> Settings:
    """
    Read the configuration: variables over file over defaults.

    Args:
        path: the file, from ``--config``. Without it: ``$JOBDAEMON_CONFIG``, else :data:`SYSTEM_CONFIG`, else
            ``jobdaemon/jobdaemon.toml`` under the user's XDG config home; the last two only if they exist.
        environ: instead of the process's environment.

    Raises:
        SettingsError: every problem on a line of its own, with the key and its ``file:line`` or variable; no secret.
    """
    environ = os.environ if environ is None else environ
    keys = setting_keys()
    path = _config_file(path, environ)
    file = read_file(path) if path is not None else Source()
    variables = read_environment(environ, {".".join(key).lower(): key for key in keys})
    problems = [*file.problems, *variables.problems]
    arrays = _key_arrays(keys)
    if path is not None:
        _resolve_paths(file.table, path.absolute().parent, keys, arrays)
    in_file = [*SECRETS, *secrets_in_arrays(arrays, file.table)]
    in_either = dict.fromkeys([*in_file, *secrets_in_arrays(arrays, variables.table)])
    problems += choose_forms_of_secrets(in_either, file, variables)
    _drop_places_of_replaced(arrays, file, variables)
    table, places = overlay(file.table, variables.table), file.places | variables.places
    secret_files = {dotted(key): path for key in in_file if path is not None and get(file.table, key)}
    problems += read_secret_files([*SECRETS, *secrets_in_arrays(arrays, table)], table, places, secret_files)
    if not get(table, ("data_dir",)):
        table["data_dir"] = _user_folder("data", environ)
    settings = _validated(table, places, problems)
    return settings.loaded_from(places, secret_files)


def setting_keys(section: type[BaseModel] | None = None, prefix: tuple[str, ...] = ()) -> dict[tuple[str, ...], FieldInfo]:
    """Every key of the tree as a path, in order, with its field; the keys of a queue stand once, for the queue ``*``."""
    keys: dict[tuple[str, ...], FieldInfo] = {}
    for name, field in (section or Settings).model_fields.items():
        if name == "queues":
            keys |= setting_keys(QueueOverrides, (*prefix, name, "*"))
        elif isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys |= setting_keys(field.annotation, (*prefix, name))
        else:
            keys[(*prefix, name)] = field
    return keys


def _key_arrays(keys: Mapping[tuple[str, ...], FieldInfo]) -> dict[Path_, tuple[str, ...]]:
    """Where provider keys stand, and which of each one's fields are secrets."""
    arrays: dict[Path_, tuple[str, ...]] = {}
    for path, field in keys.items():
        item = next(iter(get_args(field.annotation)), None)
        if isinstance(item, type) and issubclass(item, ProviderKeySettings):
            fields = item.model_fields.items()
            arrays[path] = tuple(name for name, inner in fields if SecretStr in get_args(inner.annotation))
    return arrays


def _config_file(path: Path | None, environ: Mapping[str, str]) -> Path | None:
    if path is not None:
        return path
    if named := environ.get("JOBDAEMON_CONFIG", "").strip():
        return Path(named).expanduser()
    for candidate in (SYSTEM_CONFIG, _user_folder("config", environ) / "jobdaemon.toml"):
        try:
            candidate.stat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError:
            pass  # it is there but not for us: read_file says so; passing over it could reach another database
        return candidate
    return None


def _user_folder(kind: Literal["data", "config"], environ: Mapping[str, str]) -> Path:
    named = Path(environ.get(f"XDG_{kind.upper()}_HOME", ""))
    if named.is_absolute():
        return named / "jobdaemon"
    return platformdirs.user_data_path("jobdaemon") if kind == "data" else platformdirs.user_config_path("jobdaemon")


def _drop_places_of_replaced(arrays: Iterable[Path_], file: Source, variables: Source) -> None:
    """An array given by a variable replaces the file's whole array."""
    for array in arrays:
        if get(variables.table, array) is not None:
            for place in [place for place in file.places if place.startswith(f"{dotted(array)}.")]:
                del file.places[place]


def _resolve_paths(
    table: Table, folder: Path, keys: Mapping[tuple[str, ...], FieldInfo], arrays: Mapping[Path_, Iterable[str]]
) -> None:
    """Relative paths in a file mean places beside that file, wherever the program was started."""
    paths: list[Path_] = [key for key, field in keys.items() if Path in (field.annotation, *get_args(field.annotation))]
    for key in [*paths, *map(file_form, secrets_in_arrays(arrays, table))]:
        value = get(table, key)
        if isinstance(value, str) and not value.startswith("~"):
            put(table, key, str(folder / value))


def _validated(table: Table, places: Mapping[str, str], problems: list[Problem]) -> Settings:
    settings, found, wrong = _tried(table, places)
    if settings is None and wrong:
        # While a value is wrong nothing looks at what the others mean together: they are tried once more without those.
        rest = deepcopy(table)
        for path in wrong:
            _drop(rest, path)
        _, more, still_wrong = _tried(rest, places)
        if not still_wrong:
            found += [problem for problem in more if not any(_may_follow_from(path, problem) for path in wrong)]
    known = {problem.key for problem in problems}
    # A secret whose file could not be read is missing for a reason already given.
    problems += (problem for problem in found if f"{problem.key}_file" not in known)
    if settings is None or problems:
        raise SettingsError("\n".join(map(str, problems)))  # outside every except: its context would hold the input
    return settings


def _tried(table: Table, places: Mapping[str, str]) -> tuple[Settings | None, list[Problem], list[Path_]]:
    """The settings, or all that is wrong with them, and the paths of the values that are wrong by themselves."""
    try:
        return Settings.model_validate(table), [], []
    except ValidationError as error:
        details = error.errors(include_url=False)
    problems = [problem for one in details for problem in _problems_of(one, places)]
    paths = (_path_of(one) for one in details if one["type"] != "contradiction")
    return None, problems, [path for path in paths if path]


def _path_of(details: ErrorDetails) -> Path_:
    """The setting to blame; of an array the whole."""
    path = tuple(part for part in details["loc"] if part != "[key]")
    number = next((index for index, part in enumerate(path) if isinstance(part, int)), len(path))
    return path[:number]


def _drop(table: Table, path: Path_) -> None:
    inner: Any = table
    for part in path[:-1]:
        inner = inner.get(part) if isinstance(inner, dict) else None
    if isinstance(inner, dict) and path:
        inner.pop(path[-1], None)


def _may_follow_from(wrong: Path_, problem: Problem) -> bool:
    """
    Whether *problem* may be gone once *wrong* is right: it names that setting, or, of queues and providers, one beside it.

    There a setting may stand for another without being named: ``keys`` for ``api_key``, ``queues.generate`` for each provider's.
    """
    if problem.is_alone:
        return False
    name = dotted(wrong[:2] if wrong[0] in ("queues", "generate") else wrong)
    return re.search(rf"\b{re.escape(name)}\b", f"{problem.key} {problem.text}") is not None


def _problems_of(details: ErrorDetails, places: Mapping[str, str]) -> Iterator[Problem]:
    context = details.get("ctx", {})
    if details["type"] == "contradiction":
        for problem in context["problems"]:
            yield Problem(problem.key, problem.text, place_of(problem.key, places))
        return
    key = dotted(tuple(part for part in details["loc"] if part != "[key]"))
    if details["loc"] and isinstance(details["loc"][-1], int):
        key = key.rpartition(".")[0]  # an element of an array of values: the array is the setting
    value = details["input"]
    match details["type"]:
        case "extra_forbidden":
            text = f"is not a setting{_suggestion(key)}"
        case "model_type" | "dict_type" | "model_attributes_type":
            text = "must be a table"
        case "value_error":
            text = str(context["error"])
        case "string_pattern_mismatch":
            text = "has characters that are not allowed here"
        case _:
            text = details["msg"].replace("Input should", "must").replace("should", "must")
            # Numbers help to find the slip; text could be a secret in the wrong place.
            is_shown = isinstance(value, int | float) and not _is_secret(key)
            text += f", not {value}" if is_shown else ""
    yield Problem(key, text, place_of(key, places))


def _is_secret(key: str) -> bool:
    if tuple(key.split(".")) in SECRETS:
        return True
    *_, array, number, name = "", "", "", *key.split(".")
    return array == "keys" and number.isdigit() and name not in ("concurrency", "rate", "daily_budget")


def _suggestion(key: str) -> str:
    parent, _, name = key.rpartition(".")
    at = ["*" if parent.startswith("queues.") and index == 1 else part for index, part in enumerate(parent.split(".", 1))]
    depth = tuple(part for part in ".".join(at).split(".") if part)
    siblings = {path[len(depth)] for path in setting_keys() if path[: len(depth)] == depth and len(path) > len(depth)}
    close = difflib.get_close_matches(name, siblings, n=1)
    return f": did you mean {close[0]}?" if close else ""
