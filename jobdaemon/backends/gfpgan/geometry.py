"""
Cutting faces out of a photo for the network, and putting back what it made of them.

What goes back is the difference between the restored and the original crop, enlarged or reduced to the photo and faded out
towards the crop's edge. So a face larger than the network's 512 pixels keeps its own finest detail instead of being replaced by
an enlargement; what the network left alone stays as it was, to the bit; and where faces overlap their differences are averaged.

Works strip by strip: memory does not grow with the photo. OpenCV and numpy only, and OpenCV lets other threads run meanwhile.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import cv2
import numpy as np
from numpy.typing import NDArray

from jobdaemon.backends.faces import Floats, Pixels, halved

Matrix = NDArray[np.float64]
Numbers = NDArray[np.uint8] | NDArray[np.float32]

#: Pixels of a side of a crop.
CROP_SIDE_PX = 512
#: Below, there is nothing that the network could know the person by. The authors leave such faces out too.
SMALLEST_EYE_DISTANCE_PX = 5.0
#: Where the landmarks (in the order of ``faces.Face``) lie in a crop. Source: facexlib, FaceRestoreHelper, read 2026-11.
TEMPLATE: Matrix = np.array(
    [(192.98138, 239.94708), (318.90277, 240.1936), (256.63416, 314.01935), (201.26117, 371.41043), (313.08905, 371.15118)]
)
#: Beyond the photo's edge, as in the pictures that the network was made for (RGB). Source: as above.
BORDER_RGB = (132, 133, 135)

# Where a difference counts, in the crop: fully up to this share of a rounded oval, then fading to nothing at its edge.
_OVAL_CENTRE, _OVAL_HALF, _OVAL_POWER, _OVAL_FULL = (256.0, 262.0), (240.0, 244.0), 2.6, 0.75
# A strip's working memory is about 30 bytes a pixel; it stays in a core's cache, which takes a third less time than without.
_STRIP_PIXELS = 150_000


@dataclass(frozen=True, slots=True, eq=False)
class AlignedFace:
    """
    A face as the network wants it.

    Attributes:
        crop: (512, 512, 3) uint8 RGB.
        matrix: (2, 3), from the photo's pixels to the crop's (x, y; the centre of the first pixel is 0).
    """

    crop: Pixels
    matrix: Matrix


def align_face(pixels: Pixels, landmarks: Floats) -> AlignedFace | None:
    """
    Cut a face out, upright and at the network's scale.

    Args:
        pixels: (H, W, 3) uint8 RGB; only looked at.
        landmarks: (5, 2), as ``faces.Face`` has them.

    Returns:
        The face; None when it is too small to be restored or its landmarks lie as no face's do.
    """
    points = np.asarray(landmarks, np.float64)
    if not np.isfinite(points).all() or np.hypot(*(points[1] - points[0])) < SMALLEST_EYE_DISTANCE_PX:
        return None
    matrix = _similarity(points)
    if matrix is None:
        return None
    height, width = pixels.shape[:2]
    left, top, right, bottom = _box(matrix, width, height)
    if left >= right or top >= bottom:
        return None
    region = pixels[top:bottom, left:right]
    crop = _warped(region, _after_offset(matrix, left, top), (CROP_SIDE_PX, CROP_SIDE_PX), border=BORDER_RGB)
    return AlignedFace(np.asarray(crop, np.uint8), matrix)


def paste_faces(pixels: Pixels, faces: Sequence[tuple[AlignedFace, Pixels]], *, strength: float = 1.0) -> None:
    """
    Put restored faces back, in place.

    Args:
        pixels: (H, W, 3) uint8 RGB, the photo that the faces were cut out of; changed.
        faces: each with its restored crop, (512, 512, 3) uint8 RGB.
        strength: 0.0 (nothing changes) to 1.0.
    """
    if strength <= 0:
        return
    patches = [_Patch.of(face, restored, strength, pixels) for face, restored in faces]
    for group in _overlapping(patches):
        _paste(pixels, group)


@dataclass(frozen=True, slots=True, eq=False)
class _Patch:
    """
    What one face changes.

    Attributes:
        change: (512, 512, 3) float32 in the crop: the faded difference.
        inverse: (2, 3), from the crop to the photo.
        box: left, top, right, bottom: the photo's pixels that may change.
    """

    change: Floats
    inverse: Matrix
    box: tuple[int, int, int, int]

    @classmethod
    def of(cls, face: AlignedFace, restored: Pixels, strength: float, pixels: Pixels) -> _Patch:
        change = np.asarray(cv2.subtract(restored, face.crop, dtype=cv2.CV_32F), np.float32)
        cv2.multiply(change, _mask(), dst=change, scale=strength)
        height, width = pixels.shape[:2]
        return cls(change, np.asarray(cv2.invertAffineTransform(face.matrix), np.float64), _box(face.matrix, width, height))


def _similarity(points: Matrix) -> Matrix | None:
    """(2, 3): turns, scales and shifts *points* onto the template; the best fit to most of them, as the network's authors do."""
    matrix, _ = cv2.estimateAffinePartial2D(points, TEMPLATE, method=cv2.LMEDS)
    if matrix is None or not np.isfinite(matrix).all():  # type: ignore[redundant-expr]  # OpenCV's types leave None out
        return None
    scale = float(np.hypot(matrix[0, 0], matrix[1, 0]))
    # A crop holds four eye distances; landmarks that want it far larger or smaller are no face's.
    eyes = float(np.hypot(*(points[1] - points[0]))) * scale
    usual = float(np.hypot(*(TEMPLATE[1] - TEMPLATE[0])))
    return np.asarray(matrix, np.float64) if 0.2 < eyes / usual < 5 else None


def _box(matrix: Matrix, width: int, height: int) -> tuple[int, int, int, int]:
    """The photo's pixels that a crop touches: left, top, right, bottom; empty when it lies outside."""
    side = CROP_SIDE_PX
    corners = np.array([(-1, -1, 1), (side, -1, 1), (-1, side, 1), (side, side, 1)], np.float64)
    inside = corners @ np.asarray(cv2.invertAffineTransform(matrix), np.float64).T
    left, top = np.floor(inside.min(axis=0)).astype(int) - 1
    right, bottom = np.ceil(inside.max(axis=0)).astype(int) + 2
    return max(0, int(left)), max(0, int(top)), min(width, int(right)), min(height, int(bottom))


def _after_offset(matrix: Matrix, left: int, top: int) -> Matrix:
    """*matrix* for a picture whose first pixel is the original's at (left, top)."""
    moved = matrix.copy()
    moved[:, 2] += matrix[:, :2] @ (left, top)
    return moved


def _warped(picture: Numbers, matrix: Matrix, size: tuple[int, int], *, border: tuple[float, ...]) -> Numbers:
    """
    *picture* through *matrix* into *size* (width, height), without aliasing.

    A reduction averages all pixels that fall together first; what is left is done by interpolation.
    """
    scale = float(np.hypot(matrix[0, 0], matrix[1, 0]))
    matrix = matrix.copy()
    if scale < 1:
        height, width = picture.shape[:2]
        small = (max(1, round(width * scale)), max(1, round(height * scale)))
        picture = cast("Numbers", cv2.resize(halved(picture, small), small, interpolation=cv2.INTER_AREA))
        # Pixel k of the small picture has its centre at (k + 0.5) * step - 0.5 of the large one.
        steps = np.array([width / small[0], height / small[1]])
        matrix[:, 2] += matrix[:, :2] @ (steps / 2 - 0.5)
        matrix[:, :2] *= steps
    warped = cv2.warpAffine(picture, matrix, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT, borderValue=border)
    return cast("Numbers", warped)


@functools.cache
def _mask() -> Floats:
    """(512, 512, 3), only to be read: how much of a change counts, the same for each colour; 0 at the edge."""
    x = np.abs(np.arange(CROP_SIDE_PX, dtype=np.float32) - _OVAL_CENTRE[0]) / _OVAL_HALF[0]
    y = np.abs(np.arange(CROP_SIDE_PX, dtype=np.float32) - _OVAL_CENTRE[1]) / _OVAL_HALF[1]
    radius = (x[np.newaxis] ** _OVAL_POWER + y[:, np.newaxis] ** _OVAL_POWER) ** (1 / _OVAL_POWER)
    share = np.clip((1 - radius) / (1 - _OVAL_FULL), 0, 1)
    mask = np.repeat((share * share * (3 - 2 * share)).astype(np.float32)[..., np.newaxis], 3, axis=2)
    mask.flags.writeable = False
    return mask


def _overlapping(patches: Sequence[_Patch]) -> list[list[_Patch]]:
    """The patches in groups whose boxes hang together."""
    groups: list[list[_Patch]] = []
    for patch in patches:
        touching = [group for group in groups if any(_share_pixels(patch.box, other.box) for other in group)]
        groups = [group for group in groups if group not in touching]
        groups.append([*(other for group in touching for other in group), patch])
    return groups


def _share_pixels(one: tuple[int, int, int, int], other: tuple[int, int, int, int]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _paste(pixels: Pixels, group: Sequence[_Patch]) -> None:
    """Add what the patches change; where several count, their average by weight."""
    left, right = min(patch.box[0] for patch in group), max(patch.box[2] for patch in group)
    top, bottom = min(patch.box[1] for patch in group), max(patch.box[3] for patch in group)
    if left >= right or top >= bottom:
        return
    # Alone, a change says itself how much of it counts.
    changes = [patch.change if len(group) == 1 else np.dstack([patch.change, _mask()[..., :1]]) for patch in group]
    step = max(1, _STRIP_PIXELS // (right - left))
    for first in range(top, bottom, step):
        last = min(bottom, first + step)
        strip = pixels[first:last, left:right]
        cv2.add(strip, _change(group, changes, left, first, (right - left, last - first)), dst=strip, dtype=cv2.CV_8U)


def _change(group: Sequence[_Patch], changes: Sequence[Floats], left: int, top: int, size: tuple[int, int]) -> Floats:
    """
    (height, width, 3) float32: what the group changes in the strip at (left, top).

    Args:
        changes: of the group's patches, with how much of each counts as a fourth channel; of a single one without it.
    """
    if len(group) == 1:
        return _in_photo(changes[0], group[0].inverse, left, top, size)
    width, height = size
    total = np.zeros((height, width, 4), np.float32)
    for patch, change in zip(group, changes, strict=True):
        x0, y0 = max(patch.box[0], left), max(patch.box[1], top)
        x1, y1 = min(patch.box[2], left + width), min(patch.box[3], top + height)
        if x0 < x1 and y0 < y1:
            part = total[y0 - top : y1 - top, x0 - left : x1 - left]
            part += _in_photo(change, patch.inverse, x0, y0, (x1 - x0, y1 - y0))
    return np.asarray(total[..., :3] / np.maximum(1, total[..., 3:]), np.float32)


def _in_photo(change: Floats, inverse: Matrix, left: int, top: int, size: tuple[int, int]) -> Floats:
    matrix = inverse.copy()
    matrix[:, 2] -= (left, top)
    return np.asarray(_warped(change, matrix, size, border=(0, 0, 0, 0)), np.float32)
