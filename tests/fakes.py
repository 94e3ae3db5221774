"""Fakes of the ports that record what was asked of them."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta

from jobdaemon.domain.artifact import Artifact
from jobdaemon.domain.fallback import Move, Settle
from jobdaemon.domain.job import Job
from jobdaemon.domain.write import ImageFailed, ImageGenerated, PhotoPrewarmed, Write
from jobdaemon.errors import ArtifactMissingError, LeaseLostError, UnsupportedImageError
from jobdaemon.ports import (
    Batch,
    BeautifiedPhoto,
    GenerateRequest,
    ImageMade,
    ImageRow,
    OnUnknownSubmit,
    OrderRow,
    Prewarmed,
    ProviderCall,
    ProviderEvent,
)
from jobdaemon.spool import Spool

JPEG = "image/jpeg"


def order_row(**changes: object) -> OrderRow:
    """An order of plan Free whose photo lies in the store."""
    row = OrderRow(1, "Free", "fake", "artifact:sources/a.jpg", {"seed": 3}, 300, None, has_ended=False)
    return replace(row, **changes)  # type: ignore[arg-type]


def image_row(index: int, prompt: str = "p", status: str = "pending", locator: str | None = None) -> ImageRow:
    """One image of it."""
    return ImageRow(index, prompt, status, None, locator, f"orders/1/{index}.jpg" if status == "stored" else None)


def content_of(image: ImageMade) -> bytes:
    """The bytes of an image that came inline, in memory or in a spool."""
    assert image.content is not None
    return b"".join(image.content.blocks()) if isinstance(image.content, Spool) else image.content


@dataclass(slots=True)
class FakeOrders:
    """OrderReader over values."""

    order: OrderRow | None = field(default_factory=order_row)
    images: list[ImageRow] = field(default_factory=lambda: [image_row(1), image_row(2)])
    #: What an earlier attempt left open, and what ended well, by id.
    call: ProviderCall | None = None
    ended_calls: dict[int, ProviderCall] = field(default_factory=dict)

    async def load_order(self, order_id: int) -> OrderRow | None:
        return self.order if self.order is not None and self.order.id == order_id else None

    async def load_images(self, order_id: int) -> list[ImageRow]:
        return self.images

    async def load_image(self, order_id: int, index: int) -> ImageRow | None:
        return next((row for row in self.images if row.index == index), None)

    async def load_batch(self, order_id: int, job_id: int, images: Sequence[int]) -> Batch | None:
        return None if self.order is None else Batch(self.order, self.images, self.call)

    async def collectable_call(self, call_id: int) -> ProviderCall | None:
        return self.ended_calls.get(call_id)

    async def unfinished_call(self, call_id: int) -> ProviderCall | None:
        return self.call if self.call is not None and self.call.id == call_id else None


@dataclass(slots=True)
class FakeArtifacts:
    """ArtifactStore in a dict."""

    objects: dict[str, bytes] = field(default_factory=dict)
    name: str = "fake"

    async def put(self, key: str, content: bytes, media_type: str) -> Artifact:
        self.objects[key] = content
        return Artifact(key, hashlib.sha256(content).hexdigest(), len(content), media_type)

    async def put_file(self, key: str, spool: Spool, media_type: str) -> Artifact:
        return await self.put(key, b"".join(spool.blocks()), media_type)

    async def get_to_file(self, key: str, spool: Spool, *, max_bytes: int) -> None:
        spool.write(await self.get(key, max_bytes=max_bytes))

    async def get(self, key: str, *, max_bytes: int) -> bytes:
        if key not in self.objects:
            raise ArtifactMissingError(f"there is nothing under {key}")
        if len(self.objects[key]) > max_bytes:
            raise UnsupportedImageError("too big")
        return self.objects[key]

    async def delete(self, key: str) -> None:
        self.objects.pop(key, None)

    async def delete_folder(self, folder: str) -> None:
        for key in [key for key in self.objects if key.startswith(f"{folder}/")]:
            await self.delete(key)

    def url(self, key: str) -> str | None:
        return f"https://cdn.example/{key}"

    async def check(self) -> None:
        """Nothing can be wrong."""

    async def close(self) -> None:
        """Nothing to free."""


@dataclass(slots=True)
class FakeBackend:
    """BeautifyBackend that turns bytes around."""

    calls: list[tuple[bytes, float]] = field(default_factory=list)
    faces: int = 1
    unrestored: int = 0
    name: str = "fake"
    model: str = "fake 1"

    async def beautify(self, photo: bytes, *, strength: float) -> BeautifiedPhoto:
        self.calls.append((photo, strength))
        return BeautifiedPhoto(photo[::-1], JPEG, 20, 30, self.faces, self.unrestored, "fake 1", "cpu")

    async def close(self) -> None:
        """Nothing to free."""


@dataclass(slots=True)
class FakePrewarmed:
    """PrewarmedPhotos in a dict, by photo and backend."""

    photos: dict[tuple[str, str], Prewarmed] = field(default_factory=dict)
    forgotten: list[int] = field(default_factory=list)
    uses: list[int] = field(default_factory=list)
    announced: list[PhotoPrewarmed] = field(default_factory=list)

    async def announce(self, photo: PhotoPrewarmed) -> None:
        self.announced.append(photo)

    async def find(self, photo: str, backend: str) -> Prewarmed | None:
        return self.photos.get((photo, backend))

    async def used(self, entry_id: int) -> None:
        self.uses.append(entry_id)

    async def forget(self, entry_id: int) -> None:
        self.forgotten.append(entry_id)


@dataclass(slots=True)
class FakeUploaded:
    """UploadedPhotos in a dict: photo -> link, how often it was given, and when it was noted, by the loop's clock."""

    links: dict[str, tuple[str, int, float]] = field(default_factory=dict)

    async def find(self, photo: str, *, max_age: timedelta) -> str | None:
        link, given, noted_s = self.links.get(photo, ("", 0, 0.0))
        if not link or asyncio.get_running_loop().time() - noted_s >= max_age.total_seconds():
            return None
        self.links[photo] = (link, given + 1, noted_s)
        return link

    async def note(self, photo: str, link: str) -> None:
        self.links[photo] = (link, 1, asyncio.get_running_loop().time())

    async def forget(self, photo: str) -> bool:
        return self.links.pop(photo, ("", 2, 0.0))[1] > 1


@dataclass(slots=True)
class FakeProvider:
    """Provider that yields what a test gives it; an exception among the events is raised, None lets what was begun get on."""

    script: Sequence[ProviderEvent | Exception | None] = ()
    requests: list[GenerateRequest] = field(default_factory=list)
    closed: int = 0
    name: str = "fake"
    max_images_per_call: int = 5
    is_paid: bool = True
    on_unknown_submit: OnUnknownSubmit = "retry"
    #: What find_task answers, what cancel does, and the calls that were to be cancelled.
    found: str | None = None
    stops: bool | Exception = True
    cancelled: list[ProviderCall] = field(default_factory=list)

    async def find_task(self, request: GenerateRequest, call: ProviderCall) -> str | None:
        return self.found

    async def cancel(self, call: ProviderCall) -> bool:
        self.cancelled.append(call)
        if isinstance(self.stops, Exception):
            raise self.stops
        return self.stops

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[ProviderEvent, None]:
        self.requests.append(request)
        try:
            for event in self.script:
                if isinstance(event, Exception):
                    raise event
                if event is None:
                    for _ in range(10):
                        await asyncio.sleep(0)
                else:
                    yield event
        finally:
            self.closed += 1

    async def close(self) -> None:
        """Nothing to free."""


@dataclass(slots=True)
class FakeAttempt:
    """Attempt that applies the image writes of its checkpoints to a FakeOrders."""

    job: Job
    orders: FakeOrders
    checkpoints: list[Write] = field(default_factory=list)
    lost_after: int | None = None
    on_checkpoint: Callable[[Write], None] = lambda write: None
    is_spent: bool = False
    #: What a checkpoint raises once it is refused.
    loss: type[LeaseLostError] = LeaseLostError
    instead: Callable[[], Move | Settle | None] = lambda: None

    def if_given_up(self, instead: Callable[[], Move | Settle | None]) -> None:
        self.instead = instead

    async def free_slot(self) -> None:
        """Nobody waits for it."""

    async def checkpoint(self, *writes: Write) -> None:
        for write in writes:
            if self.lost_after is not None and len(self.checkpoints) >= self.lost_after:
                raise self.loss("lost")
            self.checkpoints.append(write)
            self.on_checkpoint(write)
            if isinstance(write, ImageGenerated | ImageFailed):
                status = "generated" if isinstance(write, ImageGenerated) else "failed"
                self.orders.images = [
                    replace(image, status=status) if image.index == write.index else image for image in self.orders.images
                ]


@dataclass(frozen=True, slots=True)
class Facts:
    """ImageFacts."""

    media_type: str = JPEG
    width: int = 8
    height: int = 8
