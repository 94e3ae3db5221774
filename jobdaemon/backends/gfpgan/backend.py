"""
The backend ``gfpgan``: faces restored by the network, many photos at a time.

Decoding, detecting, aligning, pasting and encoding run in threads here, the network in a child process; while the faces of some
photos are on the device, others are decoded and encoded. How many photos are in flight is the team's size.
"""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import cv2

from jobdaemon.backends.faces import Face, FaceDetector, Pixels
from jobdaemon.backends.gfpgan.geometry import AlignedFace, align_face, paste_faces
from jobdaemon.backends.gfpgan.process import Loaded, child_command
from jobdaemon.backends.gfpgan.restorer import Restorer, RestorerRules
from jobdaemon.backends.gfpgan.weights import KNOWN_SHA256
from jobdaemon.errors import DeviceMemoryError
from jobdaemon.photo import Photo, PhotoLimits, encode_photo, read_photo
from jobdaemon.ports import BeautifiedPhoto

#: Faces of one photo that are held at once, about 6 MB each while they are put back.
_FACES_AT_ONCE = 32
#: Crops that the child is given at once; of two batches a device computes one while the other is on its way.
_BATCH_ON_CPU, _BATCH_ON_DEVICE = 1, 32
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class GfpganRules:
    """
    What the child is to load, and how it is fed.

    Attributes:
        weights: ``.pth`` or ``.safetensors``.
        sha256: of that file; None when it is one that GFPGAN's authors released.
        device: ``cuda``, ``cuda:1`` … or ``cpu``.
        dtype: ``float32`` or ``bfloat16``; None: the best that the device has.
        batch: crops at once; None: 1 on the CPU, else up to 16, as memory allows.
        compile: fuse the network when the child starts.
        max_wait: how long a face waits for company while the device has nothing to do.
        timeout: a child that has a batch for longer hangs, and is killed.
    """

    weights: Path
    sha256: str | None = None
    device: str = "cuda"
    dtype: str | None = None
    batch: int | None = None
    compile: bool = False
    max_wait: timedelta = timedelta(milliseconds=20)
    timeout: timedelta = timedelta(seconds=60)

    @property
    def crops_at_once(self) -> int:
        """Size of a slot."""
        if self.device == "cpu":
            return self.batch or _BATCH_ON_CPU
        return 2 * self.batch if self.batch else _BATCH_ON_DEVICE

    def command(self) -> list[str]:
        """What starts the child."""
        command = [*child_command(), "--weights", str(self.weights), "--device", self.device]
        command += ["--sha256", self.sha256] if self.sha256 else []
        command += ["--dtype", self.dtype] if self.dtype else []
        command += ["--compute", str(self.batch)] if self.batch and self.device != "cpu" else []
        return command + (["--compile"] if self.compile else [])


def what_is_missing(weights: Path | None) -> str | None:
    """Why gfpgan cannot be chosen here, as far as can be told without starting it; None when nothing is known against it."""
    if weights is None:
        return "beautify.weights is not set"
    if not weights.exists():
        return f"there is no {weights}"
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    return None


@dataclass(slots=True)
class _Work:
    """A photo on its way; its pixels change as faces are put back."""

    photo: Photo
    faces: Sequence[Face]
    by: Loaded
    restored: int = 0


class GfpganBackend:
    """See :class:`jobdaemon.ports.BeautifyBackend`; :meth:`start` comes first."""

    name = "gfpgan"

    def __init__(self, rules: GfpganRules, *, threads: int = 1, limits: PhotoLimits | None = None) -> None:
        """
        Args:
            threads: photos decoded, or encoded, at the same time.
            limits: which photos are let in.

        Raises:
            SettingsError: OpenCV 5, or the face detector's networks are missing or changed.
        """
        self._rules = rules
        self._limits = limits or PhotoLimits()
        self._detector = FaceDetector()
        fed = RestorerRules(rules.crops_at_once, rules.max_wait, rules.timeout, compiles=rules.compile)
        self._restorer = Restorer(rules.command(), fed)
        self._executor = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="beautify")
        if threads > 1:
            # OpenCV splits every operation over all cores; with several photos at once that only adds waiting.
            cv2.setNumThreads(1)

    async def start(self) -> Loaded:
        """
        Start the child; what it has loaded, and where.

        Raises:
            RefusedError: it cannot work with these settings on this machine.
            DeviceFailedError: it died or hung over it.
        """
        await self._restorer.start()
        return self._loaded

    @property
    def model(self) -> str:
        """Which weights are loaded."""
        return self._loaded.model

    def __str__(self) -> str:
        return f"gfpgan ({self._loaded.model} on {self._loaded.device})"

    @property
    def _loaded(self) -> Loaded:
        """What restores now: after the child has started again it may be another file, or device, than before."""
        loaded = self._restorer.loaded
        if loaded is None:
            return Loaded("gfpgan", self._rules.device)
        sha256 = self._rules.sha256
        # The name of a file that nobody released says little.
        model = loaded.model if sha256 is None or sha256 in KNOWN_SHA256 else f"{loaded.model}-{sha256[:8]}"
        return Loaded(model, loaded.device)

    async def beautify(self, photo: bytes, *, strength: float) -> BeautifiedPhoto:
        """Restore one photo's faces; faces too small for it, and all when *strength* is 0, are counted as unrestored."""
        if not 0.0 <= strength <= 1.0:
            raise ValueError(f"strength must lie between 0 and 1, not at {strength}")
        if strength > 0:
            self._restorer.require_device()  # before a second is spent on decoding
        work = await self._in_thread(lambda: self._opened(photo))
        if strength > 0:
            # The order of faces and groups is the same for every attempt, so the bytes are too.
            for first in range(0, len(work.faces), _FACES_AT_ONCE):
                await self._restore(work, work.faces[first : first + _FACES_AT_ONCE], strength)
        encoded = await self._in_thread(lambda: self._encoded(work))
        return BeautifiedPhoto(
            content=encoded,
            media_type="image/jpeg",
            width=work.photo.width,
            height=work.photo.height,
            faces=work.restored,
            unrestored=len(work.faces) - work.restored,
            model=work.by.model,
            device=work.by.device,
        )

    async def close(self) -> None:
        """Let the photos in work end, drop those that wait, end the child."""
        await self._restorer.close()
        await asyncio.to_thread(self._executor.shutdown, cancel_futures=True)

    async def _restore(self, work: _Work, faces: Sequence[Face], strength: float) -> None:
        """Restore some faces of a photo, and put them back."""
        aligned = await self._in_thread(lambda: self._aligned(work.photo, faces))
        restored = await self._restorer.restore([face.crop for face in aligned])
        work.by = self._loaded
        pairs = list(zip(aligned, restored, strict=True))
        await self._in_thread(lambda: self._pasted(work.photo, pairs, strength))
        work.restored += len(pairs)

    async def _in_thread(self, step: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, step)

    def _opened(self, content: bytes) -> _Work:
        photo = read_photo(content, limits=self._limits)
        with _memory_for(photo):
            return _Work(photo, self._detector.detect(photo.pixels), self._loaded)

    def _aligned(self, photo: Photo, faces: Sequence[Face]) -> list[AlignedFace]:
        with _memory_for(photo):
            aligned = (align_face(photo.pixels, face.landmarks) for face in faces)
            return [face for face in aligned if face is not None]

    def _pasted(self, photo: Photo, faces: Sequence[tuple[AlignedFace, Pixels]], strength: float) -> None:
        with _memory_for(photo):
            paste_faces(photo.pixels, faces, strength=strength)

    def _encoded(self, work: _Work) -> bytes:
        with _memory_for(work.photo):
            return encode_photo(work.photo)


@contextmanager
def _memory_for(photo: Photo) -> Iterator[None]:
    """A lack of memory, here and not on the device, as the retryable error it is."""
    try:
        yield
    except (MemoryError, cv2.error) as error:
        if isinstance(error, cv2.error) and error.code != cv2.Error.StsNoMem:
            raise
        raise DeviceMemoryError(f"There is no memory to restore a photo of {photo.width} x {photo.height} pixels.") from error
