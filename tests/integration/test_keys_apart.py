"""Daemons that hold different keys of one provider: what was bought with a key is collected by a daemon that has it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from jobdaemon.domain.job import Task
from jobdaemon.events import JobStarted, KeyMissing
from jobdaemon.sandbox import Behaviour, Sandbox
from jobdaemon.settings import Settings
from tests.daemons import until
from tests.integration.test_orders_dashscope import API, Order, daemon, settings_for


@pytest.fixture
def order(database: str) -> Iterator[Order]:
    """Not placed yet."""
    order = Order(database)
    yield order
    order.close()


def holding(url: str, folder: Path, *aliases: str) -> Settings:
    """Settings of a daemon that has these keys, and no other."""
    keys = [{"alias": alias, "key": f"sk-apart-{alias}-0123456789"} for alias in aliases]
    return settings_for(url, folder, keys=json.dumps(keys), api_key="")


def _key(order: Order, alias: str) -> dict[str, Any]:
    query = "SELECT rested_until, rests, spent FROM jobdaemon.provider_keys WHERE alias = %s"
    [row] = order.connection.execute(query.encode(), [alias]).fetchall()
    return row


async def test_a_daemon_without_the_key_leaves_the_call_to_one_that_has_it(database: str, order: Order, tmp_path: Path) -> None:
    """It does not ask, buy, or rest its own key; why the job waits is explained and warned of; the other one collects."""
    async with Sandbox(Behaviour(latency_s=2.5)) as sandbox:
        both, other = holding(sandbox.url, tmp_path, "b"), holding(sandbox.url, tmp_path, "a")
        async with daemon(both, database) as running:
            await order.place(running)
            await until(lambda: order.accepted() == 2, timeout_s=60)
        seen: list[Any] = []
        async with daemon(other, database, seen) as running:
            await until(lambda: any(isinstance(event, KeyMissing) for event in seen), timeout_s=30)
            told = order.rows("SELECT DISTINCT told, numbers FROM jobdaemon.explain_order(%s) WHERE reason = 'key'")
        assert order.accepted() == 2
        assert not [event for event in seen if isinstance(event, JobStarted) and event.task == Task.GENERATE]
        assert _key(order, "a") == {"rested_until": None, "rests": 0, "spent": 0}
        missing = next(event for event in seen if isinstance(event, KeyMissing))
        assert (missing.provider, missing.alias, missing.jobs) == (API, "b", 2)
        assert [row["told"] for row in told] == [
            "its call is to be collected with the key it was bought with: b is in the settings of no running daemon"
        ]
        assert told[0]["numbers"]["keys"] == [{"alias": "b", "reason": "missing"}]
        async with daemon(both, database):
            await until(order.has_ended, timeout_s=60)
        order.require_complete()
        assert sandbox.report()["apis"][API]["images_bought"] == 6
    assert order.calls() == [("succeeded", 3), ("succeeded", 3)]


async def test_a_key_whose_row_is_deleted_is_given_up(database: str, order: Order, tmp_path: Path) -> None:
    """The operator's word that a key is gone: another one asks for its tasks, and buys what it cannot have."""
    async with Sandbox(Behaviour(latency_s=1.5)) as sandbox:
        async with daemon(holding(sandbox.url, tmp_path, "b"), database) as running:
            await order.place(running)
            await until(lambda: order.accepted() == 2, timeout_s=60)
        order.connection.execute("DELETE FROM jobdaemon.provider_keys")
        async with daemon(holding(sandbox.url, tmp_path, "a"), database):
            await until(order.has_ended, timeout_s=60)
        order.require_complete()
    assert order.calls()[-2:] == [("succeeded", 3), ("succeeded", 3)]
    assert _key(order, "a")["rests"] == 0


async def test_a_task_older_than_a_day_waits_for_nobody(database: str, order: Order, tmp_path: Path) -> None:
    """Every provider has forgotten it: the job does not wait for the daemon that bought it."""
    async with Sandbox(Behaviour(latency_s=1.5)) as sandbox:
        async with daemon(holding(sandbox.url, tmp_path, "b"), database) as running:
            await order.place(running)
            await until(lambda: order.accepted() == 2, timeout_s=60)
        order.connection.execute(
            "UPDATE jobdaemon.provider_calls SET submitted_at = %s", [datetime.now(UTC) - timedelta(hours=25)]
        )
        async with daemon(holding(sandbox.url, tmp_path, "a"), database):
            await until(order.has_ended, timeout_s=60)
        order.require_complete()
    assert _key(order, "a")["rests"] == 0
