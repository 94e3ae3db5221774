"""
What every backend promises (see BeautifyBackend in ports.py), whether it retouches here or elsewhere.

A new backend adds a line to BACKENDS.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio
from PIL import ExifTags, Image

from jobdaemon.backends.faces import FaceDetector, Pixels
from jobdaemon.backends.opencv import OpenCVBackend
from jobdaemon.backends.photo_enhance import PhotoEnhanceBackend
from jobdaemon.errors import UnsupportedImageError
from jobdaemon.http import GuardedClient
from jobdaemon.photo import PhotoLimits
from jobdaemon.ports import BeautifiedPhoto, BeautifyBackend
from jobdaemon.sandbox import Behaviour, Sandbox

ASTRONAUT = Path(__file__).parents[1] / "data" / "astronaut.png"
LIMITS = PhotoLimits(max_bytes=2_000_000, max_pixels=1_000_000)


@asynccontextmanager
async def opencv() -> AsyncIterator[BeautifyBackend]:
    """On the CPU of this machine."""
    backend = OpenCVBackend(limits=LIMITS)
    yield backend
    await backend.close()


def photo_enhance(name: str) -> Callable[[], AbstractAsyncContextManager[BeautifyBackend]]:
    """A photo enhance service, which the sandbox plays."""

    @asynccontextmanager
    async def opened() -> AsyncIterator[BeautifyBackend]:
        async with Sandbox(Behaviour(latency_s=0.05)) as sandbox:
            backend = PhotoEnhanceBackend(
                f"{sandbox.url}/photo-enhance/{name}",
                GuardedClient(allowed_hosts=[sandbox.url.removeprefix("http://")]),
                poll=timedelta(milliseconds=10),
                timeout=timedelta(seconds=30),
                max_pixels=6_000_000,
                max_result_bytes=100_000_000,
                limits=LIMITS,
            )
            yield backend
            await backend.close()

    return opened


BACKENDS: dict[str, Callable[[], AbstractAsyncContextManager[BeautifyBackend]]] = {
    "opencv": opencv,
    "photo_enhance": photo_enhance("one"),
    "photo_enhance, as documented, blocking": photo_enhance("docs-blocking"),
}


@pytest_asyncio.fixture(params=BACKENDS.values(), ids=BACKENDS.keys())
async def backend(request: pytest.FixtureRequest) -> AsyncIterator[BeautifyBackend]:
    """Each backend in turn."""
    async with request.param() as backend:
        yield backend


def encoded(image: Image.Image, media: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, media, **options)
    return buffer.getvalue()


def portrait() -> Image.Image:
    with Image.open(ASTRONAUT) as image:
        return image.convert("RGB")


def pixels_of(photo: BeautifiedPhoto | Image.Image) -> Pixels:
    if isinstance(photo, BeautifiedPhoto):
        with Image.open(io.BytesIO(photo.content)) as image:
            return np.array(image.convert("RGB"))
    return np.array(photo)


def distance(one: Pixels, other: Pixels) -> float:
    """Mean difference, 0 to 255."""
    return float(np.abs(one.astype(np.int16) - other).mean())


def face_of(pixels: Pixels) -> Pixels:
    """The astronaut's."""
    left, top, right, bottom = (max(0, round(edge)) for edge in FaceDetector().detect(pixels_of(portrait()))[0].box)
    return pixels[top:bottom, left:right]


async def test_a_face_is_retouched(backend: BeautifyBackend) -> None:
    """The result is a JPEG of the photo's own size with another face, and says who did it."""
    result = await backend.beautify(encoded(portrait()), strength=0.7)
    with Image.open(io.BytesIO(result.content)) as image:
        assert (image.format, image.size) == ("JPEG", (result.width, result.height))
    assert (result.width, result.height) == portrait().size
    assert (result.media_type, result.faces, result.unrestored) == ("image/jpeg", 1, 0)
    assert distance(face_of(pixels_of(result)), face_of(pixels_of(portrait()))) > 1.5
    assert result.model
    assert result.device


async def test_strength_is_a_degree(backend: BeautifyBackend) -> None:
    """Half the strength changes the face less; none changes no pixel beyond what JPEG does, and counts no face as restored."""
    photo = encoded(portrait())
    none, half, whole = [await backend.beautify(photo, strength=strength) for strength in (0.0, 0.5, 1.0)]
    before = face_of(pixels_of(portrait()))
    changes = [distance(face_of(pixels_of(result)), before) for result in (none, half, whole)]
    assert changes == sorted(changes)
    assert (none.faces, none.unrestored) == (0, 1)
    with Image.open(io.BytesIO(encoded(portrait(), "JPEG", quality=95, subsampling=0))) as same:
        assert distance(pixels_of(none), pixels_of(same.convert("RGB"))) < 0.1


async def test_the_same_photo_gives_the_same_bytes(backend: BeautifyBackend) -> None:
    """One after the other or at once."""
    photo = encoded(portrait())
    first = await backend.beautify(photo, strength=0.7)
    assert await asyncio.gather(*(backend.beautify(photo, strength=0.7) for _ in range(2))) == [first, first]


async def test_without_a_face_nothing_is_done(backend: BeautifyBackend) -> None:
    """A picture without faces comes back as it was, with no face counted."""
    hill = Image.linear_gradient("L").resize((300, 200)).convert("RGB")
    result = await backend.beautify(encoded(hill), strength=1.0)
    assert (result.faces, result.unrestored) == (0, 0)
    assert distance(pixels_of(result), pixels_of(hill)) < 1.0


@pytest.mark.parametrize("media", ["JPEG", "PNG", "WEBP", "TIFF"])
async def test_every_format_is_taken(backend: BeautifyBackend, media: str) -> None:
    """What the gatekeeper accepts is retouched, and becomes a JPEG."""
    result = await backend.beautify(encoded(portrait(), media), strength=0.7)
    assert result.content.startswith(b"\xff\xd8\xff")
    assert result.faces == 1


async def test_a_turned_photo_comes_back_upright_and_without_metadata(backend: BeautifyBackend) -> None:
    """EXIF orientation is applied; where it was taken is dropped."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif[ExifTags.Base.Artist] = "somebody"
    exif.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitude] = (48.0, 8.0, 0.0)
    photo = encoded(portrait().crop((80, 0, 400, 400)).transpose(Image.Transpose.ROTATE_90), "JPEG", exif=exif.tobytes())
    result = await backend.beautify(photo, strength=0.7)
    assert (result.width, result.height, result.faces) == (320, 400, 1)
    with Image.open(io.BytesIO(result.content)) as image:
        left = image.getexif()
    assert not {ExifTags.Base.Orientation, ExifTags.Base.Artist, ExifTags.IFD.GPSInfo} & set(left)


@pytest.mark.parametrize(
    "photo",
    [
        b"",
        b"GIF89a" + bytes(100),
        encoded(portrait())[:50_000],
        encoded(Image.new("RGB", (2000, 2000))),
        encoded(Image.new("RGB", (40, 40))),
        bytes(2_000_001),
    ],
    ids=["empty", "another format", "truncated", "too many pixels", "too small", "too large"],
)
async def test_what_is_no_photo_is_refused(backend: BeautifyBackend, photo: bytes) -> None:
    """For good, with a sentence."""
    with pytest.raises(UnsupportedImageError, match=r"\.$"):
        await backend.beautify(photo, strength=0.7)


@pytest.mark.parametrize("strength", [-0.1, 1.1, float("nan")])
async def test_a_strength_that_is_none_is_a_mistake(backend: BeautifyBackend, strength: float) -> None:
    """Who calls it so has a bug."""
    with pytest.raises(ValueError, match="strength"):
        await backend.beautify(encoded(portrait()), strength=strength)


async def test_the_event_loop_goes_on(backend: BeautifyBackend) -> None:
    """While a photo is retouched, others get their turn."""
    work = asyncio.ensure_future(backend.beautify(encoded(portrait()), strength=0.7))
    turns = 0
    while not work.done():
        await asyncio.sleep(0.001)
        turns += 1
    assert turns > 10
    await work


async def test_an_attempt_can_be_stopped(backend: BeautifyBackend) -> None:
    """A cancelled call ends at once, and the next one works."""
    photo = encoded(portrait())
    work = asyncio.ensure_future(backend.beautify(photo, strength=0.7))
    await asyncio.sleep(0.02)
    work.cancel()
    async with asyncio.timeout(5):
        with pytest.raises(asyncio.CancelledError):
            await work
        assert (await backend.beautify(photo, strength=0.7)).faces == 1
