"""
Small smooth layers over large pictures, a strip of rows at a time.

A float copy of a whole picture would cost 40 MB for each thread and fall out of the processor's cache; a strip does neither.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from jobdaemon.providers.local.crops import Window
from jobdaemon.providers.local.subject import Pixels

#: (h, w) or (h, w, 3) float32.
Layer = NDArray[np.float32]
STRIP_ROWS = 128


def multiply(picture: Pixels, small: Layer) -> None:
    """Multiply *picture* (H, W, 3) in place by *small* (h, w, 3), stretched over it."""
    for top, bottom, strip in _strips(picture):
        strip[:] = np.clip(strip * stretched(small, top, bottom, _size(picture)) + 0.5, 0, 255)


def screen(picture: Pixels, small: Layer) -> None:
    """Add light to *picture* (H, W, 3) in place: *small* (h, w, 3), 0 to 1, stretched over it and screened on."""
    for top, bottom, strip in _strips(picture):
        light = np.clip(stretched(small, top, bottom, _size(picture)), 0, 1)
        strip[:] = strip + (255 - strip.astype(np.float32)) * light + 0.5


def blend(picture: Pixels, other: Pixels, share: float) -> None:
    """Move *picture* in place towards *other* (same shape) by *share*."""
    cv2.addWeighted(picture, 1 - share, other, share, 0, dst=picture)


def add_grain(picture: Pixels, noise: NDArray[np.int8], strength: float) -> None:
    """
    Film grain, in place: strongest in the middle tones, as on film.

    Args:
        picture: (H, W, 3) uint8 RGB.
        noise: (n, n) int8 tile with a standard deviation of 32.
        strength: standard deviation at middle grey, in levels of 255.
    """
    tone = np.arange(256, dtype=np.float32) / 255
    response = (strength / 32 * (0.35 + 0.65 * 4 * tone * (1 - tone))).astype(np.float32)
    for top, bottom, strip in _strips(picture):
        grain = response[strip[..., 1]] * tiled(noise, top, bottom, picture.shape[1])
        strip[:] = np.clip(strip + grain[..., None] + 0.5, 0, 255)


def _strips(picture: Pixels) -> list[tuple[int, int, Pixels]]:
    height = picture.shape[0]
    return [(top, min(height, top + STRIP_ROWS), picture[top : top + STRIP_ROWS]) for top in range(0, height, STRIP_ROWS)]


def _size(picture: Pixels) -> tuple[int, int]:
    return picture.shape[0], picture.shape[1]


def stretched(small: Layer, top: int, bottom: int, size: tuple[int, int]) -> Layer:
    """Rows *top* to *bottom* of *small* stretched over a picture of *size* (height, width)."""
    height, width = size
    scale_x, scale_y = (small.shape[1] - 1) / max(1, width - 1), (small.shape[0] - 1) / max(1, height - 1)
    matrix = np.array([[scale_x, 0, 0], [0, scale_y, top * scale_y]], np.float64)
    return np.asarray(_warp(small, matrix, width, bottom - top), np.float32)


def part(
    layer: NDArray[np.generic],
    photo: tuple[int, ...],
    window: Window,
    *,
    rows: tuple[int, int],
    size: tuple[int, int],
    out: tuple[int, int] | None = None,
) -> NDArray[np.float32]:
    """
    What a layer shows in some rows of a picture.

    Args:
        layer: the whole photo, smaller.
        photo: height and width of the photo, pixels.
        window: what the picture shows of the photo.
        rows: first and last (exclusive) row of the picture.
        size: height and width of the picture, pixels.
        out: height and width of the result; those of the rows when None.
    """
    height, width = size
    top, bottom = rows
    out_h, out_w = out if out is not None else (bottom - top, width)
    step_x = window.width / out_w * layer.shape[1] / photo[1]
    step_y = window.height * (bottom - top) / height / out_h * layer.shape[0] / photo[0]
    start_x = window.x * layer.shape[1] / photo[1] + step_x / 2 - 0.5
    start_y = (window.y + window.height * top / height) * layer.shape[0] / photo[0] + step_y / 2 - 0.5
    return np.asarray(_warp(layer, np.array([[step_x, 0, start_x], [0, step_y, start_y]], np.float64), out_w, out_h))


def _warp(layer: NDArray[np.generic], matrix: NDArray[np.float64], width: int, height: int) -> NDArray[np.float32]:
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    warped = cv2.warpAffine(layer, matrix, (width, height), flags=flags, borderMode=cv2.BORDER_REPLICATE)  # type: ignore[arg-type]
    return np.asarray(warped)


def tiled(noise: NDArray[np.int8], top: int, bottom: int, width: int) -> NDArray[np.int8]:
    """Rows *top* to *bottom* of an endless wall of *noise* tiles, *width* pixels wide."""
    rows = np.arange(top, bottom) % noise.shape[0]
    repeats = -(-width // noise.shape[1])
    return np.tile(noise[rows], (1, repeats))[:, :width]
