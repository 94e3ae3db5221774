"""
The process that drives the device: loads the network once, then restores batch after batch until the daemon is gone.

    python -m jobdaemon.backends.gfpgan.child --channel FD --memory FD --parent PID --batch 16 --weights FILE --device cuda

torch is imported inside a function, so that a machine without it can say so in a sentence. Nothing is mended here: whatever goes
wrong but a lack of memory, or faces that fail by themselves, ends the process, and the daemon starts another one, because after
an error of the device nothing in a process can be trusted. It ends when the channel closes or its parent dies, by no signal but
SIGKILL: a Ctrl-C or a stop is for the daemon to act on, which needs its child until the last photo is done.
"""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import json
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from jobdaemon.backends.gfpgan.frames import FacesFailedError, Frames, Pixels
from jobdaemon.errors import DeviceMemoryError, JobdaemonError, RetryableError, SettingsError

_PR_SET_PDEATHSIG = 1
#: The kernel's choice when memory runs out: rather this process than the daemon, which would take every job along.
_OOM_SCORE = "500"
#: Characters, of six bytes each at most.
_MAX_REASON = 1_000


class Network(Protocol):
    """What restores faces; see :class:`jobdaemon.backends.gfpgan.network.FaceNetwork`."""

    name: str
    device: str

    def restore(self, crops: Pixels) -> Pixels:
        """
        (N, 512, 512, 3) uint8 RGB in and out.

        Raises:
            DeviceMemoryError: not even one fits.
            FacesFailedError: nothing sound came out of some of them.
            RetryableError: of some, and nobody knows which.
        """
        ...

    def warm_up(self) -> None:
        """Do once what only the first batch needs."""
        ...


class LacksDeviceError(SettingsError):
    """This machine has not what the settings ask for: no torch, or no such device."""


Load = Callable[[argparse.Namespace], Network]


def load_network(wanted: argparse.Namespace) -> Network:
    """
    The network on its device.

    Raises:
        LacksDeviceError: no torch here, or no such device.
        SettingsError: the weights are missing, changed or no weights.
    """
    try:
        import torch  # noqa: PLC0415 - see the module docstring
    except ImportError as error:
        text = f"gfpgan needs torch, which is not installed here ({error}); docs/gfpgan.md says how"
        raise LacksDeviceError(f"beautify.backend: {text}") from error
    # Devices are also counted where none can be used, for want of a driver that fits torch.
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted.device.startswith("cuda") and int(wanted.device.partition(":")[2] or 0) >= found:
        text = f'"{wanted.device}", but torch {torch.__version__} finds {found} CUDA devices here'
        raise LacksDeviceError(f'beautify.device: is {text}; "cpu" works too, some seconds a face')
    from jobdaemon.backends.gfpgan.network import FaceNetwork  # noqa: PLC0415 - imports torch

    return FaceNetwork.load(
        wanted.weights,
        sha256=wanted.sha256,
        device=wanted.device,
        dtype=wanted.dtype,
        batch_size=wanted.compute,
        compile=wanted.compile,
    )


def main(arguments: list[str] | None = None, *, load: Load = load_network) -> None:
    """
    Serve until the channel closes.

    Args:
        load: makes the network.
    """
    wanted = _parsed(arguments)
    _belong_to(wanted.parent)
    channel = socket.socket(fileno=wanted.channel)
    frames = Frames(wanted.memory, batch=wanted.batch)
    os.close(wanted.memory)
    with suppress(BrokenPipeError, ConnectionResetError):  # the daemon went, or stopped waiting, while we worked for it
        try:
            _serve(channel, frames, lambda: load(wanted))
        except (BrokenPipeError, ConnectionResetError):
            raise
        except Exception as error:  # noqa: BLE001 - see the module docstring
            sys.stdout.flush()
            traceback.print_exc()
            _tell(channel, told="broken", reason=_in_short(error))
            # Not by the usual way out, on which libraries tidy up: with a broken device they abort there, or hang.
            os._exit(1)


def _serve(channel: socket.socket, frames: Frames, load: Callable[[], Network]) -> None:
    try:
        network = load()
    except SettingsError as error:
        _tell(channel, told="refused", reason=str(error), lacks_device=isinstance(error, LacksDeviceError))
        return
    _tell(channel, told="loaded", model=network.name, device=network.device)
    network.warm_up()
    _tell(channel, told="ready")
    for request in _requests(channel):
        _restore(network, frames, request, channel)


def _in_short(error: Exception) -> str:
    """One line; of CUDA's errors the first, for the last is about how to compile torch."""
    if isinstance(error, JobdaemonError):
        return str(error)
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])


def _restore(network: Network, frames: Frames, request: dict[str, Any], channel: socket.socket) -> None:
    crops = frames.slot(request["slot"], request["count"])
    try:
        crops[:] = network.restore(crops)
    except FacesFailedError as error:
        crops[:] = error.restored
        _tell(channel, told="restored", number=request["number"], failed=error.failed, reason=str(error))
    except DeviceMemoryError as error:
        _tell(channel, told="no_memory", number=request["number"], reason=str(error))
    except RetryableError as error:
        _tell(channel, told="failed", number=request["number"], reason=str(error))
    else:
        _tell(channel, told="restored", number=request["number"], failed=[], reason="")


def _requests(channel: socket.socket) -> Iterator[dict[str, Any]]:
    with channel.makefile("rb") as lines:
        for line in lines:
            yield json.loads(line)


def _tell(channel: socket.socket, *, reason: str = "", **message: object) -> None:
    # Longer lines would be no message.
    channel.sendall(json.dumps({**message, "reason": reason[:_MAX_REASON]}).encode() + b"\n")


def _parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="jobdaemon.backends.gfpgan.child", description="Started by jobdaemon.")
    parser.add_argument("--channel", type=int, required=True)
    parser.add_argument("--memory", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True, help="crops that are handed over at once, at most")
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--sha256")
    parser.add_argument("--device", required=True)
    parser.add_argument("--dtype")
    parser.add_argument("--compute", type=int, help="crops computed at once, whatever memory is free")
    parser.add_argument("--compile", action="store_true")
    return parser.parse_args(arguments)


def _belong_to(parent: int) -> None:
    """Die with the daemon, even with one that is killed while we compute; and before it, when memory runs out."""
    faulthandler.enable()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    with suppress(OSError, AttributeError):  # Linux only; elsewhere the closed channel has to do
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(_OOM_SCORE, encoding="ascii")
    if os.getppid() != parent:
        sys.exit("the daemon is gone")


if __name__ == "__main__":
    main()
