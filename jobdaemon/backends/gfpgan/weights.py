"""
The file with the network's weights: which one it is, whether it is whole, and its tensors, without running what it contains.

A ``.pth`` file is a pickle and may hold a program; it is read by torch's restricted reader after its digest was checked.
``identify`` needs no torch, so that the daemon can refuse a wrong file at its start.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobdaemon.errors import SettingsError

if TYPE_CHECKING:
    import torch

#: Model names by the SHA-256 of the files that GFPGAN's authors released (cross-checked in public manifests, 2026-11).
KNOWN_SHA256 = {
    "29e25ee90c170f4231163f4c83df6b59c968b73f3ce00cb884015ae005db083c": "GFPGANv1.2",
    "c953a88f2727c85c3d9ae72e2bd4846bbaf59fe6972ad94130e23e7017524a70": "GFPGANv1.3",
    "e2cd4703ab14f4d01fd1383a8a8b266f9a5833dacee8e6a79d3bf21a1b6be5ad": "GFPGANv1.4",
}
SUFFIXES = (".pth", ".safetensors")

#: The released files have 349 MB; the narrowest network that could be of any use has more than this.
_SMALLEST_BYTES = 1_000_000
_LFS_POINTER = b"version https://git-lfs"
_GROUPS = ("params_ema", "params")


@dataclass(frozen=True, slots=True)
class WeightsFile:
    """
    A weights file that is the one it should be.

    Attributes:
        name: the model's name, for instance ``GFPGANv1.4``; of a file that nobody released, its own name without the suffix.
        sha256: of the whole file, lower case.
    """

    path: Path
    name: str
    sha256: str


def identify(path: Path, *, sha256: str | None = None) -> WeightsFile:
    """
    Check that the file is a released one, or the one whose digest was configured. Reads all of it: about half a second.

    Args:
        path: ``.pth`` or ``.safetensors``.
        sha256: the digest that the operator trusts; None: one of ``KNOWN_SHA256`` must fit.

    Raises:
        SettingsError: it is missing, not a weights file, or another one.
    """
    with _opened(path) as file:
        return _identified(path, file, sha256)


def load_weights(path: Path, *, sha256: str | None = None) -> tuple[WeightsFile, dict[str, torch.Tensor]]:
    """
    Check the file as ``identify`` does, and read it.

    Returns:
        What it is, and its tensors by name: float32, finite, on the CPU, of the group ``params_ema`` where there is one.

    Raises:
        SettingsError: as ``identify``; or it is damaged, holds a program, or holds no tensors under a name we know.
    """
    with _opened(path) as file:
        found = _identified(path, file, sha256)
        file.seek(0)
        content = _read_safetensors(path, file) if path.suffix == ".safetensors" else _read_pickle(path, file)
    return found, _tensors(path, content)


def _opened(path: Path) -> io.BufferedReader:
    if path.suffix not in SUFFIXES:
        raise SettingsError(f"The weights file {path} is neither .pth nor .safetensors.")
    try:
        # A FIFO without a writer would hold open() for ever.
        file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    except FileNotFoundError:
        raise SettingsError(f"There is no weights file {path}. docs/gfpgan.md says where to get one.") from None
    except OSError as error:
        raise SettingsError(f"The weights file {path} cannot be read: {error.strerror}.") from error
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise SettingsError(f"The weights file {path} is not a file.")
    return file


def _identified(path: Path, file: io.BufferedReader, wanted: str | None) -> WeightsFile:
    try:
        start = file.read(len(_LFS_POINTER))
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        size = file.tell()
    except OSError as error:
        raise SettingsError(f"The weights file {path} cannot be read: {error.strerror}.") from error
    if start == _LFS_POINTER:
        raise SettingsError(f"{path} is not the weights but Git LFS's note where they are; fetch the file itself.")
    if size < _SMALLEST_BYTES:
        raise SettingsError(f"{path} has {size:,} bytes: no GFPGAN weights are that small. Was it downloaded to its end?")
    if wanted is not None and digest != wanted.strip().lower():
        raise SettingsError(
            f"{path} ({size:,} bytes) is not the file that weights_sha256 names: its SHA-256 is {digest}. "
            "It was changed, or not downloaded to its end."
        )
    if wanted is None and digest not in KNOWN_SHA256:
        raise SettingsError(
            f"{path} ({size:,} bytes) is none of the released GFPGAN files ({', '.join(KNOWN_SHA256.values())}); was it "
            f"downloaded to its end? If you trust it, set weights_sha256 to {digest}."
        )
    return WeightsFile(path, KNOWN_SHA256.get(digest, path.stem), digest)


def _read_pickle(path: Path, file: io.BufferedReader) -> object:
    import torch  # noqa: PLC0415

    try:
        # Tensors and containers only: torch refuses every other name in the pickle before anything of it is called.
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise SettingsError(f"{path} holds more than weights, perhaps a program, and was not loaded.") from error
    except Exception as error:  # a torn file may fail anywhere in the reader
        raise SettingsError(f"{path} is damaged or not a weights file: torch cannot read it.") from error


def _read_safetensors(path: Path, file: io.BufferedReader) -> object:
    from safetensors import SafetensorError  # noqa: PLC0415
    from safetensors.torch import load  # noqa: PLC0415

    try:
        flat = load(file.read())
    except (SafetensorError, ValueError, OSError) as error:
        raise SettingsError(f"{path} is damaged or not a safetensors file.") from error
    for group in _GROUPS:
        # The format knows no groups: whoever converted a file may have written them into the names.
        inner = {name.removeprefix(f"{group}."): tensor for name, tensor in flat.items() if name.startswith(f"{group}.")}
        if inner:
            return {group: inner}
    return {"params": flat}


def _tensors(path: Path, content: object) -> dict[str, torch.Tensor]:
    import torch  # noqa: PLC0415

    groups: Mapping[Any, Any] = content if isinstance(content, Mapping) else {}
    group = next((groups[name] for name in _GROUPS if isinstance(groups.get(name), Mapping)), None)
    if group is None:
        raise SettingsError(f"{path} has neither params_ema nor params: it is no GFPGAN file.")
    tensors: dict[str, torch.Tensor] = {}
    for name, value in group.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor) or not value.is_floating_point():
            raise SettingsError(f"{path} holds {name!r}, which is no table of numbers: it is no GFPGAN file.")
        tensors[name] = value.detach().to(torch.float32)
        if not bool(torch.isfinite(tensors[name]).all()):
            raise SettingsError(f"{path} is damaged: {name} holds values that are no numbers.")
    return tensors
