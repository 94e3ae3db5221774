"""
The gatekeeper for pictures: hostile bytes in, upright sRGB pixels out; pixels in, a clean JPEG out.

Owns every decision about which files are accepted. Pillow judges: it refuses truncated files, where OpenCV returns a half-grey
picture without an error. The header is checked before anything is decoded. What is a plain JPEG without any fault, and every JPEG
that is written, takes the short way of :mod:`jobdaemon.jpeg`: the same pixels in half the time.
Memory matters (48-megapixel photos occur): after decoding, pixels are converted strip by strip straight into the upright result,
so the peak is the decoder's own picture (3 bytes a pixel of a plain JPEG, else 4) plus the result (3 bytes a pixel), whatever the
orientation or profile.

Nothing here touches Pillow's global state (``MAX_IMAGE_PIXELS``, plugin registry), and every function may run in any thread.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageCms, ImageFile, JpegImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin

from jobdaemon import jpeg
from jobdaemon.errors import DeviceMemoryError, UnsupportedImageError

ACCEPTED = "JPEG, PNG, WebP, TIFF or HEIC"

#: No face fits into less, and the nets need some room.
MIN_SIDE_PX = 64
#: Half of JPEG's own limit; a longer side is a panorama or an attack, not a portrait.
MAX_SIDE_PX = 30_000
#: A progressive camera JPEG has about ten scans; each one more costs a pass over the whole picture, so a small file with
#: thousands of them would hold a worker for hours.
MAX_JPEG_SCANS = 100
#: EXIF must fit into one 64 KiB segment.
MAX_DESCRIPTION_BYTES = 2_000

#: What tells the format, from a file's beginning.
_HEAD_BYTES = 1024
_READ_BYTES = 1 << 18
_STRIP_ROWS = 128
# Cameras' and programs' are a few kilobytes; they repeat, so that what is known of them is kept.
_SMALL_PROFILE_BYTES = 16_384
# What undoes EXIF orientations (EXIF 2.32, tag 274); from 5 on, rows of the file are columns of the picture.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# The file's first row is the picture's last row or column.
_FROM_THE_END = frozenset({3, 4, 6, 7})
_HEIC_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1", b"heif"})
_FOREIGN = (
    (b"GIF8", "a GIF"),
    (b"BM", "a BMP"),
    (b"%PDF", "a PDF document"),
    (b"\x00\x00\x01\x00", "an icon"),
    (b"8BPS", "a Photoshop document"),
    (b"PK\x03\x04", "a ZIP archive"),
)


@dataclass(frozen=True, slots=True)
class PhotoLimits:
    """
    What is let in.

    Attributes:
        max_bytes: most bytes of the encoded file.
        max_pixels: most pixels, width times height, as the header says.
    """

    max_bytes: int = 50 * 1024 * 1024
    max_pixels: int = 100_000_000


@dataclass(frozen=True, slots=True, eq=False)
class Photo:
    """
    A decoded picture.

    Attributes:
        pixels: (H, W, 3) uint8 RGB, sRGB, upright, C-contiguous and writable: the caller owns it.
        has_halved_colour: it came with colours in half the resolution of its brightness, both ways, as most JPEGs do.
    """

    pixels: NDArray[np.uint8]
    has_halved_colour: bool = False

    @property
    def width(self) -> int:
        """Pixels."""
        return int(self.pixels.shape[1])

    @property
    def height(self) -> int:
        """Pixels."""
        return int(self.pixels.shape[0])


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """
    What an encoded picture turned out to be.

    Attributes:
        media_type: by content, never by name, for instance ``image/jpeg``.
        width: pixels, upright.
        height: pixels, upright.
    """

    media_type: str
    width: int
    height: int


def read_photo(content: bytes, *, limits: PhotoLimits, longest_side: int | None = None) -> Photo:
    """
    Decode one picture, or say in a sentence why not.

    The first frame counts. Orientation and colour profile are applied, transparency is laid on white, all metadata is dropped.

    Args:
        content: an encoded picture, as hostile as the internet.
        limits: checked on the header, before anything is decoded.
        longest_side: scale down to at most so many pixels a side; a JPEG is then decoded small, which saves time and memory.

    Raises:
        UnsupportedImageError: not a picture we accept, damaged, too small or too large. Permanent.
        DeviceMemoryError: within the limits, but there is no memory for it now. Retryable.
    """
    with _opened(io.BytesIO(content), limits) as (image, media_type):
        is_reduced = longest_side is not None and max(image.size) > longest_side
        if media_type == "image/jpeg" and image.mode == "RGB" and not is_reduced:
            plain = jpeg.decoded(content, image.size)
            if plain is not None:
                return Photo(_plain_upright_srgb(image, plain), _has_halved_colour(image))
        if longest_side is not None and is_reduced:
            # The decoder never goes below the size asked for, so the sharp reduction is left to the resize.
            scale = longest_side / max(image.size)
            image.draft(None, (max(1, round(image.width * scale)), max(1, round(image.height * scale))))
        image.load()
        pixels = _upright_srgb(image, longest_side)
    if longest_side is not None and max(pixels.shape[:2]) > longest_side:
        pixels = np.array(_scaled(Image.fromarray(pixels), longest_side))
    return Photo(pixels)


def inspect_image(content: bytes | IO[bytes], *, limits: PhotoLimits) -> ImageInfo:
    """
    Prove that *content* can be decoded to its end, and keep nothing of it.

    Args:
        content: an encoded picture, as hostile as the internet; an open file of it is read from its beginning and left open.
        limits: checked on the header, before anything is decoded.

    Raises:
        UnsupportedImageError: not a picture we accept, damaged, too small or too large. Permanent.
        DeviceMemoryError: within the limits, but there is no memory for it now. Retryable.
    """
    with _opened(io.BytesIO(content) if isinstance(content, bytes) else content, limits) as (image, media_type):
        width, height = image.size
        # A JPEG is read to its end at any scale; an eighth of each side is a 64th of the memory. Other formats ignore this.
        image.draft(None, (1, 1))
        image.load()
        if _orientation(image) >= 5:
            width, height = height, width
    return ImageInfo(media_type, width, height)


def read_header(content: bytes, *, limits: PhotoLimits) -> ImageInfo:
    """
    What the header of a picture says; whether the rest can be decoded is not looked at.

    Args:
        content: an encoded picture, as hostile as the internet.

    Raises:
        UnsupportedImageError: not a picture we accept, too small or too large. Permanent.
    """
    with _opened(io.BytesIO(content), limits) as (image, media_type):
        width, height = image.size
        if _orientation(image) >= 5:
            width, height = height, width
        return ImageInfo(media_type, width, height)


def encode_jpeg(pixels: NDArray[np.uint8], *, quality: int = 92, description: str | None = None) -> bytes:
    """
    Encode as JPEG, sRGB without a profile; the same arguments give the same bytes.

    Args:
        pixels: (H, W, 3) uint8 RGB.
        quality: 1 to 95; from 95 on colours keep their full resolution.
        description: for EXIF ImageDescription, in UTF-8, cut to ``MAX_DESCRIPTION_BYTES``.
    """
    return _jpeg(pixels, quality=quality, full_colour=quality >= 95, description=description)


def _jpeg(pixels: NDArray[np.uint8], *, quality: int, full_colour: bool, description: str | None) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Software] = "jobdaemon"
    if description:
        # Bytes, because Pillow would turn everything that is not ASCII into question marks.
        cut = description.replace("\0", " ").encode()[:MAX_DESCRIPTION_BYTES]
        exif[ExifTags.Base.ImageDescription] = cut.decode(errors="ignore").encode()
    return jpeg.encoded(pixels, quality=quality, full_colour=full_colour, exif=exif.tobytes())


def encode_photo(photo: Photo) -> bytes:
    """
    Encode a photo that was worked on, without a loss that an eye could see.

    Colours that came in half the resolution stay so. What that saves goes into the brightness: the result is nearer to the pixels
    than quality 95 with full colours (up to 4 dB; of poor and very sharp photos 0.9 dB farther, at 48 dB), smaller, and done in
    two thirds of the time.
    """
    halved = photo.has_halved_colour
    return _jpeg(photo.pixels, quality=97 if halved else 95, full_colour=not halved, description=None)


def encode_png(pixels: NDArray[np.uint8], *, is_square: bool = False) -> bytes:
    """
    Encode as PNG, without metadata; the same arguments give the same bytes.

    Args:
        pixels: (H, W, 3) uint8 RGB.
        is_square: lay the picture in the middle of a transparent square of its longer side.
    """
    picture = Image.fromarray(pixels)
    if is_square and picture.width != picture.height:
        side = max(picture.size)
        square = Image.new("RGBA", (side, side))
        square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        picture = square
    out = io.BytesIO()
    picture.save(out, "PNG")
    return out.getvalue()


# -- opening ----------------------------------------------------------------------------------------------------------------


@contextmanager
def _opened(file: IO[bytes], limits: PhotoLimits) -> Iterator[tuple[ImageFile.ImageFile, str]]:
    """The picture with its header read and checked, and its media type; every error inside is translated."""
    size_bytes = file.seek(0, io.SEEK_END)
    if not size_bytes:
        raise UnsupportedImageError("The file is empty.")
    if size_bytes > limits.max_bytes:
        raise UnsupportedImageError(f"The file has {size_bytes:,} bytes; at most {limits.max_bytes:,} are accepted.")
    media_type, open_header = _recognised(file)
    kind = media_type.removeprefix("image/").upper()
    file.seek(0)
    try:
        image = open_header(file)
    except Exception as error:  # Pillow's plugins raise whatever the file provokes: SyntaxError, struct.error, KeyError …
        raise UnsupportedImageError(f"The file starts like a {kind}, but its header cannot be read.") from error
    try:
        with image:
            _check_size(image.size, limits)
            yield image, media_type
    except (UnsupportedImageError, DeviceMemoryError):
        raise
    except MemoryError as error:
        raise DeviceMemoryError(f"There is no memory to decode a {kind} of {image.width} x {image.height} pixels.") from error
    except Exception as error:  # the same, while decoding: OSError when truncated, SyntaxError on a bad checksum …
        raise UnsupportedImageError(f"The {kind} is truncated or damaged and cannot be decoded.") from error


def _check_size(size: tuple[int, int], limits: PhotoLimits) -> None:
    width, height = size
    if width * height > limits.max_pixels:
        raise UnsupportedImageError(f"The picture has {width} x {height} pixels; at most {limits.max_pixels:,} are accepted.")
    if min(size) < MIN_SIDE_PX:
        raise UnsupportedImageError(f"The picture has {width} x {height} pixels; each side needs at least {MIN_SIDE_PX}.")
    if max(size) > MAX_SIDE_PX:
        raise UnsupportedImageError(f"The picture has {width} x {height} pixels; no side may exceed {MAX_SIDE_PX:,}.")


def _recognised(file: IO[bytes]) -> tuple[str, Callable[[IO[bytes]], ImageFile.ImageFile]]:
    """
    The media type by content, and what reads the header.

    The plugin classes are called directly: ``Image.open`` would guess again, and warns above a limit of its own (89 megapixels)
    that could only be changed for the whole process.
    """
    file.seek(0)
    content = file.read(_HEAD_BYTES)
    if content.startswith(b"\xff\xd8\xff"):
        # Inside entropy-coded data FF is always stuffed, so this counts real scans (and those of an embedded thumbnail).
        if _count(file, b"\xff\xda") > MAX_JPEG_SCANS:
            raise UnsupportedImageError(f"The JPEG has more than {MAX_JPEG_SCANS} scans.")
        return "image/jpeg", JpegImagePlugin.jpeg_factory
    if content.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png", PngImagePlugin.PngImageFile
    if content.startswith(b"RIFF") and content[8:12] == b"WEBP":
        return "image/webp", WebPImagePlugin.WebPImageFile
    if content.startswith((b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+")):
        return "image/tiff", TiffImagePlugin.TiffImageFile
    if content[4:8] == b"ftyp" and content[8:12] in _HEIC_BRANDS:
        return "image/heic", _heic_opener()
    named = next((name for magic, name in _FOREIGN if content.startswith(magic)), None)
    if named is None and content[4:12] == b"ftypavif":
        named = "an AVIF"
    if named is None and b"<svg" in content.lower():
        named = "an SVG drawing"
    what = f"The file is {named}" if named else "The file is no picture we know"
    raise UnsupportedImageError(f"{what}; accepted are {ACCEPTED}.")


def _count(file: IO[bytes], pair: bytes) -> int:
    """How often two different bytes stand side by side in *file*."""
    file.seek(0)
    count, last = 0, b""
    while block := file.read(_READ_BYTES):
        # Other threads may run meanwhile; bytes.count lets none.
        values = np.frombuffer(block, np.uint8)
        count += int(np.count_nonzero((values[:-1] == pair[0]) & (values[1:] == pair[1]))) + (last + block[:1] == pair)
        last = block[-1:]
    return count


def _heic_opener() -> Callable[[IO[bytes]], ImageFile.ImageFile]:
    try:
        import pillow_heif  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise UnsupportedImageError(
            "HEIC photos cannot be read here: the extra jobdaemon[heif] is not installed. Send a JPEG instead."
        ) from error
    opener: Callable[[IO[bytes]], ImageFile.ImageFile] = pillow_heif.HeifImageFile
    return opener


# -- pixels -----------------------------------------------------------------------------------------------------------------


def _plain_upright_srgb(image: Image.Image, plain: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """
    (H, W, 3) uint8 sRGB, upright.

    Args:
        image: RGB; its header is read, nothing more.
        plain: (H, W, 3) uint8, its pixels as the file has them; changed.
    """
    to_srgb = _srgb_transform(image)
    if to_srgb is not None:
        for top in range(0, len(plain), _STRIP_ROWS):
            strip = plain[top : top + _STRIP_ROWS]
            strip[:] = np.asarray(to_srgb(Image.fromarray(strip)))
    return jpeg.upright(plain, _orientation(image))


def _has_halved_colour(image: Image.Image) -> bool:
    return JpegImagePlugin.get_sampling(image) == 2


def _upright_srgb(image: Image.Image, longest_side: int | None = None) -> NDArray[np.uint8]:
    """
    (H, W, 3) uint8 sRGB of a loaded picture; each strip of it is turned and laid where it belongs.

    Args:
        longest_side: scaled down to it first where that can be done before anything else, which saves the copy in full size.
    """
    orientation = _orientation(image)
    turn = _TURNS.get(orientation)
    to_srgb = _srgb_transform(image)
    if longest_side is not None and image.mode in ("L", "RGB", "CMYK") and "transparency" not in image.info:
        image = _scaled(image, longest_side)
    width, height = image.size
    pixels = np.empty((width, height, 3) if orientation >= 5 else (height, width, 3), np.uint8)
    for top in range(0, height, _STRIP_ROWS):
        bottom = min(height, top + _STRIP_ROWS)
        strip = _profiled(image.crop((0, top, width, bottom)))
        strip = to_srgb(strip) if to_srgb is not None else strip.convert("RGB")
        if turn is not None:
            strip = strip.transpose(turn)
        at = slice(height - bottom, height - top) if orientation in _FROM_THE_END else slice(top, bottom)
        pixels[(slice(None), at) if orientation >= 5 else at] = np.asarray(strip)
    return pixels


def _scaled(image: Image.Image, longest_side: int) -> Image.Image:
    """*image*, or a smaller one; every pixel of it counts, so nothing fine turns into patterns."""
    if max(image.size) <= longest_side:
        return image
    scale = longest_side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1 to 8; 1 when absent, out of range or unreadable, because broken metadata does not spoil a photo."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # noqa: BLE001 - whatever a hostile EXIF block provokes
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _profiled(strip: Image.Image) -> Image.Image:
    """The strip as L, RGB or CMYK: no palette, no transparency (white shows through), 8 bits."""
    if strip.mode.startswith("I;16"):
        # Not convert("L"): that clips, so that every value above 255 would become white.
        return Image.fromarray((np.asarray(strip).astype(np.uint16) >> 8).astype(np.uint8))
    if strip.mode in ("P", "PA", "LA", "La", "RGBA", "RGBa") or "transparency" in strip.info:
        coloured = strip.convert("RGBA")
        flat = Image.new("RGB", strip.size, (255, 255, 255))
        flat.paste(coloured, mask=coloured.getchannel("A"))
        return flat
    if strip.mode in ("L", "RGB", "CMYK"):
        return strip
    if strip.mode == "1":
        return strip.convert("L")
    if strip.mode in ("RGBX", "YCbCr", "HSV"):
        return strip.convert("RGB")
    raise UnsupportedImageError(f"Pictures of the kind {strip.mode} (32-bit, floating-point or Lab values) are not accepted.")


def _srgb_transform(image: Image.Image) -> Callable[[Image.Image], Image.Image] | None:
    """What turns a strip into sRGB by the embedded profile; None without one, or with one that is broken, foreign or sRGB."""
    raw = image.info.get("icc_profile")
    if not raw:
        return None
    # A pixel tells what the whole becomes; but it would have the whole decoded where that was done elsewhere.
    mode = image.mode if image.mode == "RGB" and "transparency" not in image.info else _profiled(image.crop((0, 0, 1, 1))).mode
    if mode == "RGB" and (_is_srgb(raw) if len(raw) <= _SMALL_PROFILE_BYTES else _is_srgb.__wrapped__(raw)):
        return None
    transform = _transform(raw, mode)
    if transform is None:
        return None

    def to_srgb(strip: Image.Image) -> Image.Image:
        converted = ImageCms.applyTransform(strip, transform)
        assert converted is not None  # None only when it works in place
        return converted

    return to_srgb


@functools.lru_cache(maxsize=64)
def _is_srgb(raw: bytes) -> bool:
    """Whether an RGB profile is sRGB by effect, or of no use: most are, and the conversion of 12 megapixels takes 0.2 s."""
    transform = _transform(raw, "RGB")
    try:
        return transform is None or _changes_nothing(transform)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return True


def _transform(raw: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(raw))
        if profile.profile.xcolor_space.strip() != {"L": "GRAY"}.get(mode, mode):
            return None
        return ImageCms.buildTransform(
            profile,
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None


def _changes_nothing(transform: ImageCms.ImageCmsTransform) -> bool:
    levels = np.linspace(0, 255, 9).astype(np.uint8)
    lattice = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(27, 27, 3)
    converted = ImageCms.applyTransform(Image.fromarray(lattice), transform)
    return bool(np.abs(np.asarray(converted).astype(np.int16) - lattice.astype(np.int16)).max() <= 1)
