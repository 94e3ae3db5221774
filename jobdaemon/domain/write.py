"""
What an attempt wants the database to remember, as data.

Every write is idempotent by the state of the row it changes: it applies once, and the jobs in its ``then`` are inserted only
when it applied. So a checkpoint whose COMMIT was answered too late may be sent again.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from jobdaemon.domain.artifact import Artifact
from jobdaemon.domain.job import NewJob


@dataclass(frozen=True, slots=True)
class OrderStarted:
    """The first attempt of the first stage began."""

    order_id: int


@dataclass(frozen=True, slots=True)
class PhotoBeautified:
    """The order's beautified photo lies in the store; generating may begin."""

    order_id: int
    artifact: Artifact
    width: int
    height: int
    faces: int
    unrestored: int
    model: str
    device: str
    then: tuple[NewJob, ...] = ()


@dataclass(frozen=True, slots=True)
class CallSubmitted:
    """A provider took a call under its own id: never buy it again. *key_alias* is the key it was made with, if any."""

    order_id: int
    job_id: int
    batch: int
    provider: str
    task_id: str | None
    key_alias: str | None = None


@dataclass(frozen=True, slots=True)
class ImageGenerated:
    """One image arrived from a provider; *locator* is ``artifact:<key>`` or an https URL."""

    order_id: int
    index: int
    provider: str
    locator: str
    expires_at: datetime | None = None
    then: tuple[NewJob, ...] = ()


@dataclass(frozen=True, slots=True)
class ImageStored:
    """One finished image is where people can have it."""

    order_id: int
    index: int
    object_key: str
    url: str | None
    sha256: str
    size_bytes: int
    width: int
    height: int
    media_type: str


@dataclass(frozen=True, slots=True)
class ImageFailed:
    """
    One image will not be made; its siblings are not concerned.

    Attributes:
        was: what the image must still be for this to apply: a dead generate job takes no image along that arrived before.
    """

    order_id: int
    index: int
    error: str
    was: Literal["pending", "generated"]


@dataclass(frozen=True, slots=True)
class OrderFailed:
    """Nothing more will be made for this order; every image not stored yet fails with *error*."""

    order_id: int
    error: str


@dataclass(frozen=True, slots=True)
class ImagesRemoved:
    """The stored images of a cancelled order are gone from the store."""

    order_id: int


Write = OrderStarted | PhotoBeautified | CallSubmitted | ImageGenerated | ImageStored | ImageFailed | OrderFailed | ImagesRemoved
