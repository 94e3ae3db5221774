"""
psycopg's query dialect put into asyncpg's: text and values only, no driver and no I/O.

procrastinate writes its statements for psycopg: ``%(name)s`` stands for a value, ``%%`` for a percent sign, and the Python type
of a value decides its Postgres type (a string or None stays untyped, for Postgres to infer). asyncpg wants ``$1`` and lets
Postgres infer every type, which fails in ``%(seconds)s || 'SECOND'`` (a number where text is inferred) and makes JSON depend on
the codecs of the connection. So each value is sent under the type psycopg would give it, as an explicit cast behind its
placeholder, and what is JSON or a composite travels as text: that works on every connection, whatever codecs its owner set and
however often a migration re-created the types.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from functools import lru_cache
from typing import Any
from uuid import UUID

JsonDumps = Callable[[Any], str | bytes]

# Where SQL hides text that must not be read as SQL, and the two things we look for. Identifiers are consumed whole, so that the
# e of `like'…'` is not taken for an escape string and the $ of a$b not for a dollar quote.
_TOKEN = re.compile(
    r"""
      (?P<placeholder>%\((?P<name>[^)]+)\)[sbt](?P<cast>(?=\s*::))?)
    | (?P<percent>%%)
    | (?P<stray>%)
    | (?P<opaque>
          [eE]'(?:[^'\\]|\\.|'')*+'
        | '(?:[^']|'')*+'
        | "(?:[^"]|"")*+"
        | \$(?P<tag>(?:[^\W\d]\w*)?)\$.*?\$(?P=tag)\$
        | --[^\n]*
      )
    | (?P<comment>/\*)
    | (?P<identifier>[^\W\d][\w$]*)
    | (?P<plain>[^\w%'"$/-]+|\d+|.)
    """,
    re.VERBOSE | re.DOTALL,
)
_COMMENT_EDGE = re.compile(r"/\*|\*/")


class PlaceholderError(ValueError):
    """A query's placeholders are malformed, or a value for one of them is missing."""


@dataclass(frozen=True, slots=True)
class _Placeholder:
    """
    A place for a value.

    Attributes:
        name: of the argument.
        is_cast: the query itself says the type, with ``::`` right behind.
    """

    name: str
    is_cast: bool


@dataclass(frozen=True, slots=True)
class _Relation:
    """An unqualified name of one of procrastinate's own tables, types or functions."""

    name: str


_Piece = str | _Placeholder | _Relation


@dataclass(frozen=True, slots=True)
class Statement:
    """
    What asyncpg runs.

    Attributes:
        text: SQL with ``$1`` … ``$n``.
        values: one per ``$n``.
    """

    text: str
    values: tuple[Any, ...]


def bind(query: str, arguments: Mapping[str, Any], *, dumps: JsonDumps, schema: str | None = None) -> Statement:
    """
    Put a psycopg query and its arguments into asyncpg's form.

    A name used twice is one ``$n``. As in psycopg, arguments that the query does not name are ignored. Unlike psycopg, which
    knows nothing of SQL's lexical structure, a ``%(name)s`` inside quotes or comments is left alone.

    Args:
        query: SQL with ``%(name)s`` placeholders and doubled percent signs.
        arguments: values by name; dicts become jsonb, lists of tuples arrays of composites.
        dumps: makes JSON of a dict.
        schema: when given, procrastinate's own names are qualified with it, so that the statement works under any search_path.

    Raises:
        PlaceholderError: a stray percent sign, or an argument is missing.
    """
    numbers: dict[str, int] = {}
    casts: list[str] = []
    values: list[Any] = []
    text: list[str] = []
    for piece in _parse(query):
        if isinstance(piece, str):
            text.append(piece)
        elif isinstance(piece, _Relation):
            text.append(f"{quote_identifier(schema)}.{piece.name}" if schema else piece.name)
        else:
            if piece.name not in numbers:
                if piece.name not in arguments:
                    raise PlaceholderError(f"The query names %({piece.name})s, and no such argument was given.")
                cast, value = _typed(arguments[piece.name], dumps, is_cast=piece.is_cast)
                numbers[piece.name] = len(numbers)
                casts.append(cast)
                values.append(value)
            index = numbers[piece.name]
            text.append(f"${index + 1}{casts[index]}")
    return Statement("".join(text), tuple(values))


def quote_identifier(name: str) -> str:
    """Quote *name* for use in SQL."""
    return '"' + name.replace('"', '""') + '"'


@lru_cache(maxsize=256)
def _parse(query: str) -> tuple[_Piece, ...]:
    pieces: list[_Piece] = []
    position = 0
    before = ""
    while position < len(query):
        match = _TOKEN.match(query, position)
        assert match is not None  # the last alternative takes any character
        end = match.end() if match["comment"] is None else _end_of_comment(query, match.end())
        token = query[position:end]
        if match["stray"] is not None:
            raise PlaceholderError(f"A stray % at character {position} of the query: write %% for a percent sign.")
        if match["placeholder"] is not None:
            pieces.append(_Placeholder(match["name"], is_cast=match["cast"] is not None))
        elif match["identifier"] is not None and token.startswith("procrastinate_") and not before.endswith("."):
            pieces.append(_Relation(token))
        else:
            pieces.append(token.replace("%%", "%"))
        if not token.isspace():
            before = token.rstrip()
        position = end
    return tuple(pieces)


def _end_of_comment(query: str, position: int) -> int:
    """Find the end of a block comment whose opening ends at *position*; they nest, which no regular expression follows."""
    depth = 1
    while depth:
        edge = _COMMENT_EDGE.search(query, position)
        if edge is None:
            return len(query)
        depth += 1 if edge[0] == "/*" else -1
        position = edge.end()
    return position


def _typed(value: Any, dumps: JsonDumps, *, is_cast: bool) -> tuple[str, Any]:
    """Give the cast and the form in which a value is sent, by its Python type as psycopg does."""
    cast = _cast_of_scalar(value)
    if cast is not None:
        return cast, value
    if isinstance(value, dict):
        return "::text::jsonb", _json(value, dumps)
    if isinstance(value, tuple):
        return "::text", _literal(value, dumps)
    if isinstance(value, list):
        return _typed_list(value, dumps, is_cast=is_cast)
    return "", value


def _cast_of_scalar(value: Any) -> str | None:
    """Give the cast for a scalar, '' where Postgres must infer the type, None when *value* is something else."""
    if value is None or isinstance(value, str):
        return ""
    if isinstance(value, bool):
        return "::boolean"
    if isinstance(value, int):
        return _cast_of_integer(value)
    if isinstance(value, datetime):
        return "::timestamp" if value.utcoffset() is None else "::timestamptz"
    for kind, cast in _SCALARS:
        if isinstance(value, kind):
            return cast
    return None


_SCALARS: tuple[tuple[type, str], ...] = (
    (float, "::double precision"),
    (Decimal, "::numeric"),
    (date, "::date"),
    (time, "::time"),
    (timedelta, "::interval"),
    (UUID, "::uuid"),
    (bytes, "::bytea"),
)


def _cast_of_integer(value: int) -> str:
    # The smallest type that holds it: Postgres widens an integer on its way into a function, and never narrows one.
    for bits, cast in ((15, "::smallint"), (31, "::integer"), (63, "::bigint")):
        if -(1 << bits) <= value < 1 << bits:
            return cast
    return "::numeric"


def _typed_list(values: list[Any], dumps: JsonDumps, *, is_cast: bool) -> tuple[str, Any]:
    if is_cast:
        # As text, an array needs no codec: asyncpg has none for composites where a text codec for jsonb is set.
        return "::text", _literal(values, dumps)
    if values and all(isinstance(value, dict) for value in values):
        return "::text::jsonb[]", _literal(values, dumps)
    if any(isinstance(value, dict | tuple) for value in values):
        return "::text", _literal(values, dumps)
    return "", values


def _literal(value: Any, dumps: JsonDumps) -> str:
    """Write a value as Postgres reads it from text; the caller writes NULLs, which look different in arrays and rows."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "t" if value else "f"
    if isinstance(value, dict):
        return _json(value, dumps)
    if isinstance(value, tuple):
        return "(" + ",".join("" if part is None else _quoted(_literal(part, dumps)) for part in value) + ")"
    if isinstance(value, list):
        return "{" + ",".join("NULL" if part is None else _quoted(_literal(part, dumps)) for part in value) + "}"
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, timedelta):
        return f"{value.days} days {value.seconds} seconds {value.microseconds} microseconds"
    if isinstance(value, bytes):
        return "\\x" + value.hex()
    return str(value)


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _json(value: Any, dumps: JsonDumps) -> str:
    encoded = dumps(value)
    return encoded if isinstance(encoded, str) else encoded.decode()
