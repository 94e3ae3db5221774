"""Faces cut out and put back: where they belong, nothing else changed, whatever their size and place."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from jobdaemon.backends.faces import Floats, Pixels
from jobdaemon.backends.gfpgan.geometry import BORDER_RGB, TEMPLATE, AlignedFace, align_face, paste_faces

ASTRONAUT = Path(__file__).parents[1] / "data" / "astronaut.png"
# By eye, see tests/data/README.md.
LANDMARKS = np.array([(203, 101), (246.5, 103), (224, 127), (204, 141), (242, 142)], np.float32)
SIZES = [0.15, 0.5, 1.0, 3.0, 6.0]


def portrait(scale: float = 1.0) -> tuple[Pixels, Floats]:
    with Image.open(ASTRONAUT) as image:
        pixels = np.array(image.convert("RGB"))
    interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    resized = np.asarray(cv2.resize(pixels, None, fx=scale, fy=scale, interpolation=interpolation), np.uint8)
    return resized, ((LANDMARKS + 0.5) * scale - 0.5).astype(np.float32)


def floats(values: list[float]) -> Floats:
    return np.array(values, np.float32)


def aligned(pixels: Pixels, landmarks: Floats) -> AlignedFace:
    face = align_face(pixels, landmarks)
    assert face is not None
    return face


def pasted(pixels: Pixels, *faces: tuple[AlignedFace, Pixels], strength: float = 1.0) -> Pixels:
    copy = pixels.copy()
    paste_faces(copy, faces, strength=strength)
    return copy


@pytest.mark.parametrize("scale", SIZES)
def test_landmarks_come_to_lie_on_the_template(scale: float) -> None:
    """The landmarks fall within a twelfth of the crop's eye distance of the template, whatever the photo's size."""
    pixels, landmarks = portrait(scale)
    face = aligned(pixels, landmarks)
    moved = landmarks @ face.matrix[:, :2].T + face.matrix[:, 2]
    assert face.crop.shape == (512, 512, 3)
    assert np.linalg.norm(moved - TEMPLATE, axis=1).mean() < 126 / 12


@pytest.mark.parametrize("scale", [3.0, 6.0])
def test_large_face_is_reduced_without_aliasing(scale: float) -> None:
    """A crop of an enlarged photo is the crop of the photo: averaging keeps the place and lets no stripes appear."""
    truth = aligned(*portrait(1.0)).crop.astype(int)
    pixels, landmarks = portrait(scale)
    assert np.abs(aligned(pixels, landmarks).crop - truth).mean() < 2.0
    noise = np.random.default_rng(1).integers(0, 256, pixels.shape).astype(np.uint8)
    # One pixel of the crop stands for many of the photo: their noise must average out.
    assert aligned(noise, ((landmarks - landmarks.mean(axis=0)) * 2 + landmarks.mean(axis=0)).astype(np.float32)).crop.std() < 50


def test_marks_come_to_lie_where_the_matrix_says() -> None:
    """A dot in a large photo is found in the crop within half a pixel of where the matrix puts it."""
    _, landmarks = portrait(5.0)
    pixels = np.zeros((2560, 2560, 3), np.uint8)
    for x, y in landmarks:
        cv2.circle(pixels, (round(float(x)), round(float(y))), 15, (255, 255, 255), -1)
    face = aligned(pixels, landmarks)
    _, _, _, centres = cv2.connectedComponentsWithStats((face.crop[..., 0] > 100).astype(np.uint8))
    wanted = np.rint(landmarks) @ face.matrix[:, :2].T + face.matrix[:, 2]
    for point in wanted:
        assert np.linalg.norm(centres[1:] - point, axis=1).min() < 0.5


@pytest.mark.parametrize("scale", SIZES)
def test_identity_leaves_the_photo_alone(scale: float) -> None:
    """What the network left as it was stays as it was, to the bit."""
    pixels, landmarks = portrait(scale)
    face = aligned(pixels, landmarks)
    assert np.array_equal(pasted(pixels, (face, face.crop.copy())), pixels)


@pytest.mark.parametrize("scale", SIZES)
def test_change_lands_on_the_face_and_nowhere_else(scale: float) -> None:
    """A crop made brighter by 40 brightens the face by 40, fades out, and changes no pixel outside of the crop's place."""
    pixels, landmarks = portrait(scale)
    pixels = np.minimum(pixels, 200)
    face = aligned(pixels, landmarks)
    changed = pasted(pixels, (face, face.crop + 40)).astype(int) - pixels
    nose_x, nose_y = np.rint(landmarks[2]).astype(int)
    reach = max(2, round(20 * scale))
    assert set(np.unique(changed[nose_y - reach : nose_y + reach, nose_x - reach : nose_x + reach])) <= {39, 40}
    assert changed.min() >= 0
    inverse = cv2.invertAffineTransform(face.matrix)
    corners = np.array([(0, 0), (511, 0), (511, 511), (0, 511)]) @ inverse[:, :2].T + inverse[:, 2]
    inside = np.zeros(pixels.shape[:2], np.uint8)
    cv2.fillConvexPoly(inside, np.rint(corners).astype(np.int32), 1)
    assert not changed[inside == 0].any()
    # No seam: from one pixel to the next the change differs by little.
    assert np.abs(np.diff(changed[..., 0], axis=1)).max() <= max(2, 5 / scale)


def test_restored_face_replaces_the_photos() -> None:
    """Where the photo is as fine as the crop or coarser, what comes back is the restored face itself."""
    pixels, landmarks = portrait(1.0)
    face = aligned(pixels, landmarks)
    other = np.asarray(cv2.GaussianBlur(face.crop[:, ::-1], (0, 0), 6), np.uint8)
    result = aligned(pasted(pixels, (face, other)), landmarks).crop.astype(int)
    assert np.abs(result - other)[150:400, 150:360].mean() < 4


def test_strength_blends() -> None:
    """Half the strength is half the change; none is none, to the bit."""
    pixels, landmarks = portrait()
    pixels = np.minimum(pixels, 200)
    face = aligned(pixels, landmarks)
    nose_x, nose_y = np.rint(landmarks[2]).astype(int)
    for strength, change in ((0.5, 20), (0.25, 10)):
        assert (
            abs(
                int(pasted(pixels, (face, face.crop + 40), strength=strength)[nose_y, nose_x, 0])
                - pixels[nose_y, nose_x, 0]
                - change
            )
            <= 1
        )
    assert np.array_equal(pasted(pixels, (face, face.crop + 40), strength=0), pixels)


def test_results_do_not_overflow() -> None:
    """Changes beyond black and white stop there."""
    pixels, landmarks = portrait()
    face = aligned(pixels, landmarks)
    nose_x, nose_y = np.rint(landmarks[2]).astype(int)
    assert pasted(pixels, (face, np.full_like(face.crop, 255)))[nose_y, nose_x].min() >= 250
    assert pasted(pixels, (face, np.zeros_like(face.crop)))[nose_y, nose_x].max() <= 5


def test_overlapping_faces_are_changed_once() -> None:
    """Where two faces share pixels, the same change of both comes once, not twice."""
    pixels, landmarks = portrait()
    pixels = np.minimum(pixels, 150)
    one, other = aligned(pixels, landmarks), aligned(pixels, landmarks + floats([30, 10]))
    changed = pasted(pixels, (one, one.crop + 40), (other, other.crop + 40)).astype(int) - pixels
    assert changed.max() <= 41
    nose_x, nose_y = np.rint(landmarks[2]).astype(int)
    assert changed[nose_y, nose_x, 0] in (39, 40, 41)
    assert np.array_equal(pasted(pixels, (one, one.crop), (other, other.crop)), pixels)


def test_many_faces_in_one_photo() -> None:
    """Forty faces side by side are each put back in their own place."""
    tile, landmarks = portrait(0.5)
    tile = np.minimum(tile[:128, 48:176], 200)
    landmarks = landmarks - floats([48, 0])
    pixels = np.tile(tile, (5, 8, 1))
    offsets = [floats([128 * column, 128 * row]) for row in range(5) for column in range(8)]
    faces = [aligned(pixels, landmarks + offset) for offset in offsets]
    changes = [number + 5 for number in range(len(faces))]
    result = pasted(pixels, *((face, face.crop + np.uint8(change)) for face, change in zip(faces, changes, strict=True)))
    for offset, change in zip(offsets, changes, strict=True):
        x, y = np.rint(landmarks[2] + offset).astype(int)
        assert abs(int(result[y, x, 0]) - int(pixels[y, x, 0]) - change) <= 1


def test_face_beyond_the_edge_keeps_to_the_photo() -> None:
    """A face cut off by the photo's edge is filled up with grey, and put back into what there is of it."""
    pixels, landmarks = portrait()
    cut = np.ascontiguousarray(pixels[60:, 190:])
    face = aligned(cut, landmarks - floats([190, 60]))
    assert tuple(face.crop[300, 2]) == BORDER_RGB
    whole = aligned(pixels, landmarks)
    assert np.abs(face.crop.astype(int) - whole.crop)[150:, 200:].mean() < 1
    result = pasted(cut, (face, 255 - face.crop))
    nose_x, nose_y = np.rint(landmarks[2] - [190, 60]).astype(int)
    assert np.abs(255 - result[nose_y, nose_x].astype(int) - cut[nose_y, nose_x]).max() < 12


@pytest.mark.parametrize("turn", [-170, -60, 35, 90])
def test_turned_face_is_set_upright(turn: float) -> None:
    """A face turned by any angle gives the crop of the upright one."""
    pixels, landmarks = portrait()
    matrix = cv2.getRotationMatrix2D((224.0, 120.0), turn, 1.0)
    matrix[:, 2] += (200, 250)
    canvas = np.asarray(cv2.warpAffine(pixels, matrix, (900, 900), flags=cv2.INTER_CUBIC), np.uint8)
    turned = (landmarks @ matrix[:, :2].T + matrix[:, 2]).astype(np.float32)
    centre = (slice(160, 420), slice(150, 370))
    assert np.abs(aligned(canvas, turned).crop.astype(int) - aligned(pixels, landmarks).crop)[centre].mean() < 4


@pytest.mark.parametrize(
    "landmarks",
    [
        LANDMARKS * 0.11,  # the eyes 4.8 pixels apart
        np.full((5, 2), 100.0),
        LANDMARKS * np.nan,
        LANDMARKS + 5_000,
    ],
)
def test_what_cannot_be_restored_is_told(landmarks: Floats) -> None:
    """Faces that are too small, outside of the photo, or whose landmarks lie in one point, give None."""
    pixels, _ = portrait()
    assert align_face(pixels, np.asarray(landmarks, np.float32)) is None


def test_memory_does_not_grow_with_the_photo() -> None:
    """A face that fills 24 megapixels takes less than 60 MB beside the photo to cut out and to put back."""
    _, landmarks = portrait()
    pixels = np.full((4900, 4900, 3), 90, np.uint8)
    large = ((landmarks - landmarks.mean(axis=0)) * 30 + 2450).astype(np.float32)
    tracemalloc.start()  # numpy's arrays and those that OpenCV makes for Python
    try:
        face = aligned(pixels, large)
        paste_faces(pixels, [(face, face.crop + 10)])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 60e6
    assert pixels[2450, 2450, 0] == 100


def test_same_input_gives_the_same_bytes() -> None:
    """Cutting out and putting back twice gives the same bytes."""
    pixels, landmarks = portrait(2.0)
    one, again = (pasted(pixels, (face, 255 - face.crop)) for face in (aligned(pixels, landmarks), aligned(pixels, landmarks)))
    assert np.array_equal(one, again)
