"""
Face networks with random weights, and the network's authors' own package to compare with. For tests and for scripts/bench/gfpgan.

Random weights prove how numbers flow, not how faces look.
"""

from __future__ import annotations

import hashlib
import importlib
import math
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from jobdaemon.backends.gfpgan.architecture import network_class, unfilled

#: A 40th of the work of the true one.
NARROW: dict[str, Any] = {"narrow": 0.125, "channel_multiplier": 1}


def random_network(*, narrow: bool, seed: int = 7) -> torch.nn.Module:
    """A network of the true architecture, or a narrow one; its noise does something (an untrained network's has no strength)."""
    network_type = network_class()
    with unfilled():
        network: torch.nn.Module = network_type(**(NARROW if narrow else {})).requires_grad_(requires_grad=False).eval()
    # What comes out deviates by 0.3 (narrow) or 0.4 then, as a picture does. Rounding grows with it: four times this in the wide
    # network put half of the values outside of -1 to 1, and bfloat16 was 1.6 levels off in the mean instead of 0.9.
    colours = 0.15 if narrow else 0.0375
    # One table for all of them: 86 million fresh random numbers take seconds.
    table = torch.randn(1_000_003, generator=torch.Generator().manual_seed(seed))
    for number, (name, tensor) in enumerate(network.state_dict().items()):
        _fill(tensor, table[7_919 * number % 500_000 :])
        if tensor.numel() == 1:
            tensor.fill_(0.1)  # a noise's strength
        elif "bias" in name:
            tensor.mul_(0.1).add_(float("modulation" in name))
        elif "noise" not in name and "constant_input" not in name:
            # Numbers shall neither grow nor vanish from layer to layer, and the colours' sum shall stay a picture.
            fan_in = math.prod(tensor.shape[2 if tensor.ndim == 5 else 1 :])
            tensor.mul_((colours if "to_rgb" in name and tensor.ndim == 5 else 1) / fan_in**0.5)
    return network


def _fill(tensor: torch.Tensor, table: torch.Tensor) -> None:
    flat = tensor.view(-1)
    for start in range(0, len(flat), len(table)):
        part = flat[start : start + len(table)]
        part.copy_(table[: len(part)])


def save_weights(network: torch.nn.Module, path: Path, *, group: str = "params_ema") -> str:
    """Write a checkpoint as people have them, ``.pth`` or ``.safetensors``; returns its SHA-256."""
    if path.suffix == ".safetensors":
        save_file(network.state_dict(), path)
    else:
        torch.save({group: network.state_dict()}, path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def narrow_weights(path: Path) -> str:
    """Write a narrow network of 32 MB that restores a face in 0.2 s of a core; returns its SHA-256."""
    return save_weights(random_network(narrow=True), path)


def authors_network_class() -> Any:
    """
    ``GFPGANv1Clean`` of the gfpgan package.

    Raises:
        ImportError: the package is not installed.
    """
    return _authors_module("gfpgan.archs.gfpganv1_clean_arch").GFPGANv1Clean


def authors_helper_class() -> Any:
    """
    ``FaceRestoreHelper`` of facexlib.

    Raises:
        ImportError: the package is not installed.
    """
    return _authors_module("facexlib.utils.face_restoration_helper").FaceRestoreHelper


def _authors_module(name: str) -> types.ModuleType:
    """Import what does not import by itself any more: it names a module that torchvision removed, and more of torchvision."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _import_torchvision()
        gone = types.ModuleType("torchvision.transforms.functional_tensor")
        functional = importlib.import_module("torchvision.transforms.functional")
        gone.rgb_to_grayscale = functional.rgb_to_grayscale  # type: ignore[attr-defined]
        sys.modules[gone.__name__] = gone
        return importlib.import_module(name)


def _import_torchvision() -> None:
    """Import torchvision also where its CUDA build meets a torch for the CPU; its own operators are missing then."""
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        for name in [name for name in sys.modules if name.split(".", 1)[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        # What it defines lasts as long as it does.
        vars(importlib.import_module("torchvision"))["operators_of_ours"] = library
