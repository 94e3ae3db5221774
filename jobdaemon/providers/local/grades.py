"""
Colour: every grade is a function from colour to colour, applied to a picture as one 3D table.

Skin stays in the middle of every curve, so faces keep their modelling; only the duotones recolour it on purpose.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

Colours = NDArray[np.float32]
_SIZE = 25
_LUMA = np.array([0.2126, 0.7152, 0.0722], np.float32)


def apply_grade(pixels: NDArray[np.uint8], name: str) -> NDArray[np.uint8]:
    """*pixels*, (H, W, 3) uint8 RGB, graded. ``natural`` returns them as they are."""
    if name == "natural":
        return pixels
    # A copy: what Pillow hands out is read-only, and later steps write in place.
    return np.array(Image.fromarray(pixels).filter(_table(name)))


@lru_cache(maxsize=64)
def _table(name: str) -> ImageFilter.Color3DLUT:
    steps = np.linspace(0, 1, _SIZE, dtype=np.float32)
    blue, green, red = np.meshgrid(steps, steps, steps, indexing="ij")
    colours = np.stack([red, green, blue], axis=-1).reshape(-1, 3)
    graded = np.clip(GRADES[name](colours), 0, 1).astype(np.float32)
    return ImageFilter.Color3DLUT(_SIZE, graded.reshape(-1).tolist())


def _luma(c: Colours) -> Colours:
    return np.asarray(c @ _LUMA, np.float32)[:, None]


def _contrast(c: Colours, amount: float, pivot: float = 0.45) -> Colours:
    """An S-curve around *pivot*; negative amounts flatten."""
    curve = pivot + (c - pivot) * (1 + amount)
    return np.asarray(np.where(amount > 0, _shoulder(curve), curve), np.float32)


def _shoulder(c: Colours) -> Colours:
    """Bend the ends softly into 0 and 1 instead of clipping them."""
    high = np.where(c > 0.8, 0.8 + 0.2 * np.tanh((c - 0.8) / 0.2), c)
    return np.asarray(np.where(high < 0.1, 0.1 + 0.1 * np.tanh((high - 0.1) / 0.1), high), np.float32)


def _saturate(c: Colours, factor: float) -> Colours:
    grey = _luma(c)
    return np.asarray(grey + (c - grey) * factor, np.float32)


def _tint(c: Colours, shadows: tuple[float, float, float], highlights: tuple[float, float, float]) -> Colours:
    """Add one colour to the shadows and one to the highlights (split toning)."""
    grey = _luma(c)
    dark, light = np.array(shadows, np.float32), np.array(highlights, np.float32)
    return np.asarray(c + (1 - grey) ** 2 * dark + grey**2 * light, np.float32)


def _gain(c: Colours, r: float, g: float, b: float) -> Colours:
    return np.asarray(c * np.array([r, g, b], np.float32), np.float32)


def _lift(c: Colours, black: float, white: float = 1.0) -> Colours:
    return np.asarray(black + c * (white - black), np.float32)


def _mono(weights: tuple[float, float, float], contrast: float, gamma: float = 1.0) -> Callable[[Colours], Colours]:
    def grade(c: Colours) -> Colours:
        grey = np.clip(c @ np.array(weights, np.float32), 0, 1)[:, None] ** gamma
        return np.repeat(_contrast(np.asarray(grey, np.float32), contrast), 3, axis=1)

    return grade


def _toned(base: Callable[[Colours], Colours], *stops: tuple[int, int, int]) -> Callable[[Colours], Colours]:
    """Map dark to light onto a ramp of colours, each 0 to 255."""
    ramp = np.array(stops, np.float32) / 255
    places = np.linspace(0, 1, len(stops))

    def grade(c: Colours) -> Colours:
        grey = np.clip(base(c)[:, 0], 0, 1)
        return np.stack([np.interp(grey, places, ramp[:, i]) for i in range(3)], axis=1).astype(np.float32)

    return grade


# Red counts most: skin turns out light and even, as with a yellow filter on black-and-white film.
_PORTRAIT = (0.45, 0.45, 0.10)

GRADES: dict[str, Callable[[Colours], Colours]] = {
    "natural": lambda c: c,
    "crisp": lambda c: _saturate(_contrast(c, 0.18), 1.08),
    "warm": lambda c: _tint(_gain(_contrast(c, 0.08), 1.06, 1.0, 0.90), (0.01, 0.0, -0.01), (0.04, 0.02, -0.03)),
    "golden hour": lambda c: _tint(_gain(_contrast(c, 0.10), 1.10, 0.99, 0.78), (0.05, 0.01, -0.02), (0.08, 0.05, -0.06)),
    "cool": lambda c: _saturate(_tint(_gain(_contrast(c, 0.10), 0.94, 1.0, 1.08), (-0.01, 0.01, 0.04), (0, 0.0, 0.02)), 0.92),
    "teal and orange": lambda c: _tint(_saturate(_contrast(c, 0.16), 1.05), (-0.07, 0.04, 0.08), (0.06, 0.01, -0.07)),
    "matte": lambda c: _lift(_saturate(_contrast(c, -0.08), 0.80), 0.11, 0.95),
    "faded": lambda c: _tint(_lift(_saturate(c, 0.68), 0.16, 0.93), (0.0, 0.02, 0.06), (0.03, 0.02, -0.05)),
    "rich chrome": lambda c: _saturate(_tint(_contrast(c, 0.26, 0.5), (0.0, -0.01, 0.03), (0.03, 0.01, -0.02)), 1.22),
    "pastel": lambda c: _tint(_lift(_saturate(c, 0.72) ** 0.80, 0.12, 1.0), (0.05, 0.01, 0.07), (0.01, -0.01, 0.01)),
    "moody green": lambda c: _tint(_saturate(_contrast(c * 0.86, 0.18), 0.72), (-0.03, 0.035, 0.01), (0.0, 0.02, -0.05)),
    "dusk": lambda c: _tint(_saturate(_contrast(c * 0.88, 0.12), 0.85), (0.05, -0.02, 0.14), (0.06, -0.02, 0.03)),
    "bleach bypass": lambda c: _saturate(_contrast(c, 0.42), 0.42),
    "cross process": lambda c: _tint(_saturate(_contrast(c, 0.28), 1.15), (-0.05, 0.02, 0.12), (0.06, 0.07, -0.16)),
    "rose": lambda c: _tint(_saturate(_contrast(c, 0.04), 0.9), (0.06, -0.01, 0.03), (0.05, -0.02, 0.01)),
    "black and white": _mono(_PORTRAIT, 0.14),
    "high contrast mono": _mono((0.35, 0.55, 0.10), 0.55),
    "low key mono": _mono((0.40, 0.45, 0.15), 0.30, 1.75),
    "high key mono": _mono((0.55, 0.40, 0.05), -0.05, 0.60),
    "sepia": _toned(_mono(_PORTRAIT, 0.1), (26, 14, 6), (128, 88, 52), (214, 178, 132), (250, 240, 222)),
    "selenium": _toned(_mono(_PORTRAIT, 0.2), (14, 10, 22), (104, 92, 118), (198, 190, 206), (246, 244, 248)),
    "platinum": _toned(_mono(_PORTRAIT, -0.04), (38, 35, 32), (138, 132, 124), (210, 204, 194), (248, 245, 238)),
    "cyanotype": _toned(_mono(_PORTRAIT, 0.12), (6, 26, 62), (34, 92, 148), (150, 190, 214), (242, 246, 244)),
    "duotone navy and peach": _toned(_mono(_PORTRAIT, 0.2), (18, 22, 74), (150, 88, 122), (255, 206, 168)),
    "duotone teal and cream": _toned(_mono(_PORTRAIT, 0.2), (4, 50, 56), (66, 146, 138), (252, 238, 206)),
    "duotone violet and yellow": _toned(_mono(_PORTRAIT, 0.2), (58, 14, 98), (214, 74, 122), (255, 230, 120)),
    "duotone wine and rose": _toned(_mono(_PORTRAIT, 0.2), (52, 6, 28), (190, 60, 84), (255, 218, 214)),
    "duotone forest and mint": _toned(_mono(_PORTRAIT, 0.2), (8, 38, 24), (60, 132, 88), (216, 250, 222)),
    "duotone ink and orange": _toned(_mono(_PORTRAIT, 0.25), (16, 16, 26), (196, 72, 24), (255, 214, 140)),
    "duotone blue and pink": _toned(_mono(_PORTRAIT, 0.2), (16, 28, 120), (122, 92, 220), (255, 196, 222)),
}

MONOCHROME = tuple(name for name in GRADES if "mono" in name or name in {"black and white", "sepia", "selenium", "platinum"})
DUOTONE = tuple(name for name in GRADES if name.startswith("duotone") or name == "cyanotype")
COLOUR = tuple(name for name in GRADES if name not in MONOCHROME and name not in DUOTONE)
