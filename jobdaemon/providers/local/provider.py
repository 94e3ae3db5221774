"""
The ``local`` provider: real, different pictures from one photo on this machine's processor, without an account or a network.

These are styles (crop, background, colour, film, paint, print), not generative AI, and every picture's EXIF says so. The same
photo, prompt and index give the same bytes; another index gives a visibly different picture.
"""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import cv2

from jobdaemon.errors import DeviceMemoryError, SettingsError
from jobdaemon.photo import PhotoLimits, encode_jpeg, read_photo
from jobdaemon.ports import GenerateRequest, ImageMade, ImageRefused, OnUnknownSubmit, ProviderCall, ProviderEvent
from jobdaemon.providers.local.recipe import recipe_for
from jobdaemon.providers.local.render import render
from jobdaemon.providers.local.subject import MASTER_LONG_SIDE_PX, FindFaces, Subject, prepare_subject

#: Prepared photos kept, 60 MB each at most: as many orders are usually under way at once on one machine.
_KEPT_SUBJECTS = 2
_JPEG_QUALITY = 90


class _AbandonedError(Exception):
    """Nobody waits for this picture any more. Never leaves this module."""


class LocalProvider:
    """Implements :class:`jobdaemon.ports.Provider`."""

    name = "local"
    is_paid = False
    on_unknown_submit: OnUnknownSubmit = "retry"

    def __init__(
        self,
        *,
        threads: int,
        limits: PhotoLimits | None = None,
        images_per_call: int = 5,
        find_faces: FindFaces | None = None,
    ) -> None:
        """
        Start the threads.

        Args:
            threads: pictures computed at once, over all calls; 1 or more.
            limits: what photos are let in.
            images_per_call: most images of one call.
            find_faces: (H, W, 3) uint8 RGB to boxes ``(x, y, width, height)`` in its pixels, called in a worker thread with
                the photo at 480 pixels; None uses OpenCV's bundled cascade.

        Raises:
            SettingsError: no threads or no images.
        """
        if threads < 1 or images_per_call < 1:
            raise SettingsError("The local provider needs at least one thread and one image per call.")
        # Our own threads are the parallelism; OpenCV's pool on top would only fight them for the cores.
        cv2.setNumThreads(1)
        self.max_images_per_call = images_per_call
        self._limits = limits or PhotoLimits()
        self._find_faces = find_faces
        self._threads = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="local-provider")
        self._subjects: OrderedDict[str, Subject] = OrderedDict()
        self._preparing: dict[str, asyncio.Lock] = {}

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[ProviderEvent, None]:
        """
        Make the images of one call, and yield each in the order of the request as soon as it is ready.

        Raises:
            UnsupportedImageError: the photo is no image we accept. Permanent.
            DeviceMemoryError: no memory for it now. Retryable.
        """
        loop = asyncio.get_running_loop()
        abandoned = threading.Event()
        subject = await self._prepared(request)
        waiting = deque(request.images)
        under_way: deque[asyncio.Future[ProviderEvent]] = deque()
        try:
            while waiting or under_way:
                # Two at a time: the next picture is computed while the caller stores this one, and a call that comes later
                # still finds the threads' queue short.
                while waiting and len(under_way) < 2:
                    index, _ = waiting.popleft()
                    under_way.append(loop.run_in_executor(self._threads, _make, subject, request.prompt, index, abandoned))
                event = await under_way[0]
                under_way.popleft()
                yield event
        finally:
            abandoned.set()
            for future in under_way:
                future.cancel()

    async def find_task(self, request: GenerateRequest, call: ProviderCall) -> str | None:  # noqa: ARG002 - nothing is submitted
        return None

    async def cancel(self, call: ProviderCall) -> bool:  # noqa: ARG002 - a call ends with its attempt
        return False

    async def close(self) -> None:
        """Free threads and memory; pictures under way are finished or abandoned first."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(self._threads.shutdown, wait=True)
        self._subjects.clear()
        self._preparing.clear()

    async def _prepared(self, request: GenerateRequest) -> Subject:
        """The request's photo, decoded and cut out once however many calls ask for it at the same time."""
        digest = request.photo.sha256
        lock = self._preparing.setdefault(digest, asyncio.Lock())
        try:
            async with lock:
                subject = self._subjects.get(digest)
                if subject is None:
                    subject = await self._prepare(request.load_photo)
                    self._subjects[digest] = subject
                self._subjects.move_to_end(digest)
                while len(self._subjects) > _KEPT_SUBJECTS:
                    self._subjects.popitem(last=False)
                return subject
        finally:
            # Nobody holds or awaits it: the next request makes its own.
            if not lock.locked():
                self._preparing.pop(digest, None)

    async def _prepare(self, load_photo: Callable[[], Awaitable[bytes]]) -> Subject:
        content = await load_photo()
        return await asyncio.get_running_loop().run_in_executor(self._threads, _read, content, self._limits, self._find_faces)


@contextmanager
def _memory_translated() -> Iterator[None]:
    try:
        yield
    except MemoryError as error:
        raise DeviceMemoryError("There is no memory to style this photo now.") from error
    except cv2.error as error:
        if error.code == cv2.Error.StsNoMem:
            raise DeviceMemoryError("There is no memory to style this photo now.") from error
        raise


def _read(content: bytes, limits: PhotoLimits, find_faces: FindFaces | None) -> Subject:
    with _memory_translated():
        return prepare_subject(read_photo(content, limits=limits, longest_side=MASTER_LONG_SIDE_PX).pixels, find_faces)


def _make(subject: Subject, prompt: str, index: int, abandoned: threading.Event) -> ProviderEvent:
    def checkpoint() -> None:
        if abandoned.is_set():
            raise _AbandonedError

    checkpoint()
    recipe = recipe_for(index, prompt)
    try:
        with _memory_translated():
            pixels = render(subject, recipe, checkpoint=checkpoint)
            checkpoint()
            content = encode_jpeg(pixels, quality=_JPEG_QUALITY, description=recipe.description)
    except cv2.error as error:
        # One look that OpenCV cannot make of this photo is that image's failure, not its siblings'.
        return ImageRefused(index, f"The look {recipe.background}, {recipe.grade}, {recipe.finish} failed: {error.err}.")
    return ImageMade(index, content=content, media_type="image/jpeg")
