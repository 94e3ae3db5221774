"""Prewarms in the real claim: equal to the pure model on random queues, after everything else, and cheap."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg.rows import dict_row

from jobdaemon.domain.job import PREWARM_PRIORITY, Job, Task
from jobdaemon.domain.picking import LIFTED_PRIORITY, ReadyJob, pick
from jobdaemon.queue.store import PostgresJobStore
from tests.factories import Jobs, Orders, Sql

TOP = 300  # Free's priority in the tests' plans
PREWARM = ReadyJob(0, PREWARM_PRIORITY)


@pytest.fixture(scope="module")
def board(postgres: Any, engine_template: str) -> Iterator[Sql]:
    """A database whose transactions are all rolled back."""
    name = postgres.create_database(template=engine_template)
    with psycopg.connect(postgres.url(name), autocommit=True, row_factory=dict_row) as connection:
        connection.execute("ALTER TABLE jobdaemon.procrastinate_jobs DISABLE TRIGGER USER")
        yield connection
    postgres.drop_database(name)


def put(sql: Sql, jobs: list[ReadyJob]) -> None:
    """Insert these jobs under their own ids."""
    rows = [
        {
            "id": job.id,
            "task": Task.BEAUTIFY if job.is_wanted else Task.PREWARM,
            "priority": job.priority,
            "lock": job.lock,
            "args": {"customer": job.customer, "order_id": job.order_id} if job.is_wanted else {"source": "artifact:a"},
        }
        for job in jobs
    ]
    sql.execute(
        "INSERT INTO jobdaemon.procrastinate_jobs (id, queue_name, task_name, priority, lock, args)"
        " SELECT r.id, 'beautify', r.task, r.priority, r.lock, r.args"
        " FROM jsonb_to_recordset(%s::jsonb) AS r (id bigint, task text, priority integer, lock text, args jsonb)",
        [json.dumps(rows)],
    )


def sql_pick(sql: Sql, slots: int) -> set[int]:
    """What the claim's own function chooses."""
    row = sql.execute(
        "SELECT jobdaemon.pick_jobs(q, %s) AS ids FROM jobdaemon.queues q WHERE q.name = 'beautify'", [slots]
    ).fetchone()
    assert row is not None
    return set(row["ids"])


def start(sql: Sql, ids: set[int]) -> None:
    sql.execute("UPDATE jobdaemon.procrastinate_jobs SET status = 'doing', worker_id = NULL WHERE id = ANY (%s)", [list(ids)])


JOBS = st.just(PREWARM) | st.builds(
    ReadyJob,
    id=st.just(0),
    priority=st.sampled_from([LIFTED_PRIORITY, TOP, TOP, 100, -1_000_000]),
    order_id=st.integers(1, 6),
    customer=st.sampled_from(["", "a", "a", "b"]),
    lock=st.sampled_from([None, None, None, "x"]),
)
ROUNDS = st.lists(st.tuples(st.integers(1, 8), st.integers(0, 6)), min_size=1, max_size=4)


@settings(max_examples=150, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(jobs=st.lists(JOBS, max_size=25), fair_share=st.none() | st.integers(1, 4), rounds=ROUNDS)
def test_the_claim_picks_what_the_model_picks(
    board: Sql, jobs: list[ReadyJob], fair_share: int | None, rounds: list[tuple[int, int]]
) -> None:
    """Over several claims with ends between them, prewarms start in SQL where they start in domain/picking.py."""
    ready = {number: replace(job, id=number) for number, job in enumerate(jobs, start=1)}
    running: dict[int, ReadyJob] = {}
    passed = 0
    with board.transaction(force_rollback=True):
        board.execute("UPDATE jobdaemon.queues SET fair_share = %s WHERE name = 'beautify'", [fair_share])
        put(board, list(ready.values()))
        for slots, ends in rounds:
            busy = {job.lock for job in running.values() if job.lock}
            free = [job for job in ready.values() if job.lock not in busy]
            held = Counter(job.customer for job in running.values())
            if fair_share is None and not any(job.is_lifted for job in ready.values()):
                # the short way looks at no more jobs than it has slots, so that jobs of one lock may leave slots free
                wanted = sorted((job for job in free if job.is_wanted), key=ReadyJob.claim_order)[:slots]
                free = wanted + [job for job in free if not job.is_wanted]
            model = pick(free, slots, running=held, fair_share=fair_share, top=TOP, passed=passed)
            picked = sql_pick(board, slots)
            # A job that waits for another one's lock waits for a slot too: then SQL lets no prewarm through.
            are_all_free = all(job.lock not in busy for job in ready.values())
            expected = {job_id for job_id in model.ids if are_all_free or ready[job_id].is_wanted}
            assert picked == expected
            passed = model.passed
            start(board, picked)
            running |= {job_id: ready.pop(job_id) for job_id in picked}
            for job_id in sorted(running)[:ends]:
                del running[job_id]
                board.execute("UPDATE jobdaemon.procrastinate_jobs SET status = 'succeeded' WHERE id = %s", [job_id])


def test_the_fullest_door_costs_a_claim_little(board: Sql) -> None:
    """With a thousand prewarms waiting and no order, and with as many orders before them, a claim reads about one row of each."""
    board.execute("DISCARD PLANS")
    with board.transaction(force_rollback=True):
        put(board, [replace(PREWARM, id=n) for n in range(1, 1001)])
        for has_orders in (False, True):
            if has_orders:
                put(board, [ReadyJob(n, TOP, n) for n in range(1001, 2001)])
            for _ in range(7):  # custom plans, then generic ones
                before = _scanned(board)
                picked = sql_pick(board, 4)
                assert len(picked) == 4
                assert all((job_id > 1000) is has_orders for job_id in picked)
                assert _scanned(board) - before < 3500


def _scanned(sql: Sql) -> int:
    row = sql.execute(
        "SELECT idx_tup_fetch + seq_tup_read AS rows FROM pg_stat_xact_user_tables"
        " WHERE relid = 'jobdaemon.procrastinate_jobs'::regclass"
    ).fetchone()
    assert row is not None
    count: int = row["rows"]
    return count


def prewarm(sql: Sql, name: str) -> int:
    row = sql.execute("SELECT job_id FROM jobdaemon.prewarm(%s)", [f"https://photos.example/{name}.jpg"]).fetchone()
    assert row is not None
    return int(row["job_id"])


def tasks(jobs: list[Job]) -> list[str]:
    return [job.task.removeprefix("jobdaemon.") for job in jobs]


async def test_orders_first_then_idle_slots(store: PostgresJobStore, daemon_id: int, sql: Sql, order_factory: Orders) -> None:
    """However long prewarms wait, an order of any plan, set to the lowest priority too, starts before; they get what is left."""
    prewarms = [prewarm(sql, "a"), prewarm(sql, "b"), prewarm(sql, "c")]
    pro, free = order_factory("Pro"), order_factory("Free")
    sql.execute("SELECT jobdaemon.prioritize_order(%s, -1000000)", [pro])
    [first] = await store.claim("beautify", daemon_id, 1)
    assert first.order_id == free
    [second, third] = await store.claim("beautify", daemon_id, 2)
    assert (second.order_id, third.id, third.order_id) == (pro, prewarms[0], None)
    late = order_factory("Pro")
    assert [job.order_id for job in await store.claim("beautify", daemon_id, 1)] == [late]
    assert [job.id for job in await store.claim("beautify", daemon_id, 9)] == prewarms[1:]


@pytest.mark.parametrize("plan", ["Free", "Pro"])
async def test_a_capped_customer_goes_before(
    store: PostgresJobStore, daemon_id: int, sql: Sql, order_factory: Orders, plan: str
) -> None:
    """A customer who has had the fair share still goes before a prewarm, which has no customer."""
    sql.execute("UPDATE jobdaemon.queues SET fair_share = 1 WHERE name = 'beautify'")
    first = prewarm(sql, "a")
    orders = [order_factory(plan, customer="ada") for _ in range(3)]
    claimed = [(await store.claim("beautify", daemon_id, 1))[0] for _ in range(4)]
    assert [job.order_id for job in claimed] == [*orders, None]
    assert claimed[-1].id == first


async def test_within_the_cluster_limit(store: PostgresJobStore, daemon_id: int, sql: Sql, order_factory: Orders) -> None:
    """A running prewarm holds a slot of the cluster limit like any job, and takes one only when no order wants it."""
    sql.execute("UPDATE jobdaemon.queues SET cluster_limit = 2 WHERE name = 'beautify'")
    for name in "abc":
        prewarm(sql, name)
    order_factory("Free")
    assert tasks(await store.claim("beautify", daemon_id, 5)) == ["beautify", "prewarm"]
    order = order_factory("Free")
    assert await store.claim("beautify", daemon_id, 5) == []
    sql.execute("UPDATE jobdaemon.queues SET cluster_limit = 3 WHERE name = 'beautify'")
    assert [job.order_id for job in await store.claim("beautify", daemon_id, 5)] == [order]


async def test_a_held_order_is_not_passed_by(
    store: PostgresJobStore, daemon_id: int, sql: Sql, order_factory: Orders, engine_database: str
) -> None:
    """While somebody holds the row of an order's job, no prewarm takes the slot that it is about to want."""
    prewarm(sql, "a")
    order = order_factory("Free")
    with psycopg.connect(engine_database) as other:
        other.execute("SELECT FROM jobdaemon.procrastinate_jobs WHERE task_name = 'jobdaemon.beautify' FOR UPDATE")
        assert await store.claim("beautify", daemon_id, 1) == []
    assert [job.order_id for job in await store.claim("beautify", daemon_id, 1)] == [order]
    assert tasks(await store.claim("beautify", daemon_id, 1)) == ["prewarm"]


async def test_other_work_below_goes_before(store: PostgresJobStore, daemon_id: int, sql: Sql, job_factory: Jobs) -> None:
    """What an app put into the queue at a priority of its own, however low, is wanted: a prewarm waits for it."""
    prewarm(sql, "a")
    low = job_factory("beautify", "mail.send", -3_000_000)
    assert [job.id for job in await store.claim("beautify", daemon_id, 1)] == [low]
    assert tasks(await store.claim("beautify", daemon_id, 1)) == ["prewarm"]


async def test_never_lifted(store: PostgresJobStore, sql: Sql, order_factory: Orders) -> None:
    """However long it waits, lifting leaves a prewarm alone, while an order of the same age is lifted."""
    waiting = prewarm(sql, "a")
    order_factory("Pro")
    sql.execute("UPDATE jobdaemon.orders SET waits_from = now() - interval '2 hours'")
    sql.execute("UPDATE jobdaemon.procrastinate_events SET at = now() - interval '2 hours'")
    assert await store.lift_orders() == 1
    rows = sql.execute("SELECT id, priority FROM jobdaemon.procrastinate_jobs ORDER BY id").fetchall()
    assert [row["priority"] for row in rows] == [PREWARM_PRIORITY, LIFTED_PRIORITY]
    assert rows[0]["id"] == waiting


def test_one_priority_for_both(sql: Sql) -> None:
    """SQL and Python name the same priority, below all that plans and operators may set."""
    row = sql.execute("SELECT jobdaemon.prewarm_priority() AS priority").fetchone()
    assert row == {"priority": PREWARM_PRIORITY}
    assert PREWARM_PRIORITY < -1_000_000
