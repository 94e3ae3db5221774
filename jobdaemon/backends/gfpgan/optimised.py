"""
The network's computation, rewritten for speed and bit-stable results. Imports torch: import it lazily.

What differs from the authors' code, while the numbers stay the same but for rounding (tests/conformance/test_gfpgan_network.py):

- The noise is the checkpoint's own, never drawn: the same face gives the same picture.
- A modulated convolution scales its input and its output instead of making each sample a set of weights: one plain convolution
  for the whole batch instead of a grouped one.
- Tensors lie channels last, as pictures come and as the device's convolutions want them; nothing is transposed on the way.
- Halving is average pooling, which is what bilinear halving amounts to; the 1x1 convolution beside a doubling runs before it, on
  a quarter of the pixels.
- Pixels go in and come out as bytes; they are scaled on the device.
- In a reduced precision the styles, the sum of the colours and the result stay float32: they are small, and errors there show.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

_SLOPE = 0.2
#: The authors' "conversion" gain of a styled convolution.
_GAIN = 2**0.5


class OptimisedNetwork(nn.Module):  # type: ignore[misc]  # torch counts as untyped
    """
    The network for inference on one device in one precision.

    It copies what it needs; the original may be dropped.
    """

    def __init__(self, original: nn.Module, *, device: torch.device, dtype: torch.dtype) -> None:
        """
        Copy *original*'s weights to the device.

        Args:
            original: a ``GFPGANv1Clean`` of spandrel or of the gfpgan package.
            dtype: of convolutions and of what flows between them.
        """
        super().__init__()
        decoder = original.stylegan_decoder
        self._dtype = dtype
        self._style_features = int(original.num_style_feat)
        self.first = _convolution(original.conv_body_first)
        self.down = nn.ModuleList(_Down(block) for block in original.conv_body_down)
        self.last = _convolution(original.final_conv)
        self.styles = _linear(original.final_linear)
        self.up = nn.ModuleList(_Up(block) for block in original.conv_body_up)
        self.scales = nn.ModuleList(_condition(block) for block in original.condition_scale)
        self.shifts = nn.ModuleList(_condition(block) for block in original.condition_shift)
        self.start = _frozen(decoder.constant_input.weight)
        noises = [getattr(decoder.noises, f"noise{index}") for index in range(len(decoder.style_convs) + 1)]
        layers = [decoder.style_conv1, *decoder.style_convs]
        self.styled = nn.ModuleList(_Styled(layer, noise) for layer, noise in zip(layers, noises, strict=True))
        self.colours = nn.ModuleList(_Colours(layer) for layer in [decoder.to_rgb1, *decoder.to_rgbs])
        self.to(device)
        for module in self.modules():
            if not isinstance(module, nn.Linear):
                _convert(module, dtype)
        self.eval()

    def forward(self, crops: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Restore a batch of faces.

        Args:
            crops: (N, 512, 512, 3) uint8 RGB on the network's device.

        Returns:
            The same shape and type; and (N,) bool, whether a face's values were all numbers. Where they were not, its pixels mean
            nothing.
        """
        restored = self.compute(crops.permute(0, 3, 1, 2).to(torch.float32) * (2 / 255) - 1)
        sound = restored.isfinite().flatten(1).all(1)
        pixels = ((restored + 1) * 127.5).clamp(0, 255).round().to(torch.uint8)
        return pixels.permute(0, 2, 3, 1).contiguous(), sound

    def compute(self, faces: torch.Tensor) -> torch.Tensor:
        """
        The network on numbers.

        Args:
            faces: (N, 3, 512, 512) float32 RGB, -1 to 1, on the network's device; best channels last.

        Returns:
            The same shape and type, about -1 to 1.
        """
        feature = _activated(self.first(faces.to(self._dtype)))
        skips = []
        for down in self.down:
            feature = down(feature)
            skips.append(feature)
        feature = _activated(self.last(feature))
        styles = self.styles(feature.to(torch.float32).flatten(1))
        styles = styles.unflatten(1, (-1, self._style_features))
        conditions = []
        for up, scale, shift in zip(self.up, self.scales, self.shifts, strict=True):
            feature = up(feature + skips.pop())
            conditions.append((scale(feature), shift(feature)))
        return self._decode(styles, conditions)

    def _decode(self, styles: torch.Tensor, conditions: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        feature = self.styled[0](self.start.expand(styles.shape[0], -1, -1, -1), styles[:, 0])
        picture = self.colours[0](feature, styles[:, 1])
        for index, (scale, shift) in enumerate(conditions):
            place = 2 * index + 1
            feature = self.styled[place](feature, styles[:, place])
            # Half of the channels follow what the encoder saw. In place, to move fewer bytes.
            guided = feature[:, feature.shape[1] // 2 :]
            guided.mul_(scale).add_(shift)
            feature = self.styled[place + 1](feature, styles[:, place + 1])
            picture = _doubled(picture) + self.colours[index + 1](feature, styles[:, place + 2])
        return picture


class _Down(nn.Module):  # type: ignore[misc]
    """A residual block that halves the sides."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.conv1, self.conv2, self.skip = (_convolution(conv) for conv in (original.conv1, original.conv2, original.skip))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = functional.avg_pool2d(_activated(self.conv1(x)), 2)
        return _activated(self.conv2(inner)) + self.skip(functional.avg_pool2d(x, 2))


class _Up(nn.Module):  # type: ignore[misc]
    """A residual block that doubles the sides."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.conv1, self.conv2, self.skip = (_convolution(conv) for conv in (original.conv1, original.conv2, original.skip))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = _doubled(_activated(self.conv1(x)))
        return _activated(self.conv2(inner)) + _doubled(self.skip(x))


class _Styled(nn.Module):  # type: ignore[misc]
    """A modulated and demodulated convolution with noise, bias and activation."""

    def __init__(self, original: nn.Module, noise: torch.Tensor) -> None:
        super().__init__()
        modulated = original.modulated_conv
        weight = modulated.weight.detach()[0]
        self.modulation = _linear(modulated.modulation)
        self.weight = _frozen(weight)
        # Added up once, (1, C, H, W): a sum of (1, 1, H, W) and (1, C, 1, 1) is laid out channels first, as any picture after it.
        self.offset = _frozen(original.weight * noise + original.bias)
        self._doubles = modulated.sample_mode == "upsample"
        self._padding = int(modulated.padding)
        self._eps = float(modulated.eps)
        # float32 whatever the precision: it scales whole channels. Linear's attributes are left alone by _convert.
        self.energy = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        self.energy.weight = _frozen(weight.to(torch.float32).square().sum((2, 3)))

    def forward(self, x: torch.Tensor, style: torch.Tensor) -> torch.Tensor:
        scale = self.modulation(style)
        gain = torch.rsqrt(self.energy(scale.square()) + self._eps) * _GAIN
        x = x * scale.to(x.dtype)[:, :, None, None]
        if self._doubles:
            x = _doubled(x)
        x = functional.conv2d(x, self.weight, padding=self._padding)
        return _activated(torch.addcmul(self.offset, x, gain.to(x.dtype)[:, :, None, None]))


class _Colours(nn.Module):  # type: ignore[misc]
    """A modulated 1x1 convolution to RGB: with three outputs a matrix for each sample is cheaper than scaling the input."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        modulated = original.modulated_conv
        self.modulation = _linear(modulated.modulation)
        self.weight = _frozen(modulated.weight.detach()[0, :, :, 0, 0])
        self.bias = _frozen(original.bias)

    def forward(self, x: torch.Tensor, style: torch.Tensor) -> torch.Tensor:
        matrices = self.weight * self.modulation(style).to(x.dtype)[:, None, :]  # (N, 3, C)
        pixels = x.permute(0, 2, 3, 1).flatten(1, 2)  # (N, H * W, C)
        colours = torch.bmm(pixels, matrices.transpose(1, 2)).to(torch.float32)
        return colours.unflatten(1, tuple(x.shape[2:])).permute(0, 3, 1, 2) + self.bias.to(torch.float32)


def _convolution(original: nn.Module) -> nn.Module:
    """A copy of a plain convolution."""
    copy = nn.Conv2d(
        original.in_channels,
        original.out_channels,
        original.kernel_size,
        padding=original.padding,
        bias=original.bias is not None,
        device="meta",
    )
    copy.weight = _frozen(original.weight)
    if original.bias is not None:
        copy.bias = _frozen(original.bias)
    return copy


def _linear(original: nn.Module) -> nn.Module:
    copy = nn.Linear(original.in_features, original.out_features, bias=original.bias is not None, device="meta")
    copy.weight = _frozen(original.weight)
    if original.bias is not None:
        copy.bias = _frozen(original.bias)
    return copy


def _condition(original: Any) -> nn.Module:
    """Two convolutions with an activation between them."""
    return nn.Sequential(_convolution(original[0]), nn.LeakyReLU(_SLOPE, inplace=True), _convolution(original[2]))


def _frozen(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().to(torch.float32), requires_grad=False)


def _convert(module: nn.Module, dtype: torch.dtype) -> None:
    """The module's own parameters in *dtype*, channels last where they have channels."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        layout = torch.channels_last if parameter.ndim == 4 else torch.contiguous_format
        setattr(module, name, nn.Parameter(parameter.to(dtype=dtype).contiguous(memory_format=layout), requires_grad=False))


def _activated(x: torch.Tensor) -> torch.Tensor:
    return functional.leaky_relu_(x, _SLOPE)


def _doubled(x: torch.Tensor) -> torch.Tensor:
    return functional.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
