"""The kinds of values that settings take: how each is read from what a person wrote, and which ones are refused."""

from __future__ import annotations

import json
import os
import re
from datetime import timedelta
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr

from jobdaemon.settings_sources import array_of_text
from jobdaemon.units import parse_duration, parse_size


class Section(BaseModel):
    """Base of every section: frozen, no unknown keys, and errors that do not repeat what was written."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, allow_inf_nan=False)


def cores() -> int:
    """How many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def number(value: object) -> object:
    """*value*, which must not be true or false."""
    if isinstance(value, bool):  # pydantic would take true for 1
        raise ValueError("must be a number")  # noqa: TRY004 - pydantic gathers ValueErrors; a TypeError would pass through
    return value


def _count_of_cores(value: object) -> object:
    return cores() if value == "cores" else number(value)


def blank(value: object) -> object:
    """None for the empty text, which means "not given"; anything else is left alone."""
    return None if isinstance(value, str) and not value.strip() else value


def _never(value: object) -> object:
    return None if isinstance(value, str) and value.strip() in ("", "never") else value


def _path(value: object) -> object:
    if isinstance(value, str):
        if "\0" in value:
            raise ValueError("must be a path")
        try:
            value = Path(value).expanduser()
        except RuntimeError:
            raise ValueError("names a home directory that does not exist") from None
    if isinstance(value, Path):
        return Path.cwd() / value  # load_settings has already resolved paths that stand in a file against its folder
    if value is not None:
        raise ValueError("must be a path")
    return None


def lower(value: object) -> object:
    """Text in lower case, so that ``INFO`` is ``info``."""
    return value.strip().lower() if isinstance(value, str) else value


def _web_url(value: object) -> object:
    if not isinstance(value, str) or blank(value) is None:
        return blank(value)
    if not _is_web_url(value.strip()):
        raise ValueError('must be a web address without a password or a query, such as "https://images.example.com"')
    return value.strip().rstrip("/")


def _is_web_url(value: str) -> bool:
    try:
        parts = urlsplit(value)
        has_good_host = bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False
    is_bare = parts.username is None and not parts.query and not parts.fragment and not re.search(r"\s", value)
    return parts.scheme in ("http", "https") and has_good_host and is_bare


def _table(value: object) -> object:
    """A JSON object given as text (as the environment does) becomes a table; the empty text an empty one."""
    if isinstance(value, str):
        try:
            parsed = json.loads(value) if value.strip() else {}
        except (ValueError, RecursionError):
            parsed = None
        if not isinstance(parsed, dict):
            raise ValueError('must be a table of arrays: {"one": ["two"]}')  # noqa: TRY004 - pydantic gathers ValueErrors only
        return parsed
    return value


def _hosts(value: object) -> object:
    if isinstance(value, str) and not value.lstrip().startswith("["):
        value = [host for host in re.split(r"[,\s]+", value) if host]
    value = array_of_text(value)
    if not isinstance(value, list | tuple) or not all(isinstance(host, str) for host in value):
        raise ValueError('must be an array of host names: ["photos.example.com"]')
    if any(not host or re.search(r"[/\s@]", host) for host in value):
        raise ValueError("must name hosts only, such as photos.example.com or 10.0.0.5: no scheme, path or range")
    return tuple(host.lower() for host in value)


Duration = Annotated[timedelta, BeforeValidator(parse_duration)]
LongerThanZero = Annotated[Duration, Field(gt=timedelta(0))]
#: None means "never"; in a variable, where the empty text is no value, the word says so.
DurationOrNever = Annotated[LongerThanZero | None, BeforeValidator(_never)]
Size = Annotated[int, BeforeValidator(parse_size), Field(gt=0)]
Whole = Annotated[int, BeforeValidator(number)]
Priority = Annotated[Whole, Field(ge=-1_000_000, le=1_000_000)]
OptionalPriority = Annotated[Priority | None, BeforeValidator(blank)]
Cores = Annotated[int, BeforeValidator(_count_of_cores)]
Share = Annotated[float, BeforeValidator(number), Field(ge=0, le=1)]
PerSecond = Annotated[float, BeforeValidator(number), Field(ge=0.0001, le=10_000)]
#: The empty text means "not given" wherever nothing is a possible value, in the file as in the environment.
OptionalPath = Annotated[Path | None, BeforeValidator(_path), BeforeValidator(blank)]
AbsolutePath = Annotated[Path, BeforeValidator(_path)]
OptionalSecret = Annotated[SecretStr | None, BeforeValidator(blank)]
OptionalText = Annotated[str | None, BeforeValidator(blank)]
WebUrl = Annotated[str | None, BeforeValidator(_web_url)]
#: The same where one is always needed.
ServiceUrl = Annotated[str, BeforeValidator(_web_url)]
WebUrls = Annotated[tuple[ServiceUrl, ...], BeforeValidator(array_of_text)]
Hosts = Annotated[tuple[str, ...], BeforeValidator(_hosts)]
Prompts = Annotated[tuple[str, ...], BeforeValidator(array_of_text), Field(min_length=1)]
#: A provider's, backend's or queue's name; whether it exists is for the composition root to say.
Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]*$", max_length=64)]
OptionalNames = Annotated[tuple[Name, ...] | None, BeforeValidator(array_of_text), BeforeValidator(blank)]
#: A table of arrays; as a variable a JSON object.
NamesByName = Annotated[dict[Name, Annotated[tuple[Name, ...], BeforeValidator(array_of_text)]], BeforeValidator(_table)]
