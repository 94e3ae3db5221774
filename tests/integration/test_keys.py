"""Provider keys in the real claim: equal to the pure model, exact over daemons, resting when refused, waking by themselves."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg.rows import dict_row

from jobdaemon.db import DatabaseAddress
from jobdaemon.domain.job import Job, Task
from jobdaemon.domain.keys import OUT_OF_MONEY, REFUSED, KeyedJob, KeyState, ProviderKey, deal
from jobdaemon.domain.outcome import End, Signal, Transition
from jobdaemon.domain.picking import LIFTED_PRIORITY
from jobdaemon.domain.retry import after_error
from jobdaemon.domain.write import CallEnded, CallSubmitted, Write
from jobdaemon.errors import KeyMissingError, KeyRefusedError
from jobdaemon.events import KeyRested
from jobdaemon.ports import Attempt
from jobdaemon.queue.store import PostgresJobStore
from tests.daemons import NO_POLL, Stages, running_daemon, until
from tests.effort import examples
from tests.factories import PLANS, QUEUES, RULES, Jobs, Orders, Row, Sql, open_call

QUEUE = "generate.local"
HASTY = replace(RULES, retry=replace(RULES.retry, backoff=timedelta(seconds=0.05), cap=timedelta(seconds=0.1)))


def add_key(sql: Sql, alias: str = "a", **values: Any) -> None:
    """Insert one key of the tests' provider."""
    columns = {"provider": "local", "alias": alias} | values
    names, marks = ", ".join(columns), ", ".join(["%s"] * len(columns))
    sql.execute(f"INSERT INTO jobdaemon.provider_keys ({names}) VALUES ({marks})".encode(), list(columns.values()))


def key(sql: Sql, alias: str = "a") -> Row:
    row = sql.execute("SELECT * FROM jobdaemon.provider_keys WHERE provider = 'local' AND alias = %s", [alias]).fetchone()
    assert row is not None
    return row


def fill(sql: Sql, count: int, images: int = 0, **values: object) -> None:
    """Insert generate jobs that make no image, though they ask for so many."""
    sql.execute(
        "INSERT INTO jobdaemon.procrastinate_jobs (queue_name, task_name, priority, args)"
        " SELECT %s, %s, %s, jsonb_build_object('order_id', NULL, 'images',"
        " (SELECT coalesce(jsonb_agg(i), '[]') FROM generate_series(1, %s) AS i)) FROM generate_series(1, %s)",
        [QUEUE, Task.GENERATE, values.get("priority", 0), images, count],
    )


def doing(sql: Sql) -> Counter[str | None]:
    rows = sql.execute("SELECT key_alias FROM jobdaemon.procrastinate_jobs WHERE status = 'doing'").fetchall()
    return Counter(row["key_alias"] for row in rows)


def ended(job: Job, signal: Signal | None = None, retry_after: timedelta | None = None) -> Transition:
    """The end of an attempt: a success, or one that was turned away."""
    if signal is None:
        return Transition(job, End.SUCCEEDED)
    return Transition(job, End.SNOOZE, signal=signal, retry_after=retry_after)


# ------------------------------------------------------------- the model


@pytest.fixture(scope="module")
def board(postgres: Any, engine_template: str) -> Iterator[Sql]:
    """A database whose transactions are all rolled back."""
    name = postgres.create_database(template=engine_template)
    with psycopg.connect(postgres.url(name), autocommit=True, row_factory=dict_row) as connection:
        connection.execute("ALTER TABLE jobdaemon.procrastinate_jobs DISABLE TRIGGER USER")
        yield connection
    postgres.drop_database(name)


offsets = st.none() | st.sampled_from([-3600, -60, 3600, 7200])
limits = st.tuples(
    st.none() | st.integers(0, 4),
    st.none() | st.sampled_from([0.001, 0.01]),
    st.none() | st.integers(0, 12),
    st.sampled_from([False, False, False, True]),
    offsets,
    offsets,
    st.integers(0, 12),
    st.sampled_from([None, 0, -1]),
)
ready_jobs = st.tuples(
    st.integers(0, 5), st.sampled_from([None, None, None, "a", "b", "c", "z"]), st.booleans(), st.integers(0, 2)
)


@settings(max_examples=examples(200), derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(st.sampled_from("abc"), limits, max_size=3),
    st.lists(ready_jobs, max_size=30),
    st.lists(st.sampled_from(["a", "b", "c", None]), max_size=6),
    st.integers(1, 8),
    st.sampled_from(["abc", "abc", "ab", "c", ""]),
)
def test_the_claim_deals_as_the_model_does(
    board: Sql,
    keys: dict[str, tuple[Any, ...]],
    ready: list[tuple[int, str | None, bool, int]],
    running: list[str | None],
    slots: int,
    held: str,
) -> None:
    """On any queue under any keys SQL starts the same jobs under the same keys as domain/keys.py, and opens at the same time."""
    with board.transaction(force_rollback=True):
        [worker] = _one(board, "SELECT * FROM jobdaemon.procrastinate_register_worker_v1()").values()
        now = _one(board, "SELECT clock_timestamp() AS now")["now"].astimezone(UTC)
        states = [_state(alias, values, now) for alias, values in keys.items()]
        for state in states:
            columns = {name: getattr(state, name) for name in ("concurrency", "rate", "daily_budget", "spent", "spent_on")}
            columns |= {"paused": state.is_paused, "rested_until": state.rested_until, "next_start_at": state.next_start_at}
            add_key(board, state.alias, **columns)
        jobs, rows = _waiting(ready)
        board.execute(
            "INSERT INTO jobdaemon.procrastinate_jobs (id, queue_name, task_name, priority, args, key_alias)"
            " SELECT r.id, %s, 'x', r.priority, r.args, r.key_alias FROM jsonb_to_recordset(%s::jsonb)"
            " AS r (id bigint, priority integer, args jsonb, key_alias text)",
            [QUEUE, json.dumps(rows)],
        )
        board.execute("SET LOCAL session_replication_role = replica")  # calls of orders that are not there
        board.execute(
            "INSERT INTO jobdaemon.provider_calls (order_id, job_id, batch, provider, external_task_id, key_alias)"
            " SELECT 1, r.id, 1, 'local', 't', r.bought FROM jsonb_to_recordset(%s::jsonb) AS r (id bigint, bought text)"
            " WHERE r.bought IS NOT NULL",
            [json.dumps(rows)],
        )
        board.execute("SET LOCAL session_replication_role = origin")
        board.execute(
            "INSERT INTO jobdaemon.procrastinate_jobs (queue_name, task_name, args, status, key_alias)"
            " SELECT %s, 'x', '{}', 'doing', alias FROM unnest(%s::text[]) AS alias",
            [QUEUE, running],
        )
        claimed = board.execute(
            "SELECT id, key_alias, opens_in_s FROM jobdaemon.claim_jobs(%s, %s, %s, %s::text[])",
            [QUEUE, worker, slots, list(held)],
        ).fetchall()
        after = {row["alias"]: row for row in board.execute("SELECT * FROM jobdaemon.provider_keys").fetchall()}
    own = [state for state in states if state.alias in held]
    elsewhere = {state.alias for state in states if state not in own}
    counts = Counter(alias for alias in running if alias)
    wanted = deal(jobs, own, running=counts, slots=slots, now=now, elsewhere=elsewhere)
    assert [(row["id"], row["key_alias"]) for row in claimed if row["id"] is not None] == list(wanted.started)
    opens_in_s = next((row["opens_in_s"] for row in claimed if row["id"] is None), None)
    assert (opens_in_s is None) == (wanted.opens_at is None)
    if wanted.opens_at is not None:
        assert opens_in_s == pytest.approx((wanted.opens_at - now).total_seconds(), abs=5)
    for state in wanted.keys:
        if state.spent_on == now.date():
            assert after[state.alias]["spent"] == state.spent


def _one(sql: Sql, query: str) -> Row:
    row = sql.execute(query.encode()).fetchone()
    assert row is not None
    return row


def _state(alias: str, values: tuple[Any, ...], now: datetime) -> KeyState:
    concurrency, rate, daily_budget, is_paused, rests_s, starts_s, spent, spent_on = values
    return KeyState(
        alias,
        concurrency,
        rate,
        daily_budget,
        is_paused,
        None if rests_s is None else now + timedelta(seconds=rests_s),
        None if starts_s is None else now + timedelta(seconds=starts_s),
        spent,
        None if spent_on is None else now.date() + timedelta(days=spent_on),
    )


def _waiting(ready: list[tuple[int, str | None, bool, int]]) -> tuple[list[KeyedJob], list[Row]]:
    """The ready jobs in claim order, and as rows; a row may not say what its job has bought."""
    rows: list[Row] = [
        {
            "id": number,
            "priority": priority,
            "args": {"images": list(range(images))},
            "key_alias": bought if is_marked else None,
            "bought": bought,
        }
        # Where nothing can be bought, the claim finds only those whose row says it.
        for number, (images, bought, is_marked, priority) in enumerate(ready, start=10**9)
        if bought is None or is_marked
    ]
    in_order = sorted(rows, key=lambda row: (-row["priority"], row["id"]))
    return [KeyedJob(row["id"], len(row["args"]["images"]), row["bought"]) for row in in_order], rows


# ------------------------------------------------------------- exact over daemons


@pytest.fixture
async def stores(engine_database: str, patient_locks: None) -> Any:
    """Four stores, as of four daemons."""
    stores = [PostgresJobStore(DatabaseAddress(engine_database)) for _ in range(4)]
    yield stores
    for store in stores:
        await store.close()


async def test_concurrency_and_budget_are_exact_over_daemons(stores: list[PostgresJobStore], daemon_id: int, sql: Sql) -> None:
    """Of many claims at once no key ever gets more jobs, or more images a day, than its row allows."""
    add_key(sql, "a", concurrency=3)
    add_key(sql, "b", daily_budget=10)
    fill(sql, 40, images=2)
    claims = await asyncio.gather(*(store.take_slots(QUEUE, daemon_id, 4, ["a", "b"]) for store in stores * 4))
    jobs = [job for claim in claims for job in claim.jobs]
    assert Counter(job.key_alias for job in jobs) == {"a": 3, "b": 5} == doing(sql)
    assert key(sql, "b")["spent"] == 10
    await stores[0].commit([ended(job) for job in jobs], daemon_id=daemon_id)
    assert doing(sql) == {}
    assert key(sql, "b")["spent"] == 0  # they bought nothing
    sql.execute("UPDATE jobdaemon.provider_keys SET spent = 10 WHERE alias = 'b'")
    again = await stores[1].take_slots(QUEUE, daemon_id, 9, ["a", "b"])
    assert [job.key_alias for job in again.jobs] == ["a"] * 3


async def test_a_rate_holds_over_daemons(stores: list[PostgresJobStore], daemon_id: int, sql: Sql) -> None:
    """However many daemons ask however often, starts under a key are at least 1 / rate apart."""
    add_key(sql, rate=20)
    fill(sql, 60)
    starts: list[float] = []
    began = time.monotonic()

    async def work(store: PostgresJobStore) -> None:
        while len(starts) < 16:
            claim = await store.take_slots(QUEUE, daemon_id, 5, ["a"])
            starts.extend(time.monotonic() for _ in claim.jobs)
            assert claim.opens_in is not None
            await asyncio.sleep(claim.opens_in.total_seconds())

    async with asyncio.timeout(60):
        await asyncio.gather(*map(work, stores))
    assert len(starts) <= 1 + 20 * (max(starts) - began)


async def test_two_daemons_start_as_often_as_the_rate_allows(engine_database: str, sql: Sql) -> None:
    """Without a poll or a notification, daemons go on starting work as the rate allows, and never above it."""
    add_key(sql, rate=10)
    fill(sql, 100)
    starts: list[float] = []
    began = time.monotonic()

    async def gate(attempt: Attempt) -> None:
        starts.append(time.monotonic())

    stages = Stages(gate)
    async with (
        running_daemon(engine_database, stages, engine=NO_POLL, keys=("a",), team_size=4),
        running_daemon(engine_database, stages, engine=NO_POLL, keys=("a",), team_size=4),
    ):
        await until(lambda: len(starts) >= 16)  # the poll is a minute away: only timers bring so many
    print(f"\n{15 / (starts[15] - starts[0]):.2f} starts per second of 10")  # noqa: T201 - shown with -s
    assert all(place <= 10 * (start - began) for place, start in enumerate(starts))


async def test_the_budget_begins_anew_at_midnight(stores: list[PostgresJobStore], daemon_id: int, sql: Sql) -> None:
    """What was spent yesterday does not count; until then the claim says how long it is to midnight, UTC."""
    add_key(sql, daily_budget=4)
    fill(sql, 5, images=2)
    first = await stores[0].take_slots(QUEUE, daemon_id, 9, ["a"])
    row = _one(sql, "SELECT extract(epoch FROM date_trunc('day', now(), 'UTC') + interval '1 day' - now())::float8 AS s")
    assert len(first.jobs) == 2
    assert first.opens_in is not None
    assert first.opens_in.total_seconds() == pytest.approx(row["s"], abs=5)
    sql.execute("UPDATE jobdaemon.provider_keys SET spent_on = spent_on - 1")
    second = await stores[0].take_slots(QUEUE, daemon_id, 9, ["a"])
    assert len(second.jobs) == 2
    assert key(sql)["spent"] == 4


async def test_a_rate_that_is_raised_counts_at_once(stores: list[PostgresJobStore], daemon_id: int, sql: Sql) -> None:
    """The long wait that a low rate asked for does not outlive it."""
    add_key(sql, rate=0.0001)
    fill(sql, 3)
    first = await stores[0].take_slots(QUEUE, daemon_id, 9, ["a"])
    assert len(first.jobs) == 1
    assert first.opens_in is not None
    assert first.opens_in > timedelta(hours=2)
    sql.execute("UPDATE jobdaemon.provider_keys SET rate = 1000")
    assert len((await stores[0].take_slots(QUEUE, daemon_id, 9, ["a"])).jobs) == 1


async def test_lifted_work_keeps_its_turns_under_a_rate(stores: list[PostgresJobStore], daemon_id: int, sql: Sql) -> None:
    """Where each claim starts one job, and looks at others in vain, every fourth start is still lifted work's."""
    add_key(sql, rate=10_000, daily_budget=50)
    fill(sql, 12, images=1, priority=300)
    fill(sql, 5, images=1, priority=LIFTED_PRIORITY)
    fill(sql, 2, images=60, priority=400)
    priorities = []
    for _ in range(12):
        claim = await stores[0].take_slots(QUEUE, daemon_id, 5, ["a"])
        priorities += [job.priority for job in claim.jobs]
        await asyncio.sleep(0.001)
    assert priorities[:12].count(LIFTED_PRIORITY) == 3
    assert [priorities[at] for at in (3, 7, 11)] == [LIFTED_PRIORITY] * 3


# ------------------------------------------------------------- bought tasks


async def test_a_bought_task_keeps_its_key(
    stores: list[PostgresJobStore], daemon_id: int, sql: Sql, order_factory: Orders, job_factory: Jobs
) -> None:
    """
    After a retry the job goes on under the key it bought with, past rate and budget; a daemon without that key passes it by, and
    only with the key's row gone any other will do.
    """
    add_key(sql, "a", daily_budget=1)
    add_key(sql, "b", concurrency=0)
    order_id = order_factory("Free")
    job_id = job_factory(QUEUE, Task.GENERATE, args={"order_id": order_id, "images": [1]})
    [job] = (await stores[0].take_slots(QUEUE, daemon_id, 1, ["a", "b"])).jobs
    assert job.key_alias == "a"
    call = CallSubmitted(order_id, job_id, "local", (1,), "task-1", job.key_alias)
    await stores[0].commit([Transition(job, End.CHECKPOINT, writes=(call,))], daemon_id=daemon_id)
    await stores[0].commit([Transition(job, End.HANDED_BACK)], daemon_id=daemon_id)
    assert job_factory.row(job_id)["key_alias"] == "a"
    sql.execute("UPDATE jobdaemon.provider_keys SET concurrency = 9 WHERE alias = 'b'")
    fill(sql, 1)  # another one, which has to take b: the budget of a is spent
    jobs = (await stores[0].take_slots(QUEUE, daemon_id, 9, ["a", "b"])).jobs
    assert {job.id == job_id: job.key_alias for job in jobs} == {True: "a", False: "b"}
    assert key(sql)["spent"] == 1
    bought = await open_call(stores[0], order_id, job_id)
    assert bought is not None
    assert (bought.task_id, bought.key) == ("task-1", "a")
    [job] = [job for job in jobs if job.id == job_id]
    await stores[0].commit([Transition(job, End.HANDED_BACK)], daemon_id=daemon_id)
    fill(sql, 1)
    jobs = (await stores[0].take_slots(QUEUE, daemon_id, 9, ["b"])).jobs
    assert {job.id == job_id: job.key_alias for job in jobs} == {False: "b"}
    sql.execute("DELETE FROM jobdaemon.provider_keys WHERE alias = 'a'")
    assert [job.key_alias for job in (await stores[0].take_slots(QUEUE, daemon_id, 9, ["b"])).jobs] == ["b"]


async def test_a_bought_task_waits_for_its_key_and_lets_others_pass(
    stores: list[PostgresJobStore], daemon_id: int, sql: Sql, order_factory: Orders, job_factory: Jobs
) -> None:
    """While its key rests it waits; a pause, which is for buying, does not hold it."""
    add_key(sql, "a", rested_until=datetime.now(UTC) + timedelta(hours=1), paused=True)
    add_key(sql, "b")
    order_id = order_factory("Free")
    job_id = job_factory(QUEUE, Task.GENERATE, 999, {"order_id": order_id, "images": [1]})
    sql.execute(
        "INSERT INTO jobdaemon.provider_calls (order_id, job_id, batch, provider, external_task_id, key_alias)"
        " VALUES (%s, %s, 1, 'local', 't', 'a')",
        [order_id, job_id],
    )
    fill(sql, 2)
    claim = await stores[0].take_slots(QUEUE, daemon_id, 9, ["a", "b"])
    assert [job.key_alias for job in claim.jobs] == ["b", "b"]
    assert job_id not in [job.id for job in claim.jobs]
    assert claim.opens_in is not None
    sql.execute("UPDATE jobdaemon.provider_keys SET rested_until = NULL WHERE alias = 'a'")
    [job] = (await stores[0].take_slots(QUEUE, daemon_id, 9, ["a", "b"])).jobs
    assert (job.id, job.key_alias) == (job_id, "a")


async def test_collecting_once_more_costs_nothing(
    stores: list[PostgresJobStore], daemon_id: int, sql: Sql, order_factory: Orders, job_factory: Jobs
) -> None:
    """A job made for an expired link goes on under the key of the call that made the image; what is no call is no hindrance."""
    add_key(sql, "a", daily_budget=1)
    add_key(sql, "b")
    order_id = order_factory("Free")
    call_id = _one(
        sql,
        "INSERT INTO jobdaemon.provider_calls (order_id, job_id, batch, provider, external_task_id, key_alias, outcome)"
        f" VALUES ({order_id}, 1, 1, 'local', 't', 'a', 'succeeded') RETURNING id",
    )["id"]
    for call in (call_id, "x", 1e30, -1, 1.5, None):
        job_factory(QUEUE, Task.GENERATE, args={"order_id": order_id, "images": [1, 2], "call": call})
    jobs = (await stores[0].take_slots(QUEUE, daemon_id, 9, ["a", "b"])).jobs
    assert Counter((job.args["call"] == call_id, job.key_alias) for job in jobs) == {(True, "a"): 1, (False, "b"): 5}
    assert key(sql)["spent"] == 0


async def test_a_call_for_another_daemon_costs_nothing_here(stores: list[PostgresJobStore], daemon_id: int, sql: Sql) -> None:
    """A job that lacks the key of its call neither rests the key it was dealt nor spends that key's budget."""
    add_key(sql, "a", daily_budget=9)
    fill(sql, 1, images=4)
    [job] = (await stores[0].take_slots(QUEUE, daemon_id, 1, ["a"])).jobs
    assert key(sql)["spent"] == 4
    end = after_error(job, KeyMissingError("not here"), RULES.retry, jitter=0.5, dead=lambda reason: ())
    assert (end.end, end.signal) == (End.SNOOZE, Signal.ELSEWHERE)
    await stores[0].commit([end], daemon_id=daemon_id)
    row = key(sql)
    assert (row["spent"], row["rests"], row["rested_until"]) == (0, 0, None)
    queue = _one(sql, f"SELECT circuit, adaptive_limit FROM jobdaemon.queues WHERE name = '{QUEUE}'")
    assert queue == {"circuit": "closed", "adaptive_limit": None}


async def test_a_job_that_bought_nothing_forgets_its_key(stores: list[PostgresJobStore], daemon_id: int, sql: Sql) -> None:
    """Handed back before it bought anything, a job may take any key."""
    add_key(sql, "a")
    fill(sql, 1)
    [job] = (await stores[0].take_slots(QUEUE, daemon_id, 1, ["a"])).jobs
    await stores[0].commit([Transition(job, End.HANDED_BACK)], daemon_id=daemon_id)
    assert _one(sql, "SELECT key_alias FROM jobdaemon.procrastinate_jobs") == {"key_alias": None}


# ------------------------------------------------------------- refusals


async def test_a_refused_key_rests_and_the_other_goes_on(engine_database: str, sql: Sql) -> None:
    """The refused job runs under the other key without having spent an attempt; the event holds no word of the provider's."""
    add_key(sql, "a", concurrency=5)
    add_key(sql, "b", concurrency=2)
    used: list[str | None] = []

    async def gate(attempt: Attempt) -> None:
        used.append(attempt.job.key_alias)
        if attempt.job.key_alias == "a":
            raise KeyRefusedError("The provider does not know the key sk-secret.")

    async with running_daemon(engine_database, Stages(gate), engine=NO_POLL, rules=HASTY, keys=("a", "b")) as daemon:
        rested = daemon.events.expect(KeyRested)
        fill(sql, 6)
        event = await rested.wait()
        await until(lambda: _one(sql, "SELECT count(*) AS n FROM jobdaemon.procrastinate_jobs WHERE status = 'todo'")["n"] == 0)
        assert sum(isinstance(seen, KeyRested) for seen in daemon.seen) == 1
    assert (event.provider, event.alias, event.reason) == ("local", "a", REFUSED)
    assert 55 < event.seconds <= 60
    assert used.count("b") == 6
    assert used.count("a") <= 2
    rows = sql.execute("SELECT DISTINCT status::text, attempts FROM jobdaemon.procrastinate_jobs").fetchall()
    assert rows == [{"status": "succeeded", "attempts": 1}]
    row = key(sql)
    assert (row["rests"], row["rest_reason"]) == (1, REFUSED)


async def test_when_all_keys_rest_work_waits_and_goes_on_by_itself(engine_database: str, sql: Sql) -> None:
    """With every key resting nothing starts; at the end of the first rest work goes on, without a poll."""
    until_then = _one(sql, "SELECT clock_timestamp() + interval '1 second' AS at")["at"]
    add_key(sql, "a", rested_until=until_then)
    add_key(sql, "b", rested_until=until_then + timedelta(hours=1))
    starts: list[datetime] = []

    async def gate(attempt: Attempt) -> None:
        starts.append(datetime.now(UTC))

    async with running_daemon(engine_database, Stages(gate), engine=NO_POLL, keys=("a", "b")):
        fill(sql, 3)
        await until(lambda: len(starts) == 3)
    assert timedelta(0) <= starts[0] - until_then.astimezone(UTC) < timedelta(seconds=1)


async def test_an_empty_account_rests_until_tomorrow_and_resume_ends_it(engine_database: str, sql: Sql) -> None:
    """Out of money rests the key until midnight, UTC; an operator's resume reaches the daemon at once."""
    add_key(sql)
    is_empty = True
    runs = 0

    async def gate(attempt: Attempt) -> None:
        nonlocal runs
        runs += 1
        if is_empty:
            raise KeyRefusedError("The account is empty.", is_out_of_money=True)

    async with running_daemon(engine_database, Stages(gate), engine=NO_POLL, rules=HASTY, keys=("a",), team_size=1) as daemon:
        rested = daemon.events.expect(KeyRested)
        fill(sql, 1)
        assert (await rested.wait()).reason == OUT_OF_MONEY
        row = _one(
            sql, "SELECT rested_until = date_trunc('day', now(), 'UTC') + interval '1 day' AS is_right FROM jobdaemon.keys"
        )
        assert row == {"is_right": True}
        await asyncio.sleep(1.5)  # past the job's own snooze: only the key holds it
        assert runs == 1
        is_empty = False
        await asyncio.to_thread(sql.execute, "SELECT jobdaemon.resume_key('local', 'a')")
        await until(lambda: _one(sql, "SELECT status::text FROM jobdaemon.procrastinate_jobs")["status"] == "succeeded")


async def test_a_burst_of_refusals_counts_once_and_a_success_ends_it(
    stores: list[PostgresJobStore], daemon_id: int, sql: Sql
) -> None:
    """Refusals of one burst, in several commits, rest the key once; a success claimed since sets the count back."""
    add_key(sql)
    fill(sql, 9)
    jobs = (await stores[0].take_slots(QUEUE, daemon_id, 5, ["a"])).jobs
    for job in jobs[:3]:
        await stores[0].commit([ended(job, Signal.KEY)], daemon_id=daemon_id)
    first = key(sql)
    assert first["rests"] == 1
    await stores[0].commit([ended(jobs[3])], daemon_id=daemon_id)
    assert key(sql)["rests"] == 1  # it had been claimed before
    sql.execute("UPDATE jobdaemon.provider_keys SET rested_until = now()")
    [job, other] = (await stores[0].take_slots(QUEUE, daemon_id, 2, ["a"])).jobs
    await stores[0].commit([ended(job, Signal.KEY)], daemon_id=daemon_id)
    again = key(sql)
    assert again["rests"] == 2
    assert timedelta(seconds=110) < again["rested_until"] - datetime.now(UTC) <= timedelta(seconds=121)
    sql.execute("UPDATE jobdaemon.provider_keys SET rested_until = now()")
    [job] = (await stores[0].take_slots(QUEUE, daemon_id, 1, ["a"])).jobs
    await stores[0].commit([ended(other), ended(job)], daemon_id=daemon_id)
    assert key(sql)["rests"] == 0


async def test_a_wished_wait_rests_the_key_and_not_the_queue(stores: list[PostgresJobStore], daemon_id: int, sql: Sql) -> None:
    """Retry-After holds its key alone; the queue's adaptive limit learns from the refusal all the same."""
    add_key(sql, "a", concurrency=1)
    add_key(sql, "b", concurrency=1)
    fill(sql, 5)
    [job] = (await stores[0].take_slots(QUEUE, daemon_id, 5, ["a"])).jobs
    await stores[0].commit([ended(job, Signal.CAPACITY, timedelta(minutes=5))], daemon_id=daemon_id)
    rests = key(sql)["rested_until"] - datetime.now(UTC)
    assert timedelta(minutes=4) < rests <= timedelta(minutes=5)
    row = _one(sql, f"SELECT adaptive_limit, rested_until FROM jobdaemon.queues WHERE name = '{QUEUE}'")
    assert row == {"adaptive_limit": 1, "rested_until": None}
    assert [job.key_alias for job in (await stores[0].take_slots(QUEUE, daemon_id, 5, ["a", "b"])).jobs] == ["b"]


@pytest.mark.parametrize("end", [End.SUCCEEDED, End.RETRY, End.FAILED, End.HANDED_BACK, End.INTERRUPTED])
async def test_the_budget_counts_what_was_bought(
    stores: list[PostgresJobStore], daemon_id: int, sql: Sql, order_factory: Orders, job_factory: Jobs, end: End
) -> None:
    """However an attempt ends, what it did not buy goes back: an outage spends no day's budget. More than asked counts too."""
    add_key(sql, daily_budget=100)
    order_id = order_factory("Free")
    for _ in range(4):
        job_factory(QUEUE, Task.GENERATE, args={"order_id": order_id, "images": [1, 2, 3]})
    nothing, some, more, asked = (await stores[0].take_slots(QUEUE, daemon_id, 4, ["a"])).jobs
    for job, made in ((some, 2), (more, 5), (asked, None)):
        writes: list[Write] = [CallSubmitted(order_id, job.id, "local", (1, 2, 3), None, "a")]
        await stores[0].commit([Transition(job, End.CHECKPOINT, writes=tuple(writes))], daemon_id=daemon_id)
        if made is not None:
            ended_call = CallEnded(order_id, job.id, "partial", made=made)
            await stores[0].commit([Transition(job, End.CHECKPOINT, writes=(ended_call,))], daemon_id=daemon_id)
    assert key(sql)["spent"] == 12
    if end is End.INTERRUPTED:
        sql.execute("UPDATE jobdaemon.procrastinate_workers SET last_heartbeat = '-infinity'")
    for job, spent in ((nothing, 9), (some, 8), (more, 10), (asked, 10)):
        await stores[0].commit([Transition(job, end)], daemon_id=daemon_id)
        assert key(sql)["spent"] == spent


async def test_who_is_turned_away_gives_the_budget_back(
    stores: list[PostgresJobStore], daemon_id: int, sql: Sql, order_factory: Orders, job_factory: Jobs
) -> None:
    """A refused job whose call was not taken gives its images back to the budget; one that bought, or may have, does not."""
    add_key(sql, daily_budget=100)
    order_id = order_factory("Free")
    for _ in range(5):
        job_factory(QUEUE, Task.GENERATE, args={"order_id": order_id, "images": [1, 2]})

    async def claim(limit: int) -> list[Job]:
        return (await stores[0].take_slots(QUEUE, daemon_id, limit, ["a"])).jobs

    async def note(job: Job, *writes: Write) -> None:
        await stores[0].commit([Transition(job, End.CHECKPOINT, writes=writes)], daemon_id=daemon_id)

    async def turn_away(job: Job, signal: Signal = Signal.CAPACITY) -> None:
        await stores[0].commit([ended(job, signal)], daemon_id=daemon_id)
        sql.execute("UPDATE jobdaemon.provider_keys SET rested_until = NULL")
        sql.execute("UPDATE jobdaemon.queues SET adaptive_limit = NULL, rested_until = NULL")

    refused, bought, lost, partial, early = await claim(5)
    for job in (refused, bought, lost, partial):
        await note(job, CallSubmitted(order_id, job.id, "local", (1, 2), "t" if job is bought else None, "a"))
    await note(refused, CallEnded(order_id, refused.id, "failed"))
    await note(partial, CallEnded(order_id, partial.id, "partial", made=1))
    assert key(sql)["spent"] == 10
    for job in (bought, lost):
        await turn_away(job)
    assert key(sql)["spent"] == 10
    await turn_away(partial)
    assert key(sql)["spent"] == 9
    await turn_away(refused)
    await turn_away(early, Signal.MONEY)
    assert key(sql)["spent"] == 5
    again = next(job for job in await claim(5) if job.id == bought.id)
    assert key(sql)["spent"] == 5 + 4 * 2  # all but the one that goes on with its task
    await note(again, CallEnded(order_id, again.id, "failed"))
    await turn_away(again, Signal.KEY)
    assert key(sql)["spent"] == 5 + 4 * 2


async def test_a_refusal_without_a_key_of_ours_ends_the_job(engine_database: str, sql: Sql) -> None:
    """Where the engine knows no key there is none to rest: the attempts are spent, and the job ends."""

    async def gate(attempt: Attempt) -> None:
        raise KeyRefusedError("no")

    async with running_daemon(engine_database, Stages(gate), rules=HASTY):
        fill(sql, 1)
        await until(lambda: _one(sql, "SELECT status::text FROM jobdaemon.procrastinate_jobs")["status"] == "failed")
    assert _one(sql, "SELECT attempts FROM jobdaemon.procrastinate_jobs") == {"attempts": RULES.retry.attempts}


async def test_refusals_and_claims_at_once_wait_for_nobody_for_ever(
    stores: list[PostgresJobStore], daemon_id: int, sql: Sql
) -> None:
    """Claims, successes and refusals of two queues' jobs, all at the same moment, meet no deadlock."""
    sql.execute("INSERT INTO jobdaemon.queues (name) VALUES ('generate.other')")
    sql.execute("INSERT INTO jobdaemon.provider_keys (provider, alias) VALUES ('local', 'a'), ('local', 'b'), ('other', 'a')")
    fill(sql, 60)
    fill(sql, 60)
    sql.execute("UPDATE jobdaemon.procrastinate_jobs SET queue_name = 'generate.other' WHERE id % 2 = 0")
    deadlocks = _one(sql, "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()")["deadlocks"]

    done = 0

    async def work(number: int, store: PostgresJobStore) -> None:
        nonlocal done
        signals = [Signal.KEY, None, Signal.CAPACITY, Signal.OUTAGE]
        for turn in range(8):
            jobs = []
            for queue in sorted([QUEUE, "generate.other"], reverse=turn % 2 == 0):
                jobs += (await store.take_slots(queue, daemon_id, 3, ["a", "b"])).jobs
            await store.commit([ended(job, signals[(number + job.id) % 4]) for job in jobs], daemon_id=daemon_id)
            done += len(jobs)

    async def operate() -> None:
        while True:
            await asyncio.to_thread(sql.execute, "UPDATE jobdaemon.provider_keys SET rested_until = NULL")
            await asyncio.to_thread(sql.execute, "UPDATE jobdaemon.queues SET adaptive_limit = NULL, rested_until = NULL")

    async with asyncio.timeout(30):
        operator = asyncio.ensure_future(operate())
        await asyncio.gather(*(work(number, store) for number, store in enumerate(stores)))
        operator.cancel()
        await asyncio.wait({operator})
    print(f"\n{done} attempts")  # noqa: T201
    assert done > 20
    sql.execute("SELECT pg_stat_clear_snapshot()")
    assert _one(sql, "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()")["deadlocks"] == deadlocks


# ------------------------------------------------------------- rows, operators, other queues


@pytest.mark.parametrize(
    ("column", "value"),
    [
        *(("concurrency", value) for value in (-1, 100_001)),
        *(("rate", value) for value in (0, -1, 0.00001, 1e300, float("nan"), float("inf"))),
        *(("daily_budget", value) for value in (-1, 1_000_000_001)),
        ("paused", None),
    ],
)
def test_impossible_limits_are_refused(sql: Sql, column: str, value: object) -> None:
    """A limit that cannot be is refused with a sentence, in an INSERT and in an UPDATE, and nothing changes."""
    with pytest.raises(psycopg.Error, match="must be") as caught:
        add_key(sql, "a", **{column: value})
    assert caught.value.sqlstate == "JD004"
    add_key(sql)
    before = key(sql)
    with pytest.raises(psycopg.Error, match="must be") as caught:
        sql.execute(f"UPDATE jobdaemon.provider_keys SET {column} = %s".encode(), [value])
    assert caught.value.sqlstate == "JD004"
    assert key(sql) == before


@pytest.mark.parametrize("alias", ["", "a b", "-a", "a" * 65, "ä"])
def test_an_alias_is_a_plain_name(sql: Sql, alias: str) -> None:
    """What is no plain name is refused."""
    with pytest.raises(psycopg.errors.CheckViolation):
        add_key(sql, alias)


async def test_zero_and_the_largest_limits(stores: list[PostgresJobStore], daemon_id: int, sql: Sql) -> None:
    """0 starts nothing and nobody is told to look again; the largest values, and none at all, are no hindrance."""
    fill(sql, 9, images=3)
    add_key(sql, "a", concurrency=0)
    add_key(sql, "b", daily_budget=0)
    claim = await stores[0].take_slots(QUEUE, daemon_id, 3, ["a", "b"])
    assert (claim.jobs, claim.opens_in) == ([], None)
    add_key(sql, "c", concurrency=100_000, rate=10_000, daily_budget=1_000_000_000, spent=999_999_997)
    assert [job.key_alias for job in (await stores[0].take_slots(QUEUE, daemon_id, 1, ["a", "b", "c"])).jobs] == ["c"]
    add_key(sql, "d")
    assert [job.key_alias for job in (await stores[0].take_slots(QUEUE, daemon_id, 2, ["a", "d"])).jobs] == ["d", "d"]


async def test_only_keys_that_this_daemon_has_and_the_database_knows(
    stores: list[PostgresJobStore], daemon_id: int, sql: Sql
) -> None:
    """A key that is not in the database, or whose secret this daemon lacks, starts nothing; neither does no key at all."""
    add_key(sql, "a")
    fill(sql, 2)
    assert (await stores[0].take_slots(QUEUE, daemon_id, 2, ["nope"])).jobs == []
    assert (await stores[0].take_slots(QUEUE, daemon_id, 2, [])).jobs == []
    assert [job.key_alias for job in (await stores[0].take_slots(QUEUE, daemon_id, 2, ["nope", "a"])).jobs] == ["a", "a"]


async def test_an_operator_in_the_middle_of_a_change_holds_nobody_up(
    stores: list[PostgresJobStore], daemon_id: int, sql: Sql
) -> None:
    """While somebody's open transaction holds a key's row, claims use other keys and look again soon, and ends commit."""
    add_key(sql, "a")
    add_key(sql, "b", concurrency=1)
    fill(sql, 5)
    [first] = (await stores[0].take_slots(QUEUE, daemon_id, 1, ["a"])).jobs
    with sql.transaction():
        sql.execute("UPDATE jobdaemon.provider_keys SET concurrency = 7 WHERE alias = 'a'")
        async with asyncio.timeout(60):
            claim = await stores[0].take_slots(QUEUE, daemon_id, 5, ["a", "b"])
            await stores[0].commit([ended(first, Signal.KEY)], daemon_id=daemon_id)
    assert [job.key_alias for job in claim.jobs] == ["b"]
    assert claim.opens_in is not None
    assert claim.opens_in <= timedelta(seconds=1)


async def test_a_queue_without_keys_is_as_it_was(stores: list[PostgresJobStore], daemon_id: int, sql: Sql) -> None:
    """A claim that names no keys asks nothing of them: no limit of theirs holds, no row of theirs changes, no job gets one."""
    add_key(sql, concurrency=0, paused=True)
    before = key(sql)
    fill(sql, 3)
    jobs = await stores[0].claim(QUEUE, daemon_id, 3)
    assert [job.key_alias for job in jobs] == [None] * 3
    await stores[0].commit([ended(job) for job in jobs], daemon_id=daemon_id)
    assert key(sql) == before


def test_changes_are_told_and_starts_are_not(engine_database: str, sql: Sql, job_factory: Jobs) -> None:
    """What an operator changes wakes the daemons of the provider's queue; what the claim writes wakes nobody."""
    add_key(sql, rate=1000, daily_budget=9)
    fill(sql, 1, images=1)
    worker = _one(sql, "SELECT * FROM jobdaemon.procrastinate_register_worker_v1()").popitem()[1]
    with psycopg.connect(engine_database, autocommit=True) as listener:
        listener.execute("LISTEN jobdaemon_control")
        sql.execute("SELECT * FROM jobdaemon.claim_jobs(%s, %s, 1, ARRAY['a'])", [QUEUE, worker])
        assert key(sql)["spent"] == 1
        sql.execute("NOTIFY jobdaemon_control, 'nothing before'")
        sql.execute("SELECT jobdaemon.pause_key('local', 'a')")
        sql.execute("UPDATE jobdaemon.provider_keys SET concurrency = 3")
        heard = [notify.payload for notify in listener.notifies(timeout=60, stop_after=3)]
    assert heard == ["nothing before", QUEUE, QUEUE]


def test_pause_and_resume(sql: Sql) -> None:
    """A pause is a switch; resume takes it back and ends a rest too. The answer says how the key is now."""
    add_key(sql, concurrency=4, rate=2.5, rested_until=datetime(2999, 1, 1, tzinfo=UTC), rest_reason=REFUSED, rests=3)
    assert _one(sql, "SELECT jobdaemon.pause_key('local', 'a') AS told") == {
        "told": "key a of local is paused: concurrency 4, 2.5 starts per second, no daily budget;"
        " it rests until 2999-01-01T00:00:00Z"
    }
    assert _one(sql, "SELECT rest_reason, paused FROM jobdaemon.keys") == {"rest_reason": REFUSED, "paused": True}
    assert _one(sql, "SELECT jobdaemon.resume_key('local', 'a') AS told") == {
        "told": "key a of local is open: concurrency 4, 2.5 starts per second, no daily budget"
    }
    row = key(sql)
    assert (row["paused"], row["rested_until"], row["rests"]) == (False, None, 0)


@pytest.mark.parametrize("function", ["pause_key", "resume_key"])
@pytest.mark.parametrize("arguments", ["'local', 'b'", "'other', 'a'", "NULL, NULL"])
def test_unknown_keys(sql: Sql, function: str, arguments: str) -> None:
    """JD005 names the key and the provider that are not there."""
    add_key(sql)
    with pytest.raises(psycopg.Error, match=r'unknown key ".*" of provider ".*"') as caught:
        sql.execute(f"SELECT jobdaemon.{function}({arguments})".encode())
    assert caught.value.sqlstate == "JD005"


async def test_rows_of_the_settings_are_inserted_once(stores: list[PostgresJobStore], sql: Sql) -> None:
    """A key of the settings without a row gets one; an operator's row stays as it is."""
    await stores[0].ensure_rows(QUEUES, PLANS, [ProviderKey("local", "a", 3, 0.5, 100)])
    sql.execute("UPDATE jobdaemon.provider_keys SET concurrency = 9")
    await stores[0].ensure_rows(QUEUES, PLANS, [ProviderKey("local", "a", 3, 0.5, 100), ProviderKey("local", "b")])
    row = key(sql)
    assert (row["concurrency"], row["rate"], row["daily_budget"]) == (9, 0.5, 100)
    assert key(sql, "b")["concurrency"] is None
