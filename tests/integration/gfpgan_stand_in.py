"""
A child whose network inverts colours, and misbehaves where a test tells it to by the first pixel of a crop or by its device.

The file given as weights gets a line for every batch: how many crops, and each one's first value.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from pathlib import Path

from jobdaemon.backends.gfpgan.child import LacksDeviceError, main
from jobdaemon.backends.gfpgan.frames import FacesFailedError, Pixels
from jobdaemon.errors import DeviceMemoryError, RetryableError, SettingsError

#: First values of crops that do something.
KILLS, HANGS, BABBLES, FILLS_MEMORY, RAISES, SLEEPS, FAILS, IS_UNSOUND, ABORTS, SIGNALS, TEARS = 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11

#: As CUDA words its errors: the last line is always the same.
CUDA_ERROR = """CUDA error: an illegal memory access was encountered
CUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be incorrect.
For debugging consider passing CUDA_LAUNCH_BLOCKING=1
Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.
"""


class Inverter:
    """A Network."""

    def __init__(self, wanted: argparse.Namespace) -> None:
        self.name = "inverter-1"
        self.device = wanted.device
        if Path(self.device).is_file():
            self.name = Path(self.device).read_text(encoding="utf-8")
        self._journal: Path = wanted.weights
        self._channel: int = wanted.channel

    def warm_up(self) -> None:
        print("warming up")  # noqa: T201 - what a library may do
        if self.device == "useless":
            raise RuntimeError(CUDA_ERROR)
        if self.device == "slow":
            time.sleep(600)

    def restore(self, crops: Pixels) -> Pixels:
        first = [int(value) for value in crops[:, 0, 0, 0]]
        with self._journal.open("a", encoding="utf-8") as journal:
            journal.write(" ".join(map(str, first)) + "\n")
        if TEARS in first:
            os.write(self._channel, b'{"told": "resto')
        if KILLS in first or TEARS in first:
            os.kill(os.getpid(), signal.SIGKILL)
        if HANGS in first:
            time.sleep(600)
        if BABBLES in first:
            os.write(self._channel, b"\x00not a message\n")
        if FILLS_MEMORY in first:
            raise DeviceMemoryError("The device is full.")
        if RAISES in first:
            raise RuntimeError(CUDA_ERROR)
        if ABORTS in first:
            print("terminate called after throwing an instance of 'c10::AcceleratorError'", file=sys.stderr)  # noqa: T201
            print(f"  what():  {CUDA_ERROR}", file=sys.stderr)  # noqa: T201 - as the runtime of C++ does
            os.abort()
        if SIGNALS in first:
            os.kill(os.getpid(), signal.SIGRTMIN + 5)
        if FAILS in first:
            raise RetryableError("No numbers came out.")
        if IS_UNSOUND in first:
            bad = [place for place, value in enumerate(first) if value == IS_UNSOUND]
            raise FacesFailedError("No numbers came out.", restored=255 - crops, failed=bad)
        if SLEEPS in first:
            time.sleep(0.2)
        return 255 - crops


def load(wanted: argparse.Namespace) -> Inverter:
    """The network, or what the device's name says."""
    match wanted.device:
        case "none":
            raise LacksDeviceError("There is no such device.")
        case "damaged":
            raise SettingsError("The weights are damaged.")
        case "dies":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "silent":
            time.sleep(600)
    return Inverter(wanted)


if __name__ == "__main__":
    main(sys.argv[1:], load=load)
