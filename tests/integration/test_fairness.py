"""Fair share and lifting in the real claim: equal to the pure model on random queues, exact over daemons, cheap, and wired."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from psycopg.rows import dict_row

from jobdaemon.db import DatabaseAddress
from jobdaemon.domain.job import Job, NewJob, Task
from jobdaemon.domain.outcome import End, Transition
from jobdaemon.domain.picking import LIFTED_PRIORITY, ReadyJob, longest_wait, pick
from jobdaemon.queue.store import PostgresJobStore
from tests.effort import IS_THOROUGH, examples
from tests.factories import Claimed, Jobs, Orders, Sql, beautified, generated

TOP = 300  # Free's priority in the tests' plans


@pytest.fixture(scope="module")
def board(postgres: Any, engine_template: str) -> Iterator[Sql]:
    """A database whose transactions are all rolled back."""
    name = postgres.create_database(template=engine_template)
    with psycopg.connect(postgres.url(name), autocommit=True, row_factory=dict_row) as connection:
        connection.execute("ALTER TABLE jobdaemon.procrastinate_jobs DISABLE TRIGGER USER")
        yield connection
    postgres.drop_database(name)


# ------------------------------------------------------------- the model

JOBS = st.builds(
    ReadyJob,
    id=st.just(0),
    priority=st.sampled_from([LIFTED_PRIORITY, LIFTED_PRIORITY, 500, TOP, TOP, 200, 100, -5]),
    order_id=st.none() | st.integers(1, 6),
    customer=st.sampled_from(["", "a", "a", "b", "c", "d"]),
    lock=st.sampled_from([None, None, None, None, "x", "y"]),
)
ROUNDS = st.lists(st.tuples(st.integers(1, 8), st.integers(0, 6)), min_size=1, max_size=4)


def put(sql: Sql, jobs: list[ReadyJob], queue: str = "upload") -> None:
    """Insert these jobs under their own ids."""
    rows = [
        {
            "id": job.id,
            "priority": job.priority,
            "lock": job.lock,
            "args": ({"customer": job.customer} if job.customer else {})
            | ({} if job.order_id is None else {"order_id": job.order_id}),
        }
        for job in jobs
    ]
    sql.execute(
        "INSERT INTO jobdaemon.procrastinate_jobs (id, queue_name, task_name, priority, lock, args)"
        " SELECT r.id, %s, 'jobdaemon.upload', r.priority, r.lock, r.args"
        " FROM jsonb_to_recordset(%s::jsonb) AS r (id bigint, priority integer, lock text, args jsonb)",
        [queue, json.dumps(rows)],
    )


def sql_pick(sql: Sql, slots: int) -> set[int]:
    """What the claim's own function chooses."""
    row = sql.execute(
        "SELECT jobdaemon.pick_jobs(q, %s) AS ids FROM jobdaemon.queues q WHERE q.name = 'upload'", [slots]
    ).fetchone()
    assert row is not None
    return set(row["ids"])


def passed_in(sql: Sql) -> int:
    row = sql.execute("SELECT passed FROM jobdaemon.lifted_turns WHERE queue = 'upload'").fetchone()
    return 0 if row is None else int(row["passed"])


@settings(max_examples=examples(300), derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(jobs=st.lists(JOBS, max_size=40), fair_share=st.none() | st.integers(1, 4), rounds=ROUNDS)
@example(jobs=[ReadyJob(0, 0, 1, "a")] * 40, fair_share=1, rounds=[(8, 0), (8, 3)])
@example(  # found by chance: jobs that only wait for another one's lock are no choice and take nobody's place
    jobs=[*[ReadyJob(0, 500, None, "a", "x")] * 2, ReadyJob(0, 500, None, "a")], fair_share=1, rounds=[(2, 0)]
)
def test_the_claim_picks_what_the_model_picks(
    board: Sql, jobs: list[ReadyJob], fair_share: int | None, rounds: list[tuple[int, int]]
) -> None:
    """On any queue, over several claims with ends between them, SQL and domain/picking.py choose the same jobs and turns."""
    ready = {number: replace(job, id=number) for number, job in enumerate(jobs, start=1)}
    running: dict[int, ReadyJob] = {}
    passed = 0
    with board.transaction(force_rollback=True):
        board.execute("UPDATE jobdaemon.queues SET fair_share = %s WHERE name = 'upload'", [fair_share])
        put(board, list(ready.values()))
        for slots, ends in rounds:
            busy = {job.lock for job in running.values() if job.lock}
            free = [job for job in ready.values() if job.lock not in busy]
            held = Counter(job.customer for job in running.values())
            if fair_share is None and not any(job.is_lifted for job in ready.values()):
                # the short way looks at no more jobs than it has slots, so that jobs of one lock may leave slots free
                free = sorted(free, key=ReadyJob.claim_order)[:slots]
            wanted = pick(free, slots, running=held, fair_share=fair_share, top=TOP, passed=passed)
            picked = sql_pick(board, slots)
            assert picked == set(wanted.ids)
            passed = wanted.passed
            assert passed_in(board) == passed
            board.execute(
                "UPDATE jobdaemon.procrastinate_jobs SET status = 'doing', worker_id = NULL WHERE id = ANY (%s)", [list(picked)]
            )
            running |= {job_id: ready.pop(job_id) for job_id in picked}
            for job_id in sorted(running)[:ends]:
                del running[job_id]
                board.execute("UPDATE jobdaemon.procrastinate_jobs SET status = 'succeeded' WHERE id = %s", [job_id])


@settings(max_examples=examples(40), derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    head=st.integers(500, 900),
    tail=st.lists(JOBS.map(lambda job: replace(job, lock=None)), max_size=25),
    fair_share=st.integers(1, 3),
    slots=st.integers(1, 6),
    lifted_head=st.booleans(),
)
@example(  # found by chance: the surplus was dealt before all of it was known
    head=500,
    tail=[*[ReadyJob(0, LIFTED_PRIORITY)] * 3, ReadyJob(0, LIFTED_PRIORITY, None, "a"), ReadyJob(0, 500, None, "a")],
    fair_share=1,
    slots=6,
    lifted_head=False,
)
def test_far_behind_a_capped_customer_too(
    board: Sql, head: int, tail: list[ReadyJob], fair_share: int, slots: int, lifted_head: bool
) -> None:
    """However many jobs of one customer stand at the head, longer than the claim looks at one by one, it picks as the model."""
    block = LIFTED_PRIORITY if lifted_head else TOP
    jobs = [ReadyJob(number, block, 1, "hog") for number in range(1, head + 1)]
    jobs += [replace(job, id=head + number) for number, job in enumerate(tail, start=1)]
    with board.transaction(force_rollback=True):
        board.execute("UPDATE jobdaemon.queues SET fair_share = %s WHERE name = 'upload'", [fair_share])
        put(board, jobs)
        held: Counter[str] = Counter()
        ready = {job.id: job for job in jobs}
        passed = 0
        for _ in range(2):
            wanted = pick(ready.values(), slots, running=held, fair_share=fair_share, top=TOP, passed=passed)
            picked = sql_pick(board, slots)
            assert picked == set(wanted.ids)
            passed = wanted.passed
            board.execute(
                "UPDATE jobdaemon.procrastinate_jobs SET status = 'doing', worker_id = NULL WHERE id = ANY (%s)", [list(picked)]
            )
            held.update(ready.pop(job_id).customer for job_id in picked)


BLOCKS = st.lists(
    st.tuples(
        st.integers(1, 120),  # jobs
        st.sampled_from(
            [(0, 1), (1, 1), (2, 1), (1, 4), (3, 6), (10, 20), (10, 40)]
        ),  # whose: from this one on so many take turns
        st.sampled_from([LIFTED_PRIORITY, TOP, TOP, TOP, 100]),
        st.booleans(),  # their orders are as old as the first, or younger than all before
        st.sampled_from([0, 0, 0, 3, 1]),  # unless 0, one in so many has a lock, the same for all
    ),
    min_size=2,
    max_size=6,
)


@pytest.fixture(scope="module")
def neighbours(board: Sql) -> list[str]:
    """'' and 50 customers of two lanes, so that each stands in the way of others: 30 of one, then 20 of the other."""
    lanes = [
        board.execute(
            "SELECT 'c' || n AS name FROM generate_series(1, 5000) AS n"
            " WHERE hashtext(('c' || n) COLLATE \"C\") & 63 = %s LIMIT %s",
            lane,
        ).fetchall()
        for lane in ([63, 30], [0, 20])
    ]
    return ["", *(row["name"] for rows in lanes for row in rows)]


@settings(max_examples=examples(100), derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    blocks=BLOCKS,
    running=st.lists(st.sampled_from([1, 1, 1, 1, 2, 3, 12]), max_size=8),
    fair_share=st.integers(1, 4) | st.sampled_from([50, None]),
    rounds=st.lists(st.tuples(st.integers(1, 8) | st.just(40), st.integers(0, 20)), min_size=1, max_size=3),
)
@example(  # as many customers of one lane as slots, behind one of that lane who has had the share
    blocks=[(120, (1, 1), TOP, False, 0), (120, (10, 20), TOP, False, 0)], running=[1], fair_share=1, rounds=[(8, 0)]
)
def test_long_queues_of_many_customers(
    board: Sql,
    neighbours: list[str],
    blocks: list[tuple[int, tuple[int, int], int, bool, int]],
    running: list[int],
    fair_share: int | None,
    rounds: list[tuple[int, int]],
) -> None:
    """Whatever blocks of work wait, of one customer or of many, of nobody, lifted or locked, the claim picks as the model."""
    jobs = [ReadyJob(number, TOP, None, neighbours[customer]) for number, customer in enumerate(running, start=1)]
    for size, (first, count), priority, is_old, locked in blocks:
        oldest = 1 if is_old else len(jobs)
        for place in range(size):
            customer = neighbours[first + place * 7 % count]
            lock = "x" if locked and place % locked == 0 else None
            jobs.append(ReadyJob(len(jobs) + 1, priority, oldest + place // 3, customer, lock))
    busy = {job.id: job for job in jobs[: len(running)]}
    ready = {job.id: job for job in jobs[len(running) :]}
    passed = 0
    with board.transaction(force_rollback=True):
        share(board, fair_share)
        put(board, jobs)
        started = set(busy)
        for slots, ends in rounds:
            board.execute(
                "UPDATE jobdaemon.procrastinate_jobs SET status = 'doing', worker_id = NULL WHERE id = ANY (%s)", [list(started)]
            )
            locks = {job.lock for job in busy.values() if job.lock}
            free = [job for job in ready.values() if job.lock not in locks]
            held = Counter(job.customer for job in busy.values())
            if fair_share is None and not any(job.is_lifted for job in ready.values()):
                free = sorted(free, key=ReadyJob.claim_order)[:slots]
            wanted = pick(free, slots, running=held, fair_share=fair_share, top=TOP, passed=passed)
            started = sql_pick(board, slots)
            assert started == set(wanted.ids)
            passed = wanted.passed
            assert passed_in(board) == passed
            busy |= {job_id: ready.pop(job_id) for job_id in started}
            ended = sorted(busy)[:ends]
            busy = {job_id: job for job_id, job in busy.items() if job_id not in ended}
            started -= set(ended)
            board.execute("UPDATE jobdaemon.procrastinate_jobs SET status = 'succeeded' WHERE id = ANY (%s)", [ended])


# ------------------------------------------------------------- fair share


@pytest.fixture
async def stores(engine_database: str, patient_locks: None):  # type: ignore[no-untyped-def]
    """Four stores, each with connections of its own."""
    stores = [PostgresJobStore(DatabaseAddress(engine_database)) for _ in range(4)]
    yield stores
    for store in stores:
        await store.close()


def share(sql: Sql, slots: int | None, queue: str = "upload") -> None:
    sql.execute("UPDATE jobdaemon.queues SET fair_share = %s WHERE name = %s", [slots, queue])


def end_running(sql: Sql) -> None:
    sql.execute("UPDATE jobdaemon.procrastinate_jobs SET status = 'succeeded' WHERE status = 'doing'")


def customers(jobs: list[Job]) -> Counter[str]:
    return Counter(job.args.get("customer", "") for job in jobs)


async def test_share_is_exact_over_racing_daemons(stores: list[PostgresJobStore], daemon_id: int, sql: Sql) -> None:
    """However many daemons claim at once, no customer runs more than the share while others wait."""
    put(sql, [ReadyJob(n, 0, n, "ab"[n > 200]) for n in range(1, 401)])
    put(sql, [ReadyJob(n, 0, n) for n in range(401, 601)])
    share(sql, 3)
    for _ in range(3):
        claims = await asyncio.gather(*(store.claim("upload", daemon_id, 4) for store in stores for _ in range(3)))
        running = customers([job for jobs in claims for job in jobs])
        assert running == {"a": 3, "b": 3, "": 42}
        end_running(sql)


async def test_a_customer_alone_may_use_all(store: PostgresJobStore, daemon_id: int, sql: Sql) -> None:
    """Nobody else waits: the share holds nothing back; somebody comes: the next free slots are theirs up to the share."""
    put(sql, [ReadyJob(n, 0, n, "a") for n in range(1, 101)])
    share(sql, 2)
    first = await store.claim("upload", daemon_id, 10)
    assert customers(first) == {"a": 10}
    put(sql, [ReadyJob(n, 0, n, "b") for n in range(201, 241)])
    assert customers(await store.claim("upload", daemon_id, 2)) == {"b": 2}
    # both hold their share now: what is left goes to who runs least
    assert customers(await store.claim("upload", daemon_id, 5)) == {"b": 5}


async def test_customer_travels_with_the_order(claimed_job_factory: Claimed, sql: Sql) -> None:
    """Every job of an order names its customer, those that follow and those that are redriven too; '' is nobody's name."""
    orders = claimed_job_factory.orders
    job = await claimed_job_factory.beautify(customer="ann", plan="Free")
    assert job.args["customer"] == "ann"
    assert job.order_id is not None
    following = NewJob("generate.local", Task.GENERATE, 300, {"order_id": job.order_id, "images": [1]})
    done = Transition(job, End.SUCCEEDED, writes=(beautified(job.order_id, following),))
    await claimed_job_factory.store.commit([done], daemon_id=claimed_job_factory.daemon_id)
    [generate] = await claimed_job_factory.claim("generate.local")
    assert generate.args == {"order_id": job.order_id, "images": [1], "customer": "ann"}
    anonymous = orders("Free")
    assert [row["args"] for row in orders.jobs(anonymous)] == [{"order_id": anonymous}]


@pytest.mark.slow
def test_fifty_thousand_capped_jobs_at_the_head_cost_little(board: Sql) -> None:
    """Behind 50,000 waiting jobs of a capped customer a claim touches a few hundred pages, with and without statistics."""
    board.execute("VACUUM jobdaemon.procrastinate_jobs")  # of what other tests have rolled back
    with board.transaction(force_rollback=True):
        share(board, 1)
        put(board, [ReadyJob(n, TOP, n // 14 + 1, "hog") for n in range(1, 50_001)])
        put(board, [ReadyJob(50_000 + n, TOP, 9_000 + n, f"c{n % 10}") for n in range(1, 401)])
        board.execute("UPDATE jobdaemon.procrastinate_jobs SET status = 'doing' WHERE id = 1")
        touched = []
        for round_ in range(30):
            if round_ == 15:
                board.execute("ANALYZE jobdaemon.procrastinate_jobs")
            row = board.execute(
                "EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON)"
                " SELECT jobdaemon.pick_jobs(q, 3) FROM jobdaemon.queues q WHERE q.name = 'upload'"
            ).fetchone()
            assert row is not None
            plan = row["QUERY PLAN"][0]["Plan"]
            touched.append(plan["Shared Hit Blocks"] + plan["Shared Read Blocks"])
            picked = list(sql_pick(board, 3))
            board.execute("UPDATE jobdaemon.procrastinate_jobs SET status = 'succeeded' WHERE id = ANY (%s)", [picked])
            assert min(picked) > 50_000
    # a walk over the head would be thousands; the first call of each plan reads the catalog too
    assert sorted(touched)[-3] < 600, touched


#: Whose waiting jobs, in claim order: name, jobs, customers who take turns, how many jobs each of these runs, priority.
QUEUES_THAT_COULD_COST = {
    "one other": [("hog", 5_000, 1, 1, TOP), ("c", 5, 1, 0, TOP)],
    "a thousand others": [("hog", 5_000, 1, 1, TOP), ("c", 5_000, 1_000, 0, TOP)],
    "one job each": [("c", 5_000, 5_000, 0, TOP)],
    "all capped": [("hog", 5_000, 1, 1, TOP)],
    "twenty capped": [("hog", 5_000, 20, 1, TOP), ("c", 1_000, 200, 0, TOP)],
    "lifted work first": [("late", 20, 4, 0, LIFTED_PRIORITY), ("hog", 5_000, 1, 1, TOP), ("c", 1_000, 200, 0, TOP)],
    "a lifted head": [("hog", 5_000, 1, 1, LIFTED_PRIORITY), ("c", 1_000, 200, 0, TOP)],
    "nobody's work": [("hog", 5_000, 1, 1, TOP), ("", 1_000, 1, 0, TOP)],
}


@pytest.mark.parametrize("blocks", QUEUES_THAT_COULD_COST.values(), ids=QUEUES_THAT_COULD_COST)
def test_a_claim_looks_at_few_rows(board: Sql, blocks: list[tuple[str, int, int, int, int]]) -> None:
    """Whoever waits, a claim of four jobs fetches a few hundred rows in as many index scans, with and without statistics."""
    board.execute("DISCARD PLANS")
    with board.transaction(force_rollback=True):
        share(board, 1)
        for order_id, (name, jobs, number, running, priority) in enumerate(blocks):
            customer = f"'{name}-' || n % {number}" if name else "''"
            board.execute(
                "INSERT INTO jobdaemon.procrastinate_jobs (queue_name, task_name, priority, args, status)"
                f" SELECT 'upload', 'jobdaemon.upload', {priority},"
                f" jsonb_build_object('order_id', {order_id * 10_000} + n / 5, 'customer', {customer}),"
                f" (CASE WHEN n < {running * number} THEN 'doing' ELSE 'todo' END)::jobdaemon.procrastinate_job_status"
                f" FROM generate_series(0, {jobs - 1}) AS n"
            )
        for has_statistics in (False, True):
            if has_statistics:
                board.execute("ANALYZE jobdaemon.procrastinate_jobs")
            before = looked_at(board)
            assert len(sql_pick(board, 4)) == 4
            after = looked_at(board)
            assert after["rows"] - before["rows"] < 600, (before, after)
            assert after["scans"] - before["scans"] < 400, (before, after)


def looked_at(sql: Sql) -> dict[str, int]:
    """Rows of the jobs table that this transaction has fetched so far, and in how many scans of indexes and of the table."""
    row = sql.execute(
        "SELECT idx_tup_fetch + seq_tup_read AS rows, idx_scan + seq_scan AS scans FROM pg_stat_xact_user_tables"
        " WHERE relid = 'jobdaemon.procrastinate_jobs'::regclass"
    ).fetchone()
    assert row is not None
    return row


# ------------------------------------------------------------- Free first


async def test_free_takes_the_very_next_slot(store: PostgresJobStore, daemon_id: int, sql: Sql, job_factory: Jobs) -> None:
    """Free that arrives while Pro fills every slot takes the very next free one, every time."""
    sql.execute("SELECT jobdaemon.resize_queue('upload', cluster_limit => 4)")
    put(sql, [ReadyJob(n, 100, n, "pro") for n in range(1, 1101)])
    sql.execute("SELECT setval('jobdaemon.procrastinate_jobs_id_seq', 5000)")
    running = [job.id for job in await store.claim("upload", daemon_id, 4)]
    assert len(running) == 4
    for round_ in range(1000 if IS_THOROUGH else 100):
        free = job_factory(priority=TOP, args={"order_id": 100_000 + round_})
        assert await store.claim("upload", daemon_id, 1) == []
        sql.execute("UPDATE jobdaemon.procrastinate_jobs SET status = 'succeeded' WHERE id = %s", [running.pop(0)])
        [job] = await store.claim("upload", daemon_id, 1)
        assert job.id == free, round_
        # it ends, and Pro fills its slot again
        sql.execute("UPDATE jobdaemon.procrastinate_jobs SET status = 'succeeded' WHERE id = %s", [free])
        [pro] = await store.claim("upload", daemon_id, 1)
        running.append(pro.id)


# ------------------------------------------------------------- lifting


def age(sql: Sql, order_id: int, minutes: int) -> None:
    sql.execute("UPDATE jobdaemon.orders SET waits_from = now() - %s WHERE id = %s", [timedelta(minutes=minutes), order_id])


async def test_what_waited_too_long_is_lifted_once(store: PostgresJobStore, order_factory: Orders, sql: Sql) -> None:
    """Older than its plan's lift_after means lifted, once; younger, ended, prioritized and the highest plan's are not."""
    old, young, free, ended, steered = (order_factory(plan) for plan in ("Pro", "Pro", "Free", "Start", "Pro"))
    for order_id in (old, free, ended, steered):
        age(sql, order_id, 6)  # the tests' plans say five minutes
    sql.execute("SELECT jobdaemon.cancel_order(%s), jobdaemon.prioritize_order(%s, 7)", [ended, steered])
    assert (await store.promote()).has_overdue
    assert await store.lift_orders() == 1
    assert not (await store.promote()).has_overdue
    assert await store.lift_orders() == 0
    priorities = {order_id: order_factory.jobs(order_id)[0]["priority"] for order_id in (old, young, free, steered)}
    assert priorities == {old: LIFTED_PRIORITY, young: 100, free: 300, steered: 7}
    assert (order_factory.row(old)["priority"], order_factory.row(old)["lifted_at"] is not None) == (100, True)


async def test_an_order_for_later_waits_from_then_on(store: PostgresJobStore, order_factory: Orders, sql: Sql) -> None:
    """The wait of an order that is scheduled counts from its time, not from the day it was made."""
    order_id = order_factory("Pro")
    row = sql.execute(
        "SELECT e.order_id FROM jobdaemon.enqueue_order('Pro', 'https://a.example/b.jpg', at => now() + interval '1 day') e"
    ).fetchone()
    assert row is not None
    later = order_factory.row(row["order_id"])
    assert later["waits_from"] - later["created_at"] == timedelta(days=1)
    assert order_factory.row(order_id)["waits_from"] == order_factory.row(order_id)["created_at"]
    assert not (await store.promote()).has_overdue


async def test_jobs_that_follow_are_lifted_too(claimed_job_factory: Claimed, sql: Sql) -> None:
    """An order lifted while a stage works on it makes lifted jobs, though the stage has read the old priority."""
    job = await claimed_job_factory.beautify(plan="Pro")
    assert job.order_id is not None
    age(sql, job.order_id, 6)
    assert await claimed_job_factory.store.lift_orders() == 1
    follow = NewJob("generate.local", Task.GENERATE, 100, {"order_id": job.order_id, "images": [1]})
    await claimed_job_factory.store.commit(
        [Transition(job, End.SUCCEEDED, writes=(beautified(job.order_id, follow),))], daemon_id=claimed_job_factory.daemon_id
    )
    [generate] = await claimed_job_factory.claim("generate.local")
    assert generate.priority == LIFTED_PRIORITY
    upload = NewJob("upload", Task.UPLOAD, 100, {"order_id": job.order_id, "image": 1})
    await claimed_job_factory.store.commit(
        [Transition(generate, End.CHECKPOINT, writes=(generated(job.order_id, 1, upload),))],
        daemon_id=claimed_job_factory.daemon_id,
    )
    [job] = await claimed_job_factory.claim("upload")
    assert job.priority == LIFTED_PRIORITY


async def test_lifting_leaves_held_orders_to_the_next_round(
    engine_database: str, store: PostgresJobStore, order_factory: Orders, sql: Sql
) -> None:
    """An order that somebody holds is not waited for."""
    held, other = order_factory("Pro"), order_factory("Pro")
    for order_id in (held, other):
        age(sql, order_id, 6)
    with psycopg.connect(engine_database) as somebody:
        somebody.execute("SELECT FROM jobdaemon.orders WHERE id = %s FOR UPDATE", [held])
        assert await asyncio.wait_for(store.lift_orders(), 5) == 1
    assert await store.lift_orders() == 1


async def test_one_start_in_four_over_all_daemons(stores: list[PostgresJobStore], daemon_id: int, sql: Sql) -> None:
    """While Free waits, racing daemons start one lifted job in four, no more and no fewer; without Free all slots are theirs."""
    put(sql, [ReadyJob(n, LIFTED_PRIORITY, n) for n in range(1, 101)])
    put(sql, [ReadyJob(n, TOP, n) for n in range(101, 301)])
    for _ in range(5):
        claims = await asyncio.gather(*(store.claim("upload", daemon_id, size) for store in stores for size in (1, 2, 5)))
        jobs = [job for claimed in claims for job in claimed]
        assert (len(jobs), sum(job.priority == LIFTED_PRIORITY for job in jobs)) == (32, 8)
    sql.execute("UPDATE jobdaemon.procrastinate_jobs SET status = 'cancelled' WHERE status = 'todo' AND priority = %s", [TOP])
    assert {job.priority for job in await stores[0].claim("upload", daemon_id, 20)} == {LIFTED_PRIORITY}


async def test_pro_starts_within_its_bound_under_endless_free(
    store: PostgresJobStore, daemon_id: int, order_factory: Orders, sql: Sql
) -> None:
    """A lifted Pro order starts within four times what is ahead of it, plus one, while Free never runs out."""
    pro = [order_factory("Pro") for _ in range(6)]
    for order_id in pro:
        age(sql, order_id, 6)
    for _ in range(8):
        order_factory("Free")
    await store.lift_orders()
    started: dict[int | None, int] = {}
    for place in range(1, 41):
        order_factory("Free")
        [job] = await store.claim("beautify", daemon_id, 1)
        end_running(sql)
        started[job.order_id] = place
    for ahead, order_id in enumerate(pro):
        bound = longest_wait(timedelta(0), notice=timedelta(0), ahead=ahead, starts_per_s=1)
        assert timedelta(seconds=started[order_id]) <= bound
