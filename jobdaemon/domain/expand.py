"""What follows what: from a finished stage to the next jobs, and from a dead job to what it takes along."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from jobdaemon.domain.job import UPLOAD_QUEUE, Job, NewJob, Task, generate_queue
from jobdaemon.domain.write import CallEnded, ImageFailed, OrderFailed, Write


@dataclass(frozen=True, slots=True)
class WantedImage:
    """An image of an order that is still to be made; *index* counts from 1."""

    index: int
    prompt: str


@dataclass(frozen=True, slots=True)
class Batch:
    """
    The images of one provider call: all of one prompt.

    Attributes:
        images: their indexes in the order, ascending.
    """

    prompt: str
    images: tuple[int, ...]


def batches(images: Iterable[WantedImage], images_per_call: int) -> list[Batch]:
    """Cut an order's images into provider calls: neighbours of the same prompt, at most *images_per_call* each."""
    if images_per_call < 1:
        raise ValueError("images_per_call must be at least 1")
    result: list[Batch] = []
    for image in sorted(images, key=lambda image: image.index):
        last = result[-1] if result else None
        if last is not None and last.prompt == image.prompt and len(last.images) < images_per_call:
            result[-1] = Batch(last.prompt, (*last.images, image.index))
        else:
            result.append(Batch(image.prompt, (image.index,)))
    return result


def generate_jobs(
    order_id: int,
    priority: int,
    provider: str,
    images: Iterable[WantedImage],
    images_per_call: int,
    *,
    tried: Sequence[str] = (),
) -> tuple[NewJob, ...]:
    """
    One job per batch.

    Args:
        tried: providers that gave these images up before.
    """
    past = {"tried": list(tried)} if tried else {}
    return tuple(
        NewJob(generate_queue(provider), Task.GENERATE, priority, {"order_id": order_id, "images": list(batch.images)} | past)
        for batch in batches(images, images_per_call)
    )


def upload_job(order_id: int, priority: int, index: int) -> NewJob:
    """The job that brings one generated image to where people can have it."""
    return NewJob(UPLOAD_QUEUE, Task.UPLOAD, priority, {"order_id": order_id, "image": index})


def collect_job(order_id: int, priority: int, provider: str, index: int, call_id: int | None) -> NewJob:
    """The job that asks the provider for one image once more: of the call that made it, as long as that is known there."""
    args = {"order_id": order_id, "images": [index]}
    return NewJob(generate_queue(provider), Task.GENERATE, priority, args if call_id is None else args | {"call": call_id})


def writes_when_dead(job: Job, reason: str) -> tuple[Write, ...]:
    """
    What a job that is given up on takes along: beautify its order, generate its batch, upload its image, abandon its call.

    An image that was made or stored meanwhile is not touched: :class:`ImageFailed` applies to what the stage had left to do.
    """
    if job.order_id is None:
        return ()
    match job.task:
        case Task.BEAUTIFY:
            return (OrderFailed(job.order_id, reason),)
        case Task.GENERATE:
            return tuple(ImageFailed(job.order_id, index, reason, was="pending") for index in job.image_indexes)
        case Task.UPLOAD:
            return tuple(ImageFailed(job.order_id, index, reason, was="generated") for index in job.image_indexes)
        case Task.ABANDON if isinstance(call_id := job.args.get("call_id"), int):
            return (CallEnded(job.order_id, job.id, "cancelled", call_id),)
        case _:
            return ()
