"""
Every seam on one page: what stages need from the world, and what the world must promise.

Each port has one conformance suite under ``tests/conformance`` that every implementation passes.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Protocol

from jobdaemon.domain.artifact import Artifact
from jobdaemon.domain.job import Job
from jobdaemon.domain.outcome import Done
from jobdaemon.domain.write import Write


@dataclass(frozen=True, slots=True)
class BeautifiedPhoto:
    """
    What a backend made of a photo.

    Attributes:
        content: an encoded image: upright, sRGB, without location data.
        media_type: of *content*.
        width: pixels.
        height: pixels.
        faces: how many faces were found and retouched; 0 means the pixels are untouched.
        unrestored: faces found but left as they were.
        model: name and version of what did it.
        device: where it ran, ``cpu`` or a device name.
    """

    content: bytes
    media_type: str
    width: int
    height: int
    faces: int
    unrestored: int
    model: str
    device: str


class BeautifyBackend(Protocol):
    """Retouches portraits. Never blocks the event loop."""

    name: str

    async def beautify(self, photo: bytes, *, strength: float) -> BeautifiedPhoto:
        """
        Retouch every face of one encoded photo; the same bytes and strength give the same bytes.

        Args:
            photo: an encoded image, as hostile as the internet.
            strength: 0.0 (pixels untouched) to 1.0.

        Raises:
            UnsupportedImageError: not an image we accept. Permanent.
            DeviceMemoryError: the device could not hold it. Retryable.
        """
        ...

    async def close(self) -> None:
        """Free threads, processes and device memory."""
        ...


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """
    One provider call: some images of one prompt from one photo.

    Attributes:
        order_id: for logs and file names at the provider.
        images: ``(index, ordinal)`` of each image: *index* is its place in the order, *ordinal* counts the
            images of the same prompt in the order from 0.
        prompt: what the customer asked for.
        photo: the beautified photo.
        load_photo: fetches its bytes.
        params: the order's free parameters.
        task_id: the provider's id of this very call when an earlier attempt noted one: resume it, never submit again.
        key: alias of the key this call has to be made with; None where the provider knows no keys.
    """

    order_id: int
    images: tuple[tuple[int, int], ...]
    prompt: str
    photo: Artifact
    load_photo: Callable[[], Awaitable[bytes]]
    params: Mapping[str, Any] = field(default_factory=dict)
    task_id: str | None = None
    key: str | None = None


@dataclass(frozen=True, slots=True)
class TaskAccepted:
    """The provider took the call; *task_id* must be noted before anything else happens."""

    task_id: str


@dataclass(frozen=True, slots=True)
class ImageMade:
    """One image arrived: inline (*content*, *media_type*) or as a *url* that may expire."""

    index: int
    content: bytes | None = None
    media_type: str | None = None
    url: str | None = None
    url_expires_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class ImageRefused:
    """The provider will not make this one image; its siblings are not concerned."""

    index: int
    reason: str


ProviderEvent = TaskAccepted | ImageMade | ImageRefused


class Provider(Protocol):
    """Makes images. One implementation per HTTP service or local engine."""

    name: str
    #: The most images one call can make; batches are cut to it.
    max_images_per_call: int
    #: A paid call is aborted when its worker can no longer be sure of its lease.
    is_paid: bool

    def generate(self, request: GenerateRequest) -> AsyncGenerator[ProviderEvent, None]:
        """
        Submit (or resume) one call and yield what happens, as it happens.

        A polled provider yields :class:`TaskAccepted` first. An index of the request that was neither made nor refused when
        the iterator ends is a failure of the call.

        Raises:
            RateLimitedError, KeyRefusedError, ProviderUnavailableError: Retryable.
            ProviderRefusedError, UnsupportedFeatureError: Permanent.
        """
        ...

    async def close(self) -> None:
        """Free connections and threads."""
        ...


@dataclass(frozen=True, slots=True)
class OrderRow:
    """
    What a stage needs to know of an order.

    Attributes:
        source: ``https://…`` or ``artifact:<key>``.
        beautified: the beautified photo, once there is one.
        has_ended: completed, partial, failed or cancelled.
    """

    id: int
    plan: str
    provider: str
    source: str
    params: Mapping[str, Any]
    priority: int
    beautified: Artifact | None
    has_ended: bool


@dataclass(frozen=True, slots=True)
class ImageRow:
    """One image of an order; *status* is pending, generated, stored, failed or cancelled."""

    index: int
    prompt: str
    status: str
    provider: str | None
    locator: str | None
    object_key: str | None


class ImageFacts(Protocol):
    """What decoding an image tells."""

    @property
    def media_type(self) -> str:
        """For instance ``image/jpeg``."""
        ...

    @property
    def width(self) -> int:
        """Pixels."""
        ...

    @property
    def height(self) -> int:
        """Pixels."""
        ...


class OrderReader(Protocol):
    """Reads for stages. They write only through their outcome."""

    async def load_order(self, order_id: int) -> OrderRow | None:
        """The order, or None when there is none under this id."""
        ...

    async def load_images(self, order_id: int) -> list[ImageRow]:
        """All images of the order, by index."""
        ...

    async def open_call(self, job_id: int) -> str | None:
        """The provider's task id that an earlier attempt of this job noted, if its end is unknown."""
        ...


class Attempt(Protocol):
    """One run of a job, as its stage sees it."""

    @property
    def job(self) -> Job:
        """The claimed job."""
        ...

    async def checkpoint(self, *writes: Write) -> None:
        """
        Commit *writes* now, in the middle of the attempt, if the attempt still holds its job.

        Raises:
            LeaseLostError: somebody else has the job now, or its order has ended: stop working on it.
        """
        ...


class Stage(Protocol):
    """What a job of one task does; any attempt may run twice."""

    async def run(self, attempt: Attempt) -> Done:
        """
        Do the work and return what to commit.

        Raises:
            RetryableError, PermanentError: as their names say; anything else counts as retryable.
        """
        ...


class ArtifactStore(Protocol):
    """Keeps artifacts: shared by all daemons. Implementations verify what they write."""

    name: str

    async def put(self, key: str, content: bytes, media_type: str) -> Artifact:
        """
        Store *content* under *key*; when this returns it is durable. The same bytes again are a success.

        Raises:
            StoreUnavailableError: full, unreachable or busy. Retryable.
            StoreRefusedError: credentials, bucket or rights. Permanent.
        """
        ...

    async def get(self, key: str, *, max_bytes: int) -> bytes:
        """
        The bytes under *key*.

        Raises:
            ArtifactMissingError: nothing there. Permanent.
            UnsupportedImageError: more than *max_bytes*. Permanent.
            StoreUnavailableError: Retryable.
        """
        ...

    async def delete(self, key: str) -> None:
        """Remove *key*; that it is not there is a success."""
        ...

    def url(self, key: str) -> str | None:
        """Where people can fetch *key*, or None when this store serves nobody."""
        ...

    async def check(self) -> None:
        """
        Prove that the store can be written and read now.

        Raises:
            StoreUnavailableError, StoreRefusedError: with a sentence that says what to do.
        """
        ...

    async def close(self) -> None:
        """Free connections."""
        ...
