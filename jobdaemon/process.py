"""
The main job in the foreground: photos in, a folder of finished images for each out.

Works through the same door as everybody else: each photo becomes an order under a key made of the photo's digest, plan, prompts
and folder, so the same call after an interruption finds the same orders and finishes what is missing. Images are fetched from
the artifact store as they are stored, whichever daemon made them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from jobdaemon.delivery import Delivery, Folders
from jobdaemon.domain.order import ENDED_STATUSES, NewOrder, derive_key
from jobdaemon.errors import InvalidOrderError, JobdaemonError, RefusedError, UnsupportedImageError
from jobdaemon.intake import printable, read_photo_file, store_photo
from jobdaemon.photo import PhotoLimits
from jobdaemon.ports import ArtifactStore
from jobdaemon.watch import OrderDesk

QUEUE_FULL = ("JD002", "JD003")
CUSTOMER = "process"
_POLL = timedelta(seconds=1)


@dataclass(frozen=True, slots=True)
class Wish:
    """
    What one call of ``process`` asks for, for every photo.

    Attributes:
        photos: files; one that is missing or bad is reported and stops no other.
        out: an existing folder that can be written.
        prompts: None for the plan's own.
        images: None for as many as the plan gives.
    """

    photos: Sequence[Path]
    out: Path
    plan: str
    prompts: tuple[str, ...] | None = None
    images: int | None = None

    def details(self) -> tuple[str, ...]:
        """What is asked for besides photo and plan, for keys."""
        return (*(self.prompts or ()), str(self.images or ""))


@dataclass(slots=True)
class PhotoRun:
    """
    How far one photo is.

    Attributes:
        status: waiting, refused, or its order's status.
        error: why it was refused, or what went wrong with its order.
        row: its order's row of ``order_progress``.
        wish: digest of what is asked for.
        delivered: indexes of the images that lie in the folder.
        undelivered: why images that are stored do not, by index.
    """

    photo: Path
    status: str = "waiting"
    error: str | None = None
    order_id: int | None = None
    sha256: str = ""
    source: str = ""
    wish: str = ""
    delivery: Delivery | None = None
    row: dict[str, Any] = field(default_factory=dict)
    images: list[dict[str, Any]] = field(default_factory=list)
    delivered: set[int] = field(default_factory=set)
    undelivered: dict[int, str] = field(default_factory=dict)
    is_finished: bool = False

    @property
    def shown_photo(self) -> str:
        """The photo's name as it may be printed."""
        return printable(Path(self.photo.name))

    def document(self) -> dict[str, Any]:
        """What ``--json`` and ``order.json`` say of it."""
        shown = [{key: value for key, value in image.items() if key != "media_type"} for image in self.images]
        folder = None if self.delivery is None else printable(self.delivery.folder)
        row = {key: value for key, value in self.row.items() if key != "error"}
        return row | {
            "status": self.status,
            "error": self.error,
            "photo": printable(self.photo),
            "photo_sha256": self.sha256,
            "wish": self.wish,
            "folder": folder,
            "images": shown,
        }


class ForegroundRun:
    """One call of ``process``; a daemon has to be at work somewhere."""

    def __init__(
        self,
        wish: Wish,
        *,
        desk: OrderDesk,
        artifacts: ArtifactStore,
        limits: PhotoLimits,
        max_image_bytes: int,
        on_progress: Callable[[Sequence[PhotoRun]], None],
        on_finished: Callable[[PhotoRun], None],
    ) -> None:
        """
        Args:
            limits: which photos are let in.
            on_progress: told whenever something changed.
            on_finished: told once per photo, when nothing more will happen to it.
        """
        self._wish = wish
        self._desk = desk
        self._artifacts = artifacts
        self._limits = limits
        self._max_image_bytes = max_image_bytes
        self._on_progress = on_progress
        self._on_finished = on_finished
        self._folders = Folders(wish.out)
        self.runs = [PhotoRun(photo) for photo in wish.photos]

    async def run(self) -> None:
        """
        Bring every photo to its end.

        Raises:
            RefusedError: the plan or the prompts are refused, which concerns every photo.
            DatabaseUnavailableError: the database went away.
        """
        waiting = list(self.runs)
        while waiting or any(not run.is_finished for run in self.runs):
            # The door may be full; then the rest waits until one of ours has gone through.
            while waiting and await self._begin(waiting[0]):
                waiting.pop(0)
                self._on_progress(self.runs)
            await self._follow()
            self._on_progress(self.runs)
            if any(not run.is_finished for run in self.runs):
                await self._desk.changed(at_most=_POLL)

    async def _begin(self, run: PhotoRun) -> bool:
        """Enqueue one photo; False when the queue is full and it has to wait for orders of ours to end."""
        try:
            if run.delivery is None:
                await self._prepare(run)
            await self._enqueue(run)
        except RefusedError as error:
            if error.sqlstate in QUEUE_FULL:
                if any(other.order_id is not None and not other.is_finished for other in self.runs):
                    return False
                self._refuse(run, error)
                return True
            if run.delivery is not None:
                await asyncio.to_thread(run.delivery.abandon)
            raise
        except (InvalidOrderError, UnsupportedImageError) as error:
            self._refuse(run, error)
        return True

    async def _prepare(self, run: PhotoRun) -> None:
        photo = await asyncio.to_thread(read_photo_file, run.photo, limits=self._limits)
        run.sha256 = photo.sha256
        run.source = await store_photo(self._artifacts, photo, self._desk.hold_source)
        # What is asked for, wherever it goes: the folder belongs to it.
        digest = derive_key(run.sha256, self._wish.plan, self._wish.details(), "").rpartition("-")[2]
        try:
            run.delivery = await asyncio.to_thread(self._folders.claim, run.photo, digest)
        except OSError as error:
            raise InvalidOrderError(f"{error.filename} cannot be written: {error.strerror}.") from error
        run.wish = digest

    async def _enqueue(self, run: PhotoRun) -> None:
        assert run.delivery is not None
        wish = self._wish
        key = derive_key(run.sha256, wish.plan, wish.details(), str(run.delivery.folder.absolute()))
        # Again, since it may have waited for its turn.
        await self._desk.hold_source(run.source)
        while True:
            order = await self._desk.enqueue(
                NewOrder(plan=wish.plan, source=run.source, customer=CUSTOMER, key=key, prompts=wish.prompts, images=wish.images)
            )
            run.order_id = order.order_id
            if order.created:
                return
            # An earlier call made this order: what had failed gets new attempts now, and a cancelled one a successor.
            status = (await self._desk.progress([order.order_id]))[order.order_id]["status"]
            if status != "cancelled" and not (status in ("failed", "partial") and await self._is_past(order.order_id, status)):
                return
            key = f"{key[:200]}:{order.order_id}"

    async def _is_past(self, order_id: int, status: str) -> bool:
        """
        Give what has failed of an order new attempts. One that was retired cannot be: when it failed as a whole it is past,
        and is made anew; when some of its images were stored it stays as it is, since all would be bought again.
        """
        try:
            await self._desk.redrive(order_id)
        except RefusedError:
            return status == "failed"
        return False

    def _refuse(self, run: PhotoRun, error: JobdaemonError) -> None:
        run.status, run.error = "refused", str(error)
        self._finish(run)

    def _finish(self, run: PhotoRun) -> None:
        run.is_finished = True
        self._on_finished(run)

    async def _follow(self) -> None:
        open_runs = {run.order_id: run for run in self.runs if run.order_id is not None and not run.is_finished}
        progress = await self._desk.progress(open_runs)
        for order_id, row in progress.items():
            run = open_runs[order_id]
            has_news = row["images_stored"] > len(run.delivered) or row["status"] in ENDED_STATUSES
            run.row, run.status, run.error = row, row["status"], row["error"]
            if has_news:
                await self._deliver(run)
            if row["status"] in ENDED_STATUSES:
                await self._conclude(run)

    async def _deliver(self, run: PhotoRun) -> None:
        assert run.order_id is not None
        assert run.delivery is not None
        run.images = await self._desk.images(run.order_id)
        for image in run.images:
            if image["status"] != "stored" or image["index"] in run.delivered:
                continue
            index, media_type, sha256 = image["index"], image["media_type"], image["sha256"]
            if not await asyncio.to_thread(run.delivery.has, index, media_type, sha256):
                try:
                    content = await self._artifacts.get(image["object_key"], max_bytes=self._max_image_bytes)
                    await asyncio.to_thread(run.delivery.write_image, index, media_type, content)
                except (JobdaemonError, OSError) as error:
                    reason = error.strerror or str(error) if isinstance(error, OSError) else str(error)
                    run.undelivered[index] = reason
                    continue
            run.undelivered.pop(index, None)
            run.delivered.add(index)
            self._on_progress(self.runs)

    async def _conclude(self, run: PhotoRun) -> None:
        assert run.delivery is not None
        title = f"{run.shown_photo} · {run.row['plan']} · {len(run.delivered)} of {run.row['images_total']} images"
        reasons = list(run.undelivered.values())
        try:
            await asyncio.to_thread(run.delivery.write_contact_sheet, run.images, title)
            await asyncio.to_thread(run.delivery.write_order, run.document())
        except OSError as error:
            reasons.append(error.strerror or str(error))
        if reasons:
            missing = f"{len(run.undelivered)} of {run.row['images_stored']} images" if run.undelivered else "the contact sheet"
            run.error = f"{missing} could not be written to {printable(run.delivery.folder)}: {reasons[0]}"
        if run.status == "completed" and len(run.delivered) < run.row["images_total"]:
            run.status = "undelivered"
        self._finish(run)
