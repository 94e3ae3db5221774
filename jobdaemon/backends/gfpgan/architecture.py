"""
The network as its authors wrote it, in spandrel's edition, filled with weights.

Its widths are read from the tensors' shapes: spandrel's own loader knows one width only, and tests want a narrow network.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from jobdaemon.errors import SettingsError

if TYPE_CHECKING:
    import torch

#: Pixels of a side of what goes in and comes out.
FACE_SIDE_PX = 512
#: Up- and downsampling steps between 4 and 512 pixels.
_STEPS = 7
#: Style codes: two for each size from 4 to 512 pixels.
_STYLES = 16
_TORCHVISION = "torchvision.transforms.functional"
_NEEDED = ("normalize", "rotate", "InterpolationMode")


def build(tensors: Mapping[str, torch.Tensor], *, path: Path) -> torch.nn.Module:
    """
    The network with *tensors* as its weights: on the CPU, for inference; it keeps the tensors.

    Args:
        tensors: as ``weights.load_weights`` returns them.
        path: for messages.

    Raises:
        SettingsError: they are another network's, or spandrel is missing.
    """
    architecture = network_class()
    widths = _widths(tensors)
    if widths is None:
        raise SettingsError(f"{path} holds another network than GFPGAN's 'clean' one for {FACE_SIDE_PX} pixels (v1.2 to v1.4).")
    with unfilled():
        network = architecture(out_size=FACE_SIDE_PX, different_w=True, input_is_latent=True, sft_half=True, **widths)
    try:
        network.load_state_dict(tensors, strict=True, assign=True)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise SettingsError(f"{path} is no complete GFPGAN file: {reason}") from error
    network.requires_grad_(requires_grad=False)
    module: torch.nn.Module = network.eval()
    return module


def network_class() -> Any:
    """
    The class ``GFPGANv1Clean`` of spandrel.

    Raises:
        SettingsError: torch or spandrel is missing.
    """
    try:
        with_torchvision_or_stub()
        return importlib.import_module("spandrel.architectures.GFPGAN").GFPGAN
    except ImportError as error:
        raise SettingsError(
            "The backend gfpgan needs torch and spandrel; docs/gfpgan.md says how to install them for your device."
        ) from error


def unfilled() -> AbstractContextManager[object]:
    """
    While it is entered, new networks hold whatever lay in memory: for those whose weights come from elsewhere.

    Random numbers would take longer than reading the file, and torch's own way around them (the device ``meta``) two seconds.
    """
    import torch  # noqa: PLC0415

    class Unfilled(torch.overrides.TorchFunctionMode):  # type: ignore[misc]  # torch counts as untyped
        def __torch_function__(
            self, called: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            del types
            if getattr(called, "__module__", "") == "torch.nn.init":
                return args[0] if args else (kwargs or {})["tensor"]
            return (torch.empty if called is torch.randn else called)(*args, **(kwargs or {}))

    return cast("AbstractContextManager[object]", Unfilled())


def with_torchvision_or_stub() -> None:
    """
    Import spandrel where torchvision is missing or broken, too.

    spandrel names three of its functions in networks that we never build. torchvision is broken where its CUDA build meets a
    torch for the CPU, which its wheel on PyPI makes easy.
    """
    if "spandrel" in sys.modules:
        return
    try:
        importlib.import_module(_TORCHVISION)
    except (ImportError, RuntimeError):
        _forget("torchvision")
        try:
            _stub()
            importlib.import_module("spandrel")
        finally:
            _forget("torchvision")  # whoever really needs it must get the true error


def _stub() -> None:
    parts = _TORCHVISION.split(".")
    for count in range(1, len(parts) + 1):
        name = ".".join(parts[:count])
        module = types.ModuleType(name)
        module.__path__ = []
        sys.modules[name] = module
    for needed in _NEEDED:
        setattr(sys.modules[_TORCHVISION], needed, type(needed, (), {"BILINEAR": None, "NEAREST": None}))


def _forget(package: str) -> None:
    for name in [name for name in sys.modules if name.split(".", 1)[0] == package]:
        del sys.modules[name]


def _widths(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any] | None:
    """What the class must be made with to fit *tensors*; None: it could not."""

    def side(name: str, axis: int) -> int:
        tensor = tensors.get(name)
        return int(tensor.shape[axis]) if tensor is not None and tensor.ndim > axis else 0

    deepest = side("stylegan_decoder.constant_input.weight", 1)
    middle = side("stylegan_decoder.style_convs.6.modulated_conv.weight", 1)  # 64 pixels
    style = side("stylegan_decoder.style_mlp.1.weight", 0)
    outputs = side("final_linear.weight", 0)
    steps = sum(name.startswith("condition_scale.") and name.endswith(".0.weight") for name in tensors)
    clean = "conv_body_first.weight" in tensors and steps == _STEPS
    if not clean or not deepest or not middle or not style or outputs != _STYLES * style:
        return None
    return {
        "narrow": deepest / 512,
        "channel_multiplier": 2 * middle / deepest,
        "num_style_feat": style,
        "num_mlp": sum(name.startswith("stylegan_decoder.style_mlp.") and name.endswith(".weight") for name in tensors),
    }
