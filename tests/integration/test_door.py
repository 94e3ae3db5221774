"""The door under pressure: keys exact for many enqueuers at once, depth overshot by no more than the transactions then open."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import psycopg
import pytest

from tests.factories import SOURCE, Orders, Sql

ENQUEUERS = 50
LIMIT = 20


def _enqueue(url: str, customer: str, keys: list[str | None], start: Barrier) -> list[tuple[object, object]]:
    """(order id, created) of each key, or (None, SQLSTATE): one transaction each, begun when all enqueuers are there."""
    answers: list[tuple[object, object]] = []
    with psycopg.connect(url, autocommit=True) as app:
        start.wait(30)
        for key in keys:
            try:
                row = app.execute("SELECT * FROM jobdaemon.enqueue_order('Free', %s, %s, %s)", [SOURCE, customer, key]).fetchone()
            except psycopg.DatabaseError as error:
                answers.append((None, error.sqlstate))
            else:
                assert row is not None
                answers.append(row)
    return answers


def _all_at_once(url: str, customers: list[str], keys: list[str | None]) -> list[tuple[object, object]]:
    start = Barrier(len(customers))
    with ThreadPoolExecutor(len(customers)) as pool:
        return [answer for answers in pool.map(lambda name: _enqueue(url, name, keys, start), customers) for answer in answers]


def _open_orders(sql: Sql) -> Counter[str]:
    rows = sql.execute(
        "SELECT customer, count(*) AS n FROM jobdaemon.orders WHERE finished_at IS NULL GROUP BY customer"
    ).fetchall()
    return Counter({row["customer"]: row["n"] for row in rows})


def test_keys_are_exact(engine_database: str, sql: Sql) -> None:
    """Fifty enqueuers of the same twenty keys at once: each key is one order, created once, with one job and its images."""
    keys: list[str | None] = [f"k{n}" for n in range(20)]
    answers = _all_at_once(engine_database, ["c"] * ENQUEUERS, keys)
    assert len(answers) == ENQUEUERS * len(keys)
    assert sum(created is True for _, created in answers) == len(keys)
    assert list(Counter(order_id for order_id, _ in answers).values()) == [ENQUEUERS] * len(keys)
    row = sql.execute(
        "SELECT (SELECT count(*) FROM jobdaemon.orders) AS orders, (SELECT count(*) FROM jobdaemon.images) AS images,"
        " (SELECT count(*) FROM jobdaemon.procrastinate_jobs) AS jobs"
    ).fetchone()
    assert row == {"orders": 20, "images": 40, "jobs": 20}


def test_depth_is_overshot_by_what_was_open_at_most(engine_database: str, sql: Sql) -> None:
    """Fifty enqueuers against a depth of twenty: never fewer are let in, never more beyond it than transactions were open."""
    sql.execute("UPDATE jobdaemon.plans SET max_open_orders = %s WHERE name = 'Free'", [LIMIT])
    answers = _all_at_once(engine_database, [f"c{n}" for n in range(ENQUEUERS)], [None] * 4)
    let_in = sum(created is True for _, created in answers)
    assert LIMIT <= let_in < LIMIT + ENQUEUERS
    assert {code for order_id, code in answers if order_id is None} == {"JD002"}
    assert _open_orders(sql).total() == let_in
    # Nobody else is at the door now: it is exact, and stays shut until there is room again.
    assert _all_at_once(engine_database, ["x"], [None] * 3) == [(None, "JD002")] * 3


def test_depth_per_customer(engine_database: str, sql: Sql) -> None:
    """One customer at the door ten times over gets JD003 at its limit; it takes nobody else's room."""
    sql.execute("UPDATE jobdaemon.plans SET max_open_orders_per_customer = 3 WHERE name = 'Free'")
    customers = ["greedy"] * 10 + [f"c{n}" for n in range(10)]
    answers = _all_at_once(engine_database, customers, [None] * 2)
    open_orders = _open_orders(sql)
    assert 3 <= open_orders["greedy"] < 3 + 10
    assert [open_orders[f"c{n}"] for n in range(10)] == [2] * 10
    assert {code for order_id, code in answers if order_id is None} == {"JD003"}


@pytest.mark.parametrize("limit", [1, 5])
def test_depth_is_exact_for_one_after_another(order_factory: Orders, sql: Sql, limit: int) -> None:
    """Where no two transactions are open at once there is no overshoot, and each ended order makes room for one."""
    sql.execute("UPDATE jobdaemon.plans SET max_open_orders = %s WHERE name = 'Free'", [limit])
    orders = [order_factory("Free") for _ in range(limit)]
    for order_id in orders:
        with pytest.raises(psycopg.Error, match=f"queue full: plan Free has {limit} open orders already"):
            order_factory("Free")
        sql.execute("SELECT jobdaemon.cancel_order(%s)", [order_id])
        order_factory("Free")
    assert _open_orders(sql).total() == limit


def test_a_known_key_passes_a_full_door(engine_database: str, sql: Sql, order_factory: Orders) -> None:
    """Fifty who repeat a known key at a full door all get its order back; what follows from an order is never refused."""
    sql.execute("UPDATE jobdaemon.plans SET max_open_orders = 1 WHERE name = 'Free'")
    order_id = order_factory("Free", customer="c", key="k")
    assert _all_at_once(engine_database, ["c"] * ENQUEUERS, ["k"]) == [(order_id, False)] * ENQUEUERS
