"""
What an attempt wants the database to remember, as data.

Every write is idempotent by the state of the row it changes: it applies once, and the jobs in its ``then`` are inserted only
when it applied. So a checkpoint whose COMMIT was answered too late may be sent again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any, Literal

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
class PhotoPrewarmed:
    """
    A photo that nobody ordered yet is beautified and lies in the store, for whoever orders it.

    Attributes:
        photo: digest of the source photo's bytes.
        backend: what beautified it, and how: :func:`jobdaemon.domain.prewarm.backend_key`.
    """

    photo: str
    backend: str
    artifact: Artifact
    width: int
    height: int
    faces: int
    unrestored: int
    model: str
    device: str


@dataclass(frozen=True, slots=True)
class CallSubmitted:
    """
    A call to a provider is about to be made: never buy it again unless it is known to have failed.

    Attributes:
        images: the indexes it asks for, in the order in which it asks.
        task_id: its id, where it is known before; None until :class:`CallAccepted`.
        key: alias of the key it uses.
        price: of one image, as the settings have it; None where they do not say.
    """

    order_id: int
    job_id: int
    provider: str
    images: tuple[int, ...]
    task_id: str | None = None
    key: str | None = None
    price: Decimal | None = None


@dataclass(frozen=True, slots=True)
class CallAccepted:
    """The provider took this job's open call under its own id."""

    order_id: int
    job_id: int
    task_id: str


@dataclass(frozen=True, slots=True)
class CallEnded:
    """
    This job's open call is over, or the call *call_id* when one is named.

    Attributes:
        outcome: ``unknown``: the answer to the submit was lost, it may have been paid for; ``expired``: the provider has
            forgotten what it made.
        made: how many images the provider charges for; None leaves it to those that arrived.
        usage: the provider's own words on what was used.
    """

    order_id: int
    job_id: int
    outcome: Literal["succeeded", "partial", "failed", "unknown", "cancelled", "expired"]
    call_id: int | None = None
    made: int | None = None
    usage: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class ImageGenerated:
    """
    One image arrived from a provider.

    Attributes:
        locator: ``artifact:<key>`` or an https URL.
        job_id: whose open call made it, so that a URL that expires can be asked for again.
        call_id: the call itself, where it is known.
    """

    order_id: int
    index: int
    provider: str
    locator: str
    expires_at: datetime | None = None
    job_id: int | None = None
    call_id: int | None = None
    then: tuple[NewJob, ...] = ()


@dataclass(frozen=True, slots=True)
class ImageLost:
    """
    The link to a generated image no longer gives it: the image is pending again.

    Applies at most twice to one image, so that a link which never works ends somewhere.
    """

    order_id: int
    index: int
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


Write = (
    OrderStarted
    | PhotoBeautified
    | PhotoPrewarmed
    | CallSubmitted
    | CallAccepted
    | CallEnded
    | ImageGenerated
    | ImageLost
    | ImageStored
    | ImageFailed
    | OrderFailed
    | ImagesRemoved
)
