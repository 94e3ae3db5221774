"""Jobs: rows of procrastinate's table, as the engine sees them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from enum import StrEnum
from typing import Any

#: Sorts after every order.
_NO_ORDER = 2**63

#: A job whose workers died so often is a suspect: it runs alone.
SUSPECT_AFTER = 2
BEAUTIFY_QUEUE = "beautify"
#: Of jobs that start only when nothing else of their queue is ready: below whatever plans and operators may set.
PREWARM_PRIORITY = -2_000_000
UPLOAD_QUEUE = "upload"
_GENERATE = "generate."


class JobStatus(StrEnum):
    """procrastinate's own words."""

    TODO = "todo"
    DOING = "doing"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    ABORTED = "aborted"


class Task(StrEnum):
    """What a job of ours runs; kept in ``task_name``."""

    BEAUTIFY = "jobdaemon.beautify"
    PREWARM = "jobdaemon.prewarm"
    GENERATE = "jobdaemon.generate"
    UPLOAD = "jobdaemon.upload"
    REMOVE = "jobdaemon.remove"
    ABANDON = "jobdaemon.abandon"


def generate_queue(provider: str) -> str:
    """The queue of one provider's calls."""
    return f"{_GENERATE}{provider}"


def provider_of(queue: str) -> str:
    """The provider whose calls this queue holds; the inverse of :func:`generate_queue`."""
    return queue.removeprefix(_GENERATE)


@dataclass(frozen=True, slots=True)
class NewJob:
    """
    A job to insert.

    Attributes:
        priority: higher goes first. A job for an order gets that order's priority in its stage instead, when it is inserted.
        args: JSON object.
        delay: not before this long from now, by the database's clock.
    """

    queue: str
    task: str
    priority: int
    args: Mapping[str, Any]
    delay: timedelta | None = None


@dataclass(frozen=True, slots=True)
class Job:
    """
    A claimed job.

    Attributes:
        attempts: finished attempts; 0 during the first.
        deaths: workers that died while it ran.
        token: fences whatever this attempt wants to write; the same for all jobs of one claim call.
        key_alias: the provider key that this attempt has to use; None where the provider knows no keys.
    """

    id: int
    queue: str
    task: str
    priority: int
    args: Mapping[str, Any] = field(default_factory=dict)
    attempts: int = 0
    deaths: int = 0
    token: int | None = None
    key_alias: str | None = None

    @property
    def attempt(self) -> int:
        """The running attempt, counted from 1."""
        return self.attempts + 1

    @property
    def is_suspect(self) -> bool:
        """Whether so many workers died while it ran that it has to run alone."""
        return self.deaths >= SUSPECT_AFTER

    @property
    def order_id(self) -> int | None:
        """The order this job works for, when it works for one."""
        return _row_number(self.args.get("order_id"))

    @property
    def image_indexes(self) -> tuple[int, ...]:
        """The images of its order this job works for: a generate job's ``images``, an upload's ``image``; junk left out."""
        images = self.args.get("images")
        values = images if isinstance(images, list | tuple) else [self.args.get("image")]
        return tuple(value for value in map(_row_number, values) if value is not None)

    @property
    def images_asked(self) -> int:
        """How many images the claim takes of a key's budget for it; the same in SQL: ``job_images``."""
        images = self.args.get("images")
        return len(images) if isinstance(images, list | tuple) else 1

    @property
    def tried(self) -> tuple[str, ...]:
        """Providers that gave a generate job's images up before; junk left out."""
        tried = self.args.get("tried")
        return tuple(name for name in tried if isinstance(name, str)) if isinstance(tried, list | tuple) else ()

    def claim_order(self) -> tuple[int, int, int]:
        """Sorts jobs of a queue as they are claimed: highest priority, oldest order (work for no order last), oldest job."""
        return (-self.priority, _NO_ORDER if self.order_id is None else self.order_id, self.id)

    @property
    def outlives_its_order(self) -> bool:
        """Whether this job works on an order that has ended; every other job of an ended order is dropped."""
        return self.task in (Task.REMOVE, Task.ABANDON)

    @property
    def is_best_effort(self) -> bool:
        """Whether this job is given up quietly, and says nothing of how its queue's other side is."""
        return self.task == Task.ABANDON


def _row_number(value: object) -> int | None:
    """*value* if it can be a number in a row of ours: anybody may defer a job with any arguments."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**63 else None
