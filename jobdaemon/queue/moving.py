"""
Moving batches from one provider's queue to another's, inside the caller's transaction: see ``domain/fallback.py``.

A job that is moved stays the same job, so that whatever is known under its id stays with it; where the next provider makes fewer
images in one call, jobs are added for the rest.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from jobdaemon import db
from jobdaemon.domain.expand import WantedImage, generate_jobs
from jobdaemon.domain.fallback import FallbackRules, Move, moved_sentence
from jobdaemon.domain.job import Job, NewJob, generate_queue, provider_of
from jobdaemon.domain.outcome import End
from jobdaemon.domain.write import CallEnded
from jobdaemon.queue import sql, writes

_JOBS = sql.load("jobs.sql")
_ORDERS = sql.load("orders.sql")


@dataclass(frozen=True, slots=True)
class MovedBatch:
    """A batch that was moved to *provider*."""

    order_id: int
    job_id: int
    provider: str


@dataclass(frozen=True, slots=True)
class Look:
    """
    What a look at the batches that wait in a queue brought.

    Attributes:
        seen: how many were looked at.
        moved: those that were moved.
    """

    seen: int = 0
    moved: list[MovedBatch] = field(default_factory=list)


async def move_jobs(connection: db.Connection, moves: Sequence[tuple[Job, Move]]) -> list[MovedBatch]:
    """
    Send these jobs, locked with their orders, to other providers' queues; one with nothing left to make stays where it is.

    Returns:
        Those that went.
    """
    order_ids = {job.order_id for job, _ in moves if job.order_id is not None}
    if not order_ids:
        return []
    pending: dict[tuple[int, int], str] = {}
    for record in await connection.fetch(_ORDERS["pending_images"], sorted(order_ids)):
        pending[record["order_id"], record["index"]] = record["prompt"]
    rows: list[dict[str, object]] = []
    following: list[NewJob] = []
    moved: list[MovedBatch] = []
    for job, move in moves:
        if (order_id := job.order_id) is None:
            continue
        wanted = [WantedImage(index, pending[order_id, index]) for index in job.image_indexes if (order_id, index) in pending]
        tried = (*job.tried, provider_of(job.queue))
        first, *rest = generate_jobs(order_id, job.priority, move.provider, wanted, move.images_per_call, tried=tried) or (None,)
        if first is None:
            continue
        rows.append({"job_id": job.id, "queue": first.queue, "images": first.args["images"], "tried": tried})
        following += rest
        moved.append(MovedBatch(order_id, job.id, move.provider))
    if rows:
        await connection.execute(_JOBS["move_jobs"], json.dumps(rows))
        await connection.execute(_JOBS["wake_queues"], sorted({generate_queue(batch.provider) for batch in moved}))
    if following:
        await connection.execute(_JOBS["defer_jobs"], json.dumps([writes.job_row(job) for job in following]))
    return moved


async def move_waiting(
    connection: db.Connection,
    provider: str,
    rules: FallbackRules,
    *,
    avoid: Collection[str],
    reason: str,
    skip: int,
    limit: int,
) -> Look:
    """
    Send on what waits in a provider's queue and has bought nothing there.

    Args:
        avoid: providers that take nothing over now.
        reason: for ``attempts``.
        skip: how many of those that wait were looked at before, and stayed.
        limit: how many to look at.
    """
    queue, is_unpaid = generate_queue(provider), provider in rules.unpaid
    waiting = await connection.fetch(_JOBS["waiting_batches"], queue, skip, limit, is_unpaid)
    orders = await connection.fetch(_JOBS["lock_free_orders"], sorted({record["order_id"] for record in waiting}))
    by_order = {order["id"]: rules.move(order["plan"], order["provider"], provider, avoid=avoid) for order in orders}
    wanted = [record["id"] for record in waiting if by_order.get(record["order_id"]) is not None]
    jobs = [_job(record, queue) for record in await connection.fetch(_JOBS["lock_waiting"], wanted, queue, is_unpaid)]
    moves = [(job, move) for job in jobs if job.order_id and (move := by_order.get(job.order_id)) is not None]
    moved = await move_jobs(connection, moves)
    by_id = {job.id: job for job in jobs}
    if moved and is_unpaid:
        ended = [CallEnded(batch.order_id, batch.job_id, "cancelled") for batch in moved]
        await connection.execute(_ORDERS["call_ended"], json.dumps([writes.row(write) for write in ended]))
    if moved:
        rows = [_attempt_row(by_id[batch.job_id], moved_sentence(provider, batch.provider, reason)) for batch in moved]
        await connection.execute(_JOBS["record_attempts"], json.dumps(rows))
    return Look(len(waiting), moved)


def _attempt_row(job: Job, error: str) -> dict[str, object]:
    """No attempt was made: the next one would have been this."""
    return {
        "job_id": job.id,
        "order_id": job.order_id,
        "queue": job.queue,
        "attempt": job.attempt,
        "token": job.token,
        "daemon_id": None,
        "seconds": 0.0,
        "outcome": End.MOVED.value,
        "error_kind": None,
        "error": writes.storable(error),
    }


def _job(record: Any, queue: str) -> Job:
    return Job(
        id=record["id"],
        queue=queue,
        task=record["task_name"],
        priority=record["priority"],
        args=json.loads(record["args"]),
        attempts=record["attempts"],
        deaths=record["deaths"] or 0,
        token=record["token"],
    )
