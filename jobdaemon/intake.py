"""From a photo's file to the source of an order: read it, judge it, store it under its digest."""

from __future__ import annotations

import asyncio
import hashlib
import os
import stat
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from jobdaemon.domain.artifact import ARTIFACT_SCHEME, EXTENSIONS, source_key
from jobdaemon.errors import InvalidOrderError, UnsupportedImageError
from jobdaemon.photo import PhotoLimits, inspect_image
from jobdaemon.ports import ArtifactStore

_EXTENSIONS = EXTENSIONS | {"image/tiff": "tif", "image/heic": "heic"}
#: How often to look whether a source is deleted: half a minute in all. It takes less (queue/pruner.py), or its daemon died.
_LOOK_S = 0.2
_LOOKS = 150


@dataclass(frozen=True, slots=True)
class PhotoFile:
    """
    A photo that was let in.

    Attributes:
        sha256: lower-case hex digest of *content*.
        media_type: by content, never by name.
    """

    content: bytes
    sha256: str
    media_type: str

    @property
    def key(self) -> str:
        """Where it lies in the store; the same bytes always lie under the same key."""
        return source_key(self.sha256, _EXTENSIONS.get(self.media_type, "img"))

    @property
    def source(self) -> str:
        """The order's source once the photo is stored."""
        return ARTIFACT_SCHEME + self.key


def read_photo_file(path: Path, *, limits: PhotoLimits) -> PhotoFile:
    """
    Read and judge one file; never reads more than the limit, never waits for a pipe.

    Raises:
        InvalidOrderError: there is no such file, or it cannot be read. Permanent.
        UnsupportedImageError: not a picture we accept, damaged, too small or too large. Permanent.
        DeviceMemoryError: within the limits, but there is no memory for it now. Retryable.
    """
    shown = printable(path)
    try:
        # A FIFO without a writer would hold open() for ever.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise InvalidOrderError(f"{shown} is not a file.")
            content = file.read(limits.max_bytes + 1)
    except IsADirectoryError as error:
        raise InvalidOrderError(f"{shown} is a folder, not a photo.") from error
    except FileNotFoundError as error:
        raise InvalidOrderError(f"{shown}: there is no such file.") from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "its name is no file name"
        raise InvalidOrderError(f"{shown} cannot be read: {reason}.") from error
    try:
        media_type = inspect_image(content, limits=limits).media_type
    except UnsupportedImageError as error:
        raise UnsupportedImageError(f"{shown}: {error}") from error
    return PhotoFile(content, hashlib.sha256(content).hexdigest(), media_type)


async def store_photo(store: ArtifactStore, photo: PhotoFile, hold: Callable[[str], Awaitable[bool]]) -> str:
    """
    Store the photo and return the order's source; the same photo again is a success.

    Args:
        hold: keeps a source for a day until it is ordered; False while it is being deleted, since nobody had needed it for long.

    Raises:
        StoreUnavailableError: full, unreachable or busy. Retryable.
        StoreRefusedError: credentials, bucket or rights. Permanent.
        What *hold* raises.
    """
    for _ in range(_LOOKS):
        if await hold(photo.source):
            break
        await asyncio.sleep(_LOOK_S)
    await store.put(photo.key, photo.content, photo.media_type)
    return photo.source


def printable(path: Path) -> str:
    """A path as it may stand in a sentence: one line, no control characters."""
    text = os.fsencode(path).decode(errors="replace")
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)
