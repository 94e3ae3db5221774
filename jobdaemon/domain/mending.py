"""
What to do about an open order whose jobs somebody else cancelled, deleted or ended: pure, given the order as it is under lock.

A job that is gone is made again. One that somebody cancelled was to be stopped: what it would have made fails with that reason,
and so does what a dead letter left behind. What an open job works on is never touched.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from jobdaemon.domain.expand import WantedImage, batches, generate_jobs, upload_job
from jobdaemon.domain.job import BEAUTIFY_QUEUE, Job, JobStatus, NewJob, Task, generate_queue
from jobdaemon.domain.write import ImageFailed, OrderFailed, Write

#: What an image that waits in each status waits for.
_NEXT: tuple[tuple[Literal["pending", "generated"], Task], ...] = (("pending", Task.GENERATE), ("generated", Task.UPLOAD))
_CANCELLED = "its job was cancelled"
_FAILED = "its job had failed"


@dataclass(frozen=True, slots=True)
class OrderImage:
    """One image of the order; *status* as in ``images``."""

    index: int
    prompt: str
    status: str


@dataclass(frozen=True, slots=True)
class OrderJob:
    """A job of the order that has not succeeded; *status* is procrastinate's."""

    job: Job
    status: str


@dataclass(frozen=True, slots=True)
class OrderCall:
    """A call that may still give something, whose job is not open; *images* are the indexes it asked for."""

    provider: str
    images: Sequence[int]


@dataclass(frozen=True, slots=True)
class StrayOrder:
    """An open order, with all its images, all its jobs but those that succeeded, and calls that nobody goes on with."""

    id: int
    priority: int
    provider: str
    is_beautified: bool
    images: Sequence[OrderImage]
    jobs: Sequence[OrderJob]
    calls: Sequence[OrderCall] = ()


@dataclass(frozen=True, slots=True)
class Mending:
    """
    What brings an order back in line; nothing, where it is.

    Attributes:
        writes: images, or the order, that fail.
        jobs: those to be made again.
        resumed: ``(batch, first)`` of generate jobs made again: a call that was noted for the batch beginning with the first
            image is theirs.
    """

    writes: tuple[Write, ...] = ()
    jobs: tuple[NewJob, ...] = ()
    resumed: tuple[tuple[int, int], ...] = ()


def mend(order: StrayOrder, images_per_call: int) -> Mending:
    """
    Args:
        images_per_call: of the order's provider: the calls are cut as they were at first.
    """
    if not order.is_beautified:
        return _mend_beautify(order)
    writes: list[Write] = []
    lost: dict[Task, list[int]] = {Task.GENERATE: [], Task.UPLOAD: []}
    for status, task in _NEXT:
        for image in order.images:
            if image.status != status:
                continue
            its_jobs = [job for job in order.jobs if job.job.task == task and image.index in job.job.image_indexes]
            if not its_jobs:
                lost[task].append(image.index)
            elif not _is_any_open(its_jobs):
                writes.append(ImageFailed(order.id, image.index, _reason(its_jobs), was=status))
    jobs = [upload_job(order.id, order.priority, index) for index in lost[Task.UPLOAD]]
    resumed: list[tuple[int, int]] = []
    # Where a batch had gone on to another provider, what was bought there is fetched there; everything else begins anew.
    for call in order.calls:
        moved = [index for index in call.images if index in lost[Task.GENERATE]]
        if call.provider != order.provider and moved:
            lost[Task.GENERATE] = [index for index in lost[Task.GENERATE] if index not in moved]
            args = {"order_id": order.id, "images": moved, "tried": [order.provider]}
            jobs.append(NewJob(generate_queue(call.provider), Task.GENERATE, order.priority, args))
            resumed.append((min(call.images), moved[0]))
    for batch in batches([WantedImage(image.index, image.prompt) for image in order.images], images_per_call):
        missing = [WantedImage(index, batch.prompt) for index in batch.images if index in lost[Task.GENERATE]]
        if missing:
            jobs += generate_jobs(order.id, order.priority, order.provider, missing, images_per_call)
            resumed.append((batch.images[0], missing[0].index))
    return Mending(tuple(writes), tuple(jobs), tuple(resumed))


def _mend_beautify(order: StrayOrder) -> Mending:
    its_jobs = [job for job in order.jobs if job.job.task == Task.BEAUTIFY]
    if _is_any_open(its_jobs):
        return Mending()
    if its_jobs:
        return Mending(writes=(OrderFailed(order.id, _reason(its_jobs)),))
    return Mending(jobs=(NewJob(BEAUTIFY_QUEUE, Task.BEAUTIFY, order.priority, {"order_id": order.id}),))


def _is_any_open(jobs: Iterable[OrderJob]) -> bool:
    return any(job.status in (JobStatus.TODO, JobStatus.DOING) for job in jobs)


def _reason(jobs: Sequence[OrderJob]) -> str:
    newest = max(jobs, key=lambda job: job.job.id)
    return _FAILED if newest.status == JobStatus.FAILED else _CANCELLED
