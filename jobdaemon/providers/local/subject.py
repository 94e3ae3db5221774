"""
One photo, made ready for many looks: bounded pixels, where the head is, which pixels are the person.

Owns everything that is computed once per photo; what is computed per image lives in :mod:`.render`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
#: x, y, width, height of a face in pixels of the photo it was found in.
FaceBox = tuple[float, float, float, float]
FindFaces = Callable[[Pixels], Sequence[FaceBox]]

#: More than the largest output needs even for a tight crop, and 48 MB at most.
MASTER_MAX_PIXELS = 16_000_000
#: The width of 12-megapixel phone photos, and exactly half of 48-megapixel ones: those are then decoded at half size.
MASTER_LONG_SIDE_PX = 4_032
_SEGMENT_PX = 320
_MATTE_PX = 1024
_PLATE_PX = 320
_FACE_SEARCH_PX = 480


@dataclass(frozen=True, slots=True)
class Subject:
    """
    A photo ready for styling.

    Attributes:
        pixels: (H, W, 3) uint8 RGB, at most 16 MP.
        matte: (h, w) uint8, 255 where the person is; long side 1024 at most. None when no person could be told apart.
        person: (h, w, 3) uint8 RGB, the person's own colours carried over the edge of the matte, so that an edge pixel
            brings no rim of the old background with it. None together with *matte*.
        plate: (h, w, 3) float32 RGB 0 to 255, the background alone (the person painted out), long side 320 at most.
        head: x, y, width, height of the face (or of all faces) in fractions of the photo.
    """

    pixels: Pixels
    matte: Pixels | None
    person: Pixels | None
    plate: NDArray[np.float32]
    head: tuple[float, float, float, float]

    @property
    def size_bytes(self) -> int:
        """What this subject holds in memory."""
        optional = sum(layer.nbytes for layer in (self.matte, self.person) if layer is not None)
        return self.pixels.nbytes + self.plate.nbytes + optional


def prepare_subject(pixels: Pixels, find_faces: FindFaces | None = None) -> Subject:
    """
    Find the person in a photo. The same pixels always give the same subject.

    Args:
        pixels: (H, W, 3) uint8 RGB, upright.
        find_faces: finds faces; None uses OpenCV's bundled cascade.
    """
    master = fit_within(pixels, max_pixels=MASTER_MAX_PIXELS)
    head = _find_head(master, find_faces)
    matte_image = _fit_long_side(master, _MATTE_PX)
    matte = _cut_out(matte_image, head)
    assumed = head if head is not None else _assumed_head(master.shape[1] / master.shape[0], matte)
    alpha = matte if matte is not None else _soft_oval(matte_image.shape[:2], assumed)
    plate = _clean_plate(matte_image, alpha)
    person = None if matte is None else _carry_colours_out(matte_image, matte)
    return Subject(pixels=master, matte=matte, person=person, plate=plate, head=assumed)


def fit_within(pixels: Pixels, *, max_pixels: int) -> Pixels:
    """*pixels* itself, or shrunk to at most *max_pixels*."""
    height, width = pixels.shape[:2]
    if height * width <= max_pixels:
        return pixels
    scale = (max_pixels / (height * width)) ** 0.5
    return _resized(pixels, max(1, int(width * scale)), max(1, int(height * scale)))


def _fit_long_side(pixels: Pixels, long_side: int) -> Pixels:
    height, width = pixels.shape[:2]
    scale = long_side / max(height, width)
    if scale >= 1:
        return pixels
    return _resized(pixels, max(1, round(width * scale)), max(1, round(height * scale)))


def _resized(pixels: Pixels, width: int, height: int) -> Pixels:
    return np.asarray(cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA), np.uint8)


def _find_head(master: Pixels, find_faces: FindFaces | None) -> tuple[float, float, float, float] | None:
    small = _fit_long_side(master, _FACE_SEARCH_PX)
    height, width = small.shape[:2]
    if min(height, width) < 32:
        return None
    boxes = [box for box in (find_faces or find_faces_by_cascade)(small) if box[2] > 0 and box[3] > 0]
    if not boxes:
        return None
    largest = max(w * h for _, _, w, h in boxes)
    # Bystanders far smaller than the main face do not steer the crop; people side by side do.
    kept = [box for box in boxes if box[2] * box[3] >= 0.3 * largest]
    x0 = max(0.0, min(x for x, _, _, _ in kept) / width)
    y0 = max(0.0, min(y for _, y, _, _ in kept) / height)
    x1 = min(1.0, max(x + w for x, _, w, _ in kept) / width)
    y1 = min(1.0, max(y + h for _, y, _, h in kept) / height)
    return (x0, y0, x1 - x0, y1 - y0) if x1 > x0 and y1 > y0 else None


def find_faces_by_cascade(pixels: Pixels) -> list[FaceBox]:
    """Faces found by OpenCV's bundled frontal cascade: no download, about 30 ms, good enough to place a crop."""
    path = Path(cv2.__file__).parent / "data" / "haarcascade_frontalface_alt2.xml"
    if not path.is_file():  # some distributions ship OpenCV without its data
        return []
    grey = cv2.equalizeHist(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY))
    smallest = max(24, min(grey.shape) // 14)
    found = cv2.CascadeClassifier(str(path)).detectMultiScale(grey, 1.1, 5, minSize=(smallest, smallest))
    # The cascade's box is square from brow to chin with some cheek around it; ours is a face's.
    return [(x + 0.06 * w, y - 0.02 * h, 0.88 * w, 1.08 * h) for x, y, w, h in np.asarray(found, float).reshape(-1, 4).tolist()]


def _assumed_head(aspect: float, matte: Pixels | None) -> tuple[float, float, float, float]:
    """Where a portrait's head usually is, or the top of what was cut out."""
    face_height = 0.24 if aspect < 1.2 else 0.3
    face_width = min(0.6, face_height * 0.8 / aspect)
    centre, top = 0.5, 0.2
    if matte is not None:
        rows = np.flatnonzero((matte > 127).any(axis=1))
        top = float(rows[0]) / matte.shape[0] + 0.04
        band = matte[rows[0] : rows[0] + max(1, matte.shape[0] // 5)] > 127
        centre = float(np.flatnonzero(band.any(axis=0)).mean()) / matte.shape[1]
    top = min(max(top, 0.02), 0.6)
    return (min(max(centre - face_width / 2, 0.0), 1 - face_width), top, face_width, min(face_height, 0.95 - top))


def _cut_out(image: Pixels, head: tuple[float, float, float, float] | None) -> Pixels | None:
    """(h, w) uint8 matte of the person, or None when the cut is not credible."""
    height, width = image.shape[:2]
    if min(height, width) < 48:
        return None
    small = _fit_long_side(image, _SEGMENT_PX)
    if float(small.std()) < 3:
        return None  # nothing to tell apart
    seeds = _seeds(small.shape[0], small.shape[1], head)
    smooth = cv2.bilateralFilter(cv2.cvtColor(small, cv2.COLOR_RGB2BGR), 7, 25, 5)
    # GrabCut clusters with the calling thread's random numbers: without a fixed seed two runs differ.
    cv2.setRNGSeed(20_240_229)
    try:
        cv2.grabCut(smooth, seeds, None, np.zeros((1, 65)), np.zeros((1, 65)), 3, cv2.GC_INIT_WITH_MASK)  # type: ignore[call-overload]
    except cv2.error:
        return None  # too few colours on one side to model
    found = ((seeds == cv2.GC_FGD) | (seeds == cv2.GC_PR_FGD)).astype(np.uint8)
    cut = _main_piece(found, head)
    if not _is_credible(cut, head):
        return None
    return _refined(image, cut)


def _seeds(height: int, width: int, head: tuple[float, float, float, float] | None) -> NDArray[np.uint8]:
    """What is surely, probably and surely not the person."""
    seeds = np.full((height, width), cv2.GC_PR_BGD, np.uint8)
    edge_x, edge_y = max(1, width // 40), max(1, height // 40)
    if head is None:
        seeds[height // 7 :, width // 6 : width - width // 6] = cv2.GC_PR_FGD
        seeds[:edge_y] = cv2.GC_BGD
        seeds[: height * 2 // 3, :edge_x] = cv2.GC_BGD
        seeds[: height * 2 // 3, -edge_x:] = cv2.GC_BGD
        return seeds
    cx, face_w = (head[0] + head[2] / 2) * width, head[2] * width
    face_h, chin = head[3] * height, (head[1] + head[3]) * height
    cy = (head[1] + head[3] / 2) * height

    def polygon(points: list[tuple[float, float]], value: int) -> None:
        cv2.fillPoly(seeds, [np.array([[round(x), round(y)] for x, y in points], np.int32)], (value,))

    def oval(half_w: float, half_h: float, value: int, rise: float = 0.0) -> None:
        axes = (max(1, round(half_w)), max(1, round(half_h)))
        cv2.ellipse(seeds, (round(cx), round(cy - rise)), axes, 0, 0, 360, (value,), -1)

    # Far from the person nothing is: a box above and beside the head. Long hair and hats stay "probably not".
    seeds[: max(edge_y, round(cy - 1.55 * face_h))] = cv2.GC_BGD
    shoulder = min(height, round(chin))
    seeds[:shoulder, : max(edge_x, round(cx - 1.7 * face_w))] = cv2.GC_BGD
    seeds[:shoulder, min(width - edge_x, round(cx + 1.7 * face_w)) :] = cv2.GC_BGD
    oval(0.85 * face_w, 0.95 * face_h, cv2.GC_PR_FGD, rise=0.12 * face_h)
    polygon(
        [
            (cx - 0.5 * face_w, chin),
            (cx + 0.5 * face_w, chin),
            (cx + 1.5 * face_w, chin + 0.6 * face_h),
            (cx + 2.3 * face_w, height),
            (cx - 2.3 * face_w, height),
            (cx - 1.5 * face_w, chin + 0.6 * face_h),
        ],
        cv2.GC_PR_FGD,
    )
    oval(0.42 * face_w, 0.5 * face_h, cv2.GC_FGD)
    polygon(
        [
            (cx - 0.22 * face_w, chin - 0.1 * face_h),
            (cx + 0.22 * face_w, chin - 0.1 * face_h),
            (cx + 0.6 * face_w, height),
            (cx - 0.6 * face_w, height),
        ],
        cv2.GC_FGD,
    )
    return seeds


def _main_piece(cut: NDArray[np.uint8], head: tuple[float, float, float, float] | None) -> NDArray[np.uint8]:
    """The piece with the face (or the largest), its holes filled, its crumbs and hair-thin bridges gone."""
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (5, 5))
    cut = np.asarray(cv2.morphologyEx(cut, cv2.MORPH_OPEN, kernel), np.uint8)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(cut)
    if count < 2:
        return cut
    label = 1 + int(np.argmax(stats[1:, cv2.CC_STAT_AREA]))
    if head is not None:
        height, width = cut.shape
        row, column = int((head[1] + head[3] / 2) * height), int((head[0] + head[2] / 2) * width)
        label = int(labels[min(height - 1, row), min(width - 1, column)]) or label
    piece = (labels == label).astype(np.uint8)
    # Pad before filling so that arms touching the bottom edge do not close off a real gap as a hole.
    outside = (piece == 0).astype(np.uint8)
    count, holes, stats, _ = cv2.connectedComponentsWithStats(outside, connectivity=4)
    for hole in range(1, count):
        x, y, w, h, area = (int(value) for value in stats[hole])
        touches_edge = x == 0 or y == 0 or x + w == piece.shape[1] or y + h == piece.shape[0]
        if not touches_edge and area < 0.02 * piece.size:
            piece[holes == hole] = 1
    return np.asarray(cv2.morphologyEx(piece, cv2.MORPH_CLOSE, kernel), np.uint8)


def _is_credible(cut: NDArray[np.uint8], head: tuple[float, float, float, float] | None) -> bool:
    share = float(cut.mean())
    if not 0.04 <= share <= 0.9 or float(cut[0].mean()) > 0.5:
        return False
    if head is None:
        return share >= 0.08
    height, width = cut.shape
    x0, y0 = int((head[0] + 0.2 * head[2]) * width), int((head[1] + 0.15 * head[3]) * height)
    x1, y1 = int((head[0] + 0.8 * head[2]) * width) + 1, int((head[1] + 0.9 * head[3]) * height) + 1
    return float(cut[y0:y1, x0:x1].mean()) > 0.9


def _refined(image: Pixels, cut: NDArray[np.uint8]) -> Pixels:
    """The coarse cut drawn along the image's own edges (guided filter), at the size of *image*."""
    height, width = image.shape[:2]
    soft = cv2.GaussianBlur(cut.astype(np.float32), (0, 0), 1.2)
    coarse = np.asarray(cv2.resize(soft, (width, height), interpolation=cv2.INTER_CUBIC), np.float32).clip(0, 1)
    guide = image.astype(np.float32) / np.float32(255)
    radius = max(3, round(max(height, width) / 90))
    fine = guided_filter(guide, coarse, radius=radius, epsilon=2e-4)
    # Pull the matte in a little and steepen it: a pixel too few shows less than a rim of the old background.
    steep = np.clip((fine - 0.30) / 0.50, 0, 1)
    # Far from the cut's edge the filter may not doubt what was certain.
    inner = cv2.erode(cut, np.ones((3, 3), np.uint8), iterations=6)
    outer = cv2.dilate(cut, np.ones((3, 3), np.uint8), iterations=6)
    inner = cv2.resize(inner, (width, height), interpolation=cv2.INTER_NEAREST)
    outer = cv2.resize(outer, (width, height), interpolation=cv2.INTER_NEAREST)
    steep[inner > 0] = 1
    steep[outer == 0] = 0
    return np.asarray(np.rint(cv2.GaussianBlur(steep, (0, 0), 0.8) * 255), np.uint8)


def guided_filter(guide: NDArray[np.float32], source: NDArray[np.float32], *, radius: int, epsilon: float) -> NDArray[np.float32]:
    """
    Filter *source* so that its edges follow those of *guide*.

    Args:
        guide: (h, w, 3) float32 in [0, 1].
        source: (h, w) float32.
        radius: half the window, in pixels.
        epsilon: how much contrast in the guide counts as an edge (variance).

    Source: He, Sun and Tang, Guided Image Filtering, 2010 (the colour form: a linear model of the guide per window).
    """
    # The linear model varies slowly: fitting it at half size costs a quarter and shows no difference.
    height, width = source.shape
    half = (max(1, width // 2), max(1, height // 2))
    thumb = np.asarray(cv2.resize(guide, half, interpolation=cv2.INTER_AREA), np.float32)
    target = np.asarray(cv2.resize(source, half, interpolation=cv2.INTER_AREA), np.float32)
    window = (2 * (radius // 2) + 1, 2 * (radius // 2) + 1)

    def mean(values: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.asarray(cv2.blur(values, window), np.float32)

    mean_guide, mean_target = mean(thumb), mean(target)
    cross = mean(thumb * target[..., None]) - mean_guide * mean_target[..., None]
    r, g, b = (np.ascontiguousarray(thumb[..., i]) for i in range(3))
    mr, mg, mb = (mean_guide[..., i] for i in range(3))
    rr, gg, bb = mean(r * r) - mr * mr + epsilon, mean(g * g) - mg * mg + epsilon, mean(b * b) - mb * mb + epsilon
    rg, rb, gb = mean(r * g) - mr * mg, mean(r * b) - mr * mb, mean(g * b) - mg * mb
    # Inverse of the symmetric 3x3 covariance by its cofactors: numpy's batched solver takes ten times as long.
    c00, c01, c02 = gg * bb - gb * gb, gb * rb - rg * bb, rg * gb - gg * rb
    c11, c12, c22 = rr * bb - rb * rb, rb * rg - rr * gb, rr * gg - rg * rg
    determinant = rr * c00 + rg * c01 + rb * c02
    x, y, z = cross[..., 0], cross[..., 1], cross[..., 2]
    slope = np.stack([c00 * x + c01 * y + c02 * z, c01 * x + c11 * y + c12 * z, c02 * x + c12 * y + c22 * z], axis=-1)
    slope /= np.maximum(determinant, epsilon**3)[..., None]
    offset = mean_target - (slope * mean_guide).sum(axis=-1)
    model = np.dstack([mean(slope), mean(offset)])
    model = np.asarray(cv2.resize(model, (width, height), interpolation=cv2.INTER_LINEAR), np.float32)
    return np.asarray(np.einsum("hwc,hwc->hw", model[..., :3], guide) + model[..., 3], np.float32)


def _soft_oval(shape: tuple[int, int], head: tuple[float, float, float, float]) -> Pixels:
    """A soft stand-in for the matte, used only to leave the middle out when averaging the background."""
    height, width = shape
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    cx, cy = (head[0] + head[2] / 2) * width, (head[1] + head[3]) * height
    distance = np.hypot((x - cx) / max(1.0, 2.0 * head[2] * width), (y - cy) / max(1.0, 2.2 * head[3] * height))
    return np.asarray(np.clip(255 * (1.6 - distance), 0, 255), np.uint8)


def _clean_plate(image: Pixels, matte: Pixels) -> NDArray[np.float32]:
    """The background with the person painted out from what surrounds them, softly blurred."""
    small = _fit_long_side(image, _PLATE_PX)
    height, width = small.shape[:2]
    grown = cv2.dilate(matte, np.ones((3, 3), np.uint8), iterations=max(2, max(matte.shape) // 110))
    keep = 1 - np.asarray(cv2.resize(grown, (width, height), interpolation=cv2.INTER_AREA), np.float32) / 255
    colour = small.astype(np.float32) * keep[..., None]
    plate = np.zeros_like(colour)
    filled = np.zeros_like(keep)
    # From near to far: each wider blur fills only what the narrower ones could not reach.
    stacked = np.dstack([colour, keep]).astype(np.float32)
    for share in (0.008, 0.03, 0.09, 0.3, 1.0):
        blurred = _wide_blur(stacked, max(0.6, share * max(height, width)))
        value, weight = blurred[..., :3], blurred[..., 3]
        trust = np.clip(weight * 4, 0, 1) * (1 - filled)
        plate += value / np.maximum(weight, 1e-4)[..., None] * trust[..., None]
        filled += trust
    average = small.reshape(-1, 3).mean(axis=0).astype(np.float32)
    return np.asarray(np.clip(plate + (1 - filled)[..., None] * average, 0, 255), np.float32)


def _wide_blur(values: NDArray[np.float32], sigma: float) -> NDArray[np.float32]:
    """A Gaussian blur whose cost does not grow with *sigma* (a wide one is taken on a shrunken copy)."""
    height, width = values.shape[:2]
    shrink = max(1, int(sigma / 4))
    if shrink == 1:
        return np.asarray(cv2.GaussianBlur(values, (0, 0), sigma), np.float32)
    small = cv2.resize(values, (max(1, width // shrink), max(1, height // shrink)), interpolation=cv2.INTER_AREA)
    blurred = cv2.GaussianBlur(small, (0, 0), sigma / shrink)
    return np.asarray(cv2.resize(blurred, (width, height), interpolation=cv2.INTER_CUBIC), np.float32)


def _carry_colours_out(image: Pixels, matte: Pixels) -> Pixels:
    """The person's colours, grown outwards over the edge (blurred foreground over blurred matte)."""
    alpha = matte.astype(np.float32) / 255
    sure = np.clip((alpha - 0.75) * 4, 0, 1)
    colour = image.astype(np.float32) * sure[..., None]
    wide = np.asarray(cv2.blur(colour, (25, 25)), np.float32) / np.maximum(cv2.blur(sure, (25, 25)), 1e-3)[..., None]
    near_weight = np.asarray(cv2.blur(sure, (7, 7)), np.float32)
    near = np.asarray(cv2.blur(colour, (7, 7)), np.float32) / np.maximum(near_weight, 1e-3)[..., None]
    trust = np.clip(near_weight * 12, 0, 1)[..., None]
    carried = near * trust + wide * (1 - trust)
    return np.asarray(np.clip(colour + carried * (1 - sure[..., None]), 0, 255), np.uint8)
