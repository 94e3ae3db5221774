"""
Makes the photo fit what a provider takes, before it is sent or linked: an order may bring 100 megapixels, a service 16.

A photo that fits is passed on as it is, to the byte. Any other is decoded small, scaled down and encoded anew as a JPEG (as a PNG
where no JPEG is taken), in a thread; the same photo and bounds give the same bytes, so a retry sends what the first attempt sent.
One that no scaling makes fit (too small, too narrow) is refused here, where it costs nothing.

Each provider keeps its :class:`PhotoBounds` beside its models, with their source, and one :class:`PhotoFitter`.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jobdaemon.domain.artifact import EXTENSIONS, Artifact, fitted_key
from jobdaemon.errors import DeviceMemoryError, ProviderRefusedError
from jobdaemon.photo import MAX_SIDE_PX, PhotoLimits, encode_jpeg, encode_png, read_header, read_photo
from jobdaemon.ports import PhotoLinks

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

LoadPhoto = Callable[[], Awaitable[bytes]]

#: What has to be encoded anew gets no longer side than this, whatever else is taken: no model's image is larger, and a JPEG of
#: 100 megapixels is then decoded at half its size unless it is nearly square.
FITTED_SIDE_PX = 4096
_JPEG_QUALITY = 92
#: A photo that is still too heavy is tried again with so much less than what should do.
_SLACK = 0.95
#: Verdicts that are remembered; and photos of which the fitted bytes are, a few megabytes each.
_REMEMBERED, _KEPT = 1_000, 4


@dataclass(frozen=True, slots=True)
class PhotoBounds:
    """
    What a service takes of a photo.

    Attributes:
        max_bytes: of the file.
        longest_side: most pixels of a side; None where no bound is known.
        shortest_side: fewest pixels of a side.
        max_ratio: most of the longer side over the shorter one; None where no bound is known.
        media_types: what it reads.
        is_square: its sides must be equal: any other photo is laid on a transparent square.
    """

    max_bytes: int
    longest_side: int | None = None
    shortest_side: int = 1
    max_ratio: float | None = None
    media_types: tuple[str, ...] = ("image/jpeg", "image/png", "image/webp")
    is_square: bool = False

    def admits(self, width: int, height: int, size_bytes: int, media_type: str) -> bool:
        """Whether such a file can be sent as it is."""
        if self.is_square and width != height:
            return False
        return (self.longest_side is None or max(width, height) <= self.longest_side) and self.admits_bytes(
            size_bytes, media_type
        )

    def admits_bytes(self, size_bytes: int, media_type: str) -> bool:
        """The same, of what can be told without a look at the photo."""
        return size_bytes <= self.max_bytes and media_type in self.media_types

    def needs_look(self) -> bool:
        """Whether a photo's width and height matter."""
        return self.longest_side is not None or self.shortest_side > 1 or self.max_ratio is not None or self.is_square

    @property
    def copies_as(self) -> str:
        """The media type of a copy."""
        return "image/jpeg" if "image/jpeg" in self.media_types else "image/png"

    def fitted_side(self, width: int, height: int) -> int:
        """
        The longest side, in pixels, of a copy of a photo of *width* x *height*: at most :data:`FITTED_SIDE_PX`, but where the
        shorter one would become too short then.
        """
        needed = math.ceil(self.shortest_side * max(width, height) / min(width, height))
        return min(max(width, height), self.longest_side or MAX_SIDE_PX, max(FITTED_SIDE_PX, needed))


@dataclass(frozen=True, slots=True)
class FittedPhoto:
    """
    What a provider is sent or linked.

    Attributes:
        artifact: the photo itself, or a copy with a key, a digest and a size of its own.
        load: gives its bytes.
        is_copy: it lies nowhere yet.
    """

    artifact: Artifact
    load: LoadPhoto
    is_copy: bool


@dataclass(frozen=True, slots=True)
class _Copy:
    """A fitted copy, but for its bytes and where it belongs; *side* is its longest one in pixels."""

    sha256: str
    size_bytes: int
    side: int


class PhotoFitter:
    """
    Makes photos fit one provider; the work is done once for each photo.

    One photo at a time is loaded to be judged and worked on, so however many calls want theirs, one decoded photo is in memory
    (at most 0.5 GB, for a square one of 67 megapixels; most take a fifth of that).
    """

    def __init__(self, provider: str, bounds: PhotoBounds) -> None:
        """
        Args:
            provider: for the words of a refusal.
        """
        self._provider = provider
        self._bounds = bounds
        #: Digest of a photo -> its copy; None where it fits.
        self._verdicts: OrderedDict[str, _Copy | None] = OrderedDict()
        self._contents: OrderedDict[str, bytes] = OrderedDict()
        self._turn = asyncio.Lock()

    async def fit(self, photo: Artifact, load_photo: LoadPhoto) -> FittedPhoto:
        """
        *photo*, or a copy of it that fits.

        Raises:
            ProviderRefusedError: too small or too narrow for the provider. Permanent.
            UnsupportedImageError: no picture. Permanent.
            DeviceMemoryError: no memory for it now. Retryable.
            What *load_photo* raises.
        """
        bounds, digest = self._bounds, photo.sha256
        if not bounds.needs_look() and bounds.admits_bytes(photo.size_bytes, photo.media_type):
            return FittedPhoto(photo, load_photo, is_copy=False)
        if digest not in self._verdicts:
            async with self._turn:
                if digest not in self._verdicts and (content := await self._judge(photo, load_photo)) is not None:
                    return FittedPhoto(photo, _giving(content), is_copy=False)
        self._verdicts.move_to_end(digest)
        copy = self._verdicts[digest]
        if copy is None:
            return FittedPhoto(photo, load_photo, is_copy=False)
        key = fitted_key(photo.key, copy.side, copy.sha256, EXTENSIONS[bounds.copies_as])
        artifact = Artifact(key, copy.sha256, copy.size_bytes, bounds.copies_as)
        return FittedPhoto(artifact, lambda: self._content(photo, load_photo), is_copy=True)

    async def _content(self, photo: Artifact, load_photo: LoadPhoto) -> bytes:
        """The bytes of the copy, made again if they were forgotten."""
        if photo.sha256 not in self._contents:
            async with self._turn:
                if photo.sha256 not in self._contents:
                    await self._judge(photo, load_photo)
        self._contents.move_to_end(photo.sha256)
        return self._contents[photo.sha256]

    async def _judge(self, photo: Artifact, load_photo: LoadPhoto) -> bytes | None:
        """Note what becomes of *photo*; its own bytes if it fits."""
        content = await load_photo()
        made = await asyncio.to_thread(_made, content, self._bounds, self._provider)
        self._verdicts[photo.sha256] = None if made is None else made[0]
        while len(self._verdicts) > _REMEMBERED:
            self._verdicts.popitem(last=False)
        if made is None:
            return content
        self._contents[photo.sha256] = made[1]
        while len(self._contents) > _KEPT:
            self._contents.popitem(last=False)
        return None


class FittedLinks:
    """Links to photos that fit. Implements :class:`jobdaemon.ports.PhotoLinks`."""

    def __init__(self, links: PhotoLinks, fitter: PhotoFitter) -> None:
        """
        Args:
            links: makes the links.
        """
        self._links = links
        self._fitter = fitter

    async def link(self, photo: Artifact, load_photo: LoadPhoto, *, is_kept: bool = True) -> str:
        fitted = await self._fitter.fit(photo, load_photo)
        return await self._links.link(fitted.artifact, fitted.load, is_kept=is_kept and not fitted.is_copy)

    async def forget(self, photo: Artifact, load_photo: LoadPhoto) -> bool:
        fitted = await self._fitter.fit(photo, load_photo)
        return await self._links.forget(fitted.artifact, fitted.load)


def _giving(content: bytes) -> LoadPhoto:
    async def load() -> bytes:
        return content

    return load


def _made(content: bytes, bounds: PhotoBounds, provider: str) -> tuple[_Copy, bytes] | None:
    """A copy that fits; None when the photo does."""
    # Who let the photo in has set the limits of what is decoded; it was encoded here.
    limits = PhotoLimits(max_bytes=len(content), max_pixels=MAX_SIDE_PX**2)
    header = read_header(content, limits=limits)
    width, height = header.width, header.height
    _require_shape(width, height, bounds, provider)
    if bounds.admits(width, height, len(content), header.media_type):
        return None
    side = bounds.fitted_side(width, height)
    while True:
        try:
            small = read_photo(content, limits=limits, longest_side=side)
            _require_copy(small.width, small.height, bounds, provider, (width, height))
            fitted = _encoded(small.pixels, bounds)
        except MemoryError as error:
            raise DeviceMemoryError(f"There is no memory to make a photo of {width} x {height} pixels smaller.") from error
        if len(fitted) <= bounds.max_bytes:
            return _Copy(hashlib.sha256(fitted).hexdigest(), len(fitted), max(small.width, small.height)), fitted
        side = int(max(small.width, small.height) * math.sqrt(bounds.max_bytes / len(fitted)) * _SLACK)


def _encoded(pixels: NDArray[np.uint8], bounds: PhotoBounds) -> bytes:
    if bounds.copies_as == "image/jpeg":
        return encode_jpeg(pixels, quality=_JPEG_QUALITY)
    return encode_png(pixels, is_square=bounds.is_square)


def _require_shape(width: int, height: int, bounds: PhotoBounds, provider: str) -> None:
    if min(width, height) < bounds.shortest_side:
        raise ProviderRefusedError(
            f"{provider} takes photos of at least {bounds.shortest_side} pixels a side; this one has {width} x {height}"
        )
    if bounds.max_ratio is not None and max(width, height) > bounds.max_ratio * min(width, height):
        raise ProviderRefusedError(
            f"{provider} takes photos of which one side is at most {bounds.max_ratio:g} times the other; this one has"
            f" {width} x {height} pixels"
        )


def _require_copy(width: int, height: int, bounds: PhotoBounds, provider: str, whole: tuple[int, int]) -> None:
    # Two pixels: below that nothing gets lighter by being smaller.
    if min(width, height) < max(2, bounds.shortest_side):
        raise ProviderRefusedError(
            f"{provider} takes photos of {bounds.shortest_side} to {bounds.longest_side or 'any number of'} pixels a side and up"
            f" to {bounds.max_bytes:,} bytes; this one has {whole[0]} x {whole[1]} pixels and cannot be made to fit"
        )
