"""The allocator's settings."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, sys
from jobdaemon import allocator
if sys.argv[1] == "set":
    allocator.keep_little()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
def used():
    blocks = [libc.malloc(16_000_000) for _ in range(4)]
    for block in blocks:
        ctypes.memset(block, 1, 16_000_000)
    for block in blocks[:-1]:
        libc.free(block)
    keep = blocks[-1]
    left = resident()
    libc.free(keep)
    return left
before = resident()
for _ in range(3):
    left = used()
print(left - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="another C library")
def test_what_is_freed_goes_back() -> None:
    """A picture that is freed below one that is in use is the system's again; by itself the C library keeps it."""
    left = {}
    for how in ("set", "unset"):
        ran = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, timeout=60, check=True)
        left[how] = int(ran.stdout)
    assert left["set"] < 20_000_000
    assert left["unset"] > 40_000_000, "nothing to set any more"
