"""Domain writes as rows of JSON: which statement of ``orders.sql`` applies each kind, and what it returns when it did."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

from jobdaemon.domain.job import NewJob
from jobdaemon.domain.plan import Plan
from jobdaemon.domain.write import (
    CallAccepted,
    CallEnded,
    CallSubmitted,
    ImageFailed,
    ImageGenerated,
    ImageLost,
    ImagesRemoved,
    ImageStored,
    OrderFailed,
    OrderStarted,
    PhotoBeautified,
    PhotoPrewarmed,
    Write,
)
from jobdaemon.queue.fence import Ruling

#: In the order in which the statements of one transaction run.
_STATEMENTS: dict[type[Write], str] = {
    OrderStarted: "order_started",
    PhotoBeautified: "photo_beautified",
    PhotoPrewarmed: "photo_prewarmed",
    CallSubmitted: "call_submitted",
    CallAccepted: "call_accepted",
    ImageGenerated: "image_generated",
    # After the images it made: they look for their job's open call.
    CallEnded: "call_ended",
    # Before ImageFailed: where it applies, that one has nothing left to fail.
    ImageLost: "image_lost",
    ImageStored: "image_stored",
    ImageFailed: "image_failed",
    OrderFailed: "order_failed",
    ImagesRemoved: "images_removed",
}
#: Those that say nothing of the order itself: nothing is to be counted or told after them.
OF_CALLS = frozenset({"call_submitted", "call_accepted", "call_ended"})
#: Error sentences are for people; whole responses of a provider are not.
MAX_ERROR_CHARS = 2000
#: Of what a provider says of its own accounting; more is none.
MAX_USAGE_CHARS = 4000


def by_statement(writes: Iterable[Write]) -> Iterator[tuple[str, list[Write]]]:
    """Group writes by the statement that applies them, in running order."""
    groups: dict[type[Write], list[Write]] = {kind: [] for kind in _STATEMENTS}
    for write in writes:
        groups[type(write)].append(write)
    for kind, group in groups.items():
        if group:
            yield _STATEMENTS[kind], group


def row(write: Write) -> dict[str, Any]:
    """The row of JSON that *write* is to its statement."""
    match write:
        case PhotoBeautified():
            artifact = asdict(write.artifact)
            details = {name: getattr(write, name) for name in ("width", "height", "faces", "unrestored", "model", "device")}
            return {"order_id": write.order_id, "beautified": artifact | details}
        case ImageGenerated():
            expires_at = None if write.expires_at is None else write.expires_at.isoformat()
            return {
                "order_id": write.order_id,
                "index": write.index,
                "provider": write.provider,
                "locator": cleaned(write.locator),
                "expires_at": expires_at,
                "job_id": write.job_id,
                "call_id": write.call_id,
            }
        case ImageLost():
            return {"order_id": write.order_id, "index": write.index}
        case CallSubmitted():
            task_id = None if write.task_id is None else cleaned(write.task_id)
            price = None if write.price is None else str(write.price)
            return asdict(write) | {"images": list(write.images), "batch": min(write.images), "task_id": task_id, "price": price}
        case CallEnded():
            usage = cleaned(json.dumps(write.usage)) if write.usage else ""
            return asdict(write) | {"usage": write.usage if 0 < len(usage) <= MAX_USAGE_CHARS else None}
        case CallAccepted():
            return asdict(write) | {"task_id": cleaned(write.task_id)}
        case ImageStored():
            values = asdict(write)
            values["bytes"] = values.pop("size_bytes")
            return values
        case ImageFailed() | OrderFailed():
            return asdict(write) | {"error": storable(write.error)}
        case _:
            return asdict(write)


def key(write: Write) -> tuple[int, ...]:
    """What the statement returns for *write* when it applied."""
    match write:
        case ImageGenerated() | ImageLost() | ImageStored() | ImageFailed():
            return (write.order_id, write.index)
        case PhotoPrewarmed():
            return ()  # nothing follows
        case _:
            return (write.order_id,)


def plan_row(plan: Plan) -> dict[str, Any]:
    """A plan as a row of JSON; intervals in seconds."""
    values = asdict(plan)
    for name in ("lift_after", "expires_after"):
        values[f"{name}_s"] = values.pop(name).total_seconds()
    return values


def job_row(job: NewJob) -> dict[str, Any]:
    """A following job as a row of JSON."""
    return {
        "queue": job.queue,
        "task": job.task,
        "priority": job.priority,
        "args": dict(job.args),
        "delay_s": None if job.delay is None else job.delay.total_seconds(),
    }


def attempt_row(ruling: Ruling, daemon_id: int | None) -> dict[str, Any]:
    """An unsuccessful attempt as a row of JSON."""
    return {
        "job_id": ruling.job.id,
        "order_id": ruling.job.order_id,
        "queue": ruling.job.queue,
        "attempt": ruling.job.attempt,
        "token": ruling.job.token,
        "daemon_id": daemon_id if ruling.ran_by is None else ruling.ran_by,
        "seconds": ruling.seconds,
        "outcome": ruling.recorded_outcome,
        "error_kind": ruling.error_kind,
        "error": None if ruling.error is None else storable(ruling.error),
    }


def cleaned(text: str) -> str:
    """*text* as Postgres can hold it: no NUL, no lone surrogate."""
    return text.replace("\x00", "").encode("utf-8", "replace").decode("utf-8")


def storable(text: str) -> str:
    """:func:`cleaned` and of bounded length: for sentences, never for a locator, whose every byte counts."""
    text = cleaned(text)
    return text if len(text) <= MAX_ERROR_CHARS else text[: MAX_ERROR_CHARS - 1] + "…"
