"""Why an order waits: each reason with its numbers, the most decisive one in order_progress, and cheaply so."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import psycopg
import pytest

from jobdaemon.domain.job import Task
from jobdaemon.domain.outcome import End, Transition
from tests.factories import Claimed, Jobs, Orders, Row, Sql


def _waiting_for(sql: Sql, order_id: int) -> Any:
    row = sql.execute("SELECT waiting_for FROM jobdaemon.order_progress WHERE order_id = %s", [order_id]).fetchone()
    assert row is not None
    return row["waiting_for"]


def _reasons(sql: Sql, order_id: int) -> dict[str, Row]:
    rows = sql.execute("SELECT * FROM jobdaemon.explain_order(%s)", [order_id]).fetchall()
    return {row["reason"]: row["numbers"] | {"told": row["told"]} for row in rows}


@pytest.fixture
def waiting(sql: Sql, claimed_job_factory: Claimed) -> int:
    """A Start order that is ready, behind two of Free and one older of Start, in a queue that one daemon serves with one slot."""
    assert claimed_job_factory.daemon_id
    orders = claimed_job_factory.orders
    orders("Start")
    orders("Free")
    orders("Free")
    orders("Pro")
    order_id = orders("Start")
    orders("Start")
    return order_id


def test_behind_counts_what_is_claimed_before(sql: Sql, waiting: int) -> None:
    """Higher priorities and older orders count, lower ones and younger ones do not."""
    assert _waiting_for(sql, waiting) == "3 jobs go first in queue beautify"
    assert _reasons(sql, waiting) == {"behind": {"jobs": 3, "or_more": False, "told": "3 jobs go first in queue beautify"}}


async def test_behind_agrees_with_the_claim(sql: Sql, claimed_job_factory: Claimed, waiting: int) -> None:
    """As many jobs as it says are claimed before this one, one after another."""
    claimed_before = 0
    while (job := (await claimed_job_factory.claim("beautify"))[0]).order_id != waiting:
        claimed_before += 1
    assert (claimed_before, job.order_id) == (3, waiting)


@pytest.mark.parametrize(
    ("change", "reason", "told", "numbers"),
    [
        ("UPDATE jobdaemon.queues SET paused = true", "paused", "queue beautify is paused", {}),
        (
            "UPDATE jobdaemon.procrastinate_workers SET last_heartbeat = '-infinity'",
            "no_daemon",
            "no daemon serves queue beautify",
            {"draining": 0},
        ),
        (
            "UPDATE jobdaemon.daemons SET status = 'draining'",
            "draining",
            "every daemon that serves queue beautify is draining",
            {"draining": 1},
        ),
        (
            "UPDATE jobdaemon.queues SET team_size = 0",
            "team_size",
            "the team size of queue beautify is 0: no worker takes its jobs",
            {"daemons": 1, "slots": 0},
        ),
        (
            "UPDATE jobdaemon.queues SET cluster_limit = 0",
            "cluster_limit",
            "queue beautify is at its cluster limit (running 0, limit 0)",
            {"running": 0, "limit": 0},
        ),
        (
            "UPDATE jobdaemon.queues SET adaptive_limit = 0",
            "adaptive_limit",
            "queue beautify is at its adaptive limit: its provider takes no more now (running 0, limit 0)",
            {"running": 0, "limit": 0},
        ),
        (
            "UPDATE jobdaemon.queues SET circuit = 'probing'",
            "circuit",
            "too many jobs of queue beautify failed in a row, so one at a time tries it (its circuit is open)",
            {"circuit": "probing"},
        ),
        (
            "UPDATE jobdaemon.queues SET circuit = 'open', circuit_until = '2100-01-02T03:04:05Z'",
            "circuit",
            "too many jobs of queue beautify failed in a row, so none starts until 2100-01-02T03:04:05Z (its circuit is open)",
            {"circuit": "open", "until": "2100-01-02T03:04:05+00:00"},
        ),
        (
            "UPDATE jobdaemon.queues SET rested_until = '2100-01-02T03:04:05Z'",
            "resting",
            "queue beautify rests until 2100-01-02T03:04:05Z, as its provider asked",
            {"until": "2100-01-02T03:04:05+00:00"},
        ),
    ],
)
def test_each_obstacle_is_named(sql: Sql, waiting: int, change: str, reason: str, told: str, numbers: Row) -> None:
    """What stands in the way is the phrase of the order and a reason with its numbers; who goes first stays another reason."""
    sql.execute("SET TIME ZONE 'UTC'")
    sql.execute(change.encode())
    assert str(_waiting_for(sql, waiting)).removesuffix("; 3 jobs go first") == told
    reasons = _reasons(sql, waiting)
    assert reasons[reason] == numbers | {"told": told}
    assert reasons["behind"]["jobs"] == 3


async def test_taken_slots_and_limits_count_what_runs(sql: Sql, claimed_job_factory: Claimed, waiting: int) -> None:
    """A full team says how many slots there are, a full cluster how many run; both stand in the list."""
    await claimed_job_factory.claim("beautify", 2)
    assert _waiting_for(sql, waiting) == "every worker of queue beautify is busy (running 2, slots 1); 1 job goes first"
    sql.execute("UPDATE jobdaemon.queues SET cluster_limit = 2, team_size = 5")
    assert _waiting_for(sql, waiting) == "queue beautify is at its cluster limit (running 2, limit 2); 1 job goes first"
    assert list(_reasons(sql, waiting)) == ["cluster_limit", "behind"]
    sql.execute("UPDATE jobdaemon.queues SET team_size = 2")
    assert list(_reasons(sql, waiting)) == ["cluster_limit", "slots", "behind"]


async def test_a_fair_share_holds_while_others_wait(sql: Sql, claimed_job_factory: Claimed) -> None:
    """A customer who runs its share waits for it as long as another customer's job is ready, and only then."""
    sql.execute("UPDATE jobdaemon.queues SET fair_share = 1, team_size = 5")
    claimed_job_factory.orders("Free", customer="ada")
    await claimed_job_factory.claim("beautify")
    order_id = claimed_job_factory.orders("Free", customer="ada")
    free = "nothing is in its way: the next free worker of queue beautify takes it"
    assert _waiting_for(sql, order_id) == free
    for other in ("", "bob"):
        claimed_job_factory.orders("Pro", customer=other)
        told = "its customer has its fair share of queue beautify while others wait (running 1, share 1)"
        assert _waiting_for(sql, order_id) == told
        assert _reasons(sql, order_id)["fair_share"]["limit"] == 1
        sql.execute("DELETE FROM jobdaemon.procrastinate_jobs WHERE priority = 100")
        assert _waiting_for(sql, order_id) == free


async def test_a_retry_tells_the_error_behind_it(sql: Sql, claimed_job_factory: Claimed) -> None:
    """What waits for its time says until when, and after which error."""
    job = await claimed_job_factory.beautify(plan="Free")
    assert job.order_id is not None
    retry = Transition(job, End.RETRY, error="the photo could not be read", error_kind="Kind", delay=timedelta(hours=1))
    await claimed_job_factory.store.commit([retry], daemon_id=None)
    told = _waiting_for(sql, job.order_id)
    assert told.startswith("attempt 1 failed, and the next one waits until ")
    assert told.endswith("Z: the photo could not be read")
    reason = _reasons(sql, job.order_id)["retry"]
    assert (reason["attempt"], reason["error_kind"], reason["error"]) == (1, "Kind", "the photo could not be read")


async def test_a_snooze_and_a_schedule_are_no_retries(sql: Sql, claimed_job_factory: Claimed) -> None:
    """A snoozed job waits for its turn, a scheduled order for its time."""
    job = await claimed_job_factory.beautify(plan="Free")
    assert job.order_id is not None
    snooze = Transition(job, End.SNOOZE, error="429", delay=timedelta(hours=1))
    await claimed_job_factory.store.commit([snooze], daemon_id=None)
    assert _waiting_for(sql, job.order_id).endswith("Z: 429")
    assert list(_reasons(sql, job.order_id)) == ["snooze"]
    later = claimed_job_factory.orders("Free", at="tomorrow")
    assert list(_reasons(sql, later)) == ["scheduled"]
    assert _reasons(sql, later)["scheduled"]["told"] == _waiting_for(sql, later)


async def test_what_runs_and_what_was_given_up(sql: Sql, claimed_job_factory: Claimed) -> None:
    """A running job says where and since when, a dead letter why; an order at work waits for nothing."""
    job = await claimed_job_factory.beautify(plan="Free")
    assert job.order_id is not None
    reason = _reasons(sql, job.order_id)["running"]
    assert (reason["daemon_id"], reason["host"], reason["attempt"]) == (claimed_job_factory.daemon_id, "test", 1)
    assert _waiting_for(sql, job.order_id) is None
    dead = Transition(job, End.FAILED, error="broken for ever", error_kind="Kind")
    await claimed_job_factory.store.commit([dead], daemon_id=None)
    assert _reasons(sql, job.order_id)["given_up"]["told"] == "it was given up: broken for ever"


def test_an_order_without_a_job_says_so(sql: Sql, order_factory: Orders) -> None:
    """Whoever deleted its jobs, an open order still has an answer."""
    order_id = order_factory("Free")
    sql.execute("DELETE FROM jobdaemon.procrastinate_jobs")
    assert _waiting_for(sql, order_id) == "it has no open job: nothing happens by itself any more"
    assert _reasons(sql, order_id) == {}


def test_jobs_of_no_order_and_of_no_queue(sql: Sql, job_factory: Jobs, order_factory: Orders) -> None:
    """A bare job waits behind all that is for an order, a job of another app's queue is none of ours; an ended job has ended."""
    order_factory("Free")
    job_factory("beautify", priority=300)
    bare = job_factory("beautify", priority=300)
    row = sql.execute("SELECT numbers FROM jobdaemon.explain_job(%s) WHERE reason = 'behind'", [bare]).fetchone()
    assert row == {"numbers": {"jobs": 2, "or_more": False}}
    foreign = job_factory("mail", task="shop.mail", args={"order_id": "A-17"})
    row = sql.execute("SELECT told FROM jobdaemon.explain_job(%s)", [foreign]).fetchone()
    assert row == {"told": "queue mail is not one of jobdaemon's"}
    sql.execute("UPDATE jobdaemon.procrastinate_jobs SET status = 'succeeded' WHERE id = %s", [bare])
    row = sql.execute("SELECT told FROM jobdaemon.explain_job(%s)", [bare]).fetchone()
    assert row == {"told": "it has ended: succeeded"}


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ("explain_order(77)", "unknown order 77"),
        ("explain_job(77)", "unknown job 77"),
        ("explain_order(NULL)", "unknown order NULL"),
        ("explain_job(NULL)", "unknown job NULL"),
    ],
)
def test_nothing_to_explain(sql: Sql, call: str, words: str) -> None:
    """JD005 names what is not there."""
    with pytest.raises(psycopg.Error, match=words) as caught:
        sql.execute(f"SELECT * FROM jobdaemon.{call}".encode())
    assert caught.value.sqlstate == "JD005"


def test_a_listing_stays_cheap_behind_a_long_line(sql: Sql, order_factory: Orders, daemon_id: int) -> None:
    """Of a long line at most 1,000 jobs are counted: however many go first, the others are not looked at."""
    sql.execute("ALTER TABLE jobdaemon.procrastinate_jobs DISABLE TRIGGER USER")
    sql.execute(
        "INSERT INTO jobdaemon.procrastinate_jobs (queue_name, task_name, priority, args)"
        " SELECT 'beautify', %s, 200 + n %% 2 * 100, jsonb_build_object('order_id', n / 10) FROM generate_series(1, 20000) AS n",
        [Task.BEAUTIFY],
    )
    sql.execute("ALTER TABLE jobdaemon.procrastinate_jobs ENABLE TRIGGER USER")
    sql.execute("VACUUM ANALYZE jobdaemon.procrastinate_jobs")
    sql.execute("ALTER TABLE jobdaemon.orders ALTER COLUMN id RESTART WITH 1000000")
    orders = [order_factory(plan) for plan in ("Free", "Start", "Pro", "Free", "Pro") * 10]
    rows = sql.execute("SELECT * FROM jobdaemon.order_progress ORDER BY order_id DESC LIMIT 50").fetchall()
    assert daemon_id
    assert {row["waiting_for"] for row in rows} == {"1000+ jobs go first in queue beautify"}
    assert _reasons(sql, orders[-1])["behind"] == {"jobs": 1000, "or_more": True, "told": "1000+ jobs go first in queue beautify"}
    [document] = sql.execute(
        "EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) SELECT jobdaemon.jobs_before(j) FROM jobdaemon.procrastinate_jobs j"
        " WHERE (j.args ->> 'order_id')::bigint = %s AND j.task_name LIKE 'jobdaemon.%%'"
        " AND j.status IN ('todo', 'doing', 'failed')",
        [orders[-1]],
    ).fetchall()
    plan = document["QUERY PLAN"][0]["Plan"]
    # measured: 31 pages, 0.5 ms
    assert plan["Shared Hit Blocks"] + plan["Shared Read Blocks"] < 1200
