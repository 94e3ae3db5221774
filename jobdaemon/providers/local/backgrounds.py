"""
What stands behind the person.

A background is painted small (it is smooth) as float RGB, stretched to the picture, and laid behind the person strip by strip
with a little noise, so that eight bits show no bands.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from jobdaemon.providers.local.crops import Window
from jobdaemon.providers.local.layers import STRIP_ROWS, Layer, part, stretched, tiled
from jobdaemon.providers.local.subject import Pixels, Subject

_SMALL_PX = 96


@dataclass(frozen=True, slots=True)
class Scene:
    """
    A background.

    Attributes:
        name: for the caption.
        colour: its leading colour in words, so that a prompt can ask for it.
        paint: paints it: (aspect, plate in the window) to (h, w, 3) float32 RGB 0 to 255.
        wash: how strongly it tints the whole picture when no person could be cut out of the photo.
    """

    name: str
    colour: str
    paint: Callable[[tuple[int, int], Layer], Layer]
    wash: float = 0.55


def _rgb(code: str) -> NDArray[np.float32]:
    return np.array([int(code[i : i + 2], 16) for i in (0, 2, 4)], np.float32)


def _grid(shape: tuple[int, int]) -> tuple[Layer, Layer]:
    """The y and x of each small pixel, 0 to 1."""
    height, width = shape
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    return y / max(1, height - 1), x / max(1, width - 1)


def studio(name: str, colour: str, code: str) -> Scene:
    """Seamless paper: one colour, lit from behind the head, darker towards the corners and the floor."""

    def paint(shape: tuple[int, int], _plate: Layer) -> Layer:
        y, x = _grid(shape)
        light = 1.07 - 0.30 * np.hypot((x - 0.5) * 0.95, (y - 0.38) * 0.9) ** 1.5 - 0.06 * y
        return np.asarray(_rgb(code) * light[..., None], np.float32)

    return Scene(name, colour, paint)


def spotlight(name: str, colour: str, inner: str, outer: str, *, x0: float = 0.5, y0: float = 0.4) -> Scene:
    """A pool of light on a dark wall."""

    def paint(shape: tuple[int, int], _plate: Layer) -> Layer:
        y, x = _grid(shape)
        share = np.exp(-2.6 * (((x - x0) * 1.25) ** 2 + ((y - y0) * 1.15) ** 2) * 1.6)[..., None]
        return np.asarray(_rgb(outer) + (_rgb(inner) - _rgb(outer)) * share, np.float32)

    return Scene(name, colour, paint)


def gradient(name: str, colour: str, *codes: str, angle: float = 90.0) -> Scene:
    """Colours running into each other; at 90 degrees from top to bottom."""

    def paint(shape: tuple[int, int], _plate: Layer) -> Layer:
        y, x = _grid(shape)
        turn = np.deg2rad(angle)
        along = (x - 0.5) * np.cos(turn) + (y - 0.5) * np.sin(turn) + 0.5
        along = np.clip((along - 0.5) / (abs(np.cos(turn)) + abs(np.sin(turn))) + 0.5, 0, 1)
        along = along * along * (3 - 2 * along)
        places = np.linspace(0, 1, len(codes))
        ramp = np.stack([_rgb(code) for code in codes])
        return np.stack([np.interp(along, places, ramp[:, i]) for i in range(3)], axis=-1).astype(np.float32)

    return Scene(name, colour, paint)


def split_wall(name: str, colour: str, left: str, right: str) -> Scene:
    """Two painted halves meeting in a slanted, slightly soft line: a poster's backdrop."""

    def paint(shape: tuple[int, int], _plate: Layer) -> Layer:
        y, x = _grid(shape)
        share = np.clip(((x - 0.5) + (y - 0.5) * 0.35) * shape[1] / 1.5 + 0.5, 0, 1)[..., None]
        return np.asarray(_rgb(left) + (_rgb(right) - _rgb(left)) * share, np.float32)

    return Scene(name, colour, paint)


def sunburst(name: str, colour: str, one: str, other: str) -> Scene:
    """Rays from behind the head."""

    def paint(shape: tuple[int, int], _plate: Layer) -> Layer:
        y, x = _grid(shape)
        angle = np.arctan2((y - 0.42) * shape[0] / shape[1], x - 0.5)
        share = np.clip(0.5 + 6 * np.sin(angle * 12), 0, 1)[..., None]
        return np.asarray(_rgb(one) + (_rgb(other) - _rgb(one)) * share, np.float32)

    return Scene(name, colour, paint)


def canvas(name: str, colour: str, dark: str, light: str, seed: int) -> Scene:
    """A hand-painted studio canvas: clouds of two tones."""

    def paint(shape: tuple[int, int], _plate: Layer) -> Layer:
        height, width = shape
        clouds = np.zeros(shape, np.float32)
        dice = np.random.Generator(np.random.PCG64(seed))
        for cells, weight in ((3, 1.0), (6, 0.5), (13, 0.25)):
            noise = dice.random((cells, cells), np.float32)
            clouds += weight * np.asarray(cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC), np.float32)
        y, x = _grid(shape)
        share = np.clip((clouds / 1.75 - 0.25) * 1.8, 0, 1) * (1 - 0.75 * np.hypot(x - 0.5, (y - 0.4) * 0.8))
        return np.asarray(_rgb(dark) + (_rgb(light) - _rgb(dark)) * np.clip(share, 0, 1)[..., None], np.float32)

    return Scene(name, colour, paint)


def own(name: str, colour: str, *, gain: float = 1.0, saturation: float = 1.0, blur: float = 0.0, tint: str = "808080") -> Scene:
    """The photo's own background, out of focus, brightened, darkened or tinted."""

    def paint(_shape: tuple[int, int], plate: Layer) -> Layer:
        layer = cv2.GaussianBlur(plate, (0, 0), blur * max(plate.shape[:2])) if blur else plate
        grey = np.asarray(layer, np.float32).mean(axis=-1, keepdims=True)
        return np.asarray(np.clip((grey + (layer - grey) * saturation) * gain * (_rgb(tint) / 128), 0, 255), np.float32)

    return Scene(name, colour, paint, wash=0.0)


#: The photo as it is; nothing is cut out.
ORIGINAL = "original background"

_ALL = (
    studio("studio grey", "grey", "a9adb0"),
    studio("studio white", "white", "f2f1ee"),
    studio("studio charcoal", "black", "34373c"),
    studio("studio blue", "blue", "4f86b8"),
    studio("studio sand", "beige", "d9c3a0"),
    studio("studio sage", "green", "8fa98c"),
    studio("studio blush", "pink", "e6b5ae"),
    studio("studio mustard", "yellow", "d9a531"),
    studio("studio teal", "green", "1f6f70"),
    studio("studio red", "red", "a8322d"),
    studio("studio lilac", "purple", "b6a3cf"),
    studio("studio sky", "blue", "a8cfe6"),
    spotlight("navy spotlight", "blue", "3f6aa6", "0a1428"),
    spotlight("burgundy spotlight", "red", "a34250", "24060e"),
    spotlight("emerald spotlight", "green", "3d8f70", "04211a"),
    spotlight("amber spotlight", "orange", "e09a4a", "2c1606"),
    spotlight("violet spotlight", "purple", "8a63c0", "160a2c", x0=0.35),
    spotlight("silver spotlight", "grey", "d4d8dc", "3a3d42", x0=0.6),
    gradient("sunset gradient", "orange", "2b3a72", "c25d7c", "ffb46b"),
    gradient("ocean gradient", "blue", "bfe6ef", "3f94c4", "123f74"),
    gradient("dawn gradient", "pink", "f9d9c8", "e7a7bd", "8d8fc9", angle=60),
    gradient("mint gradient", "green", "e9f7e4", "8fd0b5", "3d8f8c", angle=120),
    gradient("neon gradient", "purple", "ff4f9a", "7a3cff", "16b8f3", angle=20),
    gradient("slate gradient", "grey", "d5dbe2", "7d8a99", "39434f"),
    gradient("citrus gradient", "yellow", "fff1a8", "ffc94a", "f0803c", angle=70),
    split_wall("coral and cream wall", "orange", "f07a5c", "f7ead2"),
    split_wall("blue and yellow wall", "blue", "2f62c9", "f7cf46"),
    split_wall("green and pink wall", "green", "2f7f68", "f3b8c2"),
    sunburst("red sunburst", "red", "c93a2e", "f2dcb0"),
    sunburst("teal sunburst", "blue", "2a8a96", "f4e7c3"),
    canvas("olive canvas", "green", "2b2c1c", "8b8a5c", 3),
    canvas("umber canvas", "brown", "2a1b12", "9a7452", 5),
    canvas("storm canvas", "blue", "1b222c", "73889c", 9),
    own("soft blur", "", blur=0.012),
    own("bright haze", "white", gain=1.25, saturation=0.6, blur=0.05, tint="908e8a"),
    own("night blur", "black", gain=0.42, saturation=1.1, blur=0.03, tint="767c90"),
    own("warm blur", "orange", gain=0.95, saturation=1.2, blur=0.03, tint="a4825c"),
    own("blue hour blur", "blue", gain=0.72, saturation=0.8, blur=0.03, tint="6282b4"),
)
SCENES: dict[str, Scene] = {scene.name: scene for scene in _ALL}


def lay_background(picture: Pixels, subject: Subject, window: Window, name: str, noise: NDArray[np.int8]) -> Pixels:
    """
    Put the person on a background, in place.

    Args:
        picture: (H, W, 3) uint8 RGB, the photo in *window*; written to.
        subject: where the person is.
        window: what *picture* shows.
        name: of a scene; :data:`ORIGINAL` changes nothing.
        noise: (n, n) int8 tile.
    """
    if name == ORIGINAL:
        return picture
    scene = SCENES[name]
    height, width = picture.shape[:2]
    photo = subject.pixels.shape[:2]
    scale = _SMALL_PX / max(height, width)
    shape = (max(2, round(height * scale)), max(2, round(width * scale)))
    finer = 5 if scene.wash and ("wall" in name or "sunburst" in name) else 1
    plate = part(subject.plate, photo, window, rows=(0, height), size=(height, width), out=(shape[0] * 3, shape[1] * 3))
    backdrop = scene.paint((shape[0] * finer, shape[1] * finer), plate)
    for top in range(0, height, STRIP_ROWS):
        bottom = min(height, top + STRIP_ROWS)
        strip = picture[top:bottom]
        behind = stretched(backdrop, top, bottom, (height, width))
        if subject.matte is None or subject.person is None:
            _wash(strip, behind, scene)
            continue
        behind += tiled(noise, top, bottom, width)[..., None] * np.float32(0.022)
        alpha = part(subject.matte, photo, window, rows=(top, bottom), size=(height, width)).astype(np.uint8)
        edge = np.nonzero((alpha > 0) & (alpha < 255))
        if edge[0].size:
            person = part(subject.person, photo, window, rows=(top, bottom), size=(height, width))[edge].astype(np.float32)
            share = alpha[edge].astype(np.float32)[:, None] / 255
            # Inside, the photo's own sharp pixels; towards the edge, the person's colours without the old background.
            person += (strip[edge] - person) * np.clip(share * 5 - 4, 0, 1)
            mixed = behind[edge]
            strip[edge] = np.clip(mixed + (person - mixed) * share + 0.5, 0, 255)
        cv2.copyTo(cv2.convertScaleAbs(np.maximum(behind, 0, out=behind)), (alpha == 0).view(np.uint8), strip)
    return picture


def _wash(strip: Pixels, behind: Layer, scene: Scene) -> None:
    """Without a person to keep apart: soft light in the background's colours over everything."""
    if not scene.wash:
        return
    base = strip.astype(np.float32) / 255
    colour = behind / 255
    soft = (1 - 2 * colour) * base * base + 2 * colour * base
    tinted = soft * 0.75 + colour * (0.35 * base.mean(axis=-1, keepdims=True) + 0.08)
    strip[:] = np.rint(np.clip(base + (tinted - base) * scene.wash, 0, 1) * 255)
