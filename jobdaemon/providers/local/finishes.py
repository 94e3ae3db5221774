"""
The last touch: film, light, paint, print and frames.

Every finish takes a picture it may write to, returns the finished one, and depends on nothing but its arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray

from jobdaemon.providers.local.layers import Layer, add_grain, blend, multiply, screen
from jobdaemon.providers.local.subject import Pixels

_TILE_PX = 512
_SMALL_PX = 128
_PAINT_PX = 900


@dataclass(frozen=True, slots=True)
class Finish:
    """
    A last touch.

    Attributes:
        name: for the caption.
        family: what it belongs to: clean, film, light, paint, print, frame.
        apply: makes it: (picture, variant) to picture; *variant* moves leaks, shadows and grain about.
        scale: size of the picture before the finish over the size after it; below 1 it adds a border.
    """

    name: str
    family: str
    apply: Callable[[Pixels, int], Pixels]
    scale: float = 1.0


@lru_cache(maxsize=1)
def noise_tile() -> NDArray[np.int8]:
    """(512, 512) int8 grain that repeats without a seam, standard deviation 32."""
    dice = np.random.Generator(np.random.PCG64(7))
    grain = dice.standard_normal((_TILE_PX, _TILE_PX), np.float32)
    # Two parts of fine grain and one of clumps; wrapped before blurring, so that the tile's edges meet.
    wrapped = np.pad(grain, 8, mode="wrap")
    clumps = np.asarray(cv2.GaussianBlur(wrapped, (0, 0), 1.1), np.float32)[8:-8, 8:-8]
    mixed = grain * 0.55 + clumps / clumps.std()
    tile: NDArray[np.int8] = np.clip(mixed / mixed.std() * 32, -127, 127).astype(np.int8)
    tile.setflags(write=False)  # shared between threads
    return tile


def _shifted(variant: int) -> NDArray[np.int8]:
    moved: NDArray[np.int8] = np.roll(noise_tile(), (variant * 131 % _TILE_PX, variant * 197 % _TILE_PX), axis=(0, 1))
    return moved


def _grid(picture: Pixels, long_side: int = _SMALL_PX) -> tuple[Layer, Layer]:
    """The y and x from -1 to 1 at a small size of the picture's shape."""
    height, width = picture.shape[:2]
    scale = long_side / max(height, width)
    rows, columns = max(2, round(height * scale)), max(2, round(width * scale))
    y, x = np.meshgrid(np.linspace(-1, 1, rows), np.linspace(-1, 1, columns), indexing="ij")
    return y.astype(np.float32), x.astype(np.float32)


def _rgb(layer: Layer, *colour: float) -> Layer:
    return np.asarray(layer[..., None] * np.array(colour, np.float32), np.float32)


def _vignette(picture: Pixels, depth: float) -> None:
    y, x = _grid(picture)
    fall = 1 - depth * np.clip((x * x + y * y) / 2, 0, 1) ** 1.4
    multiply(picture, _rgb(fall.astype(np.float32), 1, 1, 1))


def _shrunk(picture: Pixels, long_side: int) -> Pixels:
    height, width = picture.shape[:2]
    scale = min(1.0, long_side / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(cv2.resize(picture, size, interpolation=cv2.INTER_AREA), np.uint8)


def _grown(small: Pixels, picture: Pixels, how: int = cv2.INTER_CUBIC) -> Pixels:
    return np.asarray(cv2.resize(small, (picture.shape[1], picture.shape[0]), interpolation=how), np.uint8)


def _glow(picture: Pixels, *, threshold: float, spread: float, tint: tuple[float, float, float]) -> None:
    """Light bleeding out of the highlights: bloom in white, halation in red."""
    small = _shrunk(picture, 320).astype(np.float32) / 255
    bright = np.clip((small.min(axis=-1) - threshold) / (1 - threshold), 0, 1) ** 1.5
    soft = np.asarray(cv2.GaussianBlur(bright, (0, 0), spread * 320), np.float32)
    screen(picture, _rgb(soft, *tint))


def _clean(picture: Pixels, _variant: int) -> Pixels:
    return picture


def _shaded(picture: Pixels, _variant: int) -> Pixels:
    _vignette(picture, 0.55)
    return picture


def _film(picture: Pixels, variant: int) -> Pixels:
    _glow(picture, threshold=0.72, spread=0.018, tint=(0.42, 0.13, 0.05))
    _vignette(picture, 0.38)
    add_grain(picture, _shifted(variant), 7)
    return picture


def _pushed_film(picture: Pixels, variant: int) -> Pixels:
    _vignette(picture, 0.5)
    coarse = np.ascontiguousarray(np.kron(_shifted(variant)[::2, ::2], np.ones((2, 2), np.int8)))
    add_grain(picture, coarse, 14)
    return picture


def _soft_glow(picture: Pixels, _variant: int) -> Pixels:
    small = _shrunk(picture, 512)
    soft = np.asarray(cv2.GaussianBlur(small, (0, 0), 9), np.float32) / np.float32(255)
    screen(picture, soft * np.float32(0.30))
    _glow(picture, threshold=0.6, spread=0.03, tint=(0.35, 0.33, 0.30))
    return picture


def _leak(*colours: tuple[float, float, float]) -> Callable[[Pixels, int], Pixels]:
    """Light that got into the camera: a burning edge and a fainter streak, on the side the variant says."""

    def apply(picture: Pixels, variant: int) -> Pixels:
        y, x = _grid(picture)
        side = 1.0 if variant % 2 else -1.0
        along = (y if variant % 4 < 2 else -y) * 0.5
        burn = np.clip(1 - (1.05 - side * x + along * 0.5) / 0.85, 0, 1) ** 1.3
        streak = 0.55 * np.exp(-(((x * side - 0.25 + along * 0.6) / 0.16) ** 2)) * np.clip(0.7 - y * side, 0, 1)
        light = _rgb(burn.astype(np.float32), *colours[0]) + _rgb(streak.astype(np.float32), *colours[-1])
        screen(picture, light)
        add_grain(picture, _shifted(variant), 4)
        return picture

    return apply


def _window_light(picture: Pixels, variant: int) -> Pixels:
    """Sun through a window: bright panes and soft shadow bars, slanted."""
    y, x = _grid(picture, 256)
    height, width = picture.shape[:2]
    slant = 0.45 if variant % 2 else -0.45
    down, across = y * height / max(height, width), x * width / max(height, width)
    # The bright bar crosses a little above the middle, where a face is: a shadow over the eyes spoils a portrait.
    bars = np.clip(0.60 + 1.9 * np.cos((down + 0.2 * height / max(height, width) + across * slant) * 9), 0, 1)
    beam = np.clip(1.5 - 1.4 * np.abs(across + 0.2 * slant), 0.25, 1)
    light = np.asarray(cv2.GaussianBlur((bars * beam).astype(np.float32), (0, 0), 2.2), np.float32)
    multiply(picture, 0.46 + _rgb(light, 0.66, 0.60, 0.50) + _rgb(1 - light, -0.03, 0.0, 0.06))
    return picture


def _gels(left: tuple[float, float, float], right: tuple[float, float, float]) -> Callable[[Pixels, int], Pixels]:
    """Two coloured lamps, one from each side; the middle of the face keeps most of its own colour."""

    def apply(picture: Pixels, variant: int) -> Pixels:
        y, x = _grid(picture)
        flip = -1.0 if variant % 2 else 1.0
        from_left, from_right = (np.clip(0.5 - s * x * 0.75 + 0.1 * y, 0, 1) for s in (flip, -flip))
        light = _rgb(from_left.astype(np.float32), *left) + _rgb(from_right.astype(np.float32), *right)
        multiply(picture, np.asarray(0.30 + light, np.float32))
        screen(picture, np.asarray(0.16 * light * (np.abs(x)[..., None] ** 1.5), np.float32))
        return picture

    return apply


def _fairy_lights(picture: Pixels, variant: int) -> Pixels:
    """Out-of-focus lamps along the edges."""
    rows, columns = _grid(picture, 384)[0].shape
    dice = np.random.Generator(np.random.PCG64(1000 + variant))
    lamps = np.zeros((rows, columns, 3), np.float32)
    for _ in range(34):
        angle, reach = dice.random() * 2 * np.pi, 0.72 + 0.45 * dice.random()
        px, py = (np.cos(angle) * reach + 1) / 2 * columns, (np.sin(angle) * reach + 1) / 2 * rows
        size = int((0.025 + 0.05 * dice.random()) * max(rows, columns))
        warm = 0.25 + 0.75 * dice.random()
        disc = np.zeros_like(lamps)
        strength = 0.25 + 0.35 * float(dice.random())
        colour = (strength, strength * (0.55 + 0.3 * warm), strength * 0.5 * warm)
        cv2.circle(disc, (int(px), int(py)), size, colour, -1, cv2.LINE_AA)
        lamps = np.maximum(lamps, disc)
    screen(picture, np.asarray(cv2.GaussianBlur(lamps, (0, 0), 1.6), np.float32))
    return picture


def _oil(picture: Pixels, variant: int) -> Pixels:
    """Broad brushwork: colours pooled within edges, then lit as if the paint were thick."""
    small = _shrunk(picture, _PAINT_PX)
    small = np.asarray(cv2.bilateralFilter(cv2.medianBlur(small, 7), 7, 38, 7), np.uint8)
    small = np.asarray(cv2.medianBlur(small, 7), np.uint8)
    painted = _grown(small, picture)
    relief = np.asarray(cv2.cvtColor(small, cv2.COLOR_RGB2GRAY), np.float32)
    relief += _brush(relief.shape, variant)
    slope = np.clip(cv2.Sobel(relief, cv2.CV_32F, 1, 1, ksize=3) / 255 * 0.9, -0.16, 0.16)
    multiply(painted, _rgb(np.asarray(1.03 + slope, np.float32), 1, 1, 1))
    return painted


def _brush(shape: tuple[int, ...], variant: int) -> Layer:
    """Strokes: noise smeared along a slant."""
    dice = np.random.Generator(np.random.PCG64(2000 + variant))
    noise = dice.standard_normal(shape[:2], np.float32)
    kernel = np.eye(15, dtype=np.float32) if variant % 2 else np.fliplr(np.eye(15, dtype=np.float32))
    return np.asarray(cv2.filter2D(noise, -1, np.ascontiguousarray(kernel) / 15), np.float32) * 34


def _watercolour(picture: Pixels, variant: int) -> Pixels:
    """Washes that pool at their edges, on rough paper that shows at the rim."""
    small = _shrunk(picture, _PAINT_PX)
    flat = small
    for _ in range(2):
        flat = np.asarray(cv2.bilateralFilter(flat, 7, 46, 9), np.uint8)
    grey = np.asarray(cv2.cvtColor(flat, cv2.COLOR_RGB2GRAY), np.float32)
    edge = np.hypot(cv2.Sobel(grey, cv2.CV_32F, 1, 0), cv2.Sobel(grey, cv2.CV_32F, 0, 1)) / 255
    pool = 1 - 0.42 * np.clip(np.asarray(cv2.GaussianBlur(edge, (0, 0), 1.2)) * 0.7, 0, 1)
    rows, columns = grey.shape
    dice = np.random.Generator(np.random.PCG64(3000 + variant))
    blots = np.asarray(cv2.resize(dice.random((14, 14), np.float32), (columns, rows), interpolation=cv2.INTER_CUBIC), np.float32)
    paper = np.asarray(cv2.GaussianBlur(dice.standard_normal((rows, columns), np.float32), (0, 0), 1.3), np.float32)
    y, x = _grid(small, max(rows, columns))
    y, x = y[:rows, :columns], x[:rows, :columns]
    rim = np.clip((1.05 - np.maximum(np.abs(x), np.abs(y)) + 0.34 * (blots - 0.62)) / 0.10, 0, 1)[..., None]
    light = 255 * (flat.astype(np.float32) / 255) ** 0.82
    wash = light * (pool * (0.94 + 0.12 * blots) * (1 + 0.10 * paper))[..., None]
    sheet = np.array([250, 247, 240], np.float32) * (1 + 0.045 * paper)[..., None]
    wash = np.minimum(255, wash * 0.93 + 255 * 0.06)
    painted = np.clip(sheet + (wash - sheet) * rim, 0, 255)
    return _grown(np.asarray(np.rint(painted), np.uint8), picture)


def _poster(picture: Pixels, _variant: int) -> Pixels:
    """Screen print: few flat tones with crisp edges."""
    small = np.asarray(cv2.bilateralFilter(cv2.medianBlur(_shrunk(picture, _PAINT_PX), 7), 7, 40, 9), np.uint8)
    smooth = _grown(small, picture)
    levels = 5
    tone = np.arange(256, dtype=np.float32) / 255 * levels
    # Steep ramps instead of steps: the print's edges come out anti-aliased.
    steps = np.floor(tone) + np.clip((tone - np.floor(tone) - 0.5) * 9 + 0.5, 0, 1)
    table = np.clip(steps / levels * 255, 0, 255).astype(np.uint8)
    # Only the lightness is flattened: done channel by channel, hair and skin break up into green and pink.
    lightness, red, blue = cv2.split(cv2.cvtColor(smooth, cv2.COLOR_RGB2YCrCb))
    stronger = np.clip((np.arange(256) - 128) * 1.25 + 128, 0, 255).astype(np.uint8)
    inks = [cv2.LUT(lightness, table), cv2.LUT(red, stronger), cv2.LUT(blue, stronger)]
    return np.asarray(cv2.cvtColor(cv2.merge(inks), cv2.COLOR_YCrCb2RGB), np.uint8)


def _charcoal(picture: Pixels, variant: int) -> Pixels:
    """A drawing on toned paper: dodge of the inverted blur, with the shadows hatched in."""
    grey = np.asarray(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY), np.uint8)
    small = _shrunk(grey, 700)
    blurred = _grown(np.asarray(cv2.GaussianBlur(small, (0, 0), 5), np.uint8), grey, cv2.INTER_LINEAR)
    lines = np.asarray(cv2.divide(grey, cv2.max(blurred, np.full_like(blurred, 1)), scale=255), np.uint8)
    lines = np.asarray(cv2.LUT(lines, (255 * (np.arange(256) / 255) ** 2.4).astype(np.uint8)), np.uint8)
    shade = np.asarray(cv2.LUT(blurred, np.clip(120 + np.arange(256) * 0.75, 0, 255).astype(np.uint8)), np.uint8)
    drawn = np.asarray(cv2.multiply(lines, shade, scale=1 / 255), np.uint8)
    table = np.arange(256, dtype=np.float32)[:, None] / 255
    ink, paper = np.array([34, 30, 30], np.float32), np.array([246, 240, 228], np.float32)
    ramp = (ink + (paper - ink) * table).astype(np.uint8)
    drawing = np.asarray(cv2.merge([cv2.LUT(drawn, ramp[:, i]) for i in range(3)]), np.uint8)
    # A third of the photo's own colour stays, like chalk over the drawing.
    soft = _grown(np.asarray(cv2.GaussianBlur(_shrunk(picture, 400), (0, 0), 2), np.uint8), picture, cv2.INTER_LINEAR)
    blend(drawing, np.asarray(cv2.multiply(drawing, cv2.max(soft, np.full_like(soft, 60)), scale=1 / 235), np.uint8), 0.45)
    add_grain(drawing, _shifted(variant), 9)
    return drawing


def _halftone(picture: Pixels, variant: int) -> Pixels:
    """Printed dots, large enough to see and small enough to keep the face."""
    height, width = picture.shape[:2]
    pitch = max(5.0, max(height, width) / 170)
    angle = np.deg2rad(45 if variant % 2 else 22.5)
    y, x = np.arange(height, dtype=np.float32)[:, None], np.arange(width, dtype=np.float32)[None, :]
    soft = np.asarray(cv2.GaussianBlur(picture, (0, 0), pitch / 5), np.uint8)
    grey = np.asarray(cv2.cvtColor(soft, cv2.COLOR_RGB2GRAY), np.uint8)
    wave = np.float32(2 * np.pi / pitch)
    for top in range(0, height, 128):
        rows = y[top : top + 128]
        u = np.cos((x * np.cos(angle) + rows * np.sin(angle)) * wave)
        v = np.cos((rows * np.cos(angle) - x * np.sin(angle)) * wave)
        dot = np.clip((grey[top : top + 128] / np.float32(255) - (0.5 + 0.25 * (u + v))) * 3.5 + 0.5, 0, 1)
        strip = soft[top : top + 128]
        paper = 255 - (255 - strip.astype(np.float32)) * 0.45
        ink = strip.astype(np.float32) * 0.42
        strip[:] = ink + (paper - ink) * dot[..., None]
    return soft


def _bordered(picture: Pixels, edges: tuple[float, float, float, float], colour: tuple[int, int, int]) -> Pixels:
    """A border around the picture: top, bottom, left, right in fractions of its long side."""
    long_side = max(picture.shape[:2])
    top, bottom, left, right = (round(edge * long_side) for edge in edges)
    return np.asarray(cv2.copyMakeBorder(picture, top, bottom, left, right, cv2.BORDER_CONSTANT, value=colour), np.uint8)


def _white_mat(picture: Pixels, _variant: int) -> Pixels:
    inner = _bordered(picture, (0.003,) * 4, (60, 58, 54))
    return _bordered(inner, (0.075,) * 4, (247, 245, 240))


def _instant(picture: Pixels, _variant: int) -> Pixels:
    """An instant print: milky blacks, a wide lower margin."""
    _vignette(picture, 0.3)
    screen(picture, np.broadcast_to(np.array([0.07, 0.06, 0.10], np.float32), (2, 2, 3)).copy())
    return _bordered(picture, (0.045, 0.155, 0.045, 0.045), (240, 237, 228))


def _negative_frame(picture: Pixels, variant: int) -> Pixels:
    """A black film edge with sprocket holes above and below."""
    _film(picture, variant)
    framed = _bordered(picture, (0.075, 0.075, 0.03, 0.03), (14, 13, 12))
    height, width = framed.shape[:2]
    band, hole_w = round(0.075 * max(picture.shape[:2])), round(0.03 * max(picture.shape[:2]))
    for x in range(hole_w, width - hole_w, round(hole_w * 2.1)):
        for y in (round(band * 0.26), height - round(band * 0.74)):
            cv2.rectangle(framed, (x, y), (x + hole_w, y + round(band * 0.48)), (232, 228, 218), -1)
    return framed


def _colour_mat(r: int, g: int, b: int) -> Callable[[Pixels, int], Pixels]:
    def apply(picture: Pixels, _variant: int) -> Pixels:
        inner = _bordered(picture, (0.006,) * 4, (250, 248, 242))
        return _bordered(inner, (0.06,) * 4, (r, g, b))

    return apply


_ALL = (
    Finish("clean", "clean", _clean),
    Finish("vignette", "clean", _shaded),
    Finish("soft glow", "light", _soft_glow),
    Finish("film look", "film", _film),
    Finish("pushed film", "film", _pushed_film),
    Finish("orange light leak", "leak", _leak((0.95, 0.42, 0.10), (0.85, 0.20, 0.10))),
    Finish("pink light leak", "leak", _leak((0.95, 0.25, 0.50), (0.55, 0.25, 0.80))),
    Finish("rainbow light leak", "leak", _leak((0.95, 0.75, 0.20), (0.15, 0.55, 0.80))),
    Finish("window light", "light", _window_light),
    Finish("blue and magenta gels", "light", _gels((0.25, 0.55, 1.05), (1.05, 0.25, 0.70))),
    Finish("teal and amber gels", "light", _gels((0.15, 0.80, 0.85), (1.10, 0.65, 0.20))),
    Finish("fairy lights", "light", _fairy_lights),
    Finish("oil painting", "paint", _oil),
    Finish("watercolour", "watercolour", _watercolour),
    Finish("poster print", "print", _poster),
    Finish("charcoal drawing", "drawing", _charcoal),
    Finish("halftone print", "print", _halftone),
    Finish("white mat", "frame", _white_mat, 1 / 1.16),
    Finish("instant print", "frame", _instant, 1 / 1.2),
    Finish("negative frame", "frame", _negative_frame, 1 / 1.15),
    Finish("terracotta mat", "frame", _colour_mat(196, 98, 66), 1 / 1.14),
    Finish("navy mat", "frame", _colour_mat(32, 48, 92), 1 / 1.14),
)
FINISHES: dict[str, Finish] = {finish.name: finish for finish in _ALL}
