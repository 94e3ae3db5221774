"""
Retouching by a photo enhance service on another machine.

The photo is decoded here first, so that nothing hostile gets there, and sent as a clean JPEG without metadata. What comes back,
four times as wide and high, is proved whole, scaled to the photo's own size, and laid over the photo as strongly as was asked.

The service says neither how many faces it found nor whether it restored one (out of memory, it returns the face as it was and
calls that a success). So faces are found here: a photo without any is not sent and stays as it is, and a face that came back as
a plain enlargement counts as unrestored. When all did, the photo stays as it is too.

Retouching costs nothing, so an attempt that was cut off is simply begun anew. Its task is deleted where that can be done: after
a crash of this process it cannot.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

from jobdaemon import jpeg
from jobdaemon.backends.faces import Face, FaceDetector, Floats, Pixels
from jobdaemon.backends.photo_enhance_service import MAX_UPLOAD_BYTES, NAME, EnhanceService, TaskGoneError, TaskState
from jobdaemon.errors import (
    BackendAwayError,
    DeviceMemoryError,
    ProviderRefusedError,
    ProviderUnavailableError,
    RateLimitedError,
    UnsupportedImageError,
)
from jobdaemon.http import GuardedClient
from jobdaemon.photo import MAX_SIDE_PX, PhotoLimits, encode_jpeg, read_header, read_photo
from jobdaemon.ports import BeautifiedPhoto

MODEL = "photo_enhance-1"
#: Which machine it was, and with what, the service does not say.
DEVICE = "remote"
JPEG_QUALITY = 95

#: The service makes every side so many times as long.
_SCALE = 4
#: The longest one question or download is waited for; the whole has a deadline of its own.
_PATIENCE = timedelta(seconds=60)
#: Questions that fail at once, one after another, longer after each: a service that is being restarted is back by then.
_STRIKES = 5
_DOWNLOADS = 2
_CHECK = timedelta(seconds=10)
#: How long a stop waits for tasks to be deleted.
_FAREWELL_S = 2.0
#: So many deletions wait for an answer at once.
_MOST_FAREWELLS = 20

# Brightness and colour run from 0 to 255; faces are compared at a quarter of their size. What the service makes of a face when
# it is out of memory (cropped to 512 pixels, not restored, pasted back half a pixel aside), scaled back and compared with what
# was sent, is 2.1, 1.7, 1.2, 0.9 and 0.5 away for faces of 40, 56, 117, 229 and 458 pixels; plain enlargements (Lanczos, cubic,
# linear; JPEG 75 to 95) are closer.
_FACE_SHARE, _FACE_SIDE_PX = 1 / 4, 64
_LEAST_CHANGE, _LEAST_CHANGE_PX = 0.6, 80.0
#: Thumbnails of so many pixels a side, further apart than this, are not of the same photo ...
_THUMBNAIL_PX = 48
_MOST_CHANGE = 30.0
#: ... nor those whose contours (what is left without a blur of so many pixels) agree less than this. Retouched in whatever way, a
#: photo agrees with itself by 0.96 and more, also when it is noisy or dark; the same head at the same place, mirrored, by 0.65.
_CONTOUR_BLUR_PX = 3.0
_LEAST_LIKENESS = 0.85
#: Contours fainter than this, by root mean square, are nobody's.
_FAINT = 1.0
_RATIO_TOLERANCE = 0.02

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Sent:
    """
    What is sent for a photo.

    Attributes:
        jpeg: upright sRGB without metadata.
        width, height: of *jpeg*, pixels.
        faces: found in the photo, in its own pixels.
        scale: from the photo to *jpeg*, at most 1.
    """

    jpeg: bytes
    width: int
    height: int
    faces: Sequence[Face]
    scale: float


class PhotoEnhanceBackend:
    """Has photos retouched elsewhere; see :class:`jobdaemon.ports.BeautifyBackend`."""

    name = NAME
    model = MODEL

    def __init__(
        self,
        url: str,
        client: GuardedClient,
        *,
        poll: timedelta,
        timeout: timedelta,
        max_pixels: int,
        max_result_bytes: int,
        threads: int = 1,
        limits: PhotoLimits | None = None,
    ) -> None:
        """
        Check the networks of the face detector; the service is asked for nothing yet.

        Args:
            url: of the service, without ``/api/v1``.
            client: may reach it; closed with this backend.
            poll: how often a task is asked for.
            timeout: for one photo, from upload to result.
            max_pixels: of what is sent; a larger photo is sent smaller.
            max_result_bytes: of what comes back.
            threads: photos decoded and compared at the same time.
            limits: which photos are let in.

        Raises:
            SettingsError: OpenCV 5, or the face networks are missing or changed.
        """
        self._service = EnhanceService(url, client, max_result_bytes=max_result_bytes)
        self._poll, self._timeout = poll, timeout
        self._max_pixels, self._max_result_bytes = max_pixels, max_result_bytes
        self._limits = limits or PhotoLimits()
        self._detector = FaceDetector()
        self._executor = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="beautify")
        self._farewells: set[asyncio.Task[None]] = set()

    async def beautify(self, photo: bytes, *, strength: float) -> BeautifiedPhoto:
        """
        Retouch one photo; *strength* is the weight of the service's picture over the photo.

        Whether the same photo gives the same bytes again is for the service to say: it may use noise.

        Raises:
            UnsupportedImageError: not an image we accept. Permanent.
            ProviderRefusedError: the service will not take the photo. Permanent.
            DeviceMemoryError: no memory here or there. Retryable.
            BackendAwayError: the service is away, and has not seen the photo. Retryable.
            RateLimitedError, ProviderUnavailableError: of the service. Retryable.
        """
        if not 0.0 <= strength <= 1.0:
            raise ValueError(f"strength must lie between 0 and 1, not at {strength}")
        prepared = await self._computed(partial(self._prepare, photo, strength))
        if isinstance(prepared, BeautifiedPhoto):
            return prepared
        return await self._enhanced(prepared, lambda result: self._finish(photo, prepared, result, strength))

    async def check(self) -> None:
        """
        Prove that the service is there now.

        Raises:
            ProviderUnavailableError: it is not, or says that it is not well.
        """
        await self._service.check(within=_CHECK)

    async def close(self) -> None:
        """Let the photos in work end, drop those that wait; see off what was to be deleted."""
        if self._farewells:
            _, late = await asyncio.wait(self._farewells, timeout=_FAREWELL_S)
            for farewell in late:
                farewell.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        await self._service.close()
        await asyncio.to_thread(self._executor.shutdown, cancel_futures=True)

    async def _computed(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)

    # -- the service --------------------------------------------------------------------------------------------------------

    async def _enhanced(self, sent: _Sent, finish: Callable[[bytes], BeautifiedPhoto]) -> BeautifiedPhoto:
        """Upload, wait, fetch; once more when the service has forgotten the task in between."""
        deadline = asyncio.get_running_loop().time() + self._timeout.total_seconds()
        for is_again in (False, True):
            try:
                task_id = await self._service.submit(sent.jpeg, within=self._left(deadline))
            except BackendAwayError as error:
                if is_again:  # it has seen the photo, and who knows what that did to it
                    raise ProviderUnavailableError(str(error), retry_after=error.retry_after) from error
                raise
            with suppress(TaskGoneError):
                try:
                    await self._wait(task_id, deadline)
                    return await self._fetched(task_id, deadline, finish)
                finally:
                    # Its result would lie on the service's disk for ever.
                    self._see_off(task_id)
        raise ProviderUnavailableError(
            f"{NAME} forgot the photo's task twice. Is it restarted all the time, or does it run several processes?"
        )

    async def _wait(self, task_id: str, deadline: float) -> None:
        """Return when the task is done."""

        async def done(within: timedelta) -> bool | None:
            state = await self._service.ask(task_id, within=within)
            return True if _is_done(state) else None

        await self._insisted(done, deadline, strikes=_STRIKES)

    async def _fetched(self, task_id: str, deadline: float, finish: Callable[[bytes], BeautifiedPhoto]) -> BeautifiedPhoto:
        """The result; fetched anew when it did not come whole, since it took long to make."""

        async def finished(within: timedelta) -> BeautifiedPhoto | None:
            result = await self._service.fetch(task_id, within=within)
            return None if result is None else await self._computed(partial(finish, result))

        return await self._insisted(finished, deadline, strikes=_DOWNLOADS)

    async def _insisted(self, ask: Callable[[timedelta], Awaitable[T | None]], deadline: float, *, strikes: int) -> T:
        """
        What *ask* gives that is not None: it is called until then, or until it failed so often in a row.

        What is told of limits, and silence, are no failures: made once, a result is worth waiting for, as long as there is time.
        """
        failed = 0
        while True:
            rest = self._poll
            try:
                answer = await ask(min(_PATIENCE, self._left(deadline)))
            except RateLimitedError as error:
                rest = max(2 * self._poll, error.retry_after or self._poll)
                if rest >= self._left(deadline):
                    raise  # others can have the slot meanwhile
            except ProviderUnavailableError:
                failed += 1
                if failed >= strikes:
                    raise
                rest = self._poll * (1 + failed)
            else:
                if answer is not None:
                    return answer
                failed = 0
            await asyncio.sleep(min(rest, self._left(deadline)).total_seconds())

    def _left(self, deadline: float) -> timedelta:
        left = timedelta(seconds=deadline - asyncio.get_running_loop().time())
        if left <= timedelta(0):
            raise ProviderUnavailableError(f"{NAME} did not retouch the photo within {self._timeout.total_seconds():g} s.")
        return left

    def _see_off(self, task_id: str) -> None:
        """Delete a task while the photo goes on: a service at work on another one would keep it waiting."""
        if len(self._farewells) >= _MOST_FAREWELLS:
            return  # that many have had no answer: they would take the connections of the next photos

        async def delete() -> None:
            with suppress(ProviderUnavailableError):
                await self._service.delete(task_id, within=self._timeout)

        farewell = asyncio.create_task(delete())
        self._farewells.add(farewell)
        farewell.add_done_callback(self._farewells.discard)

    # -- pixels, on threads -------------------------------------------------------------------------------------------------

    def _prepare(self, content: bytes, strength: float) -> _Sent | BeautifiedPhoto:
        """What to send; or the photo as it is, when there is nothing to retouch."""
        pixels = read_photo(content, limits=self._limits).pixels
        height, width = pixels.shape[:2]
        with _memory_for(width, height):
            faces = self._detector.detect(pixels)
            if strength == 0.0 or not faces:
                return _beautified(pixels, faces=0, unrestored=len(faces))
            # What comes back must not have a side that nobody decodes.
            scale = min(1.0, (self._max_pixels / (width * height)) ** 0.5, MAX_SIDE_PX / _SCALE / max(width, height))
            size = (max(1, int(width * scale)), max(1, int(height * scale)))
            if scale < 1.0:
                pixels = np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA), np.uint8)
            encoded = encode_jpeg(pixels, quality=JPEG_QUALITY)
        if len(encoded) > MAX_UPLOAD_BYTES:
            raise ProviderRefusedError(
                f"The photo has {len(encoded):,} bytes as JPEG; {NAME} takes {MAX_UPLOAD_BYTES:,} at most."
            )
        return _Sent(encoded, *size, faces, scale)

    def _finish(self, content: bytes, sent: _Sent, result: bytes, strength: float) -> BeautifiedPhoto:
        """
        Raises:
            ProviderUnavailableError: *result* is damaged, or no picture of the photo.
        """
        pixels = read_photo(content, limits=self._limits).pixels
        height, width = pixels.shape[:2]
        with _memory_for(width, height):
            enhanced = self._result_pixels(result, sent, (width, height))
            # Not read_photo: made smaller, a panorama may have a side that nobody would let in.
            before = jpeg.decoded(sent.jpeg, (sent.width, sent.height))
            assert before is not None  # our own
            if not _are_of_one_photo(_thumbnail(before), _thumbnail(enhanced)):
                raise ProviderUnavailableError(f"{NAME} sent a picture that is not of the photo.")
            unrestored = sum(not _is_restored(face, before, enhanced, sent.scale) for face in sent.faces)
            if unrestored < len(sent.faces):
                cv2.addWeighted(pixels, 1.0 - strength, enhanced, strength, 0.0, dst=pixels)
            return _beautified(pixels, faces=len(sent.faces) - unrestored, unrestored=unrestored)

    def _result_pixels(self, result: bytes, sent: _Sent, size: tuple[int, int]) -> Pixels:
        """The result, proved whole, at *size* (width, height); a JPEG is decoded not much larger than that."""
        # Some pixels more: who resizes may round up.
        limits = PhotoLimits(self._max_result_bytes, (sent.width * _SCALE + _SCALE) * (sent.height * _SCALE + _SCALE))
        try:
            header = read_header(result, limits=limits)
            ratio = header.width * sent.height / (header.height * sent.width)
            if abs(ratio - 1.0) > _RATIO_TOLERANCE or header.width < sent.width:
                shown = f"{header.width} x {header.height} pixels for {sent.width} x {sent.height}"
                raise ProviderUnavailableError(f"{NAME} sent a picture of {shown}.")
            # A photo that was sent smaller has no more to gain from it than this; the rest would only cost memory.
            longest_side = min(max(size), 2 * max(sent.width, sent.height))
            enhanced = read_photo(result, limits=limits, longest_side=longest_side).pixels
        except UnsupportedImageError as error:
            raise ProviderUnavailableError(f"{NAME} sent a result that cannot be used. {error}") from error
        if (enhanced.shape[1], enhanced.shape[0]) != size:
            enhanced = np.asarray(cv2.resize(enhanced, size, interpolation=cv2.INTER_CUBIC), np.uint8)
        return enhanced


def _is_done(state: TaskState) -> bool:
    if state.error is not None:
        raise state.error
    return state.is_done


@contextmanager
def _memory_for(width: int, height: int) -> Iterator[None]:
    try:
        yield
    except MemoryError as error:
        raise _no_memory(width, height) from error
    except cv2.error as error:
        if error.code == cv2.Error.StsNoMem:
            raise _no_memory(width, height) from error
        raise


def _no_memory(width: int, height: int) -> DeviceMemoryError:
    return DeviceMemoryError(f"There is no memory to retouch a photo of {width} x {height} pixels.")


def _beautified(pixels: Pixels, *, faces: int, unrestored: int) -> BeautifiedPhoto:
    height, width = pixels.shape[:2]
    content = encode_jpeg(pixels, quality=JPEG_QUALITY)
    return BeautifiedPhoto(content, "image/jpeg", width, height, faces, unrestored, MODEL, DEVICE)


def _is_restored(face: Face, before: Pixels, after: Pixels, scale: float) -> bool:
    """
    Whether a face is anything else than it was.

    Args:
        before: (h, w, 3), what was sent.
        after: (H, W, 3), the result at the photo's size.
        scale: from the photo to *before*.
    """
    old, new = _crop(before, face, scale), _crop(after, face, 1.0)
    if not old.size or not new.size:
        return False
    longest = max(old.shape[:2])
    share = min(_FACE_SHARE, _FACE_SIDE_PX / longest)
    size = (max(1, round(old.shape[1] * share)), max(1, round(old.shape[0] * share)))
    return bool(_distance(_small(old, size), _small(new, size)) >= _LEAST_CHANGE + _LEAST_CHANGE_PX / longest)


def _crop(pixels: Pixels, face: Face, scale: float) -> Pixels:
    height, width = pixels.shape[:2]
    left, top, right, bottom = (round(edge * scale) for edge in face.box)
    return pixels[max(0, top) : min(height, bottom), max(0, left) : min(width, right)]


def _thumbnail(pixels: Pixels) -> Floats:
    return _small(pixels, (_THUMBNAIL_PX, _THUMBNAIL_PX))


def _are_of_one_photo(one: Floats, other: Floats) -> bool:
    """Whether two thumbnails are: by their colours, and by where their contours lie, whatever was done to either."""
    if _distance(one, other) > _MOST_CHANGE:
        return False
    ours, theirs = _contours(one), _contours(other)
    if float((ours * ours).mean()) < _FAINT**2:
        return True
    return float((ours * theirs).sum()) > _LEAST_LIKENESS * float(np.linalg.norm(ours) * np.linalg.norm(theirs))


def _contours(thumbnail: Floats) -> Floats:
    grey = thumbnail.mean(axis=2)
    return np.asarray(grey - cv2.GaussianBlur(grey, (0, 0), _CONTOUR_BLUR_PX), np.float32)


def _small(pixels: Pixels, size: tuple[int, int]) -> Floats:
    return np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA), np.float32)


def _distance(one: Floats, other: Floats) -> float:
    difference: NDArray[np.float32] = np.abs(one - other)
    return float(difference.mean())
