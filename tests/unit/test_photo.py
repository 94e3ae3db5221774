"""The gatekeeper: which bytes are let in, what becomes of their pixels, and what never gets through."""

from __future__ import annotations

import functools
import io
import random
import re
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageCms, ImageOps

from jobdaemon.errors import UnsupportedImageError
from jobdaemon.photo import ImageInfo, PhotoLimits, encode_jpeg, inspect_image, read_photo
from jobdaemon.spool import Spool

ASTRONAUT = Path(__file__).parents[1] / "data" / "astronaut.png"
LIMITS = PhotoLimits()


def inspected(content: bytes, *, limits: PhotoLimits) -> ImageInfo:
    """What inspect_image says of *content*; an open file of it says the same, or fails in the same words."""
    spool = Spool()
    spool.write(content)
    try:
        info = inspect_image(content, limits=limits)
    except Exception as error:
        with pytest.raises(type(error), match=f"^{re.escape(str(error))}$"):
            inspect_image(spool.opened(), limits=limits)
        raise
    assert inspect_image(spool.opened(), limits=limits) == info
    assert not spool.opened().closed
    return info


def portrait(width: int = 160, height: int = 300) -> Image.Image:
    """A part of the portrait that is no square and has no symmetry."""
    return whole_portrait().crop((150, 20, 150 + width, 20 + height))


@functools.cache
def whole_portrait() -> Image.Image:
    with Image.open(ASTRONAUT) as image:
        whole = image.convert("RGB")
    whole.info.clear()  # it carries a profile of its own
    return whole


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def png(width: int, height: int, *, depth: int, colour: int, rows: bytes, extra: bytes = b"") -> bytes:
    """A PNG by hand: for headers that lie and kinds that Pillow does not write."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def with_jpeg_size(content: bytes, width: int, height: int) -> bytes:
    """The same JPEG, its header claiming another size."""
    at = max(content.find(b"\xff\xc0"), content.find(b"\xff\xc2"))
    return content[: at + 5] + struct.pack(">HH", height, width) + content[at + 9 :]


def matrix_profile(red: tuple[float, ...], green: tuple[float, ...], blue: tuple[float, ...], gamma: float) -> bytes:
    """A minimal ICC 2.1 RGB profile with the given primaries (XYZ at D50) and tone curve."""

    def fixed(*values: float) -> bytes:
        return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))

    def xyz(values: tuple[float, ...]) -> bytes:
        return b"XYZ \0\0\0\0" + fixed(*values)

    curve = b"curv\0\0\0\0" + struct.pack(">IHH", 1, round(gamma * 256), 0)
    name = b"test\0"
    described = b"desc\0\0\0\0" + struct.pack(">I", len(name)) + name + bytes(78)
    described += bytes(-len(described) % 4)
    tags = {
        b"desc": described,
        b"cprt": b"text\0\0\0\0none\0\0\0\0",
        b"wtpt": xyz((0.9642, 1.0, 0.8249)),
        b"rXYZ": xyz(red),
        b"gXYZ": xyz(green),
        b"bXYZ": xyz(blue),
        b"rTRC": curve,
        b"gTRC": curve,
        b"bTRC": curve,
    }
    table, bodies, offset = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for tag, body in tags.items():
        table += tag + struct.pack(">II", offset + len(bodies), len(body))
        bodies += body
    header = struct.pack(
        ">I4sI4s4s4s12s4s", offset + len(bodies), b"\0\0\0\0", 0x02100000, b"mntr", b"RGB ", b"XYZ ", bytes(12), b"acsp"
    )
    return (header + bytes(68 - len(header)) + fixed(0.9642, 1.0, 0.8249)).ljust(128, b"\0") + table + bodies


SRGB_PRIMARIES = ((0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141))
ADOBE_PRIMARIES = ((0.6097, 0.3111, 0.0195), (0.2053, 0.6257, 0.0609), (0.1492, 0.0632, 0.7446))


def difference(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    return float(np.abs(one.astype(int) - other.astype(int)).mean())


# -- refused ----------------------------------------------------------------------------------------------------------------


def refused(content: bytes, limits: PhotoLimits = LIMITS) -> str:
    """The sentence with which both doors refuse *content*."""
    with pytest.raises(UnsupportedImageError) as read:
        read_photo(content, limits=limits)
    with pytest.raises(UnsupportedImageError) as checked:
        inspected(content, limits=limits)
    assert str(read.value) == str(checked.value)
    assert str(read.value).endswith(".")
    return str(read.value)


def test_empty_file_is_refused() -> None:
    """No bytes are no photo."""
    assert refused(b"") == "The file is empty."


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"this is my portrait, honestly" * 50, "no picture we know"),
        (b"\xff", "no picture we know"),
        (b"GIF89a" + bytes(100), "a GIF"),
        (b"BM" + bytes(100), "a BMP"),
        (b"%PDF-1.7" + bytes(100), "a PDF"),
        (b"<?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg'/>", "an SVG"),
        (b"\0\0\0\x20ftypavif" + bytes(100), "an AVIF"),
        (b"RIFF\x24\0\0\0WAVEfmt ", "no picture we know"),
    ],
)
def test_foreign_formats_are_refused_by_content(content: bytes, named: str) -> None:
    """What is not one of the accepted formats is named, and the accepted ones are listed."""
    message = refused(content)
    assert named in message
    assert "JPEG, PNG, WebP, TIFF or HEIC" in message


@pytest.mark.parametrize("kind", ["GIF", "BMP"])
def test_real_pictures_of_other_formats_are_refused(kind: str) -> None:
    """A valid GIF or BMP is refused although Pillow could read it."""
    assert f"a {kind}" in refused(encoded(portrait(), kind))


def test_too_many_bytes_are_refused_before_anything_is_read() -> None:
    """The size limit is checked first, on whatever the bytes are."""
    assert "at most 1,000" in refused(bytes(1001), PhotoLimits(max_bytes=1000))


@pytest.mark.parametrize(
    "content",
    [
        png(50_000, 50_000, depth=8, colour=2, rows=bytes(1000)),
        with_jpeg_size(encoded(portrait(), "JPEG"), 65_000, 65_000),
        with_jpeg_size(encoded(portrait(), "JPEG", progressive=True), 65_000, 65_000),
    ],
    ids=["png", "jpeg", "progressive"],
)
def test_bombs_are_refused_by_their_header(content: bytes) -> None:
    """A header that claims billions of pixels is refused for its size, not after trying to decode it."""
    assert "at most 100,000,000" in refused(content)


def test_pixel_limit_is_exact() -> None:
    """A picture of exactly the limit passes, one row more does not."""
    limits = PhotoLimits(max_pixels=160 * 300)
    assert inspected(encoded(portrait(160, 300), "PNG"), limits=limits) == ImageInfo("image/png", 160, 300)
    assert "48,000" in refused(encoded(portrait(160, 301), "PNG"), limits)


def test_own_limit_counts_not_pillows() -> None:
    """90 megapixels pass without a warning, although Pillow would warn."""
    rows = b"".join(b"\0" + bytes(9500 // 8 + 1) for _ in range(9500))
    assert inspected(png(9500, 9500, depth=1, colour=0, rows=rows), limits=LIMITS).width == 9500


@pytest.mark.parametrize(
    ("size", "reason"), [((63, 200), "at least 64"), ((200, 63), "at least 64"), ((30_001, 64), "exceed 30,000")]
)
def test_sides_are_limited(size: tuple[int, int], reason: str) -> None:
    """A side that holds no face, or that no portrait has, is refused."""
    assert reason in refused(encoded(Image.new("L", size), "PNG"))


def test_jpeg_with_hundreds_of_scans_is_refused() -> None:
    """Each scan costs a pass over the whole picture, so their number is limited."""
    content = encoded(portrait(), "JPEG", progressive=True)
    last_scan = content[content.rindex(b"\xff\xda") : -2]
    assert "scans" in refused(content[:-2] + last_scan * 100 + b"\xff\xd9")
    assert read_photo(content[:-2] + last_scan + b"\xff\xd9", limits=LIMITS).width == 160


KINDS: dict[str, tuple[str, dict[str, object]]] = {
    "jpeg": ("JPEG", {"quality": 80}),
    "progressive": ("JPEG", {"quality": 80, "progressive": True}),
    "png": ("PNG", {}),
    "webp": ("WEBP", {}),
    "lossless": ("WEBP", {"lossless": True}),
    "tiff": ("TIFF", {}),
    "deflated": ("TIFF", {"compression": "tiff_adobe_deflate"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_truncated_files_are_refused(kind: str) -> None:
    """Wherever a file is cut off, it is refused; never a half-grey photo."""
    form, options = KINDS[kind]
    content = encoded(portrait(96, 128), form, **options)
    whole = read_photo(content, limits=LIMITS).pixels
    for cut in sorted({*range(1, 64), *np.linspace(64, len(content) - 100, 40).astype(int)}):
        refused(content[:cut])
    # The last bytes may be an end marker, a checksum or padding: without them every pixel is still there, or it is refused.
    for cut in range(len(content) - 100, len(content)):
        try:
            pixels = read_photo(content[:cut], limits=LIMITS).pixels
        except UnsupportedImageError:
            continue
        assert np.array_equal(pixels, whole)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_raise_nothing_else(kind: str) -> None:
    """Bytes changed at random give a photo or a refusal, never any other error."""
    form, options = KINDS[kind]
    if form != "TIFF":  # which is EXIF all over
        options = options | {"exif": camera_exif().tobytes()}
    content = encoded(portrait(96, 128), form, **options)
    chance = random.Random(kind)
    for _ in range(80):
        damaged = bytearray(content)
        for _ in range(chance.choice([1, 3, 30])):
            # Half of the changes hit the headers, where they are most surprising.
            damaged[chance.randrange(chance.choice([600, len(damaged)]))] = chance.randrange(256)
        for door in (read_photo, inspected):
            try:
                door(bytes(damaged), limits=LIMITS)
            except UnsupportedImageError as refusal:
                assert str(refusal).endswith(".")  # noqa: PT017 - either outcome is right


def test_png_with_a_text_bomb_is_refused() -> None:
    """Compressed text that unpacks to hundreds of megabytes stops the file, not the machine."""
    bomb = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(200_000_000), 1))
    refused(png(64, 64, depth=8, colour=0, rows=b"".join(b"\0" + bytes(64) for _ in range(64)), extra=bomb))


@pytest.mark.parametrize("mode", ["F", "I"])
def test_pictures_of_unclear_range_are_refused(mode: str) -> None:
    """32-bit and floating-point values have no agreed white, so they are not guessed."""
    with pytest.raises(UnsupportedImageError, match=f"kind {mode}"):
        read_photo(encoded(Image.new(mode, (80, 80)), "TIFF"), limits=LIMITS)


# -- geometry ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(kind: str, orientation: int) -> None:
    """The pixels stand upright in all eight orientations and every format, as Pillow's own transposition has them."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    content = encoded(portrait(), kind, exif=exif.tobytes())
    with Image.open(io.BytesIO(content)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    photo = read_photo(content, limits=LIMITS)
    assert np.array_equal(photo.pixels, expected)
    assert photo.pixels.flags.c_contiguous
    assert photo.pixels.flags.writeable
    info = inspected(content, limits=LIMITS)
    assert (info.width, info.height) == (photo.width, photo.height) == ((300, 160) if orientation >= 5 else (160, 300))


@pytest.mark.parametrize("orientation", [0, 9, 77])
def test_impossible_orientation_is_ignored(orientation: int) -> None:
    """An orientation outside 1 to 8 leaves the photo as it is."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    assert read_photo(encoded(portrait(), "JPEG", exif=exif.tobytes()), limits=LIMITS).width == 160


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning")
def test_broken_exif_does_not_spoil_a_photo() -> None:
    """Metadata that cannot be read is dropped; the photo is not."""
    content = encoded(portrait(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")
    assert read_photo(content, limits=LIMITS).width == 160


@pytest.mark.parametrize("kind", ["WEBP", "TIFF", "PNG"])
def test_first_frame_counts(kind: str) -> None:
    """Of an animation or a multi-page file the first picture is the photo."""
    content = encoded(portrait(), kind, save_all=True, append_images=[Image.new("RGB", (160, 300), "red")], lossless=True)
    assert difference(read_photo(content, limits=LIMITS).pixels, np.asarray(portrait())) < 1


def test_phone_jpeg_with_a_second_picture_is_a_jpeg() -> None:
    """A multi-picture JPEG, as phones make them, is read as its first picture."""
    content = encoded(portrait(), "MPO", save_all=True, append_images=[Image.new("RGB", (160, 300), "red")])
    assert inspected(content, limits=LIMITS).media_type == "image/jpeg"
    assert difference(read_photo(content, limits=LIMITS).pixels, np.asarray(portrait())) < 8


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_longest_side_scales_down(kind: str) -> None:
    """A copy for a smaller purpose has the asked size and the same picture; a small photo is never enlarged."""
    content = encoded(whole_portrait(), kind)
    expected = np.asarray(whole_portrait().resize((100, 100), Image.Resampling.LANCZOS))
    small = read_photo(content, limits=LIMITS, longest_side=100)
    assert small.pixels.shape == (100, 100, 3)
    assert difference(small.pixels, expected) < 3
    assert read_photo(content, limits=LIMITS, longest_side=600).width == 512


# -- colour -----------------------------------------------------------------------------------------------------------------


def test_profile_is_converted() -> None:
    """A profile whose red is sRGB's blue makes blue what the file calls red."""
    red, green, blue = SRGB_PRIMARIES
    content = encoded(portrait(), "PNG", icc_profile=matrix_profile(blue, green, red, 2.2))
    swapped = read_photo(content, limits=LIMITS).pixels
    assert difference(swapped[..., ::-1], np.asarray(portrait())) < 4
    assert difference(swapped, np.asarray(portrait())) > 20


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_wide_gamut_photo_gets_livelier_numbers(kind: str) -> None:
    """Adobe RGB numbers are duller than sRGB numbers of the same colour; grey stays grey."""
    image = Image.new("RGB", (100, 100), (128, 128, 128))
    image.paste((200, 90, 80), (0, 0, 100, 50))
    content = encoded(image, kind, icc_profile=matrix_profile(*ADOBE_PRIMARIES, gamma=2.2), quality=95)
    pixels = read_photo(content, limits=LIMITS).pixels.astype(int)
    assert pixels[10, 50, 0] > 215
    assert np.ptp(pixels[90, 50]) <= 2
    assert abs(pixels[90, 50, 0] - 128) <= 3


def test_srgb_profile_changes_nothing() -> None:
    """A photo that says it is sRGB keeps its values to the bit."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert np.array_equal(
        read_photo(encoded(portrait(), "PNG", icc_profile=profile), limits=LIMITS).pixels, np.asarray(portrait())
    )


@pytest.mark.parametrize("profile", [b"junk", bytes(3000), matrix_profile(*ADOBE_PRIMARIES, gamma=2.2)[:200]])
def test_broken_profile_is_ignored(profile: bytes) -> None:
    """A profile that cannot be read does not spoil a photo."""
    assert np.array_equal(
        read_photo(encoded(portrait(), "PNG", icc_profile=profile), limits=LIMITS).pixels, np.asarray(portrait())
    )


def test_profile_of_another_colour_space_is_ignored() -> None:
    """An RGB profile in a grey picture says nothing about its grey."""
    grey = portrait().convert("L")
    pixels = read_photo(encoded(grey, "PNG", icc_profile=matrix_profile(*ADOBE_PRIMARIES, gamma=2.2)), limits=LIMITS).pixels
    assert np.array_equal(pixels[..., 0], np.asarray(grey))


def test_cmyk_jpeg_is_read() -> None:
    """A CMYK JPEG from a print shop keeps its look."""
    content = encoded(portrait().convert("CMYK"), "JPEG", quality=95)
    assert difference(read_photo(content, limits=LIMITS).pixels, np.asarray(portrait())) < 6
    assert inspected(content, limits=LIMITS).media_type == "image/jpeg"


@pytest.mark.parametrize("mode", ["L", "1"])
def test_grey_pictures_become_three_equal_channels(mode: str) -> None:
    """Grey is grey in RGB."""
    image = portrait().convert(mode)
    pixels = read_photo(encoded(image, "PNG"), limits=LIMITS).pixels
    assert np.array_equal(pixels, np.asarray(image.convert("RGB")))


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    """The upper byte of 16-bit grey is what the eye sees."""
    values = np.arange(80 * 80, dtype=np.uint16).reshape(80, 80) * 10
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    pixels = read_photo(png(80, 80, depth=16, colour=0, rows=rows), limits=LIMITS).pixels
    assert np.array_equal(pixels[..., 1], (values >> 8).astype(np.uint8))
    assert np.array_equal(read_photo(encoded(Image.fromarray(values), "TIFF"), limits=LIMITS).pixels, pixels)


def test_sixteen_bit_colour_is_read() -> None:
    """16-bit RGB is reduced to 8 bits."""
    values = np.asarray(portrait(80, 80)).astype(np.uint16) * 257
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    assert (
        difference(read_photo(png(80, 80, depth=16, colour=2, rows=rows), limits=LIMITS).pixels, np.asarray(portrait(80, 80))) < 1
    )


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_transparency_lies_on_white(kind: str) -> None:
    """What can be seen through becomes white, by its share."""
    image = Image.new("RGBA", (100, 100), (0, 0, 0, 0))
    image.paste((0, 0, 0, 128), (0, 0, 100, 50))
    pixels = read_photo(encoded(image, kind, lossless=True), limits=LIMITS).pixels
    assert pixels[99, 99].tolist() == [255, 255, 255]
    assert pixels[0, 0].tolist() == pytest.approx([127, 127, 127], abs=1)


@pytest.mark.parametrize("transparency", [1, bytes([255, 0, 128])], ids=["one", "table"])
def test_palette_with_transparency_lies_on_white(transparency: int | bytes) -> None:
    """A transparent entry of a palette becomes white, an opaque one keeps its colour."""
    image = Image.new("P", (90, 90))
    image.putpalette([10, 20, 30, 200, 0, 0, 0, 0, 0])
    image.paste(1, (0, 0, 90, 30))
    pixels = read_photo(encoded(image, "PNG", transparency=transparency), limits=LIMITS).pixels
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert pixels[89, 0].tolist() == [10, 20, 30]


def test_grey_with_transparency_lies_on_white() -> None:
    """Grey with an alpha channel, and grey with one transparent level, are laid on white."""
    assert read_photo(encoded(Image.new("LA", (80, 80), (0, 0)), "PNG"), limits=LIMITS).pixels.min() == 255
    assert read_photo(encoded(Image.new("L", (80, 80), 7), "PNG", transparency=7), limits=LIMITS).pixels.min() == 255


# -- HEIC -------------------------------------------------------------------------------------------------------------------


def heic() -> bytes:
    heif = pytest.importorskip("pillow_heif")
    out = io.BytesIO()
    heif.from_pillow(portrait()).save(out, quality=90)
    return out.getvalue()


def test_heic_is_read_when_the_extra_is_there() -> None:
    """A HEIC photo is a photo, and a truncated one is not."""
    content = heic()
    assert inspected(content, limits=LIMITS) == ImageInfo("image/heic", 160, 300)
    assert difference(read_photo(content, limits=LIMITS).pixels, np.asarray(portrait())) < 6
    for cut in (20, 200, len(content) // 2, len(content) - 50):
        refused(content[:cut])


def test_heic_without_the_extra_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the decoder a HEIC is refused with what to install."""
    content = heic()
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    assert "jobdaemon[heif]" in refused(content)


# -- metadata and encoding --------------------------------------------------------------------------------------------------


def camera_exif() -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "SecretCamera"
    exif[ExifTags.Base.Orientation] = 6
    exif.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitude] = (48.0, 8.0, 15.0)
    return exif


def test_no_metadata_survives() -> None:
    """Place, camera and orientation of the original are not in what we encode."""
    content = encoded(portrait(), "JPEG", exif=camera_exif().tobytes(), comment=b"SecretComment")
    assert b"SecretCamera" in content
    result = encode_jpeg(read_photo(content, limits=LIMITS).pixels)
    assert b"Secret" not in result
    with Image.open(io.BytesIO(result)) as image:
        assert dict(image.getexif()) == {ExifTags.Base.Software: "jobdaemon"}
        assert not image.getexif().get_ifd(ExifTags.IFD.GPSInfo)


def test_encoding_is_deterministic() -> None:
    """The same pixels and arguments give the same bytes; other arguments do not."""
    pixels = np.array(portrait())
    assert encode_jpeg(pixels, description="one") == encode_jpeg(pixels, description="one")
    assert encode_jpeg(pixels, description="one") != encode_jpeg(pixels, description="two")
    assert len(encode_jpeg(pixels, quality=95)) > len(encode_jpeg(pixels, quality=60))


@pytest.mark.parametrize("description", ["a prompt", "肖像，水彩", "é" * 5000, "null\0byte"])
def test_description_is_kept(description: str) -> None:
    """What the picture shows goes into its EXIF, in any script, cut where EXIF would burst."""
    result = encode_jpeg(np.array(portrait()), description=description)
    with Image.open(io.BytesIO(result)) as image:
        image.load()
        stored = image.getexif()[ExifTags.Base.ImageDescription]
    kept = stored.encode("latin-1").decode() if isinstance(stored, str) else stored.decode()
    assert description.replace("\0", " ").startswith(kept)
    assert len(kept.encode()) >= min(len(description.encode()), 1999)


def test_encoded_pixels_come_back() -> None:
    """What is encoded can be read again and looks the same."""
    pixels = np.array(portrait())
    assert difference(read_photo(encode_jpeg(pixels, quality=95), limits=LIMITS).pixels, pixels) < 2
