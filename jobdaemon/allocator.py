"""
The C library's allocator, told that large blocks go back to the system at once.

By itself glibc keeps what is freed for later: after the first picture of 16 MB was freed, every thread's arena keeps up to twice
as much, so that a daemon which decodes two pictures at a time ends up with the memory of ten. Other C libraries have no mallopt.
"""

from __future__ import annotations

import ctypes

# Source: glibc's malloc.h, and mallopt(3): setting the threshold also stops glibc from raising it by itself.
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8
#: Above what is in use all the time, below an image's pixels.
_LARGE_BYTES = 1 << 20
#: The daemon's threads wait for disks and for the decoder, not for each other's malloc.
_ARENAS = 2


def keep_little() -> None:
    """Set it, before there are threads; later calls change nothing for arenas that exist."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)
        mallopt(_M_ARENA_MAX, _ARENAS)
