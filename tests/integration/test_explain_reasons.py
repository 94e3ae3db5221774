"""Each reason why a job waits, brought about by the functions and transitions that do so in earnest, and said in plain words."""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from jobdaemon.domain.expand import WantedImage, generate_jobs
from jobdaemon.domain.job import Job, NewJob, Task
from jobdaemon.domain.outcome import End, Signal, Transition
from jobdaemon.queue.store import PostgresJobStore
from tests.factories import Claimed, Orders, Row, Sql, beautified

QUEUE = "generate.local"


@dataclass(slots=True)
class World:
    """A database that one daemon serves with one slot in each queue."""

    sql: Sql
    claimed: Claimed

    @property
    def store(self) -> PostgresJobStore:
        """The daemon's."""
        return self.claimed.store

    def call(self, call: str, *values: object) -> Any:
        """Call a function of the SQL API."""
        row = self.sql.execute(f"SELECT jobdaemon.{call} AS answer".encode(), values).fetchone()
        assert row is not None
        return row["answer"]

    def order(self, plan: str = "Free", **arguments: Any) -> int:
        """Enqueue an order; returns the id of its first job."""
        return self.job_of(self.claimed.orders(plan, **arguments))

    def job_of(self, order_id: int) -> int:
        """The newest job of an order."""
        return int(self.claimed.orders.jobs(order_id)[-1]["id"])

    def defer(self, queue: str, task: str = Task.GENERATE, lock: str | None = None, count: int = 1, **args: Any) -> list[int]:
        """Insert jobs by procrastinate's own function."""
        statement = (
            "SELECT unnest(jobdaemon.procrastinate_defer_jobs_v1(array_agg(ROW(%s, %s, 0, %s, NULL, %s::jsonb, NULL)"
            "::jobdaemon.procrastinate_job_to_defer_v1))) AS id FROM generate_series(1, %s)"
        )
        values = [queue, task, lock, json.dumps(args), count]
        return [int(row["id"]) for row in self.sql.execute(statement, values).fetchall()]

    async def claim(self, queue: str = "beautify", limit: int = 1) -> list[Job]:
        """Start jobs on the daemon."""
        return await self.claimed.claim(queue, limit)

    async def commit(self, *transitions: Transition) -> None:
        """End attempts."""
        await self.store.commit(list(transitions), daemon_id=self.claimed.daemon_id)

    def reasons(self, job_id: int) -> dict[str, Row]:
        """Reason -> numbers and told, the most decisive first."""
        rows = self.sql.execute("SELECT * FROM jobdaemon.explain_job(%s)", [job_id]).fetchall()
        return {row["reason"]: row["numbers"] | {"told": row["told"]} for row in rows}

    def waiting_for(self, job_id: int) -> Any:
        """What order_progress says of this job's order."""
        row = self.sql.execute(
            "SELECT p.waiting_for FROM jobdaemon.order_progress p JOIN jobdaemon.procrastinate_jobs j"
            " ON p.order_id = (j.args ->> 'order_id')::bigint WHERE j.id = %s",
            [job_id],
        ).fetchone()
        assert row is not None
        return row["waiting_for"]


@pytest.fixture
def world(sql: Sql, claimed_job_factory: Claimed) -> World:
    """Nothing to do yet."""
    return World(sql, claimed_job_factory)


# -- One way to each reason ---------------------------------------------------------------------------------------------------


async def _paused(world: World) -> int:
    world.call("pause_queue('beautify')")
    return world.order()


async def _scheduled(world: World) -> int:
    return world.order(at="tomorrow")


async def _retry(world: World) -> int:
    job_id = world.order()
    [job] = await world.claim()
    await world.commit(Transition(job, End.RETRY, error="no photo", error_kind="Kind", delay=timedelta(hours=1)))
    return job_id


async def _interrupted(world: World) -> int:
    job_id = world.order()
    [job] = await world.claim()
    await world.commit(Transition(job, End.INTERRUPTED, error="its worker died", error_kind="Kind", delay=timedelta(hours=1)))
    return job_id


async def _snooze(world: World) -> int:
    job_id = world.order()
    [job] = await world.claim()
    await world.commit(Transition(job, End.SNOOZE, error="429", delay=timedelta(hours=1), signal=Signal.CAPACITY))
    return job_id


async def _draining(world: World) -> int:
    world.call("drain_daemon(%s)", world.claimed.daemon_id)
    return world.order()


async def _no_daemon(world: World) -> int:
    await world.store.set_daemon_status(world.claimed.daemon_id, "stopped")
    return world.order()


async def _team_size(world: World) -> int:
    world.call("resize_queue('beautify', 0)")
    return world.order()


async def _resting(world: World) -> int:
    waiting = world.defer(QUEUE, count=2)[1]
    [job] = await world.claim(QUEUE)
    await world.commit(
        Transition(
            job, End.SNOOZE, delay=timedelta(hours=1), signal=Signal.CAPACITY, retry_after=timedelta(minutes=20), error="429"
        )
    )
    return waiting


async def _circuit(world: World) -> int:
    waiting = world.defer(QUEUE, count=6)[-1]
    jobs = await world.claim(QUEUE, 5)
    await world.commit(*(Transition(job, End.RETRY, delay=timedelta(hours=1), signal=Signal.OUTAGE) for job in jobs))
    return waiting


async def _key(world: World) -> int:
    _have_keys(world.sql, {"alias": "main", "paused": True})
    return world.defer(QUEUE)[0]


async def _fair_share(world: World) -> int:
    world.call("resize_queue('beautify', 5, fair_share => 1)")
    world.order(customer="ada")
    await world.claim()
    waiting = world.order(customer="ada")
    world.order(customer="bob")
    return waiting


async def _cluster_limit(world: World) -> int:
    world.call("resize_queue('beautify', cluster_limit => 0)")
    return world.order()


async def _adaptive_limit(world: World) -> int:
    waiting = world.defer(QUEUE, count=11)[-1]
    jobs = await world.claim(QUEUE, 10)
    await world.commit(*(Transition(job, End.SNOOZE, delay=timedelta(hours=1), signal=Signal.CAPACITY) for job in jobs[:3]))
    return waiting


async def _slots(world: World) -> int:
    world.order()
    await world.claim()
    return world.order()


async def _lock(world: World) -> int:
    world.defer("upload", lock="one")
    await world.claim("upload")
    return world.defer("upload", lock="one")[0]


async def _unknown_queue(world: World) -> int:
    return world.defer("mail", task="shop.mail")[0]


async def _lifted(world: World) -> int:
    job_id = world.order("Pro")
    _age(world.sql)
    assert await world.store.lift_orders() == 1
    return job_id


async def _behind(world: World) -> int:
    world.order()
    return world.order()


async def _ready(world: World) -> int:
    return world.order()


async def _running(world: World) -> int:
    job_id = world.order()
    await world.claim()
    return job_id


async def _given_up(world: World) -> int:
    job_id = world.order()
    [job] = await world.claim()
    await world.commit(Transition(job, End.FAILED, error="broken for ever", error_kind="Kind"))
    return job_id


async def _ended(world: World) -> int:
    order_id = world.claimed.orders("Free")
    job_id = world.job_of(order_id)
    world.call("cancel_order(%s)", order_id)
    return job_id


async def _moved(world: World) -> int:
    # How a batch gets there is told in test_fallback.py.
    order_id = world.claimed.orders("Free")
    [job_id] = world.defer("generate.local", order_id=order_id, images=[1], tried=["other"])
    return job_id


Z = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ"
#: Reason -> (how it comes about, what is said of it, other reasons that then hold too). The words are a regular expression.
WAYS: dict[str, tuple[Callable[[World], Awaitable[int]], str, list[str]]] = {
    "paused": (_paused, "queue beautify is paused", []),
    "scheduled": (_scheduled, f"it is scheduled to wait until {Z}", []),
    "retry": (_retry, f"attempt 1 failed, and the next one waits until {Z}: no photo", []),
    "snooze": (_snooze, f"it was put off until {Z}: 429", ["resting"]),
    "draining": (_draining, "every daemon that serves queue beautify is draining", []),
    "no_daemon": (_no_daemon, "no daemon serves queue beautify", []),
    "team_size": (_team_size, "the team size of queue beautify is 0: no worker takes its jobs", []),
    "resting": (_resting, f"queue generate.local rests until {Z}, as its provider asked", []),
    "circuit": (
        _circuit,
        rf"too many jobs of queue generate.local failed in a row, so none starts until {Z} \(its circuit is open\)",
        [],
    ),
    "key": (_key, "no key of local can start a call now: main is paused", []),
    "fair_share": (
        _fair_share,
        r"its customer has its fair share of queue beautify while others wait \(running 1, share 1\)",
        [],
    ),
    "cluster_limit": (_cluster_limit, r"queue beautify is at its cluster limit \(running 0, limit 0\)", []),
    "adaptive_limit": (
        _adaptive_limit,
        r"queue generate.local is at its adaptive limit: its provider takes no more now \(running 7, limit 7\)",
        ["slots"],
    ),
    "slots": (_slots, r"every worker of queue beautify is busy \(running 1, slots 1\)", []),
    "lock": (_lock, "another job with the same lock runs", ["slots"]),
    "unknown_queue": (_unknown_queue, "queue mail is not one of jobdaemon's", []),
    "lifted": (_lifted, "it is lifted: it goes before all that is not", ["ready"]),
    "behind": (_behind, "1 job goes first in queue beautify", []),
    "ready": (_ready, "nothing is in its way: the next free worker of queue beautify takes it", []),
    "running": (_running, rf"it runs on test \(daemon \d+\) since {Z}", []),
    "given_up": (_given_up, "it was given up: broken for ever", []),
    "ended": (_ended, "it has ended: cancelled", []),
    "moved": (_moved, "it was moved from other", ["ready"]),
}


@pytest.mark.parametrize("reason", WAYS)
async def test_each_reason_comes_about(world: World, reason: str) -> None:
    """The reason is found, alone or beside what must hold too, in these words."""
    way, words, beside = WAYS[reason]
    reasons = world.reasons(await way(world))
    assert sorted(reasons) == sorted([reason, *beside])
    assert re.fullmatch(words, reasons[reason]["told"])


async def test_an_interruption_is_a_retry(world: World) -> None:
    """A job whose worker died says so, and when it goes on."""
    reasons = world.reasons(await _interrupted(world))
    assert re.fullmatch(f"attempt 1 was interrupted, and the next one waits until {Z}: its worker died", reasons["retry"]["told"])


def test_every_reason_is_documented_and_tried() -> None:
    """The table of docs/sql.md, the migrations and the ways above name the same reasons."""
    root = Path(__file__).parents[2]
    page = (root / "docs" / "sql.md").read_text().partition("## Why an order waits")[2].partition("## Refusals")[0]
    listed = {name for row in re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", page, re.MULTILINE) for name in re.findall(r"\w+", row)}
    listed |= set(re.findall(r"`(running|given_up|ended)`", page))
    assert listed == set(WAYS)
    texts = [path.read_text() for path in sorted((root / "migrations").glob("*.sql"))]
    newest = next(text for text in reversed(texts) if "FUNCTION job_reasons(" in text).partition("FUNCTION job_reasons(")[2]
    said = set(re.findall(r"RETURN QUERY SELECT '(\w+)'", newest))
    assert len(said) >= 14
    assert said <= listed


def test_a_time_without_end_is_said_in_words(world: World) -> None:
    """A job that somebody scheduled for never has no date to show."""
    [job_id] = world.defer("upload")
    world.sql.execute("UPDATE jobdaemon.procrastinate_jobs SET scheduled_at = 'infinity' WHERE id = %s", [job_id])
    assert world.reasons(job_id)["scheduled"]["told"] == "it is scheduled to wait until further notice"


# -- Keys ---------------------------------------------------------------------------------------------------------------------


def _have_keys(sql: Sql, *keys: Row) -> None:
    for key in keys:
        values = {"provider": "local", **key}
        names, places = ", ".join(values), ", ".join(f"%({name})s" for name in values)
        sql.execute(f"INSERT INTO jobdaemon.provider_keys ({names}) VALUES ({places})".encode(), values)


async def test_each_key_says_what_is_in_its_way(world: World) -> None:
    """With several keys each one's own obstacle is told, in words and as numbers; what of a limit is not reached is none."""
    world.sql.execute("SET TIME ZONE 'UTC'")
    world.call("resize_queue(%s, 9)", QUEUE)
    _have_keys(
        world.sql,
        {"alias": "a", "paused": True},
        {"alias": "b", "rested_until": "2100-01-02T03:04:05Z", "rest_reason": "429 Throttling"},
        {"alias": "c", "concurrency": 2},
        {"alias": "d", "rate": 1, "next_start_at": "2100-01-02T03:04:06Z"},
        {"alias": "e", "daily_budget": 5, "spent": 5, "spent_on": "today"},
    )
    jobs = world.defer(QUEUE, count=4)
    running = [job.id for job in await world.claim(QUEUE, 2)]
    world.sql.execute("UPDATE jobdaemon.procrastinate_jobs SET key_alias = 'c' WHERE id = ANY (%s)", [running])
    [waiting] = [job for job in jobs[2:3] if job not in running]
    midnight = world.sql.execute("SELECT (current_date + 1)::timestamptz AS at").fetchone()
    assert midnight is not None
    until = midnight["at"].strftime("%Y-%m-%dT%H:%M:%SZ")
    key = world.reasons(waiting)["key"]
    assert key["told"] == (
        "no key of local can start a call now: a is paused, b rests until 2100-01-02T03:04:05Z (429 Throttling),"
        " c runs as many calls as it may (running 2, limit 2), d may start its next call at 2100-01-02T03:04:06Z,"
        f" e has spent its budget of 5 images for today, until {until}"
    )
    assert key["provider"] == "local"
    assert [(one["alias"], one["reason"]) for one in key["keys"]] == list(
        zip("abcde", ["paused", "resting", "concurrency", "rate", "budget"], strict=True)
    )
    assert key["keys"][1] == {"alias": "b", "reason": "resting", "until": "2100-01-02T03:04:05+00:00", "why": "429 Throttling"}
    assert key["keys"][2] == {"alias": "c", "reason": "concurrency", "running": 2, "limit": 2}


def _silent(world: World, seconds: float, *, lease_s: float = 15) -> None:
    """Nothing has been heard of the daemon for so long."""
    world.sql.execute(
        "UPDATE jobdaemon.procrastinate_workers SET lease = %s * interval '1 s', last_heartbeat = now() - %s * interval '1 s'"
        " WHERE id = %s",
        [lease_s, seconds, world.claimed.daemon_id],
    )


async def test_a_key_whose_daemon_died_is_what_it_waits_for(world: World) -> None:
    """Silent for half its lease the daemon is named; after that the key is nobody's, and where it was alone no daemon serves."""
    _have_keys(world.sql, {"alias": "main"})
    world.sql.execute('UPDATE jobdaemon.daemons SET keys = \'{"local": ["main"]}\'')
    [job] = world.defer(QUEUE)
    _silent(world, 7)
    assert list(world.reasons(job)) == ["ready"]
    _silent(world, 9)
    daemon = world.claimed.daemon_id
    key = world.reasons(job)["key"]
    assert key["told"] == f"no key of local can start a call now: main is held by daemon {daemon}, which has said nothing for 9 s"
    assert key["keys"] == [{"alias": "main", "reason": "missing", "daemon_id": daemon, "silent_seconds": 9}]
    _silent(world, 16)
    assert list(world.reasons(job)) == ["no_daemon"]
    await world.store.register(host="b", pid=1, version="0", queues={QUEUE: 1}, keys={"local": ()}, lease=timedelta(seconds=15))
    key = world.reasons(job)["key"]
    assert key["told"] == "no key of local can start a call now: main is in the settings of no running daemon"
    assert key["keys"] == [{"alias": "main", "reason": "missing"}]


async def test_what_ran_on_a_dead_daemon_is_said_so(world: World) -> None:
    """Silent for half its lease, that is told with the job; after a whole lease the job runs no more and its order waits."""
    job = await _running(world)
    daemon = world.claimed.daemon_id
    _silent(world, 7)
    assert re.fullmatch(rf"it runs on test \(daemon {daemon}\) since {Z}", world.reasons(job)["running"]["told"])
    _silent(world, 9)
    running = world.reasons(job)["running"]
    words = "that daemon has said nothing for 9 s: if it is dead another one takes it over"
    assert re.fullmatch(rf"it runs on test \(daemon {daemon}\) since {Z}; {words}", running["told"])
    assert (running["silent_seconds"], world.waiting_for(job)) == (9, None)
    _silent(world, 16)
    told = world.reasons(job)["running"]["told"]
    words = "that daemon has said nothing for 16 s, and another one takes it over"
    assert re.fullmatch(rf"it ran on test \(daemon {daemon}\) since {Z}; {words}", told)
    assert world.waiting_for(job) == told


@pytest.mark.parametrize(
    "free",
    [
        {},
        {"paused": False, "concurrency": 1, "rate": 5, "daily_budget": 5, "spent": 4, "spent_on": "today"},
        {"rested_until": "yesterday", "rest_reason": "429"},
        {"rate": 1, "next_start_at": "yesterday"},
        {"daily_budget": 5, "spent": 5, "spent_on": "yesterday"},
        {"provider": "other", "paused": True},
    ],
)
async def test_one_free_key_is_enough(world: World, free: Row) -> None:
    """A key that may start a call now, or no key of this provider at all, is no reason to wait."""
    if free.get("provider") is None:
        _have_keys(world.sql, {"alias": "main", "paused": True})
    world.sql.execute("SET TIME ZONE 'UTC'")
    _have_keys(world.sql, {"alias": "free", **free})
    assert list(world.reasons(world.defer(QUEUE)[0])) == ["ready"]
    assert list(world.reasons(world.defer("upload")[0])) == ["ready"]


async def test_a_budget_too_small_for_this_job(world: World) -> None:
    """A key with fewer images left for today than the job asks for says so; a smaller job can go."""
    _have_keys(world.sql, {"alias": "main", "daily_budget": 5, "spent": 3, "spent_on": "today"})
    world.sql.execute("SET TIME ZONE 'UTC'")
    world.sql.execute("UPDATE jobdaemon.provider_keys SET spent_on = current_date")
    key = world.reasons(world.defer(QUEUE, images=[1, 2, 3])[0])["key"]
    words = rf"no key of local can start a call now: main has 2 of its 5 images for today left until {Z}, and this job asks for 3"
    assert re.fullmatch(words, key["told"])
    assert (key["keys"][0]["budget"], key["keys"][0]["spent"]) == (5, 3)
    assert "key" not in world.reasons(world.defer(QUEUE, images=[1, 2])[0])


@pytest.mark.parametrize(
    ("own", "words"),
    [
        ({"paused": True, "daily_budget": 0, "rate": 1, "next_start_at": "2100-01-02T03:04:06Z"}, None),
        ({"rested_until": "2100-01-02T03:04:05Z"}, "main rests until 2100-01-02T03:04:05Z"),
        ({"concurrency": 0}, "main runs as many calls as it may (running 0, limit 0)"),
    ],
)
async def test_what_was_bought_waits_for_its_own_key(world: World, own: Row, words: str | None) -> None:
    """Neither pause, budget nor rate keeps a bought call from being collected; a rest and a full key do, whoever is free."""
    _have_keys(world.sql, {"alias": "main", **own}, {"alias": "free"})
    [job_id] = world.defer(QUEUE)
    world.sql.execute("UPDATE jobdaemon.procrastinate_jobs SET key_alias = 'main' WHERE id = %s", [job_id])
    reasons = world.reasons(job_id)
    told = f"its call is to be collected with the key it was bought with: {words}"
    assert (reasons["key"]["told"] if "key" in reasons else None) == (None if words is None else told)
    world.sql.execute("UPDATE jobdaemon.procrastinate_jobs SET key_alias = 'gone' WHERE id = %s", [job_id])
    assert "key" not in world.reasons(job_id)


async def test_many_keys_stay_one_line(world: World) -> None:
    """Of many keys five are told in words; the numbers have all."""
    _have_keys(world.sql, *({"alias": f"k{number}", "paused": True} for number in range(8)))
    key = world.reasons(world.defer(QUEUE)[0])["key"]
    assert key["told"].endswith("k3 is paused, k4 is paused, and 3 more")
    assert len(key["keys"]) == 8


# -- Lifted work --------------------------------------------------------------------------------------------------------------


def _age(sql: Sql, plan: str = "Pro") -> None:
    sql.execute("UPDATE jobdaemon.orders SET waits_from = now() - interval '1 hour' WHERE plan = %s", [plan])


async def test_lifted_work_is_told_before_and_behind(world: World) -> None:
    """A lifted job says that it is; who waits behind lifted jobs hears how many, and Free that they take one start in four."""
    pro = [world.order("Pro") for _ in range(3)]
    _age(world.sql)
    assert await world.store.lift_orders() == 3
    start = world.order("Start")
    assert world.reasons(pro[2])["lifted"]["told"] == "it is lifted: it goes before all that is not"
    assert world.waiting_for(pro[0]) == "nothing is in its way: the next free worker of queue beautify takes it; it is lifted"
    assert world.waiting_for(pro[1]) == "it is lifted: it goes before all that is not; 1 lifted job goes first"
    assert world.waiting_for(start) == "3 lifted jobs go first in queue beautify"
    free = world.order("Free")
    lifted = world.reasons(pro[2])
    assert list(lifted) == ["lifted", "behind"]
    assert (
        lifted["lifted"]["told"] == "it is lifted: lifted jobs take one start in four while jobs of priority 300 or more wait too"
    )
    assert (lifted["lifted"]["shares_with"], lifted["lifted"]["since"] is not None) == (300, True)
    assert lifted["behind"] == {"jobs": 2, "or_more": False, "told": "2 lifted jobs go first in queue beautify"}
    assert world.waiting_for(pro[0]) == lifted["lifted"]["told"]
    assert world.waiting_for(pro[2]) == lifted["lifted"]["told"] + "; 2 lifted jobs go first"
    behind = world.reasons(start)["behind"]
    assert behind == {"jobs": 4, "or_more": False, "lifted": 3, "told": "4 jobs go first in queue beautify, 3 of them lifted"}
    told = "3 lifted jobs go first in queue beautify (lifted jobs take one start in four)"
    assert world.reasons(free)["behind"] == {"jobs": 3, "or_more": False, "lifted": 3, "told": told}
    world.call("resize_queue('beautify', cluster_limit => 0)")
    limit = "queue beautify is at its cluster limit (running 0, limit 0)"
    assert world.waiting_for(pro[0]) == f"{limit}; it is lifted"
    assert world.waiting_for(pro[1]) == f"{limit}; it is lifted; 1 lifted job goes first"
    assert world.waiting_for(start) == f"{limit}; 4 jobs go first, 3 of them lifted"


# -- An order at work ---------------------------------------------------------------------------------------------------------


async def _generating(claimed: Claimed, orders: Orders, images: int) -> int:
    order_id = orders("Start", images=images)
    [job] = await claimed.claim("beautify")
    jobs: tuple[NewJob, ...] = generate_jobs(order_id, 200, "local", [WantedImage(n, str(n)) for n in range(1, images + 1)], 5)
    await claimed.store.commit([Transition(job, End.SUCCEEDED, writes=(beautified(order_id, *jobs),))], daemon_id=None)
    return order_id


async def test_an_order_of_which_some_runs(world: World, claimed_job_factory: Claimed, order_factory: Orders) -> None:
    """While one job runs the order waits for nothing, yet explain gives the reasons of those that do; so when all run."""
    order_id = await _generating(claimed_job_factory, order_factory, 3)
    [first] = await world.claim(QUEUE)
    rows = world.sql.execute("SELECT * FROM jobdaemon.explain_order(%s)", [order_id]).fetchall()
    assert world.waiting_for(first.id) is None
    told = [(row["job_id"] == first.id, row["status"], row["reason"]) for row in rows]
    assert told == [
        (True, "doing", "running"),
        (False, "todo", "slots"),
        (False, "todo", "slots"),
        (False, "todo", "behind"),
    ]
    await world.claim(QUEUE, 5)
    rows = world.sql.execute("SELECT reason FROM jobdaemon.explain_order(%s)", [order_id]).fetchall()
    assert [row["reason"] for row in rows] == ["running"] * 3
    assert world.waiting_for(first.id) is None
