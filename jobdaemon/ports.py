"""
Every seam on one page: what stages need from the world, and what the world must promise.

Each port has one conformance suite under ``tests/conformance`` that every implementation passes.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Literal, Protocol

from jobdaemon.domain.artifact import Artifact
from jobdaemon.domain.fallback import Move, Settle
from jobdaemon.domain.job import Job
from jobdaemon.domain.outcome import Done
from jobdaemon.domain.write import PhotoPrewarmed, Write
from jobdaemon.spool import Spool


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
    """
    Retouches portraits. Never blocks the event loop.

    Attributes:
        model: name and version of what does it, weights included, as its photos say.
    """

    name: str

    @property
    def model(self) -> str: ...

    async def beautify(self, photo: bytes, *, strength: float) -> BeautifiedPhoto:
        """
        Retouch every face of one encoded photo; the same bytes and strength give the same bytes, unless a service elsewhere adds
        noise.

        Args:
            photo: an encoded image, as hostile as the internet.
            strength: 0.0 (pixels untouched) to 1.0.

        Raises:
            UnsupportedImageError: not an image we accept. Permanent.
            DeviceMemoryError: the device could not hold it. Retryable.
            RateLimitedError, ProviderUnavailableError: of a service elsewhere. Retryable.
            ProviderRefusedError: the same. Permanent.
        """
        ...

    async def close(self) -> None:
        """Free threads, processes and device memory."""
        ...


@dataclass(frozen=True, slots=True)
class ProviderCall:
    """
    A call to a provider that an earlier attempt noted.

    Attributes:
        task_id: the provider's own id of it; None when the answer to the submit never arrived.
        images: the indexes it asked for, in the order in which it asked.
        key: alias of the key it was made with.
        submitted_at: by the database's clock, just before the submit.
        is_key_known: whether some daemon may have that key: it has a row, and the call is not older than any provider remembers.
    """

    id: int
    task_id: str | None
    images: tuple[int, ...]
    key: str | None
    submitted_at: datetime
    is_key_known: bool = True


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
        key: alias of the key to use; None where the provider has no keys.
        resume: a call of an earlier attempt, its task id known: ask for that task, never submit again. Its images may be more
            than those still wanted, and say which of the task's results is whose.
    """

    order_id: int
    images: tuple[tuple[int, int], ...]
    prompt: str
    photo: Artifact
    load_photo: Callable[[], Awaitable[bytes]]
    params: Mapping[str, Any] = field(default_factory=dict)
    key: str | None = None
    resume: ProviderCall | None = None


@dataclass(frozen=True, slots=True)
class Submitting:
    """
    The next thing that happens costs money: noted before it does, so that a lost answer is known to be one.

    Attributes:
        task_id: the call's id where the caller chooses it: such a call is never lost.
    """

    task_id: str | None = None


@dataclass(frozen=True, slots=True)
class TaskAccepted:
    """The provider took the call; *task_id* must be noted before anything else happens."""

    task_id: str


@dataclass(frozen=True, slots=True)
class Charged:
    """
    What a call costs, as far as its answer says; comes before the images, and once more where they are resumed.

    Attributes:
        images: how many of them.
        usage: its own words on what was used, such as tokens.
    """

    images: int
    usage: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class CallDone:
    """
    The provider has done all that this request asks of it, and is asked for nothing more: its slot is free for the next call.

    What it made may still have to be fetched. Never followed by :class:`Submitting`.
    """


@dataclass(frozen=True, slots=True)
class TaskOver:
    """
    The provider will give nothing more for this call (failed, expired, forgotten): a later attempt has to buy anew.

    Events of images that it did make come before; an error says afterwards what went wrong.
    """


@dataclass(frozen=True, slots=True)
class ImageMade:
    """One image arrived: inline (*content*, *media_type*; the receiver's now) or as a *url* that may expire."""

    index: int
    content: bytes | Spool | None = None
    media_type: str | None = None
    url: str | None = None
    url_expires_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class ImageRefused:
    """The provider will not make this one image; its siblings are not concerned."""

    index: int
    reason: str


ProviderEvent = Submitting | TaskAccepted | Charged | CallDone | TaskOver | ImageMade | ImageRefused


OnUnknownSubmit = Literal["retry", "fail"]


class Provider(Protocol):
    """Makes images. One implementation per HTTP service or local engine."""

    name: str
    #: The most images one call can make; batches are cut to it.
    max_images_per_call: int
    #: A paid call is aborted when its worker can no longer be sure of its lease.
    is_paid: bool
    #: What follows a submit whose answer was lost and cannot be found: buy again, or fail those images.
    on_unknown_submit: OnUnknownSubmit

    def generate(self, request: GenerateRequest) -> AsyncGenerator[ProviderEvent, None]:
        """
        Submit (or resume) one call and yield what happens, as it happens.

        :class:`Submitting` comes before whatever costs money, then :class:`TaskAccepted` from a provider that is polled. An
        index of the request that was neither made nor refused when the iterator ends is a failure of the call.

        Raises:
            RateLimitedError, ProviderUnavailableError: Retryable.
            KeyRefusedError, KeyMissingError: the key is refused, or not this daemon's. Retryable.
            AnswerLostError: the provider may have taken the submit. Retryable.
            ProviderRefusedError, UnsupportedFeatureError: Permanent.
        """
        ...

    async def find_task(self, request: GenerateRequest, call: ProviderCall) -> str | None:
        """
        The id of the task that *call* became, where the provider can be asked; None when it knows of none.

        Raises:
            RetryableError: it cannot say now.
        """
        ...

    async def cancel(self, call: ProviderCall) -> bool:
        """Ask the provider to stop; whether it did. Nothing that ended or is unknown is an error. Raises RetryableError."""
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
    """One image of an order; *status* is pending, generated, stored, failed or cancelled, *call_id* the call that made it."""

    index: int
    prompt: str
    status: str
    provider: str | None
    locator: str | None
    object_key: str | None
    call_id: int | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """
    What generating a batch of images begins with.

    Attributes:
        images: those of the batch, and all others of the order that have a prompt in common with them, by index.
        open_call: the newest call that an earlier attempt of this job noted, if its end is unknown.
    """

    order: OrderRow
    images: list[ImageRow]
    open_call: ProviderCall | None


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

    async def load_image(self, order_id: int, index: int) -> ImageRow | None:
        """One image of the order, or None when it has none of this index."""
        ...

    async def load_batch(self, order_id: int, job_id: int, images: Sequence[int]) -> Batch | None:
        """The order and what became of it so far, for the job that makes these of its images; None when there is no order."""
        ...

    async def collectable_call(self, call_id: int) -> ProviderCall | None:
        """A call that ended well, whose results may be fetched once more; None once the provider has forgotten it."""
        ...

    async def unfinished_call(self, call_id: int) -> ProviderCall | None:
        """This call, if its end is unknown."""
        ...


class Attempt(Protocol):
    """One run of a job, as its stage sees it."""

    @property
    def job(self) -> Job:
        """The claimed job."""
        ...

    @property
    def is_spent(self) -> bool:
        """Whether all attempts of the job are spent: this one only settles what they left behind."""
        ...

    def if_given_up(self, instead: Callable[[], Move | Settle | None]) -> None:
        """
        What to do with the job rather than give it up, should this attempt fail and be the last.

        Args:
            instead: asked once the attempt has failed.
        """
        ...

    async def free_slot(self) -> None:
        """
        Whom this attempt works for has done its part: another job may take the slot, while this one keeps what came of it.

        Returns when that job has had a moment's start, or nobody takes the slot; never raises.
        """
        ...

    async def checkpoint(self, *writes: Write) -> None:
        """
        Commit *writes* now, in the middle of the attempt, if the attempt still holds its job.

        Raises:
            LeaseLostError: somebody else has the job now: stop working on it.
            OrderEndedError: its order has ended. What *writes* say of provider calls is kept all the same.
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


class PhotoLinks(Protocol):
    """Makes a beautified photo available to a provider that fetches it."""

    async def link(self, photo: Artifact, load_photo: Callable[[], Awaitable[bytes]], *, is_kept: bool = True) -> str:
        """
        An https URL that anybody can fetch for at least an hour, or a ``data:`` URL with the photo in it.

        Args:
            is_kept: whether the photo lies in the artifact store under its key; a copy made for a provider may not yet.

        Raises:
            StoreUnavailableError, ProviderUnavailableError, RateLimitedError: Retryable.
            StoreRefusedError, ProviderRefusedError: Permanent.
        """
        ...

    async def forget(self, photo: Artifact, load_photo: Callable[[], Awaitable[bytes]]) -> bool:
        """
        The link given last does not work: the next one is made anew. Whether that may help.

        Raises what :meth:`link` raises.
        """
        ...


class UploadedPhotos(Protocol):
    """
    Knows which photos lie at a service under a link, over all daemons: once their order has ended they are deleted there.

    *photo* is an artifact's key. Every method raises DatabaseUnavailableError.
    """

    async def find(self, photo: str, *, max_age: timedelta) -> str | None:
        """The link of *photo*, if there is one that is not older than *max_age*."""
        ...

    async def note(self, photo: str, link: str) -> None:
        """*photo* lies under *link*."""
        ...

    async def forget(self, photo: str) -> bool:
        """The link does not work: it is found no more. Whether another may: this one was found before, or is gone already."""
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

    async def put_file(self, key: str, spool: Spool, media_type: str) -> Artifact:
        """As :meth:`put`, with the bytes of *spool*, which are never in memory as a whole."""
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

    async def get_to_file(self, key: str, spool: Spool, *, max_bytes: int) -> None:
        """As :meth:`get`, with the bytes going to *spool*, an empty one; what fails in the middle leaves part of them there."""
        ...

    async def delete(self, key: str) -> None:
        """Remove *key*; that it is not there is a success."""
        ...

    async def delete_folder(self, folder: str) -> None:
        """
        Remove every key that begins with *folder* (itself like a key) and a slash; that there is none is a success.

        Raises:
            StoreUnavailableError: Retryable; some may be gone.
            StoreRefusedError: Permanent.
        """
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


@dataclass(frozen=True, slots=True)
class CachedImage:
    """An image that was made before; the store has it under *artifact*, if what is there has the digest *sha256*."""

    entry_id: int
    artifact: str
    sha256: str
    media_type: str


@dataclass(frozen=True, slots=True)
class Taken:
    """
    What a cache has for some images of an order.

    Attributes:
        hits: images that were made before, by index.
        claimed: indexes that are this order's to have made, and nobody else's for now.
        ask_again_in: when another order is having one of the rest made; then nothing is claimed.
    """

    hits: Mapping[int, CachedImage]
    claimed: frozenset[int]
    ask_again_in: timedelta | None


class ImageCache(Protocol):
    """
    Knows what was made before and what is being made, over all daemons. Every method raises DatabaseUnavailableError.

    What is claimed and then stored gets into the cache by itself.
    """

    async def take(
        self, provider: str, key: str | None, order_id: int, images: Mapping[int, str], *, hold: timedelta, ttl: timedelta
    ) -> Taken:
        """
        Look for *images* (index -> cache key), and claim what is not there.

        Args:
            key: alias of the provider key the job runs under; where nothing is bought its budget gets the images back.
            hold: others wait for so long for what is claimed here, at most.
            ttl: nothing older counts.
        """
        ...

    async def release(self, order_id: int, images: Iterable[int]) -> None:
        """The order does not have these images made after all."""
        ...

    async def forget(self, entry_id: int) -> None:
        """A hit that was none: its artifact is missing or damaged."""
        ...


@dataclass(frozen=True, slots=True)
class Prewarmed:
    """
    A photo that was beautified before it was ordered; the rest as in :class:`BeautifiedPhoto`.

    Attributes:
        artifact: where it lies, if what is there has that digest.
    """

    id: int
    artifact: Artifact
    width: int
    height: int
    faces: int
    unrestored: int
    model: str
    device: str


class PrewarmedPhotos(Protocol):
    """
    Knows what was beautified before it was ordered, over all daemons. Every method raises DatabaseUnavailableError.

    *photo* is the digest of the source photo's bytes, *backend* a :func:`jobdaemon.domain.prewarm.backend_key`.
    """

    async def find(self, photo: str, backend: str) -> Prewarmed | None:
        """What was made; None when nothing was."""
        ...

    async def announce(self, photo: PhotoPrewarmed) -> None:
        """Its artifact is about to be stored: unless that is noted for good within the hour, it is to be deleted."""
        ...

    async def used(self, entry_id: int) -> None:
        """An order has copied it."""
        ...

    async def forget(self, entry_id: int) -> None:
        """What was found is missing or damaged."""
        ...
