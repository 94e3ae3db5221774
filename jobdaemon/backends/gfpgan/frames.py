"""
What the daemon and its child say to each other, and the memory in which they hand over crops.

Messages are JSON objects, one a line, over a socket pair; pixels never go through it. They lie in memory that both have mapped:
a few slots, each of one batch. The daemon fills a slot and names it, the child overwrites it and says so: who was told last
owns the slot. There and back costs four copies of 0.8 MB, two of them in the daemon: 2,200 to 2,700 crops a second on two cores
(measured).
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Collection
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from jobdaemon.errors import RetryableError

Pixels = NDArray[np.uint8]

#: Height, width and RGB of a crop.
CROP_SHAPE = (512, 512, 3)
_CROP_BYTES = CROP_SHAPE[0] * CROP_SHAPE[1] * CROP_SHAPE[2]
#: One batch is on the device, the next one is being laid beside it.
SLOTS = 2
#: Longer lines are no message.
MAX_MESSAGE_BYTES = 16_384


class FacesFailedError(RetryableError):
    """
    Some faces of a batch could not be restored; the others were, as they would have been without those.

    Attributes:
        restored: (N, 512, 512, 3) uint8 RGB, all of the batch; of those that failed the pixels mean nothing.
        failed: places in the batch.
    """

    def __init__(self, message: str, *, restored: Pixels, failed: Collection[int]) -> None:
        super().__init__(message)
        self.restored = restored
        self.failed = sorted(failed)


class Frames:
    """The shared slots, as seen by one of the two processes."""

    def __init__(self, descriptor: int, *, batch: int) -> None:
        """
        Args:
            descriptor: of the memory; it is not kept, whoever opened it closes it.
            batch: crops in a slot.
        """
        self._map = mmap.mmap(descriptor, SLOTS * batch * _CROP_BYTES)
        self._slots: Pixels = np.frombuffer(self._map, np.uint8).reshape(SLOTS, batch, *CROP_SHAPE)

    def slot(self, number: int, count: int) -> Pixels:
        """(count, 512, 512, 3) uint8: the first crops of a slot; writing to it is seen on the other side."""
        return self._slots[number, :count]

    def close(self) -> None:
        """Give the memory up."""
        self._slots = np.empty((0, 0, *CROP_SHAPE), np.uint8)
        with suppress(BufferError):  # somebody still holds a slot: it goes when they let go
            self._map.close()


def open_memory(*, batch: int) -> int:
    """A descriptor of memory for :class:`Frames`, without a name: it is gone with the last process that has it."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("jobdaemon-crops", os.MFD_CLOEXEC)
    else:  # pragma: no cover - not on Linux
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, SLOTS * batch * _CROP_BYTES)
    return descriptor
