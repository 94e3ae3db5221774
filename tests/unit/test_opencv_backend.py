"""
The opencv backend retouches: measured on a real portrait, in bands of detail.

A blur of the whole picture fails the tests on eyes, contours and everything outside the skin; doing nothing fails those on skin.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import itertools
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import ExifTags, Image

from jobdaemon.backends.faces import Face, FaceDetector, Floats, Pixels
from jobdaemon.backends.opencv import OpenCVBackend, beautify_pixels, retouch, skin_mask
from jobdaemon.errors import UnsupportedImageError
from jobdaemon.photo import PhotoLimits, read_photo
from jobdaemon.ports import BeautifyBackend

ASTRONAUT = Path(__file__).parents[1] / "data" / "astronaut.png"

Mask = NDArray[np.bool_]


@pytest.fixture(scope="module")
def detector() -> FaceDetector:
    return FaceDetector()


@pytest.fixture(scope="module")
def portrait() -> Pixels:
    with Image.open(ASTRONAUT) as image:
        return np.array(image.convert("RGB"))


@pytest.fixture(scope="module")
def face(detector: FaceDetector, portrait: Pixels) -> Face:
    return detector.detect(portrait)[0]


@pytest.fixture(scope="module")
def retouched(portrait: Pixels, face: Face) -> Pixels:
    return beautify_pixels(portrait, [face], 0.7)


# -- how it is measured -----------------------------------------------------------------------------------------------------


def resized(pixels: Pixels, scale: float) -> Pixels:
    interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_LANCZOS4
    return np.asarray(cv2.resize(pixels, None, fx=scale, fy=scale, interpolation=interpolation), np.uint8)


def darkened(pixels: Pixels, gamma: float) -> Pixels:
    return (255 * (pixels / 255.0) ** gamma).round().astype(np.uint8)


def lightness(pixels: Pixels) -> Floats:
    """CIE L, 0 to 100."""
    lab = cv2.cvtColor(pixels.astype(np.float32) / np.float32(255), cv2.COLOR_RGB2LAB)
    return np.asarray(lab[..., 0], np.float32)


def eye_distance(face: Face) -> float:
    return float(np.hypot(*(face.landmarks[1] - face.landmarks[0])))


def blurred(values: Floats, sigma: float) -> Floats:
    return np.asarray(cv2.GaussianBlur(values, (0, 0), sigma), np.float32)


def energy(pixels: Pixels, face: Face, where: Mask, band: str) -> float:
    """Mean square of lightness in a band: fine (pores, spots), or low (shape of the face, light)."""
    ed = eye_distance(face)
    light = lightness(pixels)
    values = light - blurred(light, 0.022 * ed) if band == "fine" else blurred(light, 0.1 * ed) - blurred(light, 0.4 * ed)
    return float((values[where] ** 2).mean())


def ratio(before: Pixels, after: Pixels, face: Face, where: Mask, band: str = "fine") -> float:
    return energy(after, face, where, band) / energy(before, face, where, band)


def ovals(shape: tuple[int, ...], centres: Floats, half: tuple[float, float]) -> Mask:
    y, x = np.mgrid[: shape[0], : shape[1]]
    inside: Mask = np.any([((x - cx) / half[0]) ** 2 + ((y - cy) / half[1]) ** 2 < 1 for cx, cy in centres], axis=0)
    return inside


def eyes(pixels: Pixels, face: Face) -> Mask:
    ed = eye_distance(face)
    return ovals(pixels.shape, face.landmarks[:2], (0.2 * ed, 0.1 * ed))


def skin(pixels: Pixels, face: Face) -> Mask:
    return skin_mask(pixels, face) > 0.8


def psnr(one: Pixels, other: Pixels, where: Mask | None = None) -> float:
    squares = (one.astype(np.float64) - other) ** 2
    mean = (squares if where is None else squares[where]).mean()
    return float(10 * np.log10(255**2 / max(mean, 1e-6)))


def similarity(one: Floats, other: Floats) -> float:
    """SSIM (Wang et al. 2004), Gaussian window of 1.5 pixels, values 0 to 100."""
    c1, c2 = 1.0, 9.0
    mean_one, mean_other = blurred(one, 1.5), blurred(other, 1.5)
    var_one = blurred(one * one, 1.5) - mean_one**2
    var_other = blurred(other * other, 1.5) - mean_other**2
    both = blurred(one * other, 1.5) - mean_one * mean_other
    top = (2 * mean_one * mean_other + c1) * (2 * both + c2)
    return float((top / ((mean_one**2 + mean_other**2 + c1) * (var_one + var_other + c2))).mean())


# -- what stays -------------------------------------------------------------------------------------------------------------


def test_strength_zero_changes_nothing(portrait: Pixels, face: Face) -> None:
    """At strength 0 the pixels are the same to the bit, in a copy, and no face counts as retouched."""
    result = beautify_pixels(portrait, [face], 0.0)
    assert np.array_equal(result, portrait)
    assert result is not portrait
    assert retouch(result, [face], 0.0) == 0


def test_no_face_changes_nothing(portrait: Pixels) -> None:
    """Without a face the pixels are the same to the bit."""
    assert np.array_equal(beautify_pixels(portrait, [], 1.0), portrait)


def test_input_is_left_alone(portrait: Pixels, face: Face) -> None:
    """The pure function does not write into its argument."""
    digest = hashlib.sha256(portrait.tobytes()).digest()
    beautify_pixels(portrait, [face], 1.0)
    assert hashlib.sha256(portrait.tobytes()).digest() == digest


def test_same_input_gives_same_pixels(portrait: Pixels, face: Face, retouched: Pixels) -> None:
    """Twice the same photo gives twice the same pixels, to the bit."""
    assert np.array_equal(beautify_pixels(portrait, [face], 0.7), retouched)


def test_nothing_outside_skin_eyes_and_mouth_changes(portrait: Pixels, face: Face) -> None:
    """Every pixel that is neither skin nor near an eye nor the mouth is the same to the bit, even at full strength."""
    changed = (beautify_pixels(portrait, [face], 1.0) != portrait).any(axis=2)
    ed = eye_distance(face)
    allowed = skin_mask(portrait, face) > 0
    allowed |= ovals(portrait.shape, face.landmarks[:2], (0.37 * ed, 0.21 * ed))
    allowed |= ovals(portrait.shape, face.landmarks[3:].mean(axis=0, keepdims=True), (0.65 * ed, 0.25 * ed))
    assert changed.any()
    assert not (changed & ~allowed).any()


@pytest.mark.parametrize(
    ("what", "rows", "columns"),
    [
        ("background", slice(0, 200), slice(0, 140)),
        ("suit", slice(200, 512), slice(0, 512)),
        ("hair above", slice(0, 70), slice(0, 512)),
        ("hair on the right", slice(60, 120), slice(268, 330)),
    ],
)
def test_named_places_do_not_change(portrait: Pixels, face: Face, what: str, rows: slice, columns: slice) -> None:
    """Places chosen by eye, independent of the mask: at full strength nothing happens there."""
    result = beautify_pixels(portrait, [face], 1.0)
    assert np.array_equal(result[rows, columns], portrait[rows, columns]), what


def test_face_keeps_its_shape(portrait: Pixels, face: Face, retouched: Pixels) -> None:
    """Light and shape of the face (the low band) change by less than a tenth."""
    assert 0.9 < ratio(portrait, retouched, face, skin(portrait, face), "low") < 1.1


def test_face_is_still_the_same(portrait: Pixels, face: Face, retouched: Pixels) -> None:
    """The face is structurally the same: SSIM of at least 0.97."""
    left, top, right, bottom = (int(value) for value in face.box)
    box = np.s_[top:bottom, left:right]
    assert 0.97 <= similarity(lightness(portrait[box]), lightness(retouched[box])) < 1.0


def test_skin_keeps_its_colour(portrait: Pixels, face: Face, retouched: Pixels) -> None:
    """The mean colour of the skin moves by less than what an eye sees side by side."""
    where = skin(portrait, face)
    before, after = (
        cv2.cvtColor(pixels.astype(np.float32) / np.float32(255), cv2.COLOR_RGB2LAB)[where].mean(axis=0)
        for pixels in (portrait, retouched)
    )
    assert np.abs(after - before).max() < 1.0


# -- what changes -----------------------------------------------------------------------------------------------------------


def test_skin_is_smoothed_but_not_plastic(portrait: Pixels, face: Face, retouched: Pixels) -> None:
    """At the default strength a third to three quarters of the fine texture's energy remain."""
    assert 0.35 <= ratio(portrait, retouched, face, skin(portrait, face)) <= 0.75


def test_strength_is_monotone(portrait: Pixels, face: Face) -> None:
    """More strength, less texture; full strength still leaves some."""
    where = skin(portrait, face)
    energies = [
        ratio(portrait, beautify_pixels(portrait, [face], strength), face, where) for strength in (0.0, 0.1, 0.35, 0.7, 1.0)
    ]
    assert energies[0] == 1.0
    assert all(more < less - 0.02 for less, more in itertools.pairwise(energies))
    assert energies[-1] > 0.15


def test_eyes_get_crisper(portrait: Pixels, face: Face, retouched: Pixels) -> None:
    """Eyes lose no detail and keep their brightness."""
    where = eyes(portrait, face)
    assert 1.05 <= ratio(portrait, retouched, face, where) < 2.5
    assert np.abs(lightness(retouched) - lightness(portrait))[where].mean() < 6


def test_no_halo_around_the_mask(portrait: Pixels, face: Face) -> None:
    """No pixel changes by more than what its neighbourhood spans, so that no bright or dark rim appears."""
    result = lightness(beautify_pixels(portrait, [face], 1.0))
    before = lightness(portrait)
    size = 2 * round(0.15 * eye_distance(face)) + 1
    around = np.ones((size, size), np.uint8)
    rim = skin_mask(portrait, face)
    where = (rim > 0) & (rim < 0.6)
    assert (result - cv2.dilate(before, around))[where].max() < 2
    assert (cv2.erode(before, around) - result)[where].max() < 2


def test_blemishes_fade(portrait: Pixels, detector: FaceDetector) -> None:
    """Dark spots lose at least 40 % of their contrast, and the photo comes nearer to the clean one by at least 3 dB."""
    clean = resized(portrait, 2)
    face = detector.detect(clean)[0]
    where = skin(clean, face)
    spotted, spots = with_spots(clean, where, eye_distance(face))
    result = beautify_pixels(spotted, [face], 0.7)
    around = (cv2.dilate(spots.astype(np.uint8), np.ones((17, 17), np.uint8)) > 0) & ~spots & where

    def contrast(pixels: Pixels) -> float:
        light = lightness(pixels)
        return float(light[around].mean() - light[spots].mean())

    natural = contrast(clean)
    assert contrast(spotted) - natural > 8
    assert contrast(result) - natural < 0.6 * (contrast(spotted) - natural)
    assert psnr(result, clean, where) > psnr(spotted, clean, where) + 3


def with_spots(pixels: Pixels, where: Mask, ed: float) -> tuple[Pixels, Mask]:
    """25 dark spots of 0.012 to 0.03 eye distances on the skin, with soft edges and a little noise; and where they are."""
    chance = np.random.default_rng(7)
    inside = np.argwhere(cv2.erode(where.astype(np.uint8), np.ones((round(0.15 * ed),) * 2, np.uint8)) > 0)
    y, x = np.mgrid[: pixels.shape[0], : pixels.shape[1]]
    shade = np.zeros(pixels.shape[:2])
    for centre_y, centre_x in chance.choice(inside, 25, replace=False):
        radius = chance.uniform(0.012, 0.03) * ed
        distance = np.hypot(y - centre_y, x - centre_x) / radius
        shade = np.maximum(shade, np.clip(1.5 - distance, 0, 1).clip(max=1))
    noisy = pixels + chance.normal(0, 6, pixels.shape) * (where & (shade > 0))[..., np.newaxis]
    return np.clip(noisy * (1 - 0.35 * shade[..., np.newaxis]), 0, 255).round().astype(np.uint8), shade > 0.9


# -- for everybody ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [1.33, 2.0, 2.86])
def test_dark_skin_is_served_alike(portrait: Pixels, face: Face, retouched: Pixels, gamma: float) -> None:
    """On darkened copies about as much skin is found, as much smoothing is done, and no shape is lost."""
    dark = darkened(portrait, gamma)
    where = skin(dark, face)
    result = beautify_pixels(dark, [face], 0.7)
    assert abs(where.sum() / skin(portrait, face).sum() - 1) < 0.25
    light_ratio = ratio(portrait, retouched, face, skin(portrait, face))
    assert ratio(dark, result, face, where) == pytest.approx(light_ratio, abs=0.12)
    assert 0.9 < ratio(dark, result, face, where, "low") < 1.1
    assert abs(lightness(result)[where].mean() - lightness(dark)[where].mean()) < 1.5


def test_grey_photo_stays_grey(portrait: Pixels, detector: FaceDetector) -> None:
    """A black-and-white portrait is smoothed too, and gets no tint, to the bit."""
    grey = np.dstack([np.asarray(cv2.cvtColor(portrait, cv2.COLOR_RGB2GRAY), np.uint8)] * 3)
    face = detector.detect(grey)[0]
    result = beautify_pixels(grey, [face], 0.7)
    assert np.array_equal(result[..., 0], result[..., 1])
    assert np.array_equal(result[..., 0], result[..., 2])
    assert 0.35 <= ratio(grey, result, face, skin(grey, face)) <= 0.75


@pytest.mark.parametrize("scale", [2, 5])
def test_result_does_not_depend_on_resolution(portrait: Pixels, detector: FaceDetector, scale: int) -> None:
    """Retouching an enlarged photo and enlarging a retouched one give the same picture, above 35 dB."""
    large = resized(portrait, scale)
    after = resized(beautify_pixels(large, detector.detect(large), 0.7), 1 / scale)
    before = beautify_pixels(portrait, detector.detect(portrait), 0.7)
    where = skin_mask(portrait, detector.detect(portrait)[0]) > 0
    assert psnr(after, before, where) > 35


def test_tilted_head_is_retouched_like_an_upright_one(portrait: Pixels, face: Face) -> None:
    """The recipe turns with the face."""
    tilted = np.ascontiguousarray(np.rot90(portrait))
    landmarks = np.stack([face.landmarks[:, 1], 511 - face.landmarks[:, 0]], axis=1)
    result = beautify_pixels(tilted, [Face((58, 244, 175, 334), 1.0, landmarks)], 0.7)
    upright = np.rot90(result, -1)
    assert psnr(upright, beautify_pixels(portrait, [face], 0.7), skin_mask(portrait, face) > 0) > 40


@pytest.mark.parametrize("shift", [(-220, 0), (250, 0), (0, -110), (0, 390), (5000, 0), (-5000, -5000)])
def test_faces_over_the_edge_are_no_error(portrait: Pixels, face: Face, shift: tuple[int, int]) -> None:
    """A face that lies partly or wholly outside the photo changes nothing that it must not, and never fails."""
    moved = Face(face.box, face.score, face.landmarks + np.array(shift, np.float32))
    result = beautify_pixels(portrait, [moved], 1.0)
    assert result.shape == portrait.shape
    if abs(shift[0]) > 1000:
        assert np.array_equal(result, portrait)
        assert retouch(result, [moved], 1.0) == 0


@pytest.mark.parametrize("spread", [0.0, 0.1, 1e4])
def test_nonsense_landmarks_are_no_error(portrait: Pixels, face: Face, spread: float) -> None:
    """Landmarks in one point, far too close or far too wide never fail."""
    middle = face.landmarks.mean(axis=0)
    nonsense = Face(face.box, face.score, middle + (face.landmarks - middle) * np.float32(spread))
    assert beautify_pixels(portrait, [nonsense], 1.0).dtype == np.uint8


# -- the port ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
async def backend() -> AsyncIterator[BeautifyBackend]:
    backend = OpenCVBackend(threads=1, limits=PhotoLimits())
    yield backend
    await backend.close()


def decoded(content: bytes) -> Pixels:
    return read_photo(content, limits=PhotoLimits()).pixels


async def test_photo_is_retouched_and_described(backend: BeautifyBackend, portrait: Pixels, retouched: Pixels) -> None:
    """The result is a JPEG of the same size with the retouched pixels, and says what was done and where."""
    result = await backend.beautify(ASTRONAUT.read_bytes(), strength=0.7)
    assert (result.media_type, result.width, result.height) == ("image/jpeg", 512, 512)
    assert (result.faces, result.unrestored, result.model, result.device) == (1, 0, "opencv-1", "cpu")
    assert psnr(decoded(result.content), retouched) > 36
    assert backend.name == "opencv"


async def test_same_bytes_give_same_bytes(backend: BeautifyBackend) -> None:
    """A second attempt at the same photo gives the same file, to the bit."""
    one = await backend.beautify(ASTRONAUT.read_bytes(), strength=0.7)
    assert one == await backend.beautify(ASTRONAUT.read_bytes(), strength=0.7)


async def test_photo_without_a_face_says_so(backend: BeautifyBackend, portrait: Pixels) -> None:
    """No face is found in the suit: none is counted, and the pixels are only encoded again."""
    out = io.BytesIO()
    Image.fromarray(portrait[200:]).save(out, "PNG")
    result = await backend.beautify(out.getvalue(), strength=1.0)
    assert (result.faces, result.unrestored) == (0, 0)
    assert psnr(decoded(result.content), portrait[200:]) > 38


async def test_strength_zero_counts_the_face_as_unrestored(backend: BeautifyBackend) -> None:
    """At strength 0 a face is found and left as it was."""
    result = await backend.beautify(ASTRONAUT.read_bytes(), strength=0.0)
    assert (result.faces, result.unrestored) == (0, 1)


async def test_result_is_upright_without_place(backend: BeautifyBackend, portrait: Pixels) -> None:
    """A photo taken sideways comes out upright, its face retouched, without its location."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitude] = (48.0, 8.0, 15.0)
    out = io.BytesIO()
    Image.fromarray(np.rot90(portrait[:, :400])).save(out, "JPEG", quality=95, exif=exif.tobytes())
    result = await backend.beautify(out.getvalue(), strength=0.7)
    assert (result.width, result.height, result.faces) == (400, 512, 1)
    with Image.open(io.BytesIO(result.content)) as image:
        assert dict(image.getexif()) == {ExifTags.Base.Software: "jobdaemon"}


@pytest.mark.parametrize("content", [b"", b"no picture", ASTRONAUT.read_bytes()[:100_000]], ids=["empty", "text", "truncated"])
async def test_bad_input_is_refused(backend: BeautifyBackend, content: bytes) -> None:
    """What is no photo is refused for good."""
    with pytest.raises(UnsupportedImageError):
        await backend.beautify(content, strength=0.7)


async def test_own_limits_hold(portrait: Pixels) -> None:
    """The limits given to the backend are those that count."""
    backend = OpenCVBackend(limits=PhotoLimits(max_pixels=1000))
    with pytest.raises(UnsupportedImageError, match="at most 1,000"):
        await backend.beautify(ASTRONAUT.read_bytes(), strength=0.7)
    await backend.close()


@pytest.mark.parametrize("strength", [-0.1, 1.1, float("nan")])
async def test_impossible_strength_is_an_error(backend: BeautifyBackend, strength: float) -> None:
    """Strength lies between 0 and 1."""
    with pytest.raises(ValueError, match="between 0 and 1"):
        await backend.beautify(ASTRONAUT.read_bytes(), strength=strength)


async def test_photos_in_parallel_are_not_mixed_up(portrait: Pixels) -> None:
    """Several threads give each photo its own result, the same as one thread does."""
    contents = []
    for size in (256, 320, 400):
        out = io.BytesIO()
        Image.fromarray(portrait).resize((size, size)).save(out, "PNG")
        contents.append(out.getvalue())
    before = cv2.getNumThreads()
    try:
        one, four = OpenCVBackend(), OpenCVBackend(threads=4)
        expected = [await one.beautify(content, strength=0.7) for content in contents]
        assert await asyncio.gather(*(four.beautify(content, strength=0.7) for content in contents)) == expected
        await one.close()
        await four.close()
    finally:
        cv2.setNumThreads(before)


async def test_event_loop_goes_on_while_a_photo_is_in_work(backend: BeautifyBackend) -> None:
    """Heartbeats are not held up: the loop runs hundreds of rounds during one photo."""
    work = asyncio.create_task(backend.beautify(ASTRONAUT.read_bytes(), strength=0.7))
    rounds = 0
    while not work.done():
        await asyncio.sleep(0)
        rounds += 1
    assert (await work).faces == 1
    assert rounds > 100


_MEMORY_PROBE = """
import asyncio, io, sys
from pathlib import Path
from PIL import Image
from jobdaemon.backends.opencv import OpenCVBackend

result = asyncio.run(OpenCVBackend().beautify(Path(sys.argv[1]).read_bytes(), strength=0.7))
assert (result.width, result.height, result.faces) == (6928, 6928, 1)
print(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")).split()[1])
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_48_megapixels_fit_into_half_a_gigabyte(tmp_path: Path, portrait: Pixels) -> None:
    """The largest photos of phones leave room for the rest of the product in its 600 MB."""
    photo = tmp_path / "photo.jpg"
    Image.fromarray(portrait).resize((6928, 6928), Image.Resampling.BICUBIC).save(photo, quality=90)
    command = [sys.executable, "-c", _MEMORY_PROBE, str(photo)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    assert int(done.stdout) < 500_000
