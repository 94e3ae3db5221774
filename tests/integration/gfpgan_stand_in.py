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
KILLS, HANGS, BABBLES, FILLS_MEMORY, RAISES, SLEEPS, FAILS, IS_UNSOUND = 1, 2, 3, 4, 5, 6, 7, 8


class Inverter:
    """A Network."""

    name = "inverter-1"

    def __init__(self, wanted: argparse.Namespace) -> None:
        self.device = wanted.device
        self._journal: Path = wanted.weights
        self._channel: int = wanted.channel

    def warm_up(self) -> None:
        print("warming up")  # noqa: T201 - what a library may do

    def restore(self, crops: Pixels) -> Pixels:
        first = [int(value) for value in crops[:, 0, 0, 0]]
        with self._journal.open("a", encoding="utf-8") as journal:
            journal.write(" ".join(map(str, first)) + "\n")
        if KILLS in first:
            os.kill(os.getpid(), signal.SIGKILL)
        if HANGS in first:
            time.sleep(600)
        if BABBLES in first:
            os.write(self._channel, b"\x00not a message\n")
        if FILLS_MEMORY in first:
            raise DeviceMemoryError("The device is full.")
        if RAISES in first:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
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
