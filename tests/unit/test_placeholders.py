"""psycopg's query dialect put into asyncpg's."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from enum import IntEnum
from typing import Any

import pytest
from procrastinate import sql
from procrastinate.schema import SchemaManager

from jobdaemon.queue.placeholders import PlaceholderError, Statement, bind


def _bind(query: str, **arguments: Any) -> Statement:
    return bind(query, arguments, dumps=json.dumps)


def test_a_name_used_twice_is_one_parameter() -> None:
    """The same name is sent once, under the number of its first use."""
    statement = _bind("select %(b)s, %(a)s, %(b)s::varchar", a="x", b="y")
    assert statement == Statement("select $1, $2, $1::varchar", ("y", "x"))


def test_unnamed_arguments_are_ignored() -> None:
    """An argument that the query does not name is not sent."""
    assert _bind("select 1", a=1) == Statement("select 1", ())


def test_a_missing_argument_is_an_error() -> None:
    """A placeholder without an argument is refused before anything is sent."""
    with pytest.raises(PlaceholderError, match=r"%\(a\)s"):
        _bind("select %(a)s")


@pytest.mark.parametrize("query", ["select 5 % 2", "select %s", "select %(a)", "select %(a)d"])
def test_a_stray_percent_is_an_error(query: str) -> None:
    """A percent sign that is neither doubled nor a named placeholder is refused."""
    with pytest.raises(PlaceholderError, match="stray %"):
        _bind(query, a=1)


@pytest.mark.parametrize(
    "opaque",
    [
        "'%(a)s'",
        "'it''s %(a)s'",
        r"E'it\'s %(a)s'",
        r"e'\\' || '%(a)s'",
        '"%(a)s"',
        '"a""%(a)s"',
        "$$ %(a)s $$",
        "$fn$ $$ ' %(a)s $fn$",
        "-- it's %(a)s\n",
        "/* it's /* nested */ %(a)s */",
        "/* never closed %(a)s",
    ],
)
def test_quotes_and_comments_hide_placeholders(opaque: str) -> None:
    """What only looks like a placeholder, inside a literal, a quoted name or a comment, stays as it is."""
    assert _bind(f"select %(b)s, {opaque}", b="x") == Statement(f"select $1, {opaque}", ("x",))


@pytest.mark.parametrize("literal", ["r'\\'", "like'\\'", "a$b", "$1", "1e'2'", "'50%'", "it"])
def test_what_follows_an_ordinary_token_is_still_read(literal: str) -> None:
    """A string whose prefix is no escape prefix, and a dollar inside a name, do not swallow the placeholder behind them."""
    assert _bind(f"select {literal}, %(a)s", a="x").text == f"select {literal}, $1"


def test_doubled_percents_become_single_everywhere() -> None:
    """Psycopg halves percent signs inside quotes and dollar quotes as well."""
    assert _bind("select 5 %% 2, 'a%%', $$ %% $$ -- %%").text == "select 5 % 2, 'a%', $$ % $$ -- %"


def test_the_whole_schema_comes_back_unchanged() -> None:
    """Procrastinate's schema, its percent signs doubled as its schema manager does, is restored to the letter."""
    schema = SchemaManager.get_schema()
    assert bind(schema.replace("%", "%%"), {}, dumps=json.dumps).text == schema


def test_an_unterminated_quote_is_read_in_linear_time() -> None:
    """A malformed query costs time in proportion to its length."""
    start = time.process_time()
    _bind("select '" + "a'' " * 5_000 + "b")
    assert time.process_time() - start < 2


class _Level(IntEnum):
    LOW = 1


@pytest.mark.parametrize(
    ("value", "cast"),
    [
        (None, ""),
        ("x", ""),
        (True, "::boolean"),
        (0, "::smallint"),
        (_Level.LOW, "::smallint"),
        (-(2**15), "::smallint"),
        (2**15, "::integer"),
        (2**31, "::bigint"),
        (2**63, "::numeric"),
        (1.5, "::double precision"),
        (Decimal("1.5"), "::numeric"),
        (datetime(2026, 1, 2, tzinfo=UTC), "::timestamptz"),
        (datetime(2026, 1, 2), "::timestamp"),  # noqa: DTZ001 (a naive one is the case)
        (datetime(2026, 1, 2, tzinfo=UTC).date(), "::date"),
        (timedelta(seconds=1), "::interval"),
        (b"x", "::bytea"),
        (["a", None], ""),
        ([], ""),
        ([1, 2], ""),
    ],
)
def test_scalars_are_sent_under_psycopgs_types(value: Any, cast: str) -> None:
    """A value's Python type gives its cast; integers take the smallest type, since Postgres only widens."""
    assert _bind("%(a)s", a=value) == Statement(f"$1{cast}", (value,))


def test_a_dict_is_sent_as_the_text_of_a_jsonb() -> None:
    """JSON travels as text, so that no codec of the connection sees it."""
    assert _bind("%(a)s", a={"k": "v"}) == Statement("$1::text::jsonb", ('{"k": "v"}',))


def test_json_may_be_dumped_to_bytes() -> None:
    """A json_dumps hook that gives bytes is as good as one that gives text."""
    assert bind("%(a)s", {"a": {}}, dumps=lambda _: b"{}").values == ("{}",)


def test_rows_are_sent_as_an_array_literal() -> None:
    """A list of tuples becomes the text of an array of composites, quoted at both levels."""
    statement = _bind("%(a)s::t[]", a=[("q,(", None, 5, 'say "\\"', {"k": None}, datetime(2026, 1, 2, tzinfo=UTC)), None])
    assert statement.text == "$1::text::t[]"
    row = r'("q,(",,"5","say \"\\\"","{\"k\": null}","2026-01-02T00:00:00+00:00")'
    quoted = row.replace("\\", "\\\\").replace('"', '\\"')
    assert statement.values == (f'{{"{quoted}",NULL}}',)


def test_a_list_that_the_query_casts_is_sent_as_text() -> None:
    """Where the query names the array's type, even an empty list needs no codec."""
    assert _bind("%(a)s :: t[], %(b)s::t[]", a=[], b=["x", None, 1]) == Statement(
        "$1::text :: t[], $2::text::t[]", ("{}", '{"x",NULL,"1"}')
    )


def test_a_list_of_dicts_is_an_array_of_jsonb() -> None:
    """Psycopg makes jsonb[] of it, and so do we."""
    assert _bind("%(a)s", a=[{"k": 1}]) == Statement("$1::text::jsonb[]", (r'{"{\"k\": 1}"}',))


def test_procrastinates_names_are_qualified_once() -> None:
    """With a schema, procrastinate's bare names get it; qualified, quoted and literal ones stay."""
    query = "select procrastinate_f(%(a)s::procrastinate_t[]), x.procrastinate_y, x . procrastinate_z, 'procrastinate_l', procr"
    expected = """select "My ""s".procrastinate_f($1::"My ""s".procrastinate_t[]), x.procrastinate_y, x . procrastinate_z, """
    expected += "'procrastinate_l', procr"
    assert bind(query, {"a": None}, dumps=json.dumps, schema='My "s').text == expected


@pytest.mark.parametrize("name", sorted(set(sql.queries) - {"listen_queue"}))
def test_every_query_of_procrastinate_is_understood(name: str) -> None:
    """No placeholder and no doubled percent sign is left in any of procrastinate's own queries."""
    query = sql.queries[name]
    arguments = {part.split(")")[0]: None for part in query.split("%(")[1:]}
    statement = bind(query, arguments, dumps=json.dumps)
    assert "%" not in statement.text
    assert len(statement.values) == len(arguments)
