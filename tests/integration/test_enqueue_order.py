"""The door: enqueue_order from any connection, exact keys, dealt prompts, and one clear error for each kind of bad input."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg import errors

from tests.effort import examples
from tests.factories import SOURCE, Orders, Sql

TABLES = ("orders", "images", "procrastinate_jobs", "procrastinate_events")


def _counts(sql: Sql) -> dict[str, int]:
    rows = {table: sql.execute(f"SELECT count(*) AS n FROM jobdaemon.{table}".encode()).fetchone() for table in TABLES}
    return {table: row["n"] for table, row in rows.items() if row is not None}


def _refused(orders: Orders, **arguments: Any) -> psycopg.Error:
    with pytest.raises(psycopg.Error) as caught:
        orders(**arguments)
    assert _counts(orders.sql) == dict.fromkeys(TABLES, 0)
    return caught.value


def test_rollback_of_the_callers_transaction_leaves_nothing(engine_database: str, sql: Sql) -> None:
    """An order lives and dies with the caller's own transaction, on a connection that knows nothing of our schema."""
    with psycopg.connect(engine_database) as app:
        app.execute("CREATE TABLE app_orders (id bigint)")
        app.commit()
        app.execute("INSERT INTO app_orders SELECT order_id FROM jobdaemon.enqueue_order('Free', %s)", [SOURCE])
        app.rollback()
        assert _counts(sql) == dict.fromkeys(TABLES, 0)
        app.execute("INSERT INTO app_orders SELECT order_id FROM jobdaemon.enqueue_order('Free', %s)", [SOURCE])
        app.commit()
    assert _counts(sql) == {"orders": 1, "images": 2, "procrastinate_jobs": 1, "procrastinate_events": 1}


def test_caller_may_have_any_search_path(engine_database: str) -> None:
    """A hostile search_path changes nothing: the functions pin their own."""
    with psycopg.connect(engine_database) as app:
        app.execute("CREATE SCHEMA evil; CREATE TABLE evil.plans (name text, images integer); SET search_path = evil, public")
        row = app.execute("SELECT * FROM jobdaemon.enqueue_order('Free', %s)", [SOURCE]).fetchone()
    assert row is not None
    assert row[1] is True


def test_order_is_one_beautify_job_of_the_plans_priority(order_factory: Orders) -> None:
    """An accepted order is queued with its images pending and one beautify job that carries the plan's priority."""
    order_id = order_factory("Free", customer="ann", key="7", group="g", params={"seed": 1})
    order = order_factory.row(order_id)
    assert (order["status"], order["priority"], order["provider"], order["images_total"]) == ("queued", 300, "local", 2)
    assert (order["customer"], order["key"], order["group"], order["params"]) == ("ann", "7", "g", {"seed": 1})
    assert [image["status"] for image in order_factory.images(order_id)] == ["pending", "pending"]
    [job] = order_factory.jobs(order_id)
    assert (job["queue_name"], job["task_name"], job["priority"], job["status"]) == (
        "beautify",
        "jobdaemon.beautify",
        300,
        "todo",
    )


def test_key_is_exact_under_concurrency(engine_database: str, sql: Sql) -> None:
    """Thirty enqueuers of one key at once get one order, created once."""

    def enqueue(_: int) -> tuple[int, bool]:
        with psycopg.connect(engine_database) as app:
            row = app.execute("SELECT * FROM jobdaemon.enqueue_order('Free', %s, 'c', 'k')", [SOURCE]).fetchone()
            assert row is not None
            return row

    with ThreadPoolExecutor(30) as pool:
        answers = list(pool.map(enqueue, range(30)))
    assert len({order_id for order_id, _ in answers}) == 1
    assert sum(created for _, created in answers) == 1
    assert _counts(sql)["procrastinate_jobs"] == 1


def test_key_belongs_to_its_customer_and_outlives_the_order(order_factory: Orders) -> None:
    """The same key of another customer is another order; the same key of an ended order gives that order back."""
    first = order_factory("Free", customer="a", key="k")
    assert order_factory("Free", customer="b", key="k") != first
    order_factory.sql.execute("SELECT jobdaemon.cancel_order(%s)", [first])
    assert order_factory("Pro", source="https://other.example/x", customer="a", key="k") == first
    assert order_factory("Free", customer="a", key="") != order_factory("Free", customer="a", key="")


@settings(max_examples=examples(40), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_prompts_are_dealt_in_order(order_factory: Orders, data: st.DataObject) -> None:
    """K prompts are dealt over N images in order, N/K each and the first N mod K one more."""
    images = data.draw(st.integers(1, 70))
    prompts = [f"p{n}" for n in range(data.draw(st.integers(1, images)))]
    dealt = [image["prompt"] for image in order_factory.images(order_factory("Pro", prompts=prompts, images=images))]
    each, more = divmod(images, len(prompts))
    assert dealt == [prompt for n, prompt in enumerate(prompts) for _ in range(each + (n < more))]


@pytest.mark.parametrize("name", ["Gold", "", "free", "x" * 10_000, "'; DROP TABLE orders; --", None])
def test_unknown_plan(order_factory: Orders, name: str | None) -> None:
    """JD001 names what was asked for, shortened, and the plans there are."""
    error = _refused(order_factory, plan=name)
    assert error.sqlstate == "JD001"
    assert "the plans are Free, Start, Pro" in str(error)
    assert len(str(error)) < 500


def test_queue_full(order_factory: Orders) -> None:
    """JD002 once a plan has its most open orders; an order known by its key is given back all the same."""
    order_factory.sql.execute("UPDATE jobdaemon.plans SET max_open_orders = 2 WHERE name = 'Free'")
    first = order_factory("Free", key="1")
    order_factory("Free")
    with pytest.raises(psycopg.Error, match="queue full: plan Free has 2 open orders already") as caught:
        order_factory("Free")
    assert caught.value.sqlstate == "JD002"
    assert order_factory("Free", key="1") == first
    order_factory("Start")
    order_factory.sql.execute("SELECT jobdaemon.cancel_order(%s)", [first])
    order_factory("Free")


def test_too_many_open_orders_of_a_customer(order_factory: Orders) -> None:
    """JD003 counts one customer's open orders of the plan alone."""
    order_factory.sql.execute("UPDATE jobdaemon.plans SET max_open_orders_per_customer = 1 WHERE name = 'Free'")
    order_factory("Free", customer="a")
    order_factory("Free", customer="b")
    with pytest.raises(psycopg.Error, match="this customer has 1 open orders of plan Free already") as caught:
        order_factory("Free", customer="a")
    assert caught.value.sqlstate == "JD003"


@pytest.mark.parametrize(
    "source",
    [
        "/etc/passwd",
        "http://127.0.0.1/",
        "file:///x",
        "artifact:../x",
        "artifact:a/../x",
        "artifact:a/.",
        "artifact:/etc/passwd",
        "artifact:",
        "artifact:a//b",
        "artifact:a b",
        "https://",
        "https:///x",
        "https://a/\nHost: b",
        "https://a/x\n",
        "https://a b/",
        " https://a/",
        "HTTPS:/x",
        "ftp://a/x",
        "javascript:alert(1)",
        "https://a/" + "x" * 5000,
        "artifact:" + "x" * 5000,
        "",
        None,
    ],
)
def test_bad_source(order_factory: Orders, source: str | None) -> None:
    """JD004 for whatever is neither https nor an artifact's key, without repeating it."""
    error = _refused(order_factory, source=source)
    assert error.sqlstate == "JD004"
    assert "it must be https://… or artifact:<key>" in str(error)


@pytest.mark.parametrize(
    "source", ["https://a.example/x?y=%20#z", "https://[::1]:8443/x", "artifact:sources/ab/c-d_e.jpg", "artifact:...a"]
)
def test_good_source(order_factory: Orders, source: str) -> None:
    """What is https or an artifact's key is taken as it is."""
    assert order_factory.row(order_factory("Free", source=source))["source"] == source


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"prompts": ["p"] * 10_000}, "10000 prompts for 30 images: give 1 to 30 prompts"),
        ({"prompts": []}, "0 prompts for 30 images"),
        ({"prompts": ["a", "b" * 100_000]}, "prompt 2 is 100000 bytes long; at most 4000 are allowed"),
        ({"prompts": ["a", ""]}, "prompt 2 is empty"),
        ({"prompts": [" \t\n\v\f "]}, "prompt 1 is empty"),
        ({"prompts": ["a", None]}, "prompt 2 is empty"),
        ({"prompts": [["a", "b"], ["c", "d"]]}, "prompts must be a plain list"),
        ({"images": 0}, "plan Start gives 1 to 30 images, not 0"),
        ({"images": -1}, "not -1"),
        ({"plan": "Pro", "images": 71}, "plan Pro gives 1 to 70 images, not 71"),
        ({"images": 2, "prompts": ["a", "b", "c"]}, "3 prompts for 2 images"),
        ({"params": "[]"}, "params must be a JSON object"),
        ({"params": "null"}, "params must be a JSON object"),
        ({"params": None}, "params must be a JSON object"),
        ({"params": {"x": "y" * 70_000}}, "params must be a JSON object of at most 65536 bytes"),
        ({"key": "k" * 256}, "the key is 256 bytes long"),
        ({"customer": "c" * 256}, "customer and group may be at most 255 bytes long"),
        ({"group": "g" * 256}, "customer and group may be at most 255 bytes long"),
        ({"at": "infinity"}, "at most a year ahead"),
        ({"at": "9999-01-01"}, "at most a year ahead"),
    ],
)
def test_bad_prompts_and_the_rest(order_factory: Orders, arguments: dict[str, Any], words: str) -> None:
    """JD004 says what is wrong, and nothing of the order is written."""
    error = _refused(order_factory, **arguments)
    assert error.sqlstate == "JD004"
    assert words in str(error)
    assert len(str(error)) < 500


def test_unknown_provider(order_factory: Orders) -> None:
    """JD005 for a provider that has no queue."""
    error = _refused(order_factory, provider="nope")
    assert error.sqlstate == "JD005"
    assert 'unknown provider "nope"' in str(error)


def test_nothing_at_all(order_factory: Orders) -> None:
    """NULL for everything is an unknown plan, not a crash."""
    nothing = dict.fromkeys(("plan", "source", "customer", "key", "prompts", "images", "provider", "params", "at", "group"))
    assert _refused(order_factory, **nothing).sqlstate == "JD001"


def test_nulls_that_mean_nothing_said(order_factory: Orders) -> None:
    """NULL customer, key, prompts, images, provider, at and group mean the defaults."""
    nothing: dict[str, Any] = dict.fromkeys(("customer", "key", "prompts", "images", "provider", "at", "group"))
    order = order_factory.row(order_factory("Start", **nothing))
    assert (order["customer"], order["key"], order["images_total"], order["provider"]) == ("", None, 30, "local")


def test_scheduled_order_waits(order_factory: Orders) -> None:
    """An order for later has a job that is not ready yet, and expires counted from then; the past is now."""
    later = order_factory("Free", at="tomorrow")
    [job] = order_factory.jobs(later)
    assert job["scheduled_at"] is not None
    order = order_factory.row(later)
    assert (order["expires_at"] - job["scheduled_at"]).total_seconds() == pytest.approx(86400)
    [job] = order_factory.jobs(order_factory("Free", at="-infinity"))
    assert job["scheduled_at"] is None


def test_smaller_order_takes_the_first_of_the_plans_prompts(order_factory: Orders) -> None:
    """An order of fewer images than its plan has prompts takes as many of them."""
    assert [image["prompt"] for image in order_factory.images(order_factory("Start", images=2))] == ["a", "b"]


def test_queue_names_are_not_sql(order_factory: Orders) -> None:
    """A provider's name is compared, never run."""
    assert _refused(order_factory, provider="x'; DROP TABLE jobdaemon.orders; --").sqlstate == "JD005"


def test_numbers_out_of_range_are_postgres_own_errors(order_factory: Orders) -> None:
    """An images count beyond integer is refused by its type."""
    with pytest.raises((errors.NumericValueOutOfRange, errors.UndefinedFunction)):
        order_factory(images=2**40)
