"""Factories with defaults: orders, jobs and claimed jobs in a database, and fakes of the stages' ports that record calls."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import psycopg

from jobdaemon.domain.artifact import Artifact
from jobdaemon.domain.job import Job, Task
from jobdaemon.domain.plan import Plan
from jobdaemon.domain.retry import RetryPolicy
from jobdaemon.domain.write import ImageGenerated, ImageStored, PhotoBeautified, PhotoPrewarmed
from jobdaemon.ports import ProviderCall
from jobdaemon.queue.attempt import AttemptRules
from jobdaemon.queue.store import PostgresJobStore

QUEUES = ("beautify", "generate.local", "upload")
SOURCE = "https://photos.example/portrait.jpg"
Row = dict[str, Any]
Sql = psycopg.Connection[Row]

POLICY = RetryPolicy(attempts=3, backoff=timedelta(seconds=2), cap=timedelta(seconds=10), jitter=0.2)
RULES = AttemptRules(run_timeout=timedelta(seconds=30), retry=POLICY)
BACKEND = "f" * 64
ARTIFACT = Artifact("work/1/beautified-0123456789abcdef.jpg", "0" * 64, 10, "image/jpeg")


def plan(name: str = "Start", images: int = 30, priority: int = 200, **changes: Any) -> Plan:
    """A plan; no limit on open orders unless told."""
    values: dict[str, Any] = {
        "lift_after": timedelta(minutes=5),
        "expires_after": timedelta(hours=24),
        "max_open_orders": 0,
        "max_open_orders_per_customer": 0,
        "prompts": ("a portrait",),
        "provider": "local",
    }
    return Plan(name=name, images=images, priority=priority, **(values | changes))


PLANS = (plan("Free", 2, 300), plan("Start", 30, 200, prompts=("a", "b", "c", "d", "e", "f")), plan("Pro", 70, 100))


def beautified(order_id: int, *then: Any) -> PhotoBeautified:
    """What a successful beautify attempt writes."""
    return PhotoBeautified(
        order_id, ARTIFACT, width=100, height=100, faces=1, unrestored=0, model="test 1", device="cpu", then=tuple(then)
    )


def prewarmed(number: int, size_bytes: int = 10, *, photo: int | None = None) -> PhotoPrewarmed:
    """What a successful prewarm attempt writes: of the photo with this number, if it is another one than the artifact's."""
    artifact = Artifact(f"prewarmed/{number}.jpg", f"{number:064x}", size_bytes, "image/jpeg")
    digest = f"{number if photo is None else photo:064x}"
    return PhotoPrewarmed(digest, BACKEND, artifact, width=100, height=100, faces=1, unrestored=0, model="test 1", device="cpu")


def generated(order_id: int, index: int, *then: Any, locator: str = "artifact:work/1/001-0123456789abcdef.jpg") -> ImageGenerated:
    """What a checkpoint of a generate attempt writes."""
    return ImageGenerated(order_id, index, "local", locator, then=tuple(then))


def stored(order_id: int, index: int) -> ImageStored:
    """What a successful upload attempt writes."""
    return ImageStored(
        order_id,
        index,
        object_key=f"orders/{order_id}/{index:03d}-abc.jpg",
        url=None,
        sha256="ab" * 32,
        size_bytes=10,
        width=8,
        height=8,
        media_type="image/jpeg",
    )


@dataclass(slots=True)
class Orders:
    """Makes orders through the SQL door and looks at what became of them."""

    sql: Sql
    _keys: Iterator[int] = field(default_factory=itertools.count)

    def __call__(self, plan: str = "Start", source: str = SOURCE, **arguments: Any) -> int:
        """Enqueue one order; returns its id."""
        if isinstance(arguments.get("params"), dict):
            arguments["params"] = json.dumps(arguments["params"])
        values = {"plan": plan, "source": source} | arguments
        casts = {"params": "::jsonb", "prompts": "::text[]", "at": "::timestamptz"}
        names = ", ".join(f'"{name}" => %({name})s{casts.get(name, "")}' for name in values)
        row = self.sql.execute(f"SELECT order_id FROM jobdaemon.enqueue_order({names})".encode(), values).fetchone()
        assert row is not None
        return int(row["order_id"])

    def row(self, order_id: int) -> Row:
        """The order as it is now."""
        row = self.sql.execute("SELECT * FROM jobdaemon.orders WHERE id = %s", [order_id]).fetchone()
        assert row is not None
        return row

    def images(self, order_id: int) -> list[Row]:
        """Its images by index."""
        return self.sql.execute("SELECT * FROM jobdaemon.images WHERE order_id = %s ORDER BY index", [order_id]).fetchall()

    def jobs(self, order_id: int) -> list[Row]:
        """Its jobs by id."""
        return self.sql.execute(
            "SELECT * FROM jobdaemon.procrastinate_jobs WHERE task_name LIKE 'jobdaemon.%%' AND args ->> 'order_id' = %s::text"
            " ORDER BY id",
            [str(order_id)],
        ).fetchall()


@dataclass(slots=True)
class Jobs:
    """Inserts bare jobs."""

    sql: Sql

    def __call__(
        self,
        queue: str = "upload",
        task: str = Task.UPLOAD,
        priority: int = 0,
        args: Row | None = None,
        *,
        lock: str | None = None,
        delay: timedelta | None = None,
    ) -> int:
        """Insert one job; returns its id."""
        row = self.sql.execute(
            "INSERT INTO jobdaemon.procrastinate_jobs (queue_name, task_name, priority, args, lock, scheduled_at)"
            " VALUES (%s, %s, %s, %s::jsonb, %s, now() + %s) RETURNING id",
            [queue, task, priority, json.dumps(args or {}), lock, delay],
        ).fetchone()
        assert row is not None
        return int(row["id"])

    def row(self, job_id: int) -> Row:
        """The job as it is now."""
        row = self.sql.execute("SELECT * FROM jobdaemon.procrastinate_jobs WHERE id = %s", [job_id]).fetchone()
        assert row is not None
        return row


async def open_call(store: PostgresJobStore, order_id: int | None, job_id: int) -> ProviderCall | None:
    """The newest call of this job that is not known to have ended."""
    assert order_id is not None
    batch = await store.orders.load_batch(order_id, job_id, [])
    assert batch is not None
    return batch.open_call


@dataclass(slots=True)
class Claimed:
    """Orders advanced to a stage, and the claimed job that works on it."""

    store: PostgresJobStore
    orders: Orders
    daemon_id: int

    async def claim(self, queue: str, limit: int = 1) -> list[Job]:
        """Claim from one queue as this fixture's daemon."""
        return await self.store.claim(queue, self.daemon_id, limit)

    async def beautify(self, **order: Any) -> Job:
        """A fresh order's beautify job, claimed."""
        order_id = self.orders(**order)
        [job] = [job for job in await self.claim("beautify", 100) if job.order_id == order_id]
        return job
