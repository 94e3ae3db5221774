"""A priority for each stage: what every job of an order gets, who is lifted where, and which values a plan may hold."""

from __future__ import annotations

import json
from collections.abc import Mapping

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jobdaemon.domain.expand import WantedImage, generate_jobs, upload_job, writes_when_dead
from jobdaemon.domain.outcome import End, Transition
from jobdaemon.domain.picking import LIFTED_PRIORITY
from jobdaemon.domain.plan import Plan, top_priority
from jobdaemon.queue.store import PostgresJobStore
from tests.effort import examples
from tests.factories import PLANS, QUEUES, Claimed, Orders, Row, Sql, beautified, generated, plan

STAGES = ("beautify", "generate", "upload")


def _map(sql: Sql, name: str, priorities: Mapping[str, int]) -> None:
    sql.execute("UPDATE jobdaemon.plans SET stage_priority = %s WHERE name = %s", [json.dumps(priorities), name])


def _age(sql: Sql, order_id: int) -> None:
    sql.execute("UPDATE jobdaemon.orders SET waits_from = now() - interval '1 hour' WHERE id = %s", [order_id])


def _priorities(orders: Orders, order_id: int) -> dict[str, int]:
    """Queue -> priority of the order's newest job there."""
    return {job["queue_name"]: job["priority"] for job in orders.jobs(order_id)}


async def _advance(claimed: Claimed, stages: int = 2) -> None:
    """Take what waits, orders of two images, through the first stages, whose code knows nothing but an order's own priority."""
    for job in await claimed.claim("beautify", 50):
        assert job.order_id is not None
        jobs = generate_jobs(job.order_id, 200, "local", [WantedImage(1, "p"), WantedImage(2, "p")], 5)
        await claimed.store.commit([Transition(job, End.SUCCEEDED, writes=(beautified(job.order_id, *jobs),))], daemon_id=None)
    for job in await claimed.claim("generate.local", 50) if stages > 1 else ():
        assert job.order_id is not None
        writes = tuple(generated(job.order_id, index, upload_job(job.order_id, 200, index)) for index in (1, 2))
        await claimed.store.commit([Transition(job, End.SUCCEEDED, writes=writes)], daemon_id=None)


async def test_each_stage_has_its_own(claimed_job_factory: Claimed, order_factory: Orders, sql: Sql) -> None:
    """A stage that the plan names has that priority, in whichever queue; one that it does not name has the plan's."""
    _map(sql, "Start", {"beautify": -5, "upload": 500})
    order_id = order_factory("Start", images=2)
    await _advance(claimed_job_factory)
    assert _priorities(order_factory, order_id) == {"beautify": -5, "generate.local": 200, "upload": 500}
    assert order_factory.row(order_id)["priority"] == 200
    other = order_factory("Free")
    await _advance(claimed_job_factory)
    assert _priorities(order_factory, other) == dict.fromkeys(QUEUES, 300)


async def test_the_claim_goes_by_the_stage(claimed_job_factory: Claimed, order_factory: Orders, sql: Sql) -> None:
    """An image of Start is uploaded before one of Free where its plan says so."""
    _map(sql, "Start", {"upload": 500})
    start, free = order_factory("Start", images=2), order_factory("Free")
    assert start < free
    await _advance(claimed_job_factory)
    assert [job.order_id for job in await claimed_job_factory.claim("upload")] == [start]
    order_factory("Start")
    first = order_factory("Free")
    assert [job.order_id for job in await claimed_job_factory.claim("beautify")] == [first]


async def test_an_order_keeps_what_its_plan_said(claimed_job_factory: Claimed, order_factory: Orders, sql: Sql) -> None:
    """A changed map is for orders made from then on, as a changed priority is."""
    before = order_factory("Start", images=2)
    _map(sql, "Start", {"generate": 700})
    after = order_factory("Start", images=2)
    await _advance(claimed_job_factory, stages=1)
    for order_id, priority in ((before, 200), (after, 700)):
        assert _priorities(order_factory, order_id)["generate.local"] == priority


async def test_an_operators_priority_wins_in_every_stage(claimed_job_factory: Claimed, order_factory: Orders, sql: Sql) -> None:
    """A prioritized order's jobs have that priority, whatever its plan says of their stage."""
    _map(sql, "Start", {"beautify": 1, "generate": 2, "upload": 3})
    order_id = order_factory("Start", images=2)
    sql.execute("SELECT jobdaemon.prioritize_order(%s, 777)", [order_id])
    await _advance(claimed_job_factory)
    assert _priorities(order_factory, order_id) == dict.fromkeys(QUEUES, 777)


async def test_lifting_leaves_a_stage_where_the_plan_is_the_highest(
    claimed_job_factory: Claimed, order_factory: Orders, sql: Sql
) -> None:
    """A lifted order is lifted where another plan is above it; where none is it keeps its place, before and after lifting."""
    _map(sql, "Start", {"upload": 500})
    order_id = order_factory("Start", images=2)
    await _advance(claimed_job_factory)
    _age(sql, order_id)
    assert await claimed_job_factory.store.lift_orders() == 1
    assert _priorities(order_factory, order_id)["upload"] == 500
    other = order_factory("Start", images=2)
    _age(sql, other)
    assert await claimed_job_factory.store.lift_orders() == 1
    await _advance(claimed_job_factory)
    lifted = {"beautify": LIFTED_PRIORITY, "generate.local": LIFTED_PRIORITY, "upload": 500}
    assert _priorities(order_factory, other) == lifted


async def test_who_may_be_lifted(store: PostgresJobStore, order_factory: Orders, sql: Sql) -> None:
    """The highest plan of all stages is never lifted; one that is below another in a single stage is, and upkeep agrees."""
    order_id = order_factory("Free")
    _age(sql, order_id)
    assert not (await store.promote()).has_overdue
    assert await store.lift_orders() == 0
    _map(sql, "Pro", {"upload": 301})
    assert (await store.promote()).has_overdue
    assert await store.lift_orders() == 1
    assert _priorities(order_factory, order_id) == {"beautify": 300}
    assert not (await store.promote()).has_overdue


async def test_redrive_goes_by_the_stage_it_leads_to(claimed_job_factory: Claimed, order_factory: Orders, sql: Sql) -> None:
    """A dead upload whose image must be made again becomes a generate job with that stage's priority."""
    _map(sql, "Start", {"generate": 250, "upload": 500})
    order_id = order_factory("Start", images=2)
    await _advance(claimed_job_factory)
    for job in await claimed_job_factory.claim("upload", 2):
        dead = Transition(job, End.FAILED, writes=writes_when_dead(job, "no"), error="no")
        await claimed_job_factory.store.commit([dead], daemon_id=None)
    sql.execute("UPDATE jobdaemon.images SET locator = NULL WHERE order_id = %s AND index = 1", [order_id])
    row = sql.execute("SELECT jobdaemon.redrive(%s) AS n", [order_id]).fetchone()
    assert row == {"n": 2}
    waiting = {job["queue_name"]: job["priority"] for job in order_factory.jobs(order_id) if job["status"] == "todo"}
    assert waiting == {"generate.local": 250, "upload": 500}


def test_a_job_of_no_order_cannot_be_redriven(sql: Sql) -> None:
    """It is refused with its own number, not with that of an order that is not there."""
    row = sql.execute(
        "INSERT INTO jobdaemon.procrastinate_jobs (queue_name, task_name, status)"
        " VALUES ('upload', 'jobdaemon.upload', 'failed') RETURNING id"
    ).fetchone()
    assert row is not None
    with pytest.raises(psycopg.Error, match=f"job {row['id']} is for no order and cannot be redriven") as caught:
        sql.execute("SELECT jobdaemon.redrive(job_id => %s)", [row["id"]])
    assert caught.value.sqlstate == "JD005"


PRIORITIES = st.integers(-1_000_000, 1_000_000)
PLANS_OF_ANY_KIND = st.lists(
    st.tuples(PRIORITIES, st.dictionaries(st.sampled_from(STAGES), PRIORITIES)), min_size=len(PLANS), max_size=len(PLANS)
)


@settings(max_examples=examples(60), derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(PLANS_OF_ANY_KIND, st.sampled_from(["beautify", "generate.local", "generate.a.b", "upload", "uploads"]))
def test_sql_says_what_the_model_says(order_factory: Orders, values: list[tuple[int, dict[str, int]]], queue: str) -> None:
    """job_priority and top_priority are Plan.priority_in and domain's top_priority, for any plans and any queue."""
    sql = order_factory.sql
    plans = [
        plan(old.name, old.images, priority, stage_priority=stages) for old, (priority, stages) in zip(PLANS, values, strict=True)
    ]
    with sql.transaction(force_rollback=True):
        for one in plans:
            sql.execute(
                "UPDATE jobdaemon.plans SET priority = %s, stage_priority = %s WHERE name = %s",
                [one.priority, json.dumps(dict(one.stage_priority)), one.name],
            )
        top = sql.execute("SELECT jobdaemon.top_priority(%s) AS top", [queue]).fetchone()
        assert top == {"top": top_priority(plans, queue)}
        ids = {order_factory(one.name): one for one in plans}
        rows = sql.execute("SELECT id, jobdaemon.job_priority(o, %s) AS priority FROM jobdaemon.orders o", [queue]).fetchall()
        assert {row["id"]: row["priority"] for row in rows} == {key: one.priority_in(queue) for key, one in ids.items()}


async def test_settings_become_rows(store: PostgresJobStore, sql: Sql) -> None:
    """A daemon inserts a plan with its map, and leaves that of a plan that is there."""
    new = plan("Gold", 3, 50, stage_priority={"upload": 9})
    changed = plan("Free", 2, 300, stage_priority={"upload": 9})
    await store.ensure_rows(QUEUES, [new, changed])
    rows = sql.execute("SELECT name, stage_priority AS map FROM jobdaemon.plans WHERE name IN ('Gold', 'Free')").fetchall()
    assert {row["name"]: row["map"] for row in rows} == {"Gold": {"upload": 9}, "Free": {}}


def _plan_row(sql: Sql) -> Row | None:
    return sql.execute("SELECT * FROM jobdaemon.plans WHERE name = 'Free'").fetchone()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("stage_priority = NULL", 'stage_priority must be an object such as {"upload": 500}, not NULL'),
        ("stage_priority = '[500]'", 'must be an object such as {"upload": 500}, not [500]'),
        ("stage_priority = '500'", "not 500"),
        ("""stage_priority = '{"uploads": 5}'""", 'names no stage "uploads": there are beautify, generate and upload'),
        ("""stage_priority = '{"generate.local": 5}'""", 'names no stage "generate.local"'),
        (
            """stage_priority = '{"upload": null}'""",
            "priority of stage upload must be a whole number, -1000000 to 1000000, not null",
        ),
        ("""stage_priority = '{"upload": "5"}'""", 'not "5"'),
        ("""stage_priority = '{"upload": true}'""", "not true"),
        ("""stage_priority = '{"upload": 5.5}'""", "not 5.5"),
        ("""stage_priority = '{"upload": 1e300}'""", "must be a whole number, -1000000 to 1000000, not 1000"),
        ("""stage_priority = '{"upload": -1000001}'""", "not -1000001"),
        ("priority = 10000000", "a plan's priority must be -1000000 to 1000000, not 10000000"),
        ("priority = NULL", "a plan's priority must be -1000000 to 1000000, not NULL"),
        ("lift_after = '101 years'", "lift_after and expires_after must be 100 years at most"),
        ("expires_after = '300000 years'", "lift_after and expires_after must be 100 years at most"),
    ],
)
def test_wrong_plans_are_one_sentence(sql: Sql, change: str, words: str) -> None:
    """A plain UPDATE or INSERT that would break the claim or upkeep is refused with a sentence, and nothing changes."""
    before = _plan_row(sql)
    insert = (
        "INSERT INTO jobdaemon.plans SELECT (p).* FROM (SELECT jsonb_populate_record(p, jsonb_build_object('name', 'New'))"
        " AS p FROM jobdaemon.plans p WHERE name = 'Free') AS p; "
    )
    for statement in (f"UPDATE jobdaemon.plans SET {change} WHERE name = 'Free'", f"{insert}UPDATE jobdaemon.plans SET {change}"):
        with pytest.raises(psycopg.Error) as caught:
            sql.execute(statement.encode())
        assert caught.value.sqlstate == "JD004"
        assert words in str(caught.value.diag.message_primary)
    assert _plan_row(sql) == before


def test_a_whole_number_may_be_written_with_a_point(sql: Sql, order_factory: Orders) -> None:
    """5.0 and 5e2 are whole numbers in JSON, and jobs get them."""
    sql.execute("""UPDATE jobdaemon.plans SET stage_priority = '{"beautify": 5e2}' WHERE name = 'Free'""")
    assert _priorities(order_factory, order_factory("Free")) == {"beautify": 500}
    sql.execute("""UPDATE jobdaemon.plans SET stage_priority = '{"beautify": 5.0}' WHERE name = 'Free'""")
    assert _priorities(order_factory, order_factory("Free")) == {"beautify": 5}


def test_the_model_of_a_plan() -> None:
    """The stage is what stands before the dot; the top is the highest of the plans in that stage."""
    plans: list[Plan] = [
        plan("Free", 2, 300, stage_priority={"upload": -1}),
        plan("Pro", 70, 100, stage_priority={"generate": 9}),
    ]
    assert [one.priority_in("generate.local") for one in plans] == [300, 9]
    assert [top_priority(plans, queue) for queue in QUEUES] == [300, 300, 100]


async def test_lifted_work_shares_with_the_stages_highest(claimed_job_factory: Claimed, order_factory: Orders, sql: Sql) -> None:
    """Where Start is the highest plan of a stage, its jobs have three starts of four beside lifted work there."""
    for name, upload in (("Free", 10), ("Start", 90), ("Pro", 20)):
        _map(sql, name, {"upload": upload})
    pro = order_factory("Pro", images=2)
    _age(sql, pro)
    await claimed_job_factory.store.lift_orders()
    for _ in range(3):
        order_factory("Start", images=2)
    await _advance(claimed_job_factory)
    claimed = await claimed_job_factory.claim("upload", 4)
    assert sorted(job.order_id == pro for job in claimed) == [False, False, False, True]
