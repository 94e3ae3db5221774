"""
Faces in, restored faces out: the one thing that runs in the process with torch.

Chooses precision and batch size for the device, splits and fills batches, and halves them when the device's memory is full.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from jobdaemon.backends.gfpgan.architecture import FACE_SIDE_PX, build
from jobdaemon.backends.gfpgan.frames import FacesFailedError
from jobdaemon.backends.gfpgan.weights import load_weights
from jobdaemon.errors import DeviceMemoryError, SettingsError

if TYPE_CHECKING:
    import torch

    from jobdaemon.backends.gfpgan.execution import Execution, Forward

Pixels = NDArray[np.uint8]

BATCH_SIZES = (1, 2, 4, 8, 16)
DTYPES = ("float32", "bfloat16")  # float16 gives wrong faces (the authors' issue 50, read 2026-11)

#: Of the device's free memory; the rest is for the libraries' own and for whoever else uses the device.
_MEMORY_SHARE = 0.7
#: What torch has no error of its own for: the CPU's allocator (on Linux, elsewhere), the driver, and libraries beside torch's own
#: allocator. None of them breaks anything.
_OUT_OF_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


class FaceNetwork:
    """
    The network on one device. One thread at a time.

    The same face gives the same bytes, alone or in company, at every call, as long as the batch size is the same: on the CPU
    faces are computed one by one, on other devices in batches that are filled up to ``batch_size``. Another device, precision,
    version of torch or batch size may change the last bit.

    Attributes:
        name: the model's, for instance ``GFPGANv1.4``.
        device: what computes, for people: ``cpu`` or the device's name.
        dtype: ``float32`` or ``bfloat16``.
        batch_size: faces computed at once; becomes smaller when the device's memory does not suffice.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        *,
        name: str = "GFPGAN",
        device: str = "auto",
        dtype: str | None = None,
        batch_size: int | None = None,
        compile: bool = False,  # noqa: A002  # torch's own word for it
        report: Callable[[str], None] | None = None,
    ) -> None:
        """
        Put the network on a device. ``warm_up`` does the rest, or the first call.

        Args:
            module: a ``GFPGANv1Clean`` of spandrel or of the gfpgan package; it is copied.
            name: the model's.
            device: ``auto`` (CUDA where there is one, else the CPU), ``cpu``, ``cuda`` or ``cuda:1``.
            dtype: one of ``DTYPES``; None: bfloat16 on CUDA, where the device has it, else float32.
            batch_size: most faces at once; None: 1 on the CPU, else by free memory, up to 16.
            compile: fuse the network by torch.compile in ``warm_up``: faster, and a minute or more of waiting.
            report: told in a sentence, once each, what does not work and is done without; None: a warning in the log.

        Raises:
            SettingsError: no such device or precision.
            DeviceMemoryError: the device cannot hold the weights. Retryable.
        """
        import torch  # noqa: PLC0415

        from jobdaemon.backends.gfpgan.optimised import OptimisedNetwork  # noqa: PLC0415

        self._place = _place(device)
        self.name = name
        self.device = torch.cuda.get_device_name(self._place) if self._place.type == "cuda" else self._place.type
        self.dtype = dtype or _best_dtype(self._place)
        if self.dtype not in DTYPES:
            raise SettingsError(f"The face network computes in {' or '.join(DTYPES)}, not in {self.dtype!r}.")
        self._batch_size = batch_size or (1 if self._place.type == "cpu" else None)
        self._compile = compile
        self._report = report or logging.getLogger(__name__).warning
        self._execution: Execution | None = None
        if self._place.type == "cuda":
            # Which algorithm is taken must not depend on a race between them.
            torch.backends.cudnn.benchmark = False
            torch.backends.cudnn.deterministic = True
        try:
            self._network = OptimisedNetwork(module, device=self._place, dtype=getattr(torch, self.dtype))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise self._too_small("the face network's weights") from error

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        sha256: str | None = None,
        device: str = "auto",
        dtype: str | None = None,
        batch_size: int | None = None,
        compile: bool = False,  # noqa: A002
        report: Callable[[str], None] | None = None,
    ) -> FaceNetwork:
        """
        The network of a weights file; arguments as those of the class and of ``weights.identify``.

        Raises:
            SettingsError: the file, the device or the installation will not do; the message says why.
            DeviceMemoryError: the device cannot hold the weights. Retryable.
        """
        _require_torch()
        _place(device)  # before half a second is spent on the file
        file, tensors = load_weights(path, sha256=sha256)
        module = build(tensors, path=path)
        return cls(module, name=file.name, device=device, dtype=dtype, batch_size=batch_size, compile=compile, report=report)

    @property
    def batch_size(self) -> int:
        """Faces computed at once; before the network has run, the most there may be."""
        return self._execution.batch_size if self._execution is not None else self._batch_size or BATCH_SIZES[-1]

    def warm_up(self) -> None:
        """
        Choose the batch size, compile and record what can be, and run the network once.

        Raises:
            DeviceMemoryError: not even one face fits. Retryable.
        """
        self.restore(np.full((1, FACE_SIDE_PX, FACE_SIDE_PX, 3), 128, np.uint8))

    def restore(self, crops: Pixels) -> Pixels:
        """
        Restore faces.

        Args:
            crops: (N, 512, 512, 3) uint8 RGB, aligned as ``geometry.align_face`` does; any N. More than one batch in a call lets
                the device compute one while the next is prepared.

        Returns:
            The same shape and type.

        Raises:
            DeviceMemoryError: the device cannot hold a single face at the moment. Retryable.
            FacesFailedError: the network gave values that are no numbers for some of the faces, or, on the CPU, raised over a
                batch with them. It has the others. Retryable.
        """
        if crops.ndim != 4 or crops.shape[1:] != (FACE_SIDE_PX, FACE_SIDE_PX, 3) or crops.dtype != np.uint8:
            raise ValueError(f"crops must be uint8 (N, {FACE_SIDE_PX}, {FACE_SIDE_PX}, 3), not {crops.dtype} {crops.shape}")
        restored = np.empty_like(crops)
        failed: dict[int, str] | None = None if len(crops) else {}
        while failed is None:
            try:
                failed = self._run(crops, restored)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                # Outside of this handler: the traceback holds the tensors that fill the memory.
            else:
                continue
            self._halve()
        if failed:
            raise FacesFailedError(next(iter(failed.values())), restored=restored, failed=failed)
        return restored

    def _run(self, crops: Pixels, restored: Pixels) -> dict[int, str]:
        """
        Restore; how far it came when the memory gave out is lost, and done again in smaller batches.

        Returns:
            The places that failed, and why.
        """
        execution = self._execution or self._prepared()
        failed: dict[int, str] = {}
        waiting: deque[tuple[int, Any]] = deque()
        position = 0
        while position < len(crops) or waiting:
            if position < len(crops):
                batch = crops[position : position + execution.batch_size]
                try:
                    waiting.append((position, execution.submit(batch)))
                except Exception as error:
                    # After an error of a device nothing in this process can be trusted.
                    if self._place.type != "cpu" or is_out_of_memory(error):
                        raise
                    told = f"The face network {self.name} failed on {self.device} ({_first_line(error)})."
                    failed |= dict.fromkeys(range(position, position + len(batch)), told)
                position += len(batch)
            if len(waiting) == 2 or (waiting and position >= len(crops)):
                at, wait = waiting.popleft()
                result = wait()
                restored[at : at + len(result.crops)] = result.crops
                told = f"The face network {self.name} gave values that are no numbers on {self.device}."
                failed |= {at + int(place): told for place in np.flatnonzero(~result.sound)}
        return failed

    def _prepared(self) -> Execution:
        from jobdaemon.backends.gfpgan.execution import CudaExecution, PlainExecution, compiled  # noqa: PLC0415

        if self._batch_size is None:
            self._batch_size = self._by_free_memory()
        size = self._batch_size
        forward: Forward = self._network
        if self._compile:
            forward = compiled(self._network, batch_size=size, device=self._place, report=self._report)
        if self._place.type == "cuda":
            self._execution = CudaExecution(forward, batch_size=size, device=self._place, report=self._report)
        else:
            self._execution = PlainExecution(forward, batch_size=size, device=self._place)
        return self._execution

    def _by_free_memory(self) -> int:
        """The largest batch that fits, from what one face takes."""
        import torch  # noqa: PLC0415

        if self._place.type != "cuda":
            return 1
        probe = torch.zeros((1, FACE_SIDE_PX, FACE_SIDE_PX, 3), dtype=torch.uint8, device=self._place)
        torch.cuda.synchronize(self._place)
        torch.cuda.reset_peak_memory_stats(self._place)
        before = torch.cuda.memory_allocated(self._place)
        with torch.inference_mode():
            self._network(probe)
        torch.cuda.synchronize(self._place)
        per_face = max(1, torch.cuda.max_memory_allocated(self._place) - before)
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(self._place)
        return fitting_batch(per_face_bytes=per_face, free_bytes=free)

    def _halve(self) -> None:
        import torch  # noqa: PLC0415

        size = self.batch_size
        self._execution = None
        if self._place.type == "cuda":
            torch.cuda.empty_cache()
        if size == 1:
            raise self._too_small("one face")
        self._batch_size = size // 2
        self._compile = False  # again, for another size: whoever waits for a face would wait for minutes
        self._report(f"{self.device} ran out of memory with {size} faces at once; going on with {self._batch_size}.")

    def _too_small(self, what: str) -> DeviceMemoryError:
        return DeviceMemoryError(f"{self.device} has no memory for {what} at the moment.")


def _first_line(error: Exception) -> str:
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])


def fitting_batch(*, per_face_bytes: int, free_bytes: int) -> int:
    """The largest of ``BATCH_SIZES`` that takes no more than its share of the free memory; at least 1."""
    return max((size for size in BATCH_SIZES if size * per_face_bytes <= free_bytes * _MEMORY_SHARE), default=1)


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory was missing, on a device or on the CPU; torch has an error for its own allocator on a device only."""
    import torch  # noqa: PLC0415

    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)


def _require_torch() -> None:
    try:
        import torch  # noqa: F401, PLC0415
    except ImportError as error:
        raise SettingsError("The backend gfpgan needs torch; docs/gfpgan.md says how to install it for your device.") from error


def _place(device: str) -> torch.device:
    import torch  # noqa: PLC0415

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise SettingsError(f"There is no device {device!r}; there is auto, cpu, cuda or cuda:0.") from error
    if place.type == "cuda":
        if not torch.cuda.is_available():
            raise SettingsError(f"The device {device} cannot be used: torch {torch.__version__} finds no CUDA device.")
        if (place.index or 0) >= torch.cuda.device_count():
            raise SettingsError(f"There is no device {device}: torch finds {torch.cuda.device_count()}.")
        place = torch.device("cuda", place.index or 0)
    elif place.type != "cpu":
        raise SettingsError(f"There is no device {device!r}; there is auto, cpu, cuda or cuda:0.")
    return place


def _best_dtype(place: torch.device) -> str:
    import torch  # noqa: PLC0415

    return "bfloat16" if place.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
