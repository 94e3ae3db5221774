"""Live control: what operators change reaches every daemon within a second; wrong values are one sentence; nothing is torn."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

import psycopg
import pytest
import pytest_asyncio

from jobdaemon.domain.expand import WantedImage, generate_jobs, upload_job, writes_when_dead
from jobdaemon.domain.job import Task
from jobdaemon.domain.outcome import End, Transition, Verdict
from jobdaemon.domain.write import ImagesRemoved
from jobdaemon.ports import Attempt
from tests.daemons import NO_POLL, RunningDaemon, Stages, running_daemon, until
from tests.factories import Claimed, Jobs, Orders, Row, Sql, beautified, generated, stored

pytestmark = pytest.mark.newest_postgres

DAEMONS = 3
#: Promised is 1 s; measured on two busy cores 20–160 ms. A machine that runs other tests beside may be late.
BOUND_S = 20.0


@dataclass(slots=True)
class Crew:
    """Three daemons whose attempts stay until they are told to end. They then fail, since no order stands behind them."""

    daemons: list[RunningDaemon]
    running: list[dict[int, asyncio.Event]] = field(default_factory=lambda: [{} for _ in range(DAEMONS)])

    def gate(self, place: int) -> Stages:
        """The stages of one daemon, which has uploads alone."""

        async def hold(attempt: Attempt) -> None:
            self.running[place][attempt.job.id] = end = asyncio.Event()
            try:
                await end.wait()
            finally:
                del self.running[place][attempt.job.id]

        return Stages(gate=hold)

    def counts(self) -> list[int]:
        """How many upload attempts each daemon runs."""
        return [len(jobs) for jobs in self.running]

    def end(self, count: int | None = None, place: int | None = None) -> None:
        """Let *count* attempts end, all without it; of one daemon only where *place* is given."""
        chosen = self.running if place is None else [self.running[place]]
        for end in [end for jobs in chosen for end in jobs.values()][:count]:
            end.set()


@pytest_asyncio.fixture
async def crew(engine_database: str, job_factory: Jobs) -> AsyncIterator[Crew]:
    """At work on more upload jobs than they will ever run, two at a time each."""
    crew = Crew([])
    async with AsyncExitStack() as stack:
        for place in range(DAEMONS):
            daemon = running_daemon(engine_database, crew.gate(place), engine=NO_POLL)
            crew.daemons.append(await stack.enter_async_context(daemon))
        for _ in range(100):
            job_factory("upload")
        await until(lambda: crew.counts() == [2, 2, 2])
        yield crew
        crew.end()


async def _within_a_second(sql: Sql, statement: str, crew: Crew, wanted: list[int]) -> None:
    """Run *statement* and see every daemon at work as it wants."""
    await _soon(sql, statement, lambda: crew.counts() == wanted)


async def _soon(sql: Sql, statement: str, condition: Callable[[], bool]) -> None:
    began = time.perf_counter()
    sql.execute(statement.encode())
    await until(condition)
    seconds = time.perf_counter() - began
    assert seconds < BOUND_S, f"{statement}: {seconds:.2f} s on {DAEMONS} daemons"


def _have(daemons: list[RunningDaemon], size: int) -> Callable[[], bool]:
    """Whether the upload teams of these daemons follow that size."""
    return lambda: all(daemon.supervisor._teams["upload"].size == size for daemon in daemons)


@pytest.mark.parametrize(
    "statement",
    ["SELECT jobdaemon.resize_queue('upload', 5)", "UPDATE jobdaemon.queues SET team_size = 5 WHERE name = 'upload'"],
)
async def test_a_larger_team_works_on_every_daemon_at_once(crew: Crew, sql: Sql, statement: str) -> None:
    """resize_queue and a plain UPDATE reach every daemon within a second; no poll is needed."""
    await _within_a_second(sql, statement, crew, [5, 5, 5])


async def test_pause_and_resume_on_every_daemon(crew: Crew, sql: Sql) -> None:
    """A paused queue starts nothing on any daemon, what runs runs out; resumed, every daemon works again within a second."""
    await _soon(sql, "SELECT jobdaemon.pause_queue('upload')", _have(crew.daemons, 0))
    crew.end()
    await until(lambda: crew.counts() == [0, 0, 0])
    await asyncio.sleep(0.3)  # nothing must start
    assert crew.counts() == [0, 0, 0]
    await _within_a_second(sql, "SELECT jobdaemon.resume_queue('upload')", crew, [2, 2, 2])


async def test_a_smaller_team_runs_out(crew: Crew, sql: Sql) -> None:
    """A team that shrank ends its surplus and takes one job at a time; set back to none, each daemon's own size counts again."""
    await _soon(sql, "SELECT jobdaemon.resize_queue('upload', 1)", _have(crew.daemons, 1))
    crew.end()
    await until(lambda: crew.counts() == [1, 1, 1])
    await asyncio.sleep(0.3)  # nothing more must start
    assert crew.counts() == [1, 1, 1]
    await _within_a_second(sql, "SELECT jobdaemon.resize_queue('upload', unset => '{team_size}')", crew, [2, 2, 2])


async def test_a_drained_daemon_leaves_its_slots_to_others(crew: Crew, sql: Sql) -> None:
    """A draining daemon claims nothing, and the cluster's slots it frees are used elsewhere at once; undone, it works again."""
    sql.execute("SELECT jobdaemon.resize_queue('upload', 6, 6)")
    first = crew.daemons[0].supervisor.daemon_id
    await _soon(sql, f"SELECT jobdaemon.drain_daemon({first})", _have(crew.daemons[:1], 0))
    statuses = sql.execute("SELECT status FROM jobdaemon.workers ORDER BY daemon_id").fetchall()
    assert [row["status"] for row in statuses] == ["draining", "running", "running"]
    crew.end(place=0)
    await until(lambda: crew.counts()[0] == 0 and sum(crew.counts()) == 6)
    crew.end()
    await until(lambda: sum(crew.counts()) == 6)
    assert crew.counts()[0] == 0
    await _soon(sql, f"SELECT jobdaemon.drain_daemon({first}, undo => true)", _have(crew.daemons, 6))
    await _within_a_second(sql, "SELECT jobdaemon.resize_queue('upload', 6, 18)", crew, [6, 6, 6])


async def test_a_drained_daemon_stays_drained_under_a_new_id(crew: Crew, sql: Sql) -> None:
    """A daemon whose row somebody removed registers again, still draining."""
    daemon = crew.daemons[0]
    first = daemon.supervisor.daemon_id
    await _soon(sql, f"SELECT jobdaemon.drain_daemon({first})", _have([daemon], 0))
    sql.execute("DELETE FROM jobdaemon.procrastinate_workers WHERE id = %s", [first])
    await until(lambda: daemon.supervisor.daemon_id != first)
    row = sql.execute("SELECT status FROM jobdaemon.daemons WHERE id = %s", [daemon.supervisor.daemon_id]).fetchone()
    assert row == {"status": "draining"}


async def test_new_settings_are_told(crew: Crew, sql: Sql) -> None:
    """After a reload the row of the daemon has the team sizes of its settings."""
    daemon = crew.daemons[0]
    daemon.supervisor.resize({"upload": 4})
    await until(lambda: crew.counts() == [4, 2, 2])
    statement = "SELECT (queues ->> 'upload')::integer AS size FROM jobdaemon.daemons WHERE id = %s"
    await until(lambda: sql.execute(statement, [daemon.supervisor.daemon_id]).fetchone() == {"size": 4})


# -- Answers and refusals ---------------------------------------------------------------------------------------------------


def _answer(sql: Sql, call: str) -> str:
    row = sql.execute(f"SELECT jobdaemon.{call} AS answer".encode()).fetchone()
    assert row is not None
    return str(row["answer"])


def _limits(sql: Sql) -> Row | None:
    return sql.execute("SELECT team_size, cluster_limit, fair_share FROM jobdaemon.queues WHERE name = 'upload'").fetchone()


async def test_the_answer_says_how_the_queue_is_and_who_serves_it(sql: Sql, daemon_id: int) -> None:
    """Each function answers with the queue's state, and warns when no daemon serves it or all that do are draining."""
    await asyncio.sleep(0)
    assert _answer(sql, "resize_queue('upload', 8, 20)") == "queue upload is open: team size 8, cluster limit 20"
    sql.execute("SELECT jobdaemon.drain_daemon(%s)", [daemon_id])
    warned = "queue upload is paused: team size 8, cluster limit 20; every daemon that serves it is draining"
    assert _answer(sql, "pause_queue('upload')") == warned
    sql.execute("UPDATE jobdaemon.procrastinate_workers SET last_heartbeat = now() - interval '1 hour'")
    state = "queue upload is open: each daemon's own team size, no cluster limit, fair share 3; no daemon serves it now"
    sql.execute("SELECT jobdaemon.resize_queue('upload', fair_share => 3, unset => '{team_size,cluster_limit}')")
    assert _answer(sql, "resume_queue('upload')") == state


@pytest.mark.parametrize(
    ("statement", "sqlstate", "words"),
    [
        ("SELECT jobdaemon.resize_queue('upload', -1)", "JD004", "a team size must be 0 to 10000, not -1"),
        ("SELECT jobdaemon.resize_queue('upload', 99999999999)", "JD004", "a team size must be 0 to 10000, not 99999999999"),
        ("SELECT jobdaemon.resize_queue('upload', cluster_limit => -3)", "JD004", "a cluster limit must be 0 to 100000, not -3"),
        ("SELECT jobdaemon.resize_queue('upload', fair_share => 0)", "JD004", "a fair share must be 1 to 100000, not 0"),
        ("SELECT jobdaemon.resize_queue('upload', unset => '{paused}')", "JD004", 'cannot unset "paused"'),
        ("SELECT jobdaemon.resize_queue('upload', unset => '{NULL}')", "JD004", 'cannot unset "NULL"'),
        ("SELECT jobdaemon.resize_queue('upload', 3, unset => '{team_size}')", "JD004", "team_size is given and unset at once"),
        ("SELECT jobdaemon.resize_queue('nope', 3)", "JD005", 'unknown queue "nope"'),
        ("SELECT jobdaemon.resize_queue(NULL, 3)", "JD005", 'unknown queue ""'),
        ("UPDATE jobdaemon.queues SET team_size = -1", "JD004", "a team size must be 0 to 10000, not -1"),
        ("UPDATE jobdaemon.queues SET cluster_limit = 1000000", "JD004", "a cluster limit must be 0 to 100000, not 1000000"),
        ("UPDATE jobdaemon.queues SET fair_share = 0", "JD004", "a fair share must be 1 to 100000, not 0"),
        ("UPDATE jobdaemon.queues SET paused = NULL", "JD004", "paused must be true or false, not NULL"),
        ("SELECT jobdaemon.pause_queue('nope')", "JD005", 'unknown queue "nope"'),
        ("SELECT jobdaemon.resume_queue(NULL)", "JD005", 'unknown queue ""'),
        ("SELECT jobdaemon.drain_daemon(12345)", "JD005", "unknown daemon 12345"),
        ("SELECT jobdaemon.drain_daemon(NULL)", "JD005", "unknown daemon NULL"),
        ("SELECT jobdaemon.prioritize_order(12345, 1)", "JD005", "unknown order 12345"),
        ("SELECT jobdaemon.prioritize_order(1, NULL)", "JD004", "a priority must be -1000000 to 1000000, not NULL"),
        ("SELECT jobdaemon.prioritize_order(1, 99999999999)", "JD004", "a priority must be -1000000 to 1000000, not 99999999999"),
    ],
)
def test_wrong_values_are_one_sentence(sql: Sql, statement: str, sqlstate: str, words: str) -> None:
    """What cannot be is refused with a sentence and our SQLSTATE, and nothing changes."""
    with pytest.raises(psycopg.Error) as caught:
        sql.execute(statement.encode())
    assert caught.value.sqlstate == sqlstate
    assert words in str(caught.value.diag.message_primary)
    assert _limits(sql) == {"team_size": None, "cluster_limit": None, "fair_share": None}


def test_null_leaves_a_value_and_unset_takes_it_away(sql: Sql) -> None:
    """NULL changes nothing; a name in unset goes back to none, beside others that are given."""
    sql.execute("SELECT jobdaemon.resize_queue('upload', 0, 0, 1)")
    sql.execute("SELECT jobdaemon.resize_queue('upload', NULL, NULL, NULL, NULL)")
    assert _limits(sql) == {"team_size": 0, "cluster_limit": 0, "fair_share": 1}
    sql.execute("SELECT jobdaemon.resize_queue('upload', cluster_limit => 7, unset => ARRAY['team_size', 'fair_share'])")
    assert _limits(sql) == {"team_size": None, "cluster_limit": 7, "fair_share": None}


def test_two_operators_at_once(engine_database: str, sql: Sql) -> None:
    """The second waits for the first and wins in what both set; what only one set is kept; updated_at never runs backwards."""
    with psycopg.connect(engine_database) as first, psycopg.connect(engine_database) as second, ThreadPoolExecutor(1) as pool:
        second.execute("SELECT 1")  # began before the first changes anything
        first.execute("SELECT jobdaemon.resize_queue('upload', 3, 30)")
        waiting = pool.submit(second.execute, "SELECT jobdaemon.resize_queue('upload', 4, fair_share => 2)")
        _until_blocked(sql)
        first.commit()
        after_first = sql.execute("SELECT updated_at FROM jobdaemon.queues WHERE name = 'upload'").fetchone()
        waiting.result(10)
        second.commit()
    after_second = sql.execute("SELECT updated_at FROM jobdaemon.queues WHERE name = 'upload'").fetchone()
    assert _limits(sql) == {"team_size": 4, "cluster_limit": 30, "fair_share": 2}
    assert after_first is not None
    assert after_second is not None
    assert after_first["updated_at"] < after_second["updated_at"]


def _until_blocked(sql: Sql) -> None:
    """Wait until a connection to this database waits for a lock."""
    deadline = time.monotonic() + 10
    query = "SELECT count(*) AS n FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    while (row := sql.execute(query).fetchone()) == {"n": 0}:
        assert time.monotonic() < deadline, "nobody waits for a lock"
        time.sleep(0.01)
    assert row is not None


async def test_a_stopped_daemon_stays_stopped(sql: Sql, claimed_job_factory: Claimed) -> None:
    """Drain, or its undoing, answers with the status of a daemon that has stopped and changes nothing."""
    await claimed_job_factory.store.set_daemon_status(claimed_job_factory.daemon_id, "stopped")
    assert _answer(sql, f"drain_daemon({claimed_job_factory.daemon_id})") == "stopped"
    assert _answer(sql, f"drain_daemon({claimed_job_factory.daemon_id}, true)") == "stopped"


# -- Priority ---------------------------------------------------------------------------------------------------------------


async def test_prioritize_reaches_every_stage(claimed_job_factory: Claimed, order_factory: Orders, sql: Sql) -> None:
    """An order's new priority is that of its waiting jobs, and of those that a stage makes later from what it read before."""
    job = await claimed_job_factory.beautify(plan="Free")
    order_id = job.order_id
    assert order_id is not None
    assert _answer(sql, f"prioritize_order({order_id}, -7)") == "0"
    jobs = generate_jobs(order_id, 300, "local", [WantedImage(1, "p"), WantedImage(2, "q")], 5)
    done = Transition(job, End.SUCCEEDED, writes=(beautified(order_id, *jobs),))
    await claimed_job_factory.store.commit([done], daemon_id=None)
    assert order_factory.row(order_id)["priority"] == -7
    waiting = [row for row in order_factory.jobs(order_id) if row["status"] == "todo"]
    assert [row["priority"] for row in waiting] == [-7, -7]
    assert _answer(sql, f"prioritize_order({order_id}, 900)") == "2"
    first = order_factory("Free")
    assert order_factory.row(first)["priority"] == 300
    [claimed] = await claimed_job_factory.claim("generate.local")
    assert (claimed.order_id, claimed.priority) == (order_id, 900)


async def test_a_prioritized_order_goes_first(claimed_job_factory: Claimed, order_factory: Orders, sql: Sql) -> None:
    """The youngest order of the lowest plan is claimed next once an operator says so."""
    order_factory("Free")
    last = order_factory("Pro")
    assert _answer(sql, f"prioritize_order({last}, 1000)") == "1"
    [job] = await claimed_job_factory.claim("beautify")
    assert job.order_id == last


def test_an_ended_order_has_no_priority(order_factory: Orders, sql: Sql) -> None:
    """JD005 says what became of it."""
    order_id = order_factory("Free")
    sql.execute("SELECT jobdaemon.cancel_order(%s)", [order_id])
    with pytest.raises(psycopg.Error, match=f"order {order_id} has ended: it is cancelled") as caught:
        sql.execute("SELECT jobdaemon.prioritize_order(%s, 5)", [order_id])
    assert caught.value.sqlstate == "JD005"


# -- Cancel against everything else -----------------------------------------------------------------------------------------


async def _dead_uploads(claimed: Claimed, order_id: int) -> None:
    """Bring an order of two images to the point where one is stored and the other's upload was given up."""
    [beautify] = await claimed.claim("beautify")
    jobs = generate_jobs(order_id, 300, "local", [WantedImage(1, "p"), WantedImage(2, "p")], 5)
    await claimed.store.commit([Transition(beautify, End.SUCCEEDED, writes=(beautified(order_id, *jobs),))], daemon_id=None)
    [generate] = await claimed.claim("generate.local")
    writes = tuple(generated(order_id, index, upload_job(order_id, 300, index)) for index in (1, 2))
    await claimed.store.commit([Transition(generate, End.SUCCEEDED, writes=writes)], daemon_id=None)
    [dead] = await claimed.claim("upload")
    failed = Transition(dead, End.FAILED, writes=writes_when_dead(dead, "no"), error="no", error_kind="Kind")
    await claimed.store.commit([failed], daemon_id=None)


async def test_cancel_and_redrive_at_once(claimed_job_factory: Claimed, order_factory: Orders, engine_database: str) -> None:
    """Whichever comes first, the order ends cancelled with nothing left to run; redrive answers with a number or one sentence."""
    answers: set[str] = set()
    for turn in range(12):
        order_id = order_factory("Free")
        await _dead_uploads(claimed_job_factory, order_id)
        with ThreadPoolExecutor(2) as pool:
            cancelled = pool.submit(_call, engine_database, "SELECT jobdaemon.cancel_order(%s)", order_id)
            if turn % 2:
                cancelled.result(10)
            redriven = pool.submit(_call, engine_database, "SELECT jobdaemon.redrive(%s)", order_id)
            assert cancelled.result(10) == "cancelled"
            answer = redriven.result(10)
        assert answer in ("1", f"order {order_id} was cancelled and cannot be redriven")
        answers.add(answer)
        assert order_factory.row(order_id)["status"] == "cancelled"
        assert {image["status"] for image in order_factory.images(order_id)} <= {"stored", "failed", "cancelled"}
        assert "todo" not in {job["status"] for job in order_factory.jobs(order_id)}
        failed = sum(image["status"] == "failed" for image in order_factory.images(order_id))
        assert order_factory.row(order_id)["images_failed"] == failed
    assert answers


def _call(url: str, statement: str, order_id: int) -> str:
    with psycopg.connect(url, autocommit=True) as connection:
        try:
            row = connection.execute(statement.encode(), [order_id]).fetchone()
        except psycopg.DatabaseError as error:
            if error.sqlstate != "JD005":
                raise
            return str(error.diag.message_primary)
        assert row is not None
        return str(row[0])


async def test_cancel_in_the_instant_of_the_last_image(
    claimed_job_factory: Claimed, order_factory: Orders, engine_database: str
) -> None:
    """Either the last image is stored and the order completed, or the order is cancelled and the image is not: never both."""
    verdicts: set[tuple[str, Verdict]] = set()
    for turn in range(20):
        order_id = order_factory("Free", images=1)
        await _to_last_upload(claimed_job_factory, order_id)
        [upload] = await claimed_job_factory.claim("upload")
        last = Transition(upload, End.SUCCEEDED, writes=(stored(order_id, 1),))
        cancel = asyncio.to_thread(_call, engine_database, "SELECT jobdaemon.cancel_order(%s)", order_id)
        commit = claimed_job_factory.store.commit([last], daemon_id=None)
        if turn % 4 == 0:
            status, committed = await cancel, await commit
        elif turn % 4 == 1:
            committed, status = await commit, await cancel
        else:
            status, committed = await asyncio.gather(cancel, commit)
        [verdict] = committed.verdicts
        verdicts.add((status, verdict))
        order, [image] = order_factory.row(order_id), order_factory.images(order_id)
        assert (order["status"], image["status"]) == (status, "stored" if status == "completed" else "cancelled")
        assert order["images_stored"] == (status == "completed")
        assert {job["status"] for job in order_factory.jobs(order_id)} <= {"succeeded", "aborted", "cancelled"}
    assert verdicts == {("completed", Verdict.ACCEPTED), ("cancelled", Verdict.ORDER_ENDED)}


async def _to_last_upload(claimed: Claimed, order_id: int) -> None:
    [beautify] = await claimed.claim("beautify")
    jobs = generate_jobs(order_id, 300, "local", [WantedImage(1, "p")], 5)
    await claimed.store.commit([Transition(beautify, End.SUCCEEDED, writes=(beautified(order_id, *jobs),))], daemon_id=None)
    [generate] = await claimed.claim("generate.local")
    write = generated(order_id, 1, upload_job(order_id, 300, 1))
    await claimed.store.commit([Transition(generate, End.SUCCEEDED, writes=(write,))], daemon_id=None)


async def test_removed_images_are_no_longer_counted(claimed_job_factory: Claimed, order_factory: Orders, sql: Sql) -> None:
    """After cancel with removal an order has no stored images, and its row says so; a second removal changes nothing."""
    order_id = order_factory("Free")
    await _to_last_upload(claimed_job_factory, order_id)
    [upload] = await claimed_job_factory.claim("upload")
    more = generated(order_id, 2, upload_job(order_id, 300, 2))
    await claimed_job_factory.store.commit(
        [Transition(upload, End.SUCCEEDED, writes=(more, stored(order_id, 1)))], daemon_id=None
    )
    assert order_factory.row(order_id)["images_stored"] == 1
    for _ in range(2):
        sql.execute("SELECT jobdaemon.cancel_order(%s, true)", [order_id])
        [remove] = await claimed_job_factory.claim("upload")
        assert remove.task == Task.REMOVE
        done = Transition(remove, End.SUCCEEDED, writes=(ImagesRemoved(order_id),))
        assert (await claimed_job_factory.store.commit([done], daemon_id=None)).verdicts == [Verdict.ACCEPTED]
        order = order_factory.row(order_id)
        assert (order["status"], order["images_stored"], order["images_failed"]) == ("cancelled", 0, 0)
    progress = sql.execute("SELECT images_stored, progress FROM jobdaemon.order_progress WHERE order_id = %s", [order_id])
    assert progress.fetchone() == {"images_stored": 0, "progress": 0}
