"""docs/sql.md is true: its examples run, and its tables name what is there."""

from __future__ import annotations

import re
from pathlib import Path

import psycopg
import pytest

from tests.factories import SOURCE, Orders, Sql

PAGE = (Path(__file__).parents[2] / "docs" / "sql.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


def test_sql_examples_run_in_order(engine_database: str) -> None:
    """Every SQL example of the page works, one after another, from a connection without any setting."""
    notices: list[str | None] = []
    with psycopg.connect(engine_database, autocommit=True) as connection:
        connection.add_notice_handler(lambda notice: notices.append(notice.message_primary))
        for block in blocks("sql"):
            connection.execute(block.encode())
    assert len(blocks("sql")) >= 7
    assert notices == ['unknown plan "Gold"; the plans are Free, Start, Pro']


def test_the_python_example_runs(engine_database: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The Python example of the page enqueues an order."""
    (block,) = blocks("python")
    exec(compile(block, "docs/sql.md", "exec"), {"url": engine_database})
    assert capsys.readouterr().out == "1 True\n"


def test_views_have_the_columns_that_the_page_lists(sql: Sql) -> None:
    """The table of views is complete, and its columns stand in their order."""
    listed = {
        view: columns.split(", ") for view, columns in re.findall(r"^\| `(\w+)` \| `([\w, ]+)`[^|]*\|$", PAGE, re.MULTILINE)
    }
    views = sql.execute("SELECT viewname AS name FROM pg_views WHERE schemaname = 'jobdaemon'").fetchall()
    actual = {}
    for view in views:
        description = sql.execute(f"SELECT * FROM jobdaemon.{view['name']} LIMIT 0").description
        actual[view["name"]] = [column.name for column in description or []]
    assert {name: columns for name, columns in listed.items() if name in actual} == actual


def test_every_sqlstate_is_listed() -> None:
    """Each SQLSTATE that a migration raises is explained on the page."""
    migrations = "".join(path.read_text() for path in (Path(__file__).parents[2] / "migrations").glob("*.sql"))
    raised = set(re.findall(r"ERRCODE = '(JD\d{3})'", migrations))
    assert raised <= set(re.findall(r"^\| `(JD\d{3})`", PAGE, re.MULTILINE))


def test_parameters_are_those_of_the_function(sql: Sql, order_factory: Orders) -> None:
    """The table of parameters has the function's names in their order, and each can be given by that name."""
    row = sql.execute("SELECT proargnames[1:pronargs] AS names FROM pg_proc WHERE proname = 'enqueue_order'").fetchone()
    assert row is not None
    section = PAGE.partition("## Enqueue")[2].partition("## ")[0]
    assert re.findall(r'^\| `"?(\w+)"?` \|', section, re.MULTILINE) == row["names"]
    assert sql.execute("SELECT * FROM jobdaemon.enqueue_order(plan => 'Free', source => %s)", [SOURCE]).fetchone() is not None
