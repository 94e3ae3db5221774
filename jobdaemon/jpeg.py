"""
Plain, sound JPEGs between bytes and pixels by the shortest way: nine of ten photos, and every photo that we write.

Pillow's decoder and ours are both libjpeg-turbo and give the same pixels; but Pillow keeps 4 bytes a pixel of its own and copies
them three times, which takes longer than decoding. The same goes for encoding. Whoever calls has judged the header: nothing here
guards against size or number of scans. Decoding, turning and encoding let other threads run.
"""

from __future__ import annotations

import struct

import numpy as np
import simplejpeg
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]


def decoded(content: bytes, size: tuple[int, int]) -> Pixels | None:
    """
    (H, W, 3) uint8 RGB as the file has it, or None: damaged or unusual, so that somebody more patient has to judge it.

    Args:
        content: a JPEG whose header was judged.
        size: width and height, as that header said.
    """
    width, height = size
    pixels: Pixels = np.empty((height, width, 3), np.uint8)
    try:
        if simplejpeg.decode_jpeg_header(content)[:2] != (height, width):
            return None
        # Strict: the faintest doubt of the decoder is an error, be it one that a picture can be made of all the same.
        simplejpeg.decode_jpeg(content, "RGB", buffer=pixels, strict=True)
    except ValueError:
        return None
    return pixels


def encoded(pixels: Pixels, *, quality: int, full_colour: bool, exif: bytes) -> bytes:
    """
    A baseline JPEG.

    Args:
        pixels: (H, W, 3) uint8 RGB.
        quality: 1 to 100.
        full_colour: keep colours in full resolution, not in half.
        exif: a block that begins with ``Exif``, at most 65,000 bytes.

    Raises:
        ValueError: a side is longer than a JPEG's can be.
        MemoryError: the encoder says that it failed.
    """
    import cv2  # noqa: PLC0415 - heavy, and many only look at photos

    if max(pixels.shape[:2]) > 65_500:
        raise ValueError(f"a JPEG cannot have {pixels.shape[1]} x {pixels.shape[0]} pixels")
    # Not simplejpeg: below quality 96 it takes the fast transform, whose error at 95 is a third larger.
    sampling = cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444 if full_colour else cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420
    rules = [cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, sampling]
    is_done, jpeg = cv2.imencode(".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), rules)
    if not is_done:
        raise MemoryError
    view = memoryview(jpeg)  # type: ignore[arg-type]  # numpy's types say so from Python 3.12 on
    # EXIF stands behind the JFIF segment, which is the first.
    at = 4 + struct.unpack(">H", view[4:6])[0]
    return b"".join((view[:at], b"\xff\xe1", struct.pack(">H", len(exif) + 2), exif, view[at:]))


def upright(pixels: Pixels, orientation: int) -> Pixels:
    """
    The picture as it is meant to be seen.

    Args:
        pixels: (H, W, 3) uint8; what becomes of them is undefined.
        orientation: EXIF's, 1 to 8.

    Raises:
        MemoryError: for a copy; from 5 on there is one.
    """
    if orientation == 1:
        return pixels
    import cv2  # noqa: PLC0415 - see above

    height, width = pixels.shape[:2]
    # Not OpenCV's own: the lack of memory for it is a MemoryError everywhere else.
    turned: Pixels = pixels if orientation < 5 else np.empty((width, height, 3), np.uint8)
    match orientation:
        case 2:
            cv2.flip(pixels, 1, dst=turned)
        case 3:
            cv2.flip(pixels, -1, dst=turned)
        case 4:
            cv2.flip(pixels, 0, dst=turned)
        case 5:
            cv2.transpose(pixels, dst=turned)
        case 6:
            cv2.rotate(pixels, cv2.ROTATE_90_CLOCKWISE, dst=turned)
        case 7:
            cv2.transpose(cv2.flip(pixels, -1, dst=pixels), dst=turned)
        case _:
            cv2.rotate(pixels, cv2.ROTATE_90_COUNTERCLOCKWISE, dst=turned)
    return turned
