"""
How a batch of faces gets through the network on a device. Imports torch: import it lazily.

An execution has one batch size: smaller batches are filled up. Libraries choose other kernels for other sizes, and so a face
would come out differently, in its last bit, in other company.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray

from jobdaemon.backends.gfpgan.architecture import FACE_SIDE_PX

Pixels = NDArray[np.uint8]
Forward = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
Report = Callable[[str], None]


@dataclass(frozen=True, slots=True, eq=False)
class Restored:
    """
    What came out.

    Attributes:
        crops: (N, 512, 512, 3) uint8 RGB; may change when the next but one batch is started.
        sound: (N,) bool, whether the face's values were numbers.
    """

    crops: Pixels
    sound: NDArray[np.bool_]


class Execution(Protocol):
    """Runs batches of at most ``batch_size`` faces, two of them in flight at most."""

    batch_size: int

    def submit(self, crops: Pixels) -> Callable[[], Restored]:
        """
        Start a batch.

        Args:
            crops: (N, 512, 512, 3) uint8 RGB, N from 1 to ``batch_size``; not needed any more when this returns.

        Returns:
            A function that waits for the result; to be called in the order of the batches, before the next but one is started.

        Raises:
            torch.OutOfMemoryError: the device cannot hold the batch.
        """
        ...


class PlainExecution:
    """On the processor, or on any device: send, compute, wait."""

    def __init__(self, forward: Forward, *, batch_size: int, device: torch.device) -> None:
        self.batch_size = batch_size
        self._forward = forward
        self._device = device

    def submit(self, crops: Pixels) -> Callable[[], Restored]:
        batch = np.zeros((self.batch_size, FACE_SIDE_PX, FACE_SIDE_PX, 3), np.uint8)
        batch[: len(crops)] = crops
        # Made outside, or it is another kind of tensor than the one that the network was compiled with.
        sent = torch.from_numpy(batch).to(self._device)
        with torch.inference_mode():
            pixels, sound = self._forward(sent)
            restored = Restored(pixels[: len(crops)].cpu().numpy(), sound[: len(crops)].cpu().numpy())
        return lambda: restored


@dataclass(frozen=True, slots=True, eq=False)
class _Slot:
    """Page-locked memory for a batch on its way: the device copies from and to it while the processor does something else."""

    sent: torch.Tensor
    pixels: torch.Tensor
    sound: torch.Tensor
    done: Any


class CudaExecution:
    """
    On an NVIDIA device: one stream, two slots, and the whole network as one recorded CUDA graph.

    The graph replaces some 400 launches by one. Where recording fails it is reported, and the network runs without.
    """

    def __init__(self, forward: Forward, *, batch_size: int, device: torch.device, report: Report) -> None:
        """
        Run the network once and record it.

        Raises:
            torch.OutOfMemoryError: the device cannot hold the batch.
        """
        self.batch_size = batch_size
        self._forward = forward
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._next = 0
        shape = (batch_size, FACE_SIDE_PX, FACE_SIDE_PX, 3)
        self._slots = [
            _Slot(
                torch.zeros(shape, dtype=torch.uint8, pin_memory=True),
                torch.empty(shape, dtype=torch.uint8, pin_memory=True),
                torch.empty(batch_size, dtype=torch.bool, pin_memory=True),
                torch.cuda.Event(blocking=True),  # waits asleep: the core that would spin is one that encodes photos
            )
            for _ in range(2)
        ]
        self._input = torch.zeros(shape, dtype=torch.uint8, device=device)
        self._graph: Any = None
        self._output: tuple[torch.Tensor, torch.Tensor] | None = None
        # The input was filled on another stream.
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.inference_mode(), torch.cuda.device(device):
            with torch.cuda.stream(self._stream):
                for _ in range(2):  # libraries load and choose their kernels on the first calls, which must not be recorded
                    forward(self._input)
            self._stream.synchronize()
            self._record(report)

    def submit(self, crops: Pixels) -> Callable[[], Restored]:
        slot = self._slots[self._next]
        self._next = 1 - self._next
        count = len(crops)
        # What fills up the batch is an earlier face: it changes nothing, and nothing of it is handed out.
        slot.sent[:count].numpy()[:] = crops
        with torch.inference_mode(), torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            self._input.copy_(slot.sent, non_blocking=True)
            if self._graph is not None and self._output is not None:
                self._graph.replay()
                pixels, sound = self._output
            else:
                pixels, sound = self._forward(self._input)
            slot.pixels.copy_(pixels, non_blocking=True)
            slot.sound.copy_(sound, non_blocking=True)
            slot.done.record(self._stream)

        def wait() -> Restored:
            slot.done.synchronize()
            return Restored(slot.pixels[:count].numpy(), slot.sound[:count].numpy())

        return wait

    def _record(self, report: Report) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self._stream):
                output = self._forward(self._input)
            graph.replay()
            torch.cuda.synchronize(self._device)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            report(f"The network could not be recorded as a CUDA graph and runs without: {_first_line(error)}")
        else:
            self._graph, self._output = graph, output


def compiled(network: torch.nn.Module, *, batch_size: int, device: torch.device, report: Report) -> Forward:
    """
    The network fused by torch.compile for one batch size, or as it is where that fails. Takes a minute or more.

    No kernels are tried against each other: which one is chosen would depend on the moment, and with it the result's last bit.

    Raises:
        torch.OutOfMemoryError: the device cannot hold the batch.
    """
    probe = torch.zeros((batch_size, FACE_SIDE_PX, FACE_SIDE_PX, 3), dtype=torch.uint8, device=device)
    try:
        forward: Forward = torch.compile(network, dynamic=False, fullgraph=True)
        with torch.inference_mode():
            forward(probe)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001  # a compiler fails in many ways; each of them leaves the plain network
        report(f"The network could not be compiled and runs without: {_first_line(error)}")
        return cast("Forward", network)
    return forward


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
