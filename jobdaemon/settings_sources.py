"""
Where settings are written: the TOML file and the environment, read into plain tables that remember their places.

What the keys mean and which values they take is the business of :mod:`jobdaemon.settings`.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ENVIRONMENT_PREFIX = "JOBDAEMON_"
#: A key or password is short; more is the wrong file.
_MAX_SECRET_BYTES = 65_536
#: Read elsewhere: the file to load, and whatever the project's tests need.
_NOT_SETTINGS = re.compile(r"JOBDAEMON_(CONFIG\Z|TEST_)")
#: The one short name that the general rule does not give.
_SHORT_NAMES = {"JOBDAEMON_DATABASE_URL": "database.url"}

Path_ = tuple[str | int, ...]
Table = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Problem:
    """
    One thing wrong with the settings.

    Attributes:
        key: dotted, as in ``engine.lease``; empty when no key is to blame.
        text: what is wrong and what to write instead; never a secret.
        place: ``file:line`` or the variable's name; empty for a default.
        is_alone: it is wrong whatever the other settings are; else *key* and *text* name those that it depends on.
    """

    key: str
    text: str
    place: str = ""
    is_alone: bool = False

    def __str__(self) -> str:
        return ": ".join(part for part in (self.place, self.key, self.text) if part)


@dataclass(frozen=True, slots=True)
class Source:
    """
    What one source says.

    Attributes:
        table: nested like the tree; queue names are single keys (``table["queues"]["generate.local"]``).
        places: dotted key of every value and every table header -> ``file:line`` or variable name; a table in an array has its
            number, from 0, as a part of its key.
        problems: what could not be read; the rest is still there, so that all problems are reported at once.
    """

    table: Table = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def place_of(key: str, places: Mapping[str, str]) -> str:
    """Where *key* stands, else something in it, else the nearest table around it; empty when nothing of it stands anywhere."""
    inside = (place for name, place in places.items() if name == key or name.startswith(f"{key}."))
    if (place := places.get(key) or next(inside, None)) is not None:
        return place
    parent = key.rpartition(".")[0]
    return place_of(parent, places) if parent else ""


def read_file(path: Path) -> Source:
    """Read a TOML file; one that cannot be read or parsed is a problem, not an exception."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        return Source(problems=[Problem("", f"cannot be read ({error.strerror or type(error).__name__})", str(path))])
    except UnicodeDecodeError:
        return Source(problems=[Problem("", "is not UTF-8 text", str(path))])
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        return Source(problems=[_syntax_problem(path, str(error))])
    except (ValueError, RecursionError):  # what tomllib leaves to Python: a number of thousands of digits, arrays in arrays in …
        return Source(problems=[Problem("", "holds a number that is too long, or is nested too deeply", str(path))])
    source = Source(table)
    for key, line in _lines(text.replace("\r\n", "\n")):
        place = f"{path}:{line}"
        if key in source.places and not _is_table(table, key):
            source.problems.append(Problem(key, f"was already given at {source.places[key]}", place))
        source.places.setdefault(key, place)
    if isinstance(queues := table.get("queues"), dict):
        table["queues"] = dict(_flat_queues(queues))
    return source


def _syntax_problem(path: Path, message: str) -> Problem:
    found = re.fullmatch(r"(.*) \(at (?:line (\d+), column \d+|end of document)\)", message, re.DOTALL)
    if found is None:
        return Problem("", f"is not valid TOML: {message}", str(path))
    return Problem("", f"is not valid TOML: {found[1]}", f"{path}:{found[2]}" if found[2] else str(path))


def _lines(text: str) -> Iterator[tuple[str, int]]:
    """
    The line (from 1) on which each key and table header of a valid document stands.

    tomllib keeps no positions, but it can tell where a statement ends: the first line up to which it parses alone.
    """
    lines = text.split("\n")
    header: tuple[str, ...] = ()
    count_by_array: dict[tuple[str, ...], int] = {}
    start = 0
    while start < len(lines):
        for end in range(start + 1, len(lines) + 1):
            try:
                statement = tomllib.loads("\n".join(lines[start:end]))
            except tomllib.TOMLDecodeError:
                continue
            break
        else:  # pragma: no cover - the whole document has parsed, so each of its statements does
            return
        for path in _leaf_paths(statement):
            if lines[start].lstrip().startswith("["):
                header = path
                if lines[start].lstrip().startswith("[["):
                    number = count_by_array[path] = count_by_array.get(path, -1) + 1
                    header = (*path, str(number))
                yield ".".join(header), start + 1
            else:
                yield ".".join(header + path), start + 1
        start = end


def _leaf_paths(table: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    for key, value in table.items():
        if isinstance(value, dict) and value:
            yield from ((key, *rest) for rest in _leaf_paths(value))
        else:
            yield (key,)


def _is_table(table: Table, dotted: str) -> bool:
    value: Any = table
    for part in dotted.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return isinstance(value, dict)


def _flat_queues(queues: Table, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """``[queues.generate.local]`` and ``[queues."generate.local"]`` name the same queue."""
    flat: dict[str, Any] = {}
    for name, value in queues.items():
        if not isinstance(value, dict):
            flat[prefix + name] = value
            continue
        own = {key: item for key, item in value.items() if not isinstance(item, dict)}
        nested = {key: item for key, item in value.items() if isinstance(item, dict)}
        if own or not nested:
            flat[prefix + name] = {**flat.get(prefix + name, {}), **own}
        for key, item in _flat_queues(nested, f"{prefix}{name}."):
            flat[key] = {**flat.get(key, {}), **item}
    yield from flat.items()


def dotted(path: Path_) -> str:
    """A path as people write it: ``engine.lease``."""
    return ".".join(map(str, path))


def read_environment(environ: Mapping[str, str], keys: Mapping[str, Path_]) -> Source:
    """
    Read ``JOBDAEMON_<SECTION>__<KEY>`` variables; empty ones count as not set.

    Args:
        environ: the variables.
        keys: every setting that may be given, as dotted key in lower case -> its path in the tree. Keys of a queue are
            given once, for the queue ``*``.
    """
    source = Source()
    for name in sorted(environ):
        if not name.startswith(ENVIRONMENT_PREFIX) or _NOT_SETTINGS.match(name) or not environ[name].strip():
            continue
        path = _path_of(_SHORT_NAMES.get(name) or name.removeprefix(ENVIRONMENT_PREFIX).replace("__", ".").lower(), keys)
        if path is None:
            source.problems.append(Problem("", "is not a setting of jobdaemon", name))
            continue
        key = dotted(path)
        if key in source.places:
            source.problems.append(Problem(key, f"is already set by {source.places[key]}: unset one of them", name))
            continue
        source.places[key] = name
        put(source.table, path, environ[name].strip())
    return source


def _path_of(name: str, keys: Mapping[str, Path_]) -> Path_ | None:
    first, *middle, last = name.split(".") if "." in name else (name, "")
    if first == "queues" and middle and all(middle) and f"queues.*.{last}" in keys:
        return ("queues", ".".join(middle), last)
    return keys.get(name) if "*" not in name else None


def put(table: Table, path: Path_, value: object) -> None:
    """Set a value in a nested table, making the tables on the way; a number is a place in an array that is there."""
    inner: Any = table
    for part in path[:-1]:
        inner = inner[part] if isinstance(part, int) else inner.setdefault(part, {})
    inner[path[-1]] = value


def get(table: Table, path: Path_) -> Any:
    """The value at *path*; None when there is none, or only the empty text."""
    value: Any = table
    for part in path:
        if isinstance(part, int):
            value = value[part] if isinstance(value, list) and part < len(value) else None
        else:
            value = value.get(part) if isinstance(value, dict) else None
    return None if isinstance(value, str) and not value.strip() else value


def overlay(below: Table, above: Table) -> Table:
    """*below* with the values of *above* on top, table by table; neither argument is changed."""
    merged = dict(below)
    for key, value in above.items():
        under = merged.get(key)
        merged[key] = overlay(under, value) if isinstance(under, dict) and isinstance(value, dict) else value
    return merged


def array_of_text(value: object) -> object:
    """A JSON array given as text (as the environment does) becomes a list; everything else is left alone."""
    if isinstance(value, str):
        try:
            parsed = json.loads(value)
        except (ValueError, RecursionError):
            parsed = None
        if not isinstance(parsed, list):
            raise ValueError('must be an array: ["one", "two"]')  # noqa: TRY004 - pydantic gathers ValueErrors only
        return parsed
    return value


def array_of_tables(value: object) -> object:
    """A JSON array of objects given as text (as the environment does) becomes a list; everything else is left alone."""
    if isinstance(value, str):
        try:
            parsed = json.loads(value)
        except (ValueError, RecursionError):
            parsed = None
        if not isinstance(parsed, list):
            raise ValueError('must be an array of tables, in a variable [{"alias": "one"}]')  # noqa: TRY004 - as above
        return parsed
    return value


def secrets_in_arrays(arrays: Mapping[Path_, Iterable[str]], table: Table) -> Iterator[Path_]:
    """
    The paths of the secrets in every table of these arrays; an array given as JSON text is put in its place as one.

    Args:
        arrays: path -> names of the secrets in each of its tables.
    """
    for path, names in arrays.items():
        try:
            value = array_of_tables(get(table, path))
        except ValueError:
            continue  # the validation says so
        if not isinstance(value, list):
            continue
        put(table, path, value)
        yield from ((*path, number, name) for number, item in enumerate(value) if isinstance(item, dict) for name in names)


def file_form(key: Path_) -> Path_:
    """Where the file that holds this secret is named."""
    return (*key[:-1], f"{key[-1]}_file")


def choose_forms_of_secrets(secrets: Iterable[Path_], file: Source, variables: Source) -> Iterator[Problem]:
    """Both forms in one source are a contradiction; a form in the environment replaces either form in the file."""
    for key in secrets:
        forms = (key, file_form(key))
        for source in (file, variables):
            if all(get(source.table, form) is not None for form in forms):
                file_key = dotted(forms[1])
                yield Problem(file_key, f"cannot be given together with {dotted(key)}", place_of(file_key, source.places))
        if any(get(variables.table, form) is not None for form in forms):
            for form in forms:
                if get(file.table, form) is not None:
                    put(file.table, form, "")
                    file.places.pop(dotted(form), None)


def read_secret_files(
    secrets: Iterable[Path_], table: Table, places: dict[str, str], secret_files: dict[str, Path]
) -> Iterator[Problem]:
    """Put what secret files hold where the secret itself would stand; notes the files and places of what it read."""
    for key in secrets:
        name = get(table, file_form(key))
        if not isinstance(name, str) or get(table, key) is not None:
            continue
        own, file_key = dotted(key), dotted(file_form(key))
        place = place_of(file_key, places)
        try:
            secret = _read_secret(Path(name).expanduser())
        except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: a home directory that does not exist
            reason = error.strerror if isinstance(error, OSError) else str(error)
            yield Problem(file_key, f"{name} cannot be used: {reason}", place)
            continue
        put(table, key, secret)
        places[own] = f"{name} (named by {place})"
        secret_files[own] = Path(name).expanduser()


def _read_secret(path: Path) -> str:
    with path.open("rb") as stream:
        content = stream.read(_MAX_SECRET_BYTES + 1)
    if len(content) > _MAX_SECRET_BYTES:
        raise ValueError("it is too large to be a secret")
    try:
        secret = content.decode().strip()
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8 text") from None
    if not secret or not secret.isprintable():
        raise ValueError("it must hold one line of text")
    return secret
