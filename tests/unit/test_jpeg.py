"""The short way of JPEGs: Pillow's pixels for every sound file, nothing for a doubtful one, and no loss in what is written."""

from __future__ import annotations

import io
import random

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile, JpegImagePlugin

from jobdaemon import jpeg
from jobdaemon.photo import PhotoLimits, encode_jpeg, encode_photo, read_photo
from tests.unit.test_photo import ADOBE_PRIMARIES, encoded, matrix_profile, portrait, whole_portrait

LIMITS = PhotoLimits()


@pytest.mark.parametrize("size", [(96, 128), (97, 131), (160, 300)])
@pytest.mark.parametrize(
    "options",
    [
        {"subsampling": 0},
        {"subsampling": 1},
        {"subsampling": 2},
        {"progressive": True},
        {"optimize": True, "quality": 30},
        {"restart_marker_rows": 1},
        {"keep_rgb": True},
    ],
    ids="-".join,
)
def test_pixels_are_pillows(options: dict[str, object], size: tuple[int, int]) -> None:
    """Whatever the way a JPEG was written, its pixels are those that Pillow reads, to the bit."""
    content = encoded(portrait(*size), "JPEG", **options)
    with Image.open(io.BytesIO(content)) as image:
        expected = np.asarray(image)
    pixels = jpeg.decoded(content, size)
    assert pixels is not None
    assert np.array_equal(pixels, expected)


@pytest.mark.parametrize("progressive", [False, True])
def test_doubtful_files_are_left_to_pillow(progressive: bool) -> None:
    """Cut off anywhere, be it before the end marker, damaged, or of another size than its header said: nothing comes back."""
    content = encoded(portrait(96, 128), "JPEG", progressive=progressive)
    for cut in [*range(0, len(content), 97), len(content) - 2]:
        assert jpeg.decoded(content[:cut], (96, 128)) is None
    assert jpeg.decoded(content, (128, 96)) is None
    middle = len(content) // 2
    assert jpeg.decoded(content[:middle] + b"\xff\xd9" + content[middle:], (96, 128)) is None


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("progressive", [False, True])
def test_of_damaged_files_nothing_else_is_made_than_by_pillow(progressive: bool) -> None:
    """Where bytes were changed at random, what comes back is what Pillow makes of it; what Pillow refuses never comes back."""
    content = encoded(portrait(96, 128), "JPEG", quality=80, progressive=progressive)
    chance, taken = random.Random(progressive), 0
    for _ in range(500):
        damaged = bytearray(content)
        damaged[chance.randrange(chance.choice([650, len(damaged)]))] = chance.randrange(256)
        try:
            image = JpegImagePlugin.jpeg_factory(io.BytesIO(damaged))
        except Exception:  # noqa: BLE001 - the header is judged before, and by others
            continue
        if image.mode == "RGB" and image.width * image.height < 1_000_000:
            pixels = jpeg.decoded(bytes(damaged), image.size)
            if pixels is not None:
                assert np.array_equal(pixels, np.asarray(image))
                taken += 1
    assert taken > 50


def test_a_blemish_that_pillow_forgives_is_forgiven() -> None:
    """Stray bytes before the end marker cost a photo nothing but time: it is read as without them."""
    content = encoded(portrait(), "JPEG")
    stray = content[:-2] + bytes(30) + content[-2:]
    assert jpeg.decoded(stray, (160, 300)) is None
    assert np.array_equal(read_photo(stray, limits=LIMITS).pixels, read_photo(content, limits=LIMITS).pixels)


def test_a_plain_photo_is_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow reads the header of a sound JPEG and decodes nothing, with a profile and turned by its EXIF too."""

    def load(image: ImageFile.ImageFile) -> None:
        raise AssertionError(f"Pillow was asked for the pixels of {image}")

    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    profile = matrix_profile(*ADOBE_PRIMARIES, 2.2)
    content = encoded(portrait(), "JPEG", exif=exif.tobytes(), icc_profile=profile)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    assert read_photo(content, limits=LIMITS).pixels.shape == (160, 300, 3)


@pytest.mark.parametrize("orientation", range(2, 9))
def test_a_profile_is_applied_to_a_turned_photo(orientation: int) -> None:
    """Colours and direction are both put right, as in a file without losses."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    profile = matrix_profile(*ADOBE_PRIMARIES, 2.2)
    content = encoded(portrait(), "JPEG", exif=exif.tobytes(), icc_profile=profile)
    with Image.open(io.BytesIO(content)) as image:
        lossless = encoded(image, "PNG", exif=exif.tobytes(), icc_profile=profile)
    assert np.array_equal(read_photo(content, limits=LIMITS).pixels, read_photo(lossless, limits=LIMITS).pixels)


@pytest.mark.parametrize(("quality", "subsampling"), [(60, 2), (92, 2), (95, 0)])
def test_what_is_written_is_as_good_as_pillows(quality: int, subsampling: int) -> None:
    """Our error is Pillow's at the same quality: no faster, coarser transform is used."""
    pixels = np.asarray(whole_portrait())
    theirs = encoded(whole_portrait(), "JPEG", quality=quality, subsampling=subsampling)
    assert error_of(encode_jpeg(pixels, quality=quality), pixels) <= error_of(theirs, pixels) * 1.01


@pytest.mark.parametrize("quality", [75, 92, 97])
def test_a_photo_is_written_in_the_colours_it_came_with(quality: int) -> None:
    """Halved colours stay halved; as large as a camera's, the file is smaller than with full ones, and nearer to the photo."""
    large = whole_portrait().resize((2048, 2048), Image.Resampling.LANCZOS)
    photo = read_photo(encoded(large, "JPEG", quality=quality, subsampling=2), limits=LIMITS)
    assert photo.has_halved_colour
    as_it_came, full = encode_photo(photo), encode_jpeg(photo.pixels, quality=95)
    assert len(as_it_came) < len(full)
    assert error_of(as_it_came, photo.pixels) < error_of(full, photo.pixels)


@pytest.mark.parametrize(("kind", "options"), [("JPEG", {"subsampling": 0}), ("JPEG", {"subsampling": 1}), ("PNG", {})])
def test_full_colours_stay_full(kind: str, options: dict[str, object]) -> None:
    """What came with more colour than half is written with all of it."""
    photo = read_photo(encoded(whole_portrait(), kind, **options), limits=LIMITS)
    assert not photo.has_halved_colour
    assert encode_photo(photo) == encode_jpeg(photo.pixels, quality=95)


def error_of(content: bytes, pixels: NDArray[np.uint8]) -> float:
    """Mean squared."""
    with Image.open(io.BytesIO(content)) as image:
        return float(((np.asarray(image).astype(int) - pixels) ** 2).mean())


def test_part_of_a_picture_can_be_written() -> None:
    """Pixels that do not lie one behind the other in memory are encoded as a copy of them would be."""
    part = np.asarray(whole_portrait())[10:200, 30:300]
    assert encode_jpeg(part) == encode_jpeg(part.copy())


def test_what_is_too_long_for_a_jpeg_is_refused() -> None:
    """A side beyond the format's limit is an error, not a file that nobody can read."""
    with pytest.raises(ValueError, match="70000 x 1"):
        encode_jpeg(np.zeros((1, 70_000, 3), np.uint8))
