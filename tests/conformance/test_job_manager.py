"""procrastinate's job manager, app and stock worker, the same on procrastinate's own connector and on ours."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol

import procrastinate
import psycopg
import pytest
from procrastinate import exceptions, utils
from procrastinate.jobs import Job, Notification, Status
from procrastinate.manager import JobManager

_SOON = datetime(2100, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
_TIMEOUT_S = 20

_Rows = Callable[..., list[dict[str, Any]]]


def _job(**fields: Any) -> Job:
    return Job(**{"queue": "queue_a", "task_name": "task_a", "lock": None, "queueing_lock": None, **fields})


def _ids(jobs: Iterable[Job]) -> list[int | None]:
    return [job.id for job in jobs]


@pytest.fixture
def rows(database_connection: psycopg.Connection[dict[str, Any]]) -> _Rows:
    """Run SQL from outside and give its rows."""

    def fetch(query: str, *parameters: Any) -> list[dict[str, Any]]:
        cursor = database_connection.execute(query.encode(), parameters)
        return cursor.fetchall() if cursor.description else []

    return fetch


class _Defer(Protocol):
    async def __call__(self, **fields: Any) -> Job: ...


@pytest.fixture
def deferred(job_manager: JobManager) -> _Defer:
    """Defer a job with defaults."""

    async def defer(**fields: Any) -> Job:
        return await job_manager.defer_job_async(_job(**fields))

    return defer


@pytest.fixture
def fetched(job_manager: JobManager, deferred: _Defer) -> _Defer:
    """Defer a job with defaults and fetch it for a new worker."""

    async def fetch(**fields: Any) -> Job:
        job = await deferred(**fields)
        fetched_job = await job_manager.fetch_job([job.queue], await job_manager.register_worker())
        assert fetched_job is not None
        assert fetched_job.id == job.id
        return fetched_job

    return fetch


# ---------------------------------------------------------------- defer


async def test_defer_stores_every_field(deferred: _Defer, job_manager: JobManager) -> None:
    """A deferred job reads back with each of its fields as it was given."""
    kwargs = {
        "text": "quote \" ' back \\ new \n comma , brace {} () ünï 🖼",
        "list": [1, 2.5, None, True],
        "nested": {"a": {"b": []}},
        "": "",
    }
    job = await deferred(priority=-7, lock='l "o", (c)\\k', queueing_lock="ql", task_kwargs=kwargs, scheduled_at=_SOON)
    assert list(await job_manager.list_jobs_async(id=job.id)) == [job]
    assert job.status == "todo"
    assert type(job.id) is int


async def test_defer_stores_empty_and_missing_apart(deferred: _Defer, job_manager: JobManager) -> None:
    """An empty lock is an empty string, a missing one is NULL, and no arguments are an empty object."""
    await deferred(lock="")
    await deferred(lock=None)
    assert [(job.lock, job.task_kwargs) for job in await job_manager.list_jobs_async()] == [("", {}), (None, {})]


@pytest.mark.parametrize(
    "text", ["NULL", "null", "{}", "()", '"', "\\", "'", "%s %(a)s %%", "$1", " lead and trail ", "\t", "1", "𝕏" * 9]
)
async def test_defer_stores_awkward_text(text: str, deferred: _Defer, job_manager: JobManager) -> None:
    """No text is mistaken for syntax on its way in or out."""
    await deferred(queue=text, task_name=text, lock=text, queueing_lock=text, task_kwargs={text: text})
    [job] = await job_manager.list_jobs_async(queue=text, task=text, lock=text, queueing_lock=text)
    assert (job.queue, job.task_name, job.lock, job.queueing_lock, job.task_kwargs) == (text, text, text, text, {text: text})


async def test_defer_keeps_the_moment_of_any_zone(deferred: _Defer, job_manager: JobManager) -> None:
    """A scheduled time in another zone is the same moment when read back, aware."""
    there = _SOON.astimezone(utils.utcnow().astimezone().tzinfo) + timedelta(hours=1)
    job = await deferred(scheduled_at=there)
    [read] = await job_manager.list_jobs_async(id=job.id)
    assert read.scheduled_at == there


async def test_defer_accepts_the_last_representable_moment(deferred: _Defer, job_manager: JobManager) -> None:
    """The time that procrastinate takes for "too far away" is stored."""
    job = await deferred(scheduled_at=utils.utcmax())
    [read] = await job_manager.list_jobs_async(id=job.id)
    assert read.scheduled_at == utils.utcmax()


async def test_batch_defer_gives_ids_in_order(job_manager: JobManager) -> None:
    """A batch comes back with one id for each job, in the order given."""
    jobs = await job_manager.batch_defer_jobs_async([_job(task_kwargs={"n": n}) for n in range(50)])
    stored = {job.id: job.task_kwargs["n"] for job in await job_manager.list_jobs_async()}
    assert [stored[job.id] for job in jobs] == list(range(50))
    assert {job.status for job in jobs} == {"todo"}


async def test_batch_defer_of_nothing(job_manager: JobManager) -> None:
    """An empty batch is no error and stores nothing."""
    assert await job_manager.batch_defer_jobs_async([]) == []
    assert list(await job_manager.list_jobs_async()) == []


@pytest.mark.parametrize("lock", ["ql", "with (brackets", ""])
async def test_queueing_lock_is_refused_while_one_waits(lock: str, deferred: _Defer) -> None:
    """A second waiting job with the same queueing lock raises AlreadyEnqueued, which names the lock."""
    await deferred(queueing_lock=lock)
    with pytest.raises(exceptions.AlreadyEnqueued) as caught:
        await deferred(queueing_lock=lock)
    assert lock in str(caught.value)
    cause = caught.value.__cause__
    assert isinstance(cause, exceptions.UniqueViolation)
    assert cause.constraint_name == "procrastinate_jobs_queueing_lock_idx_v1"
    assert cause.queueing_lock == lock


async def test_queueing_lock_is_free_once_fetched(fetched: _Defer, deferred: _Defer) -> None:
    """A running job does not hold its queueing lock."""
    await fetched(queueing_lock="ql")
    assert (await deferred(queueing_lock="ql")).id is not None


async def test_batch_with_a_taken_queueing_lock_stores_nothing(deferred: _Defer, job_manager: JobManager) -> None:
    """A batch is stored whole or not at all."""
    await deferred(queueing_lock="ql")
    with pytest.raises(exceptions.AlreadyEnqueued):
        await job_manager.batch_defer_jobs_async([_job(), _job(queueing_lock="ql")])
    assert len(list(await job_manager.list_jobs_async())) == 1


@pytest.mark.parametrize("fields", [{"task_kwargs": {"a": "\0"}}, {"lock": "a\0b"}, {"queue": "q" * 129}, {"priority": 2**31}])
async def test_what_postgres_cannot_store_is_a_connector_exception(fields: dict[str, Any], deferred: _Defer) -> None:
    """A value that the tables cannot hold is refused as a database error, and the connector works on."""
    with pytest.raises(exceptions.ConnectorException):
        await deferred(**fields)
    assert (await deferred()).id is not None


async def test_arguments_that_are_no_json_raise_the_dumpers_error(deferred: _Defer) -> None:
    """What JSON cannot express is the caller's TypeError, not a database error."""
    with pytest.raises(TypeError, match="serializable"):
        await deferred(task_kwargs={"when": _SOON})


# ---------------------------------------------------------------- periodic


async def test_periodic_job_is_deferred_once_for_a_timestamp(job_manager: JobManager) -> None:
    """The second worker to defer a periodic job for the same moment gets None."""
    job = _job(task_kwargs={"timestamp": 1_700_000_000}, priority=3, lock="l")
    first = await job_manager.defer_periodic_job(job=job, periodic_id="p", defer_timestamp=1_700_000_000)
    second = await job_manager.defer_periodic_job(job=job, periodic_id="p", defer_timestamp=1_700_000_000)
    assert second is None
    [stored] = await job_manager.list_jobs_async()
    assert (stored.id, stored.task_kwargs, stored.priority, stored.lock) == (first, {"timestamp": 1_700_000_000}, 3, "l")


async def test_periodic_job_of_another_id_or_moment_is_deferred(job_manager: JobManager, rows: _Rows) -> None:
    """Another periodic id or timestamp is another job; older moments of the same id are forgotten."""
    for periodic_id, timestamp in (("p", 1), ("p", 2), ("q", 2)):
        job = _job(task_kwargs={"timestamp": timestamp})
        assert await job_manager.defer_periodic_job(job=job, periodic_id=periodic_id, defer_timestamp=timestamp) is not None
    defers = rows("SELECT periodic_id, defer_timestamp FROM procrastinate_periodic_defers ORDER BY periodic_id")
    assert defers == [{"periodic_id": "p", "defer_timestamp": 2}, {"periodic_id": "q", "defer_timestamp": 2}]


async def test_periodic_job_respects_its_queueing_lock(job_manager: JobManager) -> None:
    """A periodic job whose queueing lock is taken raises AlreadyEnqueued and leaves the moment free."""
    await job_manager.defer_periodic_job(
        job=_job(task_kwargs={"timestamp": 1}, queueing_lock="ql"), periodic_id="p", defer_timestamp=1
    )
    with pytest.raises(exceptions.AlreadyEnqueued, match="ql"):
        await job_manager.defer_periodic_job(
            job=_job(task_kwargs={"timestamp": 2}, queueing_lock="ql"), periodic_id="p", defer_timestamp=2
        )
    assert len(list(await job_manager.list_jobs_async())) == 1


async def test_a_deleted_job_is_unlinked_from_its_periodic_defer(job_manager: JobManager, rows: _Rows) -> None:
    """Deleting a job keeps the note that its moment was served."""
    job_id = await job_manager.defer_periodic_job(job=_job(task_kwargs={"timestamp": 1}), periodic_id="p", defer_timestamp=1)
    assert job_id is not None
    await job_manager.cancel_job_by_id_async(job_id, delete_job=True)
    assert rows("SELECT job_id FROM procrastinate_periodic_defers") == [{"job_id": None}]


# ---------------------------------------------------------------- fetch


async def test_fetch_marks_the_job_as_doing(deferred: _Defer, job_manager: JobManager, rows: _Rows) -> None:
    """A fetched job is the worker's, is doing, and has its start on record."""
    job = await deferred(task_kwargs={"a": 1}, lock="l", queueing_lock="ql", priority=5)
    worker_id = await job_manager.register_worker()
    fetched_job = await job_manager.fetch_job(None, worker_id)
    assert fetched_job == job.evolve(status="doing", worker_id=worker_id)
    assert [row["type"] for row in rows("SELECT type::text FROM procrastinate_events ORDER BY id")] == ["deferred", "started"]


async def test_fetch_finds_nothing(job_manager: JobManager) -> None:
    """An empty queue gives None."""
    assert await job_manager.fetch_job(None, await job_manager.register_worker()) is None


async def test_fetch_keeps_to_its_queues(deferred: _Defer, job_manager: JobManager) -> None:
    """Only jobs of the named queues are fetched."""
    await deferred(queue="queue_a")
    wanted = await deferred(queue="queue_b")
    worker_id = await job_manager.register_worker()
    job = await job_manager.fetch_job(["queue_b", "queue_c"], worker_id)
    assert job is not None
    assert job.id == wanted.id
    assert await job_manager.fetch_job(["queue_b", "queue_c"], worker_id) is None


async def test_fetch_goes_by_priority_then_age(deferred: _Defer, job_manager: JobManager) -> None:
    """The highest priority comes first, and the oldest of equals."""
    jobs = [await deferred(priority=priority) for priority in (0, 5, -1, 5)]
    worker_id = await job_manager.register_worker()
    order = [await job_manager.fetch_job(None, worker_id) for _ in jobs]
    assert [job.id for job in order if job] == [jobs[1].id, jobs[3].id, jobs[0].id, jobs[2].id]


async def test_fetch_leaves_what_is_not_due(deferred: _Defer, job_manager: JobManager) -> None:
    """A job is not fetched before its time."""
    await deferred(scheduled_at=_SOON)
    due = await deferred(scheduled_at=utils.utcnow() - timedelta(hours=1))
    worker_id = await job_manager.register_worker()
    job = await job_manager.fetch_job(None, worker_id)
    assert job is not None
    assert job.id == due.id
    assert await job_manager.fetch_job(None, worker_id) is None


async def test_fetch_never_runs_two_jobs_of_one_lock(deferred: _Defer, job_manager: JobManager) -> None:
    """While a job with a lock runs, no other of that lock is fetched; afterwards it is."""
    first, second = await deferred(lock="l"), await deferred(lock="l")
    worker_id = await job_manager.register_worker()
    job = await job_manager.fetch_job(None, worker_id)
    assert job is not None
    assert job.id == first.id
    assert await job_manager.fetch_job(None, worker_id) is None
    await job_manager.finish_job(job, Status.SUCCEEDED, delete_job=False)
    job = await job_manager.fetch_job(None, worker_id)
    assert job is not None
    assert job.id == second.id


async def test_parallel_fetches_never_share_a_job(job_manager: JobManager) -> None:
    """Each of many simultaneous fetches gets a job of its own."""
    await job_manager.batch_defer_jobs_async([_job() for _ in range(20)])
    worker_id = await job_manager.register_worker()
    jobs = await asyncio.gather(*(job_manager.fetch_job(None, worker_id) for _ in range(20)))
    assert len({job.id for job in jobs if job}) == 20


async def test_fetch_for_an_unknown_worker_is_refused(deferred: _Defer, job_manager: JobManager) -> None:
    """A job cannot belong to a worker that is not registered."""
    await deferred()
    with pytest.raises(exceptions.ConnectorException):
        await job_manager.fetch_job(None, 2**40)


# ---------------------------------------------------------------- finish, retry, cancel


@pytest.mark.parametrize("status", [Status.SUCCEEDED, Status.FAILED, Status.ABORTED])
async def test_finish_ends_a_job(status: Status, fetched: _Defer, job_manager: JobManager, rows: _Rows) -> None:
    """A finished job has its final status, one more attempt, and an event."""
    job = await fetched()
    await job_manager.finish_job(job, status, delete_job=False)
    assert job.id is not None
    assert await job_manager.get_job_status_async(job.id) is status
    assert rows("SELECT attempts FROM procrastinate_jobs") == [{"attempts": 1}]
    assert rows("SELECT type::text FROM procrastinate_events ORDER BY id")[-1] == {"type": status.value}


async def test_finish_can_delete(fetched: _Defer, job_manager: JobManager, rows: _Rows) -> None:
    """A job finished with delete_job is gone, and its events with it."""
    await job_manager.finish_job(await fetched(), Status.SUCCEEDED, delete_job=True)
    assert rows("SELECT id FROM procrastinate_jobs UNION ALL SELECT id FROM procrastinate_events") == []


async def test_finish_refuses_a_status_that_is_not_final(fetched: _Defer, job_manager: JobManager) -> None:
    """A job cannot be finished into doing."""
    with pytest.raises(exceptions.ConnectorException):
        await job_manager.finish_job(await fetched(), Status.DOING, delete_job=False)


async def test_finish_refuses_an_ended_or_unknown_job(fetched: _Defer, job_manager: JobManager) -> None:
    """A job ends once."""
    job = await fetched()
    await job_manager.finish_job(job, Status.SUCCEEDED, delete_job=False)
    with pytest.raises(exceptions.ConnectorException):
        await job_manager.finish_job(job, Status.SUCCEEDED, delete_job=False)
    with pytest.raises(exceptions.ConnectorException):
        await job_manager.finish_job_by_id_async(2**40, Status.SUCCEEDED, delete_job=False)


async def test_retry_sets_the_job_back(fetched: _Defer, job_manager: JobManager) -> None:
    """A retried job waits again for the given time, its other fields kept, one attempt spent."""
    job = await fetched(priority=4, lock="l")
    await job_manager.retry_job(job, retry_at=_SOON)
    [stored] = await job_manager.list_jobs_async()
    assert (stored.status, stored.attempts, stored.scheduled_at) == ("todo", 1, _SOON)
    assert (stored.priority, stored.lock, stored.queue) == (4, "l", "queue_a")


async def test_retry_can_move_the_job(fetched: _Defer, job_manager: JobManager) -> None:
    """Priority, queue and lock can change on retry."""
    await job_manager.retry_job(await fetched(priority=4), retry_at=_SOON, priority=-2, queue="queue_b", lock="other")
    [stored] = await job_manager.list_jobs_async()
    assert (stored.priority, stored.queue, stored.lock) == (-2, "queue_b", "other")


async def test_retry_without_a_time_is_due_now(fetched: _Defer, job_manager: JobManager) -> None:
    """A job retried without a time can be fetched at once."""
    job = await fetched()
    await job_manager.retry_job(job)
    again = await job_manager.fetch_job(None, await job_manager.register_worker())
    assert again is not None
    assert (again.id, again.attempts) == (job.id, 1)


async def test_a_failed_job_can_be_retried(fetched: _Defer, job_manager: JobManager) -> None:
    """A failed job waits again; a succeeded one cannot."""
    failed = await fetched()
    await job_manager.finish_job(failed, Status.FAILED, delete_job=False)
    assert failed.id is not None
    await job_manager.retry_job_by_id_async(failed.id, retry_at=_SOON)
    assert await job_manager.get_job_status_async(failed.id) is Status.TODO
    succeeded = await fetched()
    await job_manager.finish_job(succeeded, Status.SUCCEEDED, delete_job=False)
    assert succeeded.id is not None
    with pytest.raises(exceptions.ConnectorException):
        await job_manager.retry_job_by_id_async(succeeded.id, retry_at=_SOON)


async def test_cancel_stops_a_waiting_job(deferred: _Defer, job_manager: JobManager) -> None:
    """A waiting job is cancelled once; an unknown one not at all."""
    job = await deferred()
    assert job.id is not None
    assert await job_manager.cancel_job_by_id_async(job.id) is True
    assert await job_manager.get_job_status_async(job.id) is Status.CANCELLED
    assert await job_manager.cancel_job_by_id_async(job.id) is False
    assert await job_manager.cancel_job_by_id_async(2**40) is False


async def test_cancel_can_delete(deferred: _Defer, job_manager: JobManager) -> None:
    """A waiting job cancelled with delete_job is gone."""
    job = await deferred()
    assert job.id is not None
    assert await job_manager.cancel_job_by_id_async(job.id, delete_job=True) is True
    assert list(await job_manager.list_jobs_async()) == []


async def test_cancel_leaves_a_running_job(fetched: _Defer, job_manager: JobManager) -> None:
    """Without abort, a running job goes on."""
    job = await fetched()
    assert job.id is not None
    assert await job_manager.cancel_job_by_id_async(job.id) is False
    assert await job_manager.get_job_status_async(job.id) is Status.DOING


async def test_abort_is_noted_on_a_running_job(fetched: _Defer, job_manager: JobManager) -> None:
    """With abort, a running job is listed as one to abort, in its own queue only."""
    job = await fetched()
    assert job.id is not None
    assert await job_manager.cancel_job_by_id_async(job.id, abort=True) is True
    [stored] = await job_manager.list_jobs_async()
    assert (stored.status, stored.abort_requested) == ("doing", True)
    assert list(await job_manager.list_jobs_to_abort_async()) == [job.id]
    assert list(await job_manager.list_jobs_to_abort_async(queue="queue_a")) == [job.id]
    assert list(await job_manager.list_jobs_to_abort_async(queue="queue_b")) == []


async def test_abort_cancels_a_waiting_job(deferred: _Defer, job_manager: JobManager) -> None:
    """With abort, a job that does not run yet is simply cancelled."""
    job = await deferred()
    assert job.id is not None
    assert await job_manager.cancel_job_by_id_async(job.id, abort=True) is True
    assert await job_manager.get_job_status_async(job.id) is Status.CANCELLED


async def test_retry_of_a_job_to_abort_fails_it(fetched: _Defer, job_manager: JobManager) -> None:
    """A job whose abort was requested is not run again."""
    job = await fetched()
    assert job.id is not None
    await job_manager.cancel_job_by_id_async(job.id, abort=True)
    await job_manager.retry_job(job, retry_at=_SOON)
    assert await job_manager.get_job_status_async(job.id) is Status.FAILED


async def test_status_of_an_unknown_job(job_manager: JobManager) -> None:
    """Asking for a job that does not exist raises NoResult."""
    with pytest.raises(exceptions.NoResult):
        await job_manager.get_job_status_async(2**40)


# ---------------------------------------------------------------- lists


async def _three_jobs(deferred: _Defer, job_manager: JobManager) -> Sequence[Job]:
    """Make one running job of queue_a, one waiting there, and one waiting in queue_b; the locks are l1, l1 and l2."""
    running = await deferred(lock="l1", queueing_lock="ql")
    worker_id = await job_manager.register_worker()
    assert await job_manager.fetch_job(None, worker_id) is not None
    waiting = await deferred(lock="l1", task_name="task_b")
    other = await deferred(lock="l2", queue="queue_b", task_name="task_b")
    return running.evolve(status="doing", worker_id=worker_id), waiting, other


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({}, [0, 1, 2]),
        ({"queue": "queue_a"}, [0, 1]),
        ({"task": "task_b"}, [1, 2]),
        ({"status": "doing"}, [0]),
        ({"lock": "l1"}, [0, 1]),
        ({"queueing_lock": "ql"}, [0]),
        ({"queue": "queue_a", "task": "task_b", "status": "todo", "lock": "l1"}, [1]),
        ({"queue": "queue_c"}, []),
        ({"id": 2**40}, []),
    ],
)
async def test_list_jobs_by_each_filter(
    filters: dict[str, Any], expected: list[int], deferred: _Defer, job_manager: JobManager
) -> None:
    """Jobs are listed oldest first, by any combination of filters."""
    jobs = await _three_jobs(deferred, job_manager)
    assert list(await job_manager.list_jobs_async(**filters)) == [jobs[index] for index in expected]


async def test_list_jobs_by_id_and_worker(deferred: _Defer, job_manager: JobManager) -> None:
    """Jobs can be found by their id and by their worker's."""
    jobs = await _three_jobs(deferred, job_manager)
    assert _ids(await job_manager.list_jobs_async(id=jobs[1].id)) == [jobs[1].id]
    assert _ids(await job_manager.list_jobs_async(worker_id=jobs[0].worker_id)) == [jobs[0].id]


async def test_list_jobs_by_an_unknown_status_is_refused(job_manager: JobManager) -> None:
    """A status that the enum does not know is a database error."""
    with pytest.raises(exceptions.ConnectorException):
        await job_manager.list_jobs_async(status="running")


def _counts(name: str, **statuses: int) -> dict[str, Any]:
    counts = dict.fromkeys(("todo", "doing", "succeeded", "failed", "cancelled", "aborted"), 0)
    return {"name": name, "jobs_count": sum(statuses.values()), **counts, **statuses}


async def test_list_queues(deferred: _Defer, job_manager: JobManager) -> None:
    """Queues are counted by status, and the filters hold."""
    await _three_jobs(deferred, job_manager)
    assert list(await job_manager.list_queues_async()) == [_counts("queue_a", todo=1, doing=1), _counts("queue_b", todo=1)]
    assert list(await job_manager.list_queues_async(queue="queue_b")) == [_counts("queue_b", todo=1)]
    assert list(await job_manager.list_queues_async(task="task_a", status="doing", lock="l1")) == [_counts("queue_a", doing=1)]
    assert list(await job_manager.list_queues_async(lock="none")) == []


async def test_list_tasks(deferred: _Defer, job_manager: JobManager) -> None:
    """Tasks are counted by status, and the filters hold."""
    await _three_jobs(deferred, job_manager)
    assert list(await job_manager.list_tasks_async()) == [_counts("task_a", doing=1), _counts("task_b", todo=2)]
    assert list(await job_manager.list_tasks_async(queue="queue_b", task="task_b")) == [_counts("task_b", todo=1)]
    assert list(await job_manager.list_tasks_async(status="failed")) == []


async def test_list_locks(deferred: _Defer, job_manager: JobManager) -> None:
    """Locks are counted by status, jobs without one left out, and the filters hold."""
    await _three_jobs(deferred, job_manager)
    await deferred()
    assert list(await job_manager.list_locks_async()) == [_counts("l1", todo=1, doing=1), _counts("l2", todo=1)]
    assert list(await job_manager.list_locks_async(queue="queue_b")) == [_counts("l2", todo=1)]
    assert list(await job_manager.list_locks_async(task="task_a", status="doing", lock="l1")) == [_counts("l1", doing=1)]


# ---------------------------------------------------------------- workers


async def test_workers_come_and_go(job_manager: JobManager, rows: _Rows) -> None:
    """Each registration is a new worker, and an unregistered one is gone, its job without an owner."""
    first, second = await job_manager.register_worker(), await job_manager.register_worker()
    assert first != second
    await job_manager.unregister_worker(first)
    assert rows("SELECT id FROM procrastinate_workers") == [{"id": second}]


async def test_heartbeat_is_the_databases_time(job_manager: JobManager, rows: _Rows) -> None:
    """A heartbeat moves one worker's time, and nothing for an unknown one."""
    first, second = await job_manager.register_worker(), await job_manager.register_worker()
    rows("UPDATE procrastinate_workers SET last_heartbeat = now() - interval '1 hour'")
    await job_manager.update_heartbeat(first)
    await job_manager.update_heartbeat(2**40)
    fresh = rows("SELECT id FROM procrastinate_workers WHERE last_heartbeat > now() - interval '1 minute'")
    assert fresh == [{"id": first}]
    assert second != first


@pytest.mark.parametrize("seconds", [30, 29.5, 0.001])
async def test_prune_removes_silent_workers(seconds: float, fetched: _Defer, job_manager: JobManager, rows: _Rows) -> None:
    """Workers silent for longer than the given seconds are removed and named, and their jobs lose them."""
    job = await fetched()
    rows("UPDATE procrastinate_workers SET last_heartbeat = now() - interval '31 seconds'")
    alive = await job_manager.register_worker()
    rows("UPDATE procrastinate_workers SET last_heartbeat = now() + interval '1 minute' WHERE id = %s", alive)
    assert await job_manager.prune_stalled_workers(seconds_since_heartbeat=seconds) == [job.worker_id]
    assert rows("SELECT id FROM procrastinate_workers") == [{"id": alive}]
    [stored] = await job_manager.list_jobs_async()
    assert (stored.status, stored.worker_id) == ("doing", None)


# ---------------------------------------------------------------- stalled and old jobs


@pytest.mark.parametrize("seconds", [30, 29.5])
async def test_stalled_jobs_by_heartbeat(seconds: float, fetched: _Defer, job_manager: JobManager, rows: _Rows) -> None:
    """A running job is stalled when its worker is silent or gone, and the filters hold."""
    silent, healthy, orphan = await fetched(), await fetched(queue="queue_b"), await fetched(task_name="task_b")
    rows("UPDATE procrastinate_workers SET last_heartbeat = now() - interval '31 seconds' WHERE id = %s", silent.worker_id)
    assert orphan.worker_id is not None
    await job_manager.unregister_worker(orphan.worker_id)

    async def stalled(**filters: Any) -> set[int | None]:
        return set(_ids(await job_manager.get_stalled_jobs(seconds_since_heartbeat=seconds, **filters)))

    assert await stalled() == {silent.id, orphan.id}
    assert await stalled(task_name="task_b") == {orphan.id}
    assert await stalled(queue="queue_b") == set()
    assert healthy.id not in await stalled(queue="queue_b", task_name="task_a")


async def test_stalled_jobs_by_start(fetched: _Defer, job_manager: JobManager, rows: _Rows) -> None:
    """A job that runs for longer than the given seconds is stalled, counted from its latest start."""
    old, young = await fetched(), await fetched(queue="queue_b")
    rows("UPDATE procrastinate_events SET at = now() - interval '100 seconds' WHERE job_id = %s", old.id)

    async def stalled(nb_seconds: int, **filters: Any) -> list[int | None]:
        with pytest.warns(DeprecationWarning, match="nb_seconds"):
            return _ids(await job_manager.get_stalled_jobs(nb_seconds=nb_seconds, **filters))

    assert await stalled(50) == [old.id]
    assert await stalled(200) == []
    assert await stalled(0) in ([old.id, young.id], [young.id, old.id])
    assert await stalled(50, queue="queue_b") == []
    assert await stalled(50, task_name="task_a") == [old.id]


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, {"todo", "failed", "cancelled", "aborted"}),
        ({"include_failed": True}, {"todo", "cancelled", "aborted"}),
        ({"include_cancelled": True}, {"todo", "failed", "aborted"}),
        ({"include_failed": True, "include_cancelled": True, "include_aborted": True}, {"todo"}),
        ({"queue": "queue_b"}, {"todo", "succeeded", "failed", "cancelled", "aborted"}),
    ],
)
async def test_delete_old_jobs_by_status(
    options: dict[str, Any], kept: set[str], deferred: _Defer, fetched: _Defer, job_manager: JobManager, rows: _Rows
) -> None:
    """Jobs that ended longer ago are deleted, succeeded ones always and others on request."""
    for status in (Status.SUCCEEDED, Status.FAILED, Status.ABORTED):
        await job_manager.finish_job(await fetched(), status, delete_job=False)
    cancelled = await deferred()
    assert cancelled.id is not None
    await job_manager.cancel_job_by_id_async(cancelled.id)
    await deferred()
    rows("UPDATE procrastinate_events SET at = at - interval '3 hours'")
    await job_manager.delete_old_jobs(nb_hours=4, **options)
    assert len(list(await job_manager.list_jobs_async())) == 5
    await job_manager.delete_old_jobs(nb_hours=2, **options)
    assert {job.status for job in await job_manager.list_jobs_async()} == kept


# ---------------------------------------------------------------- notifications


@pytest.mark.parametrize("queues", [None, ["queue_b", "queue_a"]])
async def test_listen_hears_of_new_jobs(
    queues: list[str] | None, deferred: _Defer, job_manager: JobManager, in_background: Callable[[Any], Any], until: Any
) -> None:
    """Who listens, to all queues or to some, hears of each new job there."""
    heard: list[Notification] = []
    event = asyncio.Event()

    async def note(*, channel: str, notification: Notification) -> None:
        heard.append(notification)
        assert channel == ("procrastinate_any_queue_v1" if queues is None else "procrastinate_queue_v1#queue_a")
        event.set()

    in_background(job_manager.listen_for_jobs(on_notification=note, queues=queues))
    await until(event, deferred)
    ids = set(_ids(await job_manager.list_jobs_async()))
    assert heard[0]["type"] == "job_inserted"
    assert heard[0]["job_id"] in ids


async def test_listen_does_not_hear_of_other_queues(
    deferred: _Defer, job_manager: JobManager, in_background: Callable[[Any], Any], until: Any
) -> None:
    """Who listens to one queue hears nothing of another."""
    heard: list[Notification] = []
    event = asyncio.Event()

    async def note(*, channel: str, notification: Notification) -> None:
        heard.append(notification)
        event.set()

    async def provoke() -> None:
        await deferred(queue="queue_b")
        await deferred(queue="queue_a")

    in_background(job_manager.listen_for_jobs(on_notification=note, queues=["queue_a"]))
    await until(event, provoke)
    wanted = set(_ids(await job_manager.list_jobs_async(queue="queue_a")))
    assert {notification["job_id"] for notification in heard} <= wanted


async def test_listen_hears_of_aborts(
    fetched: _Defer, job_manager: JobManager, in_background: Callable[[Any], Any], until: Any
) -> None:
    """Who listens hears that a running job is to be aborted."""
    heard: list[Notification] = []
    event = asyncio.Event()

    async def note(*, channel: str, notification: Notification) -> None:
        if notification["type"] == "abort_job_requested":
            heard.append(notification)
            event.set()

    async def provoke() -> None:
        job = await fetched()
        assert job.id is not None
        await job_manager.cancel_job_by_id_async(job.id, abort=True)

    in_background(job_manager.listen_for_jobs(on_notification=note))
    await until(event, provoke)
    assert heard[0]["job_id"] in list(await job_manager.list_jobs_to_abort_async())


# ---------------------------------------------------------------- checks, sync, app, worker


async def test_check_connection_finds_the_tables(job_manager: JobManager) -> None:
    """The check is true where the tables are on the path."""
    assert await job_manager.check_connection_async() is True


async def test_sync_methods_work_in_a_thread_of_an_open_app(job_manager: JobManager) -> None:
    """A synchronous task of an open app can defer, ask, list, retry and cancel."""

    def work() -> tuple[Status, int, list[str], bool, bool]:
        job = job_manager.defer_job(_job(lock="l", task_kwargs={"a": [1]}))
        assert job.id is not None
        listed = job_manager.list_jobs(id=job.id)
        assert listed == [job]
        names = [
            *(row["name"] for row in job_manager.list_queues()),
            *(row["name"] for row in job_manager.list_tasks()),
            *(row["name"] for row in job_manager.list_locks()),
        ]
        status = job_manager.get_job_status(job.id)
        batch = job_manager.batch_defer_jobs([_job(), _job()])
        with pytest.raises(exceptions.ConnectorException):
            job_manager.retry_job_by_id(job.id, retry_at=_SOON)
        return status, len(batch), names, job_manager.cancel_job_by_id(job.id), job_manager.check_connection()

    assert await utils.sync_to_async(work) == (Status.TODO, 2, ["queue_a", "task_a", "l"], True, True)


async def test_configure_task_defers_through_the_app(app: procrastinate.App, job_manager: JobManager) -> None:
    """A task known by name alone can be deferred with its options."""
    deferrer = app.configure_task(
        "elsewhere", queue="queue_b", priority=9, lock="l", queueing_lock="ql", schedule_in={"days": 900_000_000}
    )
    job_id = await deferrer.defer_async(a=1)
    [job] = await job_manager.list_jobs_async()
    assert (job.id, job.task_name, job.queue, job.priority, job.lock) == (job_id, "elsewhere", "queue_b", 9, "l")
    assert (job.queueing_lock, job.task_kwargs, job.scheduled_at) == ("ql", {"a": 1}, utils.utcmax())


async def test_batch_defer_through_the_app(app: procrastinate.App, job_manager: JobManager) -> None:
    """A batch of arguments becomes as many jobs."""
    ids = await app.configure_task("t").batch_defer_async({"n": 1}, {"n": 2})
    assert [(job.id, job.task_kwargs) for job in await job_manager.list_jobs_async()] == [(ids[0], {"n": 1}), (ids[1], {"n": 2})]


async def test_the_stock_worker_runs_the_jobs(app: procrastinate.App, job_manager: JobManager) -> None:
    """The stock worker runs async and sync tasks, retries, fails and aborts as it should, then leaves no trace of itself."""
    sums: list[int] = []

    @app.task(name="add")
    async def add(a: int, b: int) -> None:
        sums.append(a + b)

    @app.task(name="add_in_thread")
    def add_in_thread(a: int, b: int) -> None:
        sums.append(a + b)
        add.defer(a=a, b=b)

    @app.task(name="flaky", retry=procrastinate.RetryStrategy(max_attempts=1, wait=0), pass_context=True)
    async def flaky(context: procrastinate.JobContext) -> None:
        if context.job.attempts == 0:
            raise RuntimeError("once")

    @app.task(name="broken")
    async def broken() -> None:
        raise RuntimeError("always")

    ids = {
        "add": await add.defer_async(a=1, b=2),
        "thread": await add_in_thread.defer_async(a=10, b=20),
        "flaky": await flaky.defer_async(),
        "broken": await broken.defer_async(),
    }
    # A worker that has found nothing more to do stops, though a job that still runs may defer another: that is the next one's.
    for _ in range(2):
        async with asyncio.timeout(_TIMEOUT_S):
            await app.run_worker_async(wait=False, install_signal_handlers=False, concurrency=2)
    statuses = {name: await job_manager.get_job_status_async(job_id) for name, job_id in ids.items()}
    assert statuses == {"add": Status.SUCCEEDED, "thread": Status.SUCCEEDED, "flaky": Status.SUCCEEDED, "broken": Status.FAILED}
    assert sorted(sums) == [3, 30, 30]


async def test_the_stock_worker_wakes_for_a_new_job(
    app: procrastinate.App, job_manager: JobManager, in_background: Callable[[Any], Any], until: Any
) -> None:
    """A worker that waits starts a new job at once, through the notification, long before its next poll."""
    done = asyncio.Event()

    @app.task(name="ring")
    async def ring() -> None:
        done.set()

    worker = app.run_worker_async(install_signal_handlers=False, fetch_job_polling_interval=3600)
    task = in_background(worker)
    await until(done, ring.defer_async)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert Status.SUCCEEDED.value in {job.status for job in await job_manager.list_jobs_async()}


async def test_defer_commits_with_the_callers_transaction(
    app: procrastinate.App, connector_kind: Any, procrastinate_database: Any, job_manager: JobManager
) -> None:
    """A job deferred on the caller's connection is seen by others when the caller commits, and no sooner."""
    async with connector_kind.begin(procrastinate_database) as callers:
        job_id = await app.configure_task("t", connection=callers.connection, lock="l").defer_async(a={"b": 1})
        assert await job_manager.get_job_status_async(job_id, connection=callers.connection) is Status.TODO
        assert list(await job_manager.list_jobs_async()) == []
        await callers.commit()
    assert [(job.id, job.task_kwargs) for job in await job_manager.list_jobs_async()] == [(job_id, {"a": {"b": 1}})]


async def test_defer_rolls_back_with_the_callers_transaction(
    app: procrastinate.App, connector_kind: Any, procrastinate_database: Any, job_manager: JobManager
) -> None:
    """A caller's rollback leaves neither its own rows nor the jobs it deferred."""
    async with connector_kind.begin(procrastinate_database) as callers:
        await callers.execute("INSERT INTO procrastinate_workers DEFAULT VALUES")
        await app.configure_task("t", connection=callers.connection).batch_defer_async({"n": 1}, {"n": 2})
        await callers.rollback()
    assert list(await job_manager.list_jobs_async()) == []


async def test_a_refused_defer_spoils_the_callers_transaction(
    app: procrastinate.App, connector_kind: Any, procrastinate_database: Any, job_manager: JobManager
) -> None:
    """A taken queueing lock is told apart on the caller's connection too, and nothing of the transaction remains."""
    await app.configure_task("t", queueing_lock="ql").defer_async()
    async with connector_kind.begin(procrastinate_database) as callers:
        await app.configure_task("other", connection=callers.connection).defer_async()
        with pytest.raises(exceptions.AlreadyEnqueued, match="ql"):
            await app.configure_task("t", queueing_lock="ql", connection=callers.connection).defer_async()
        with pytest.raises(exceptions.ConnectorException):
            await app.configure_task("other", connection=callers.connection).defer_async()
        await callers.rollback()
    assert [job.task_name for job in await job_manager.list_jobs_async()] == ["t"]


async def test_cancel_on_the_callers_connection(
    app: procrastinate.App, connector_kind: Any, procrastinate_database: Any, job_manager: JobManager
) -> None:
    """A cancellation is undone by the caller's rollback."""
    job_id = await app.configure_task("t").defer_async()
    async with connector_kind.begin(procrastinate_database) as callers:
        assert await job_manager.cancel_job_by_id_async(job_id, connection=callers.connection) is True
        await callers.rollback()
    assert await job_manager.get_job_status_async(job_id) is Status.TODO
