"""The Python client on every kind of connection, inside the caller's own transaction."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import psycopg
import pytest
from psycopg.rows import dict_row, namedtuple_row, scalar_row, tuple_row

from jobdaemon.domain.order import NewOrder
from jobdaemon.enqueue import EnqueuedOrder, enqueue, enqueue_async
from jobdaemon.errors import RefusedError
from tests.factories import SOURCE, Sql

Enqueue = Callable[[NewOrder], Awaitable[EnqueuedOrder]]


def test_importing_the_client_imports_no_driver() -> None:
    """An app that has one driver does not pay for the other."""
    program = "import sys, jobdaemon.enqueue; print({'psycopg', 'asyncpg', 'PIL', 'pydantic'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"


@pytest.mark.parametrize("row_factory", [tuple_row, dict_row, namedtuple_row, scalar_row])
def test_any_row_factory_will_do(engine_database: str, row_factory: Any) -> None:
    """What rows the caller's connection makes does not matter."""
    with psycopg.connect(engine_database, row_factory=row_factory) as connection:
        first = enqueue(connection, NewOrder("Free", SOURCE, key="k"))
        assert enqueue(connection, NewOrder("Pro", SOURCE, key="k")) == EnqueuedOrder(first.order_id, created=False)
        assert first.created


def test_the_order_commits_with_the_callers_rows_or_not_at_all(engine_database: str, sql: Sql) -> None:
    """A rollback of the caller's transaction leaves no order; its commit leaves exactly one."""
    with psycopg.connect(engine_database) as connection:
        enqueue(connection, NewOrder("Free", SOURCE))
        connection.rollback()
        assert sql.execute("SELECT FROM jobdaemon.orders").fetchall() == []
        order = enqueue(connection, NewOrder("Free", SOURCE))
        connection.commit()
    assert sql.execute("SELECT id FROM jobdaemon.orders").fetchall() == [{"id": order.order_id}]


async def _on_asyncpg(url: str, order: NewOrder) -> EnqueuedOrder:
    connection = await asyncpg.connect(url)
    # What many apps do; params must not be encoded twice.
    await connection.set_type_codec("jsonb", schema="pg_catalog", encoder=json.dumps, decoder=json.loads)
    try:
        return await enqueue_async(connection, order)
    finally:
        await connection.close()


async def _on_psycopg(url: str, order: NewOrder) -> EnqueuedOrder:
    async with await psycopg.AsyncConnection.connect(url, row_factory=dict_row) as connection:
        return await enqueue_async(connection, order)


async def _on_psycopg_sync(url: str, order: NewOrder) -> EnqueuedOrder:
    with psycopg.connect(url) as connection:
        return enqueue(connection, order)


CLIENTS = [_on_asyncpg, _on_psycopg, _on_psycopg_sync]


@pytest.mark.parametrize("client", CLIENTS)
async def test_every_field_arrives(engine_database: str, sql: Sql, client: Callable[..., Awaitable[EnqueuedOrder]]) -> None:
    """Each field of NewOrder becomes what the column of its name says, over every driver."""
    at = datetime.now(UTC) + timedelta(hours=1)
    params = {"seed": 7, "styles": ["a", {"b": None}], "text": "é'\\u0000"}
    order = NewOrder("Start", SOURCE, "ada", "k-1", ("one", "two'"), 3, "local", params, at, "spring")
    enqueued = await client(engine_database, order)
    assert enqueued.created
    row = sql.execute("SELECT * FROM jobdaemon.orders WHERE id = %s", [enqueued.order_id]).fetchone()
    assert row is not None
    shown = {name: row[name] for name in ("plan", "source", "customer", "key", "provider", "params", "group", "images_total")}
    assert shown == {
        "plan": "Start",
        "source": SOURCE,
        "customer": "ada",
        "key": "k-1",
        "provider": "local",
        "params": params,
        "group": "spring",
        "images_total": 3,
    }
    images = sql.execute("SELECT prompt FROM jobdaemon.images WHERE order_id = %s ORDER BY index", [enqueued.order_id]).fetchall()
    assert [image["prompt"] for image in images] == ["one", "one", "two'"]
    job = sql.execute("SELECT scheduled_at FROM jobdaemon.procrastinate_jobs").fetchone()
    assert job == {"scheduled_at": at}


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize(
    ("order", "sqlstate", "words"),
    [
        (NewOrder("Gold", SOURCE), "JD001", 'unknown plan "Gold"; the plans are Free, Start, Pro'),
        (NewOrder("Free", "http://127.0.0.1/"), "JD004", "bad source: it must be https://"),
        (NewOrder("Free", SOURCE, prompts=()), "JD004", "0 prompts for 2 images"),
        (NewOrder("Free", SOURCE, provider="nobody"), "JD005", 'unknown provider "nobody"'),
    ],
)
async def test_a_refusal_has_its_code_and_the_databases_sentence(
    engine_database: str, client: Callable[..., Awaitable[EnqueuedOrder]], order: NewOrder, sqlstate: str, words: str
) -> None:
    """Every driver's error becomes the same RefusedError; the sentence carries no query, hint or position."""
    with pytest.raises(RefusedError) as caught:
        await client(engine_database, order)
    assert caught.value.sqlstate == sqlstate
    assert str(caught.value).startswith(words)
    assert "\n" not in str(caught.value)


def test_a_refusal_inside_a_savepoint_leaves_the_transaction_usable(engine_database: str, sql: Sql) -> None:
    """Who enqueues inside a savepoint may go on after a refusal."""
    with psycopg.connect(engine_database) as connection:
        with pytest.raises(RefusedError), connection.transaction():
            enqueue(connection, NewOrder("Gold", SOURCE))
        order = enqueue(connection, NewOrder("Free", SOURCE))
    assert sql.execute("SELECT id FROM jobdaemon.orders").fetchall() == [{"id": order.order_id}]


async def test_other_errors_stay_the_drivers_own(empty_database: str) -> None:
    """What is no refusal of ours reaches the caller as its driver raised it."""
    with psycopg.connect(empty_database) as connection, pytest.raises(psycopg.errors.InvalidSchemaName):
        enqueue(connection, NewOrder("Free", SOURCE))
    connection_ = await asyncpg.connect(empty_database)
    with pytest.raises(asyncpg.InvalidSchemaNameError):
        await enqueue_async(connection_, NewOrder("Free", SOURCE))
    await connection_.close()
