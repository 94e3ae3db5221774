"""
One image on its way, on disk instead of in memory: written once from front to back, then read as often as needed.

The file has no name, so nothing is left of it when the process dies. It is closed by itself once nobody holds the spool: who is
cancelled may leave a thread behind that still works on it.
"""

from __future__ import annotations

import errno
import hashlib
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import IO

from jobdaemon.errors import PutOffError, StoreRefusedError, StoreUnavailableError
from jobdaemon.units import format_size

_READ_BYTES = 1 << 18
#: What one more image may need on its way and at its place: four times a PNG of 2,048 px.
_ROOM_BYTES = 20_000_000
_LOOK_AGAIN = timedelta(seconds=10)
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST}


def require_room(folders: Iterable[Path], images: int) -> None:
    """
    Look before something is bought: what comes and has no place is lost, and was paid for.

    Args:
        folders: in which images lie, on their way or for good; those that are not there yet will be made.
        images: how many more.

    Raises:
        PutOffError: one of their disks is full. Put off, since nothing is wrong with who would have made them.
    """
    for folder in folders:
        there = next((place for place in (folder, *folder.parents) if place.exists()), folder)
        try:
            free_bytes = shutil.disk_usage(there).free
        except OSError as error:
            raise PutOffError(
                f"nothing is bought, because {there} cannot be looked at ({error.strerror})", retry_after=_LOOK_AGAIN
            ) from error
        if free_bytes < images * _ROOM_BYTES:
            told = f"{format_size(images * _ROOM_BYTES)} for {images} images"
            raise PutOffError(f"nothing is bought, because {there} has no room: it takes {told}", retry_after=_LOOK_AGAIN)


class Spool:
    """Bytes in a file without a name. One writer or one reader at a time; how much is written is for the writer to bound."""

    def __init__(self, folder: Path | None = None) -> None:
        """
        Args:
            folder: on whose disk it lies; the system's folder for temporary files when None.

        Raises:
            StoreUnavailableError: no file can be made there now. Retryable.
            StoreRefusedError: it is no folder, or one that may not be written. Permanent.
        """
        self._folder = folder
        try:
            if folder is not None:
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - see the module docstring
        except OSError as error:
            raise self._translated(error) from error
        weakref.finalize(self, self._file.close)
        self._digest = hashlib.sha256()
        self.size_bytes = 0

    def write(self, block: bytes) -> None:
        """
        Append *block*. Blocks: call it in a thread.

        Raises:
            StoreUnavailableError: the disk is full or failing. Retryable.
        """
        left = memoryview(block)
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            raise self._translated(error) from error
        self._digest.update(block)
        self.size_bytes += len(block)

    @property
    def sha256(self) -> str:
        """Of what was written, in lower-case hex."""
        return self._digest.hexdigest()

    def opened(self) -> IO[bytes]:
        """The file at its beginning; not to be closed."""
        self._file.seek(0)
        return self._file

    def blocks(self) -> Iterator[bytes]:
        """All of it, in pieces."""
        file = self.opened()
        while block := file.read(_READ_BYTES):
            yield block

    def head(self, size_bytes: int) -> bytes:
        """Its first bytes."""
        return self.opened().read(size_bytes)

    def tail(self, size_bytes: int) -> bytes:
        """Its last bytes."""
        file = self.opened()
        file.seek(max(0, self.size_bytes - size_bytes))
        return file.read(size_bytes)

    def _translated(self, error: OSError) -> StoreUnavailableError | StoreRefusedError:
        where = "the folder for temporary files" if self._folder is None else str(self._folder)
        told = f"Images on their way cannot lie in {where} ({error.strerror or type(error).__name__})"
        if error.errno in _FORBIDDEN:
            return StoreRefusedError(f"{told}: check its owner and mode.")
        return StoreUnavailableError(f"{told}.")
