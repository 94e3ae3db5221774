"""The backend photo_enhance against a service that does what a test says: silent, forgetful, broken, hostile."""

from __future__ import annotations

import asyncio
import functools
import io
import socket
import struct
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import pytest_asyncio
from aiohttp import web
from aiohttp.multipart import BodyPartReader
from PIL import ExifTags, Image, ImageDraw, ImageEnhance, ImageFilter

from jobdaemon.backends import photo_enhance
from jobdaemon.backends.faces import FaceDetector
from jobdaemon.backends.photo_enhance import PhotoEnhanceBackend
from jobdaemon.errors import (
    BackendAwayError,
    DeviceMemoryError,
    ProviderRefusedError,
    ProviderUnavailableError,
    RateLimitedError,
    UnsupportedImageError,
)
from jobdaemon.http import GuardedClient
from jobdaemon.photo import MIN_SIDE_PX
from jobdaemon.sandbox.photo_enhance_service import enhanced

ASTRONAUT = Path(__file__).parents[1] / "data" / "astronaut.png"
STATUS = "/api/v1/status/"
DOWNLOAD = "/api/v1/download/"

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


restored = functools.cache(enhanced)


@dataclass
class Service:
    """
    A service whose answers a test may replace; left alone, it does its work at once.

    Attributes:
        answers: beginning of a path -> answers for its requests, one after another; the last one stays.
        asked: method and path of every request.
        uploads: the parts named ``file`` that came.
    """

    answers: dict[str, list[Handler]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    uploads: list[tuple[str, str, bytes]] = field(default_factory=list)
    deleted: asyncio.Event = field(default_factory=asyncio.Event)
    url: str = ""

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(f"{request.method} {request.path}")
        if request.method == "POST":
            await self._take(request)
        for beginning, answers in self.answers.items():
            if request.path.startswith(beginning):
                return await (answers.pop(0) if len(answers) > 1 else answers[0])(request)
        return await self.work(request)

    async def work(self, request: web.Request) -> web.StreamResponse:
        """As the real one answers."""
        number = len(self.uploads)
        if request.method == "POST":
            return web.json_response({"task_id": f"task-{number}", "status": "queued"})
        if request.method == "DELETE":
            self.deleted.set()
            return web.json_response({"message": "Task deleted successfully"})
        if request.path.startswith(STATUS):
            return web.json_response({"status": "completed", "progress": 1.0})
        return web.Response(body=restored(self.uploads[-1][2]), content_type="image/jpeg")

    async def _take(self, request: web.Request) -> None:
        async for part in await request.multipart():
            assert isinstance(part, BodyPartReader)
            assert part.name == "file"
            self.uploads.append((part.filename or "", part.headers["Content-Type"], bytes(await part.read())))

    def count(self, beginning: str) -> int:
        """How many requests began so."""
        return sum(asked.startswith(beginning) for asked in self.asked)


@pytest_asyncio.fixture
async def service() -> AsyncIterator[Service]:
    service = Service()
    app = web.Application(client_max_size=2**30)
    app.router.add_route("*", "/{path:.*}", service.handle)
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    service.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield service
    await runner.cleanup()


Open = Callable[..., PhotoEnhanceBackend]


@pytest_asyncio.fixture
async def open_backend(service: Service) -> AsyncIterator[Open]:
    """Opens backends on the service, or elsewhere."""
    opened: list[PhotoEnhanceBackend] = []

    def make(url: str | None = None, **changes: Any) -> PhotoEnhanceBackend:
        values: dict[str, Any] = {
            "poll": timedelta(milliseconds=10),
            "timeout": timedelta(seconds=20),
            "max_pixels": 6_000_000,
            "max_result_bytes": 20_000_000,
        }
        values["client"] = GuardedClient(allowed_hosts=[(url or service.url).removeprefix("http://")])
        opened.append(PhotoEnhanceBackend(url or service.url, **(values | changes)))
        return opened[-1]

    yield make
    for backend in opened:
        await backend.close()


@pytest.fixture
def backend(open_backend: Open) -> PhotoEnhanceBackend:
    return open_backend()


def portrait(scale: float = 1.0) -> Image.Image:
    """Head and shoulders, 320 pixels a side."""
    with Image.open(ASTRONAUT) as image:
        return image.convert("RGB").crop((60, 0, 380, 320)).resize((round(320 * scale), round(320 * scale)))


def encoded(image: Image.Image, media: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, media, **options)
    return buffer.getvalue()


PHOTO = encoded(portrait(), quality=95)


def says(code: int = 200, headers: dict[str, str] | None = None, /, **body: Any) -> Handler:
    async def answer(_request: web.Request) -> web.StreamResponse:
        return web.json_response(body, status=code, headers=headers)

    return answer


def sends(content: bytes, media_type: str = "image/jpeg", status: int = 200) -> Handler:
    async def answer(_request: web.Request) -> web.StreamResponse:
        return web.Response(body=content, content_type=media_type, status=status)

    return answer


def redirects(url: str) -> Handler:
    async def answer(_request: web.Request) -> web.StreamResponse:
        return web.Response(status=307, headers={"Location": url})

    return answer


async def resets(request: web.Request) -> web.StreamResponse:
    assert request.transport is not None
    handle = request.transport.get_extra_info("socket")
    handle.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    request.transport.abort()
    return web.Response()


async def says_nothing(_request: web.Request) -> web.StreamResponse:
    await asyncio.Event().wait()
    raise AssertionError("unreachable")


async def drips(request: web.Request) -> web.StreamResponse:
    """A picture that never ends."""
    response = web.StreamResponse(headers={"Content-Type": "image/jpeg"})
    await response.prepare(request)
    while True:
        await response.write(b"\xff\xd8\xff")
        await asyncio.sleep(0.01)


PAGE = sends(b"<html><title>502 Bad Gateway</title></html>", "text/html", 502)
GREETING = sends(b"<html><title>Welcome</title></html>", "text/html")


# -- what is sent -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("media", ["PNG", "WEBP", "JPEG"])
async def test_the_service_gets_a_clean_jpeg(backend: PhotoEnhanceBackend, service: Service, media: str) -> None:
    """Whatever the photo is, it is sent under a name and a type that the service takes, and without metadata."""
    exif = Image.Exif()
    exif.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitude] = (48.0, 8.0, 0.0)
    await backend.beautify(encoded(portrait(), media, exif=exif.tobytes()), strength=0.7)
    [(name, media_type, content)] = service.uploads
    assert (name, media_type) == ("photo.jpg", "image/jpeg")
    with Image.open(io.BytesIO(content)) as sent:
        assert sent.format == "JPEG"
        assert ExifTags.IFD.GPSInfo not in sent.getexif()


async def test_a_heic_is_sent_as_a_jpeg(backend: PhotoEnhanceBackend, service: Service) -> None:
    """Phones make them, and the service does not read them."""
    pillow_heif = pytest.importorskip("pillow_heif")
    heif = pillow_heif.from_pillow(portrait())
    buffer = io.BytesIO()
    heif.save(buffer, quality=90)
    assert (await backend.beautify(buffer.getvalue(), strength=0.7)).faces == 1
    assert service.uploads[0][2].startswith(b"\xff\xd8\xff")


async def test_a_large_photo_is_sent_smaller_and_comes_back_in_its_size(open_backend: Open, service: Service) -> None:
    """At most max_pixels are sent, whatever the photo has."""
    backend = open_backend(max_pixels=100_000)
    result = await backend.beautify(encoded(portrait(2.0)), strength=0.7)
    assert (result.width, result.height, result.faces) == (*portrait(2.0).size, 1)
    with Image.open(io.BytesIO(service.uploads[0][2])) as sent:
        assert 90_000 < sent.width * sent.height <= 100_000


async def test_a_panorama_is_no_bad_photo(open_backend: Open, service: Service) -> None:
    """Made smaller, it has a side shorter than any photo that is let in; it is sent, and the result used, all the same."""
    wide = Image.new("RGB", (8000, 400))
    wide.paste(portrait(), (3000, 40))
    result = await open_backend(max_pixels=65_536).beautify(encoded(wide), strength=0.7)
    assert (result.width, result.height, result.faces + result.unrestored) == (8000, 400, 1)
    with Image.open(io.BytesIO(service.uploads[0][2])) as sent:
        assert sent.height < MIN_SIDE_PX


async def test_nothing_is_sent_that_needs_no_retouching(backend: PhotoEnhanceBackend, service: Service) -> None:
    """Neither a picture without a face, nor anything at strength 0, nor what is no photo."""
    await backend.beautify(encoded(Image.new("RGB", (300, 200), (90, 120, 90))), strength=1.0)
    await backend.beautify(PHOTO, strength=0.0)
    with pytest.raises(UnsupportedImageError):
        await backend.beautify(PHOTO[:-2_000], strength=1.0)
    assert service.asked == []


# -- how it goes on ---------------------------------------------------------------------------------------------------------


async def test_a_task_is_deleted_once_it_was_fetched(backend: PhotoEnhanceBackend, service: Service) -> None:
    """Its result would lie on the service's disk for ever."""
    await backend.beautify(PHOTO, strength=0.7)
    async with asyncio.timeout(5):
        await service.deleted.wait()
    assert service.asked == [
        "POST /api/v1/enhance",
        "GET /api/v1/status/task-1",
        "GET /api/v1/download/task-1",
        "DELETE /api/v1/tasks/task-1",
    ]


async def test_an_attempt_that_is_stopped_deletes_its_task(backend: PhotoEnhanceBackend, service: Service) -> None:
    """Nobody will come for it."""
    service.answers[STATUS] = [says_nothing]
    work = asyncio.ensure_future(backend.beautify(PHOTO, strength=0.7))
    async with asyncio.timeout(10):
        while not service.count("GET"):  # noqa: ASYNC110 - the service gives no signal
            await asyncio.sleep(0.01)
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work
        await service.deleted.wait()


async def test_a_silent_service_is_at_work(
    backend: PhotoEnhanceBackend, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Questions that get no answer, or that a gateway gave up on, are asked again, however many; the photo is sent once."""
    monkeypatch.setattr(photo_enhance, "_PATIENCE", timedelta(milliseconds=200))
    service.answers[DOWNLOAD] = [sends(restored(PHOTO))]
    service.answers[STATUS] = [*[says_nothing] * 6, *[sends(b"", status=504)] * 6, service.work]
    assert (await backend.beautify(PHOTO, strength=0.7)).faces == 1
    assert len(service.uploads) == 1


async def test_a_result_outlasts_what_the_service_does_for_others(
    backend: PhotoEnhanceBackend, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Done, and then silent: it works on somebody else's photo. The result is waited for like the task, and is not made again."""
    monkeypatch.setattr(photo_enhance, "_PATIENCE", timedelta(milliseconds=200))
    service.answers[DOWNLOAD] = [*[says_nothing] * 3, *[sends(b"", status=504)] * 4, service.work]
    assert (await backend.beautify(PHOTO, strength=0.7)).faces == 1
    assert len(service.uploads) == 1


async def test_a_result_outlasts_a_limit(backend: PhotoEnhanceBackend, service: Service) -> None:
    """The question before the download was one too many for a proxy: the result is asked for later, and is not made again."""
    service.answers[DOWNLOAD] = [*[says(429, {"Retry-After": "0"})] * 4, says(503, {"Retry-After": "0"}), service.work]
    assert (await backend.beautify(PHOTO, strength=0.7)).faces == 1
    assert len(service.uploads) == 1


@pytest.mark.parametrize(("place", "asked_for"), [(STATUS, "3600"), (DOWNLOAD, "3600"), (STATUS, None), (DOWNLOAD, None)])
async def test_a_limit_that_outlasts_the_photo_s_time_costs_no_attempt(
    open_backend: Open, service: Service, place: str, asked_for: str | None
) -> None:
    """Who is to come back in an hour does not wait for the photo's time to run out in a slot; whoever is told no time waits."""
    service.answers[place] = [says(429, {"Retry-After": asked_for} if asked_for else None)]
    backend = open_backend(timeout=timedelta(seconds=20 if asked_for else 1.5))
    with pytest.raises(RateLimitedError) as told:
        await backend.beautify(PHOTO, strength=0.7)
    assert told.value.retry_after == (timedelta(hours=1) if asked_for else None)
    async with asyncio.timeout(20):
        await service.deleted.wait()


async def test_tasks_that_cannot_be_deleted_stand_in_nobody_s_way(open_backend: Open, service: Service) -> None:
    """A service, or a proxy, that never answers a deletion gets only so many: they share the connections with the next photos."""
    service.answers["/api/v1/tasks/"] = [says_nothing]
    backend = open_backend(client=GuardedClient(allowed_hosts=[service.url.removeprefix("http://")], max_connections=30))
    for _ in range(40):
        assert (await backend.beautify(PHOTO, strength=0.7)).faces == 1
    assert service.count("DELETE") < 30


async def test_words_nobody_knows_go_on_until_the_deadline(open_backend: Open, service: Service) -> None:
    """An unknown status is not an end; the photo's time is."""
    service.answers[STATUS] = [says(status="polishing", progress=250)]
    backend = open_backend(timeout=timedelta(seconds=1.5))
    with pytest.raises(ProviderUnavailableError, match=r"within 1\.5 s"):
        await backend.beautify(PHOTO, strength=0.7)
    assert service.count(f"GET {STATUS}") > 3


@pytest.mark.parametrize("place", [STATUS, DOWNLOAD])
async def test_a_forgotten_task_is_sent_again_once(backend: PhotoEnhanceBackend, service: Service, place: str) -> None:
    """After a restart nobody knows the task, or its file."""
    service.answers[place] = [says(404, detail="not found"), service.work]
    assert (await backend.beautify(PHOTO, strength=0.7)).faces == 1
    assert len(service.uploads) == 2
    service.answers[place] = [says(404, detail="not found")]
    with pytest.raises(ProviderUnavailableError, match="twice"):
        await backend.beautify(PHOTO, strength=0.7)
    assert len(service.uploads) == 4


async def test_a_few_broken_answers_are_got_over(backend: PhotoEnhanceBackend, service: Service) -> None:
    """Four questions in a row may fail, and a full service may ask for time; the fifth is too many."""
    full = says(429, {"Retry-After": "0"})
    service.answers[STATUS] = [resets, PAGE, GREETING, says(500), full, full, service.work]
    service.answers[DOWNLOAD] = [PAGE, service.work]
    assert (await backend.beautify(PHOTO, strength=0.7)).faces == 1
    service.answers[STATUS] = [resets]
    with pytest.raises(ProviderUnavailableError, match="no whole answer"):
        await backend.beautify(PHOTO, strength=0.7)
    assert len(service.uploads) == 2


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ({"status": "failed", "error": "CUDA out of memory. Tried to allocate 2.00 GiB"}, DeviceMemoryError),
        ({"status": "failed", "error": "weights not found"}, ProviderUnavailableError),
        ({"status": "failed", "error": None}, ProviderUnavailableError),
        ({"status": "cancelled", "error": {"a": "b"}}, ProviderUnavailableError),
    ],
)
async def test_a_failed_task_is_the_service_s_trouble(
    backend: PhotoEnhanceBackend, service: Service, body: dict[str, Any], error: type[Exception]
) -> None:
    """The photo it got was a clean JPEG: trying again may help."""
    service.answers[STATUS] = [says(**body)]
    with pytest.raises(error, match=str(body["error"])[:19] if isinstance(body["error"], str) else body["status"]):
        await backend.beautify(PHOTO, strength=0.7)


# -- what it answers to an upload -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        (says(429, {"Retry-After": "7"}), RateLimitedError, "capacity"),
        (says(503, {"Retry-After": "7"}), RateLimitedError, "capacity"),
        (says(503), BackendAwayError, "503"),
        (says(504), ProviderUnavailableError, "504"),
        (PAGE, ProviderUnavailableError, "502"),
        (says(500, detail="Failed to process request: disk full"), ProviderUnavailableError, "disk full"),
        (says(401), BackendAwayError, "url right"),
        (says(404, detail="Not Found"), BackendAwayError, "url right"),
        (says(405), BackendAwayError, "url right"),
        (says(403), ProviderUnavailableError, "url right"),
        (redirects("http://169.254.169.254/latest/meta-data"), BackendAwayError, "307"),
        (GREETING, ProviderUnavailableError, "no JSON"),
        (sends(b"[1]", "application/json"), ProviderUnavailableError, "no object"),
        (sends(b"[" * 100_000, "application/json"), ProviderUnavailableError, "no JSON"),
        (sends(b" " * 1_000_000, "application/json"), ProviderUnavailableError, "more than"),
        (says(task_id="../../etc/passwd"), ProviderUnavailableError, "named no task"),
        (says(task_id=7), ProviderUnavailableError, "named no task"),
        (resets, ProviderUnavailableError, "no whole answer"),
        (says(400, detail="Unsupported file format."), ProviderRefusedError, "Unsupported file format"),
        (says(413, detail="File too large."), ProviderRefusedError, "max_pixels"),
        (says(422, detail=[{"loc": ["query"]}]), ProviderRefusedError, "422"),
    ],
)
async def test_answers_to_an_upload(
    backend: PhotoEnhanceBackend, service: Service, answer: Handler, error: type[Exception], words: str
) -> None:
    """Full, down or another service in its place: later, at no cost. Refused: never."""
    service.answers["/api/v1/enhance"] = [answer]
    with pytest.raises(error, match=words) as told:
        await backend.beautify(PHOTO, strength=0.7)
    if error is RateLimitedError:
        assert told.value.retry_after == timedelta(seconds=7)  # type: ignore[attr-defined]
    assert isinstance(told.value, BackendAwayError) is (error is BackendAwayError)
    assert str(told.value).count("\n") == 0
    assert len(service.asked) == 1


@pytest.mark.parametrize("place", ["/api/v1/enhance", STATUS])
async def test_what_a_service_tells_is_quoted_without_secrets(backend: PhotoEnhanceBackend, service: Service, place: str) -> None:
    """Its words become the order's error, which many may read; a signed address or a key in them is not for these."""
    words = "no upload to https://bucket.example/p.jpg?X-Amz-Signature=abcd with api_key=efgh; password: ijkl"
    service.answers[place] = [says(500, detail=words) if place != STATUS else says(status="failed", error=words)]
    with pytest.raises(ProviderUnavailableError, match="no upload to") as told:
        await backend.beautify(PHOTO, strength=0.7)
    assert not any(secret in str(told.value) for secret in ("abcd", "efgh", "ijkl"))


async def test_nobody_there(open_backend: Open) -> None:
    """A service that cannot be reached is an outage, and nothing of the photo's."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        backend = open_backend(f"http://127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(BackendAwayError, match="could not be reached"):
            await backend.beautify(PHOTO, strength=0.7)


async def test_a_photo_that_may_have_broken_the_service_is_no_outage_s(backend: PhotoEnhanceBackend, service: Service) -> None:
    """What breaks off after the photo was sent is told apart from a service that was away before."""
    for answer in (resets, PAGE, says(500), says(504)):
        service.answers["/api/v1/enhance"] = [answer]
        service.answers["/health"] = [says(status="healthy")]
        with pytest.raises(ProviderUnavailableError) as told:
            await backend.beautify(PHOTO, strength=0.7)
        assert type(told.value) is ProviderUnavailableError


@pytest.mark.parametrize(
    ("health", "error"),
    [
        (resets, BackendAwayError),
        (PAGE, BackendAwayError),
        (says(503), BackendAwayError),
        (says(503, {"Retry-After": "7"}), RateLimitedError),
    ],
)
async def test_a_service_in_doubt_is_asked_before_it_gets_a_photo(
    backend: PhotoEnhanceBackend, service: Service, health: Handler, error: type[Exception]
) -> None:
    """An outage in which connections are made and broken costs a photo one attempt at most: the next ones send nothing."""
    service.answers["/api/v1/enhance"] = [resets]
    with pytest.raises(ProviderUnavailableError):
        await backend.beautify(PHOTO, strength=0.7)
    service.answers = {"/health": [health]}
    for _ in range(3):
        with pytest.raises(error):
            await backend.beautify(PHOTO, strength=0.7)
    assert len(service.uploads) == 1
    service.answers = {"/health": [says(404)]}
    assert (await backend.beautify(PHOTO, strength=0.7)).faces == 1
    assert (await backend.beautify(PHOTO, strength=0.7)).faces == 1
    assert service.count("GET /health") == 4


async def test_a_service_that_went_with_a_photo_has_seen_it(backend: PhotoEnhanceBackend, service: Service) -> None:
    """Forgotten by one that is away when it is sent again, the photo may have broken it."""
    service.answers["/api/v1/enhance"] = [says(task_id="task-1"), says(503)]
    service.answers[STATUS] = [says(404)]
    with pytest.raises(ProviderUnavailableError) as told:
        await backend.beautify(PHOTO, strength=0.7)
    assert type(told.value) is ProviderUnavailableError


async def test_it_can_be_asked_whether_it_is_there(open_backend: Open, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Well, or silent at work: fine. Not well, no such service, or nobody there: an error that says so."""
    with monkeypatch.context() as soon:
        soon.setattr(photo_enhance, "_CHECK", timedelta(milliseconds=200))
        for answer in (says(status="healthy"), says_nothing):
            service.answers["/health"] = [answer]
            await open_backend().check()
    for answer in (says(status="unhealthy"), says(404), GREETING, PAGE, resets):
        service.answers["/health"] = [answer]
        with pytest.raises(ProviderUnavailableError):
            await open_backend().check()


# -- what comes back --------------------------------------------------------------------------------------------------------


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_bomb(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(10_000_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


LARGE = portrait(4.0)


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (GREETING, "cannot be used"),
        (sends(b""), "cannot be used"),
        (sends(encoded(LARGE)[:-2000]), "truncated or damaged"),
        (sends(encoded(LARGE, "PNG")[:200_000], "image/png"), "truncated or damaged"),
        (sends(png_bomb(29_000, 29_000)), "cannot be used"),
        (sends(encoded(Image.new("RGB", LARGE.size))), "not of the photo"),
        (sends(encoded(LARGE.transpose(Image.Transpose.ROTATE_180))), "not of the photo"),
        (sends(encoded(LARGE.crop((0, 0, 1280, 640)))), "pixels for"),
        (sends(encoded(portrait(0.5))), "pixels for"),
        (redirects("http://169.254.169.254/latest/meta-data"), "307"),
        (resets, "no whole answer"),
        (sends(b"", status=500), "500"),
    ],
    ids=[
        *("a page", "nothing", "truncated", "truncated PNG", "bomb", "black", "another", "cut", "small", "redirect", "reset"),
        "error",
    ],
)
async def test_what_is_no_result(backend: PhotoEnhanceBackend, service: Service, result: Handler, words: str) -> None:
    """It is fetched once more, then the attempt failed; the task is deleted, and nothing of it becomes the order's photo."""
    service.answers[DOWNLOAD] = [result]
    with pytest.raises(ProviderUnavailableError, match=words):
        await backend.beautify(PHOTO, strength=0.7)
    assert service.count(f"GET {DOWNLOAD}") == 2
    async with asyncio.timeout(5):
        await service.deleted.wait()


def studio(person: Image.Image) -> Image.Image:
    """As a photographer takes all customers: a head at the same place before the same wall."""
    picture = Image.new("RGB", (320, 400), (240, 240, 240))
    mask = Image.new("L", person.size)
    ImageDraw.Draw(mask).ellipse((90, 20, 230, 240), fill=255)
    picture.paste(person, (0, 60), mask.filter(ImageFilter.GaussianBlur(4)))
    return picture


async def test_another_customer_s_portrait_is_no_result(backend: PhotoEnhanceBackend, service: Service) -> None:
    """
    A service that counts its tasks begins anew when it is restarted, and a proxy may keep what was fetched: a portrait so like
    this one that colours and brightness hardly differ, of somebody else, is not laid over it.
    """
    somebody_else = studio(portrait().transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    nobody = Image.new("RGB", (320, 400), (225, 220, 215))
    for result in (somebody_else, nobody):
        service.answers[DOWNLOAD] = [sends(restored(encoded(result, quality=95)))]
        with pytest.raises(ProviderUnavailableError, match="not of the photo"):
            await backend.beautify(encoded(studio(portrait()), quality=95), strength=0.7)


@pytest.mark.parametrize(
    "filtered",
    [
        lambda image: image.filter(ImageFilter.MedianFilter(9)),
        lambda image: image.filter(ImageFilter.GaussianBlur(4)),
        lambda image: image.filter(ImageFilter.UnsharpMask(4, 200)),
        lambda image: ImageEnhance.Brightness(image).enhance(1.2),
        lambda image: ImageEnhance.Contrast(image).enhance(1.5),
        lambda image: image.convert("L").convert("RGB"),
    ],
    ids=["median", "blurred", "sharpened", "brighter", "contrast", "grey"],
)
@pytest.mark.parametrize("photo", [portrait(), studio(portrait()), ImageEnhance.Brightness(portrait()).enhance(0.25)])
async def test_however_a_photo_is_retouched_it_is_the_photo(
    backend: PhotoEnhanceBackend, service: Service, filtered: Callable[[Image.Image], Image.Image], photo: Image.Image
) -> None:
    """Nothing that is done to it in place makes it another one."""
    service.answers[DOWNLOAD] = [sends(encoded(filtered(photo).resize((1280, 4 * photo.height)), quality=90))]
    result = await backend.beautify(encoded(photo, quality=95), strength=0.7)
    assert (result.width, result.height) == photo.size


async def test_a_result_that_did_not_come_whole_is_fetched_again(backend: PhotoEnhanceBackend, service: Service) -> None:
    """It took long to make."""
    service.answers[DOWNLOAD] = [sends(encoded(LARGE)[:-2000]), service.work]
    assert (await backend.beautify(PHOTO, strength=0.7)).faces == 1
    assert len(service.uploads) == 1


async def test_a_result_without_end_is_given_up(open_backend: Open, service: Service) -> None:
    """Two gigabytes are not read to their end, nor is what never ends waited for longer than the photo's time."""
    sent_bytes = 0

    async def floods(request: web.Request) -> web.StreamResponse:
        nonlocal sent_bytes
        response = web.StreamResponse(headers={"Content-Type": "image/jpeg", "Content-Length": str(2 * 1024**3)})
        await response.prepare(request)
        for _ in range(2048):
            await response.write(bytes(1024**2))
            sent_bytes += 1024**2
        return response

    service.answers[DOWNLOAD] = [floods]
    with pytest.raises(ProviderUnavailableError, match="more than 20000000 bytes"):
        await open_backend().beautify(PHOTO, strength=0.7)
    assert sent_bytes < 100 * 1024**2
    service.answers[DOWNLOAD] = [drips]
    with pytest.raises(ProviderUnavailableError):
        await open_backend(timeout=timedelta(seconds=1)).beautify(PHOTO, strength=0.7)


async def test_another_format_in_another_size_is_taken(backend: PhotoEnhanceBackend, service: Service) -> None:
    """What counts are the bytes: a PNG of twice the size, called a JPEG, of the same photo and retouched."""
    with Image.open(io.BytesIO(restored(PHOTO))) as retouched:
        service.answers[DOWNLOAD] = [sends(encoded(retouched.resize((640, 640)), "PNG"))]
    result = await backend.beautify(PHOTO, strength=0.7)
    assert (result.faces, result.width, result.height) == (1, 320, 320)


# -- which faces it restored ------------------------------------------------------------------------------------------------


async def pixels_beside(backend: PhotoEnhanceBackend, photo: bytes) -> tuple[int, int, float]:
    """Faces, unrestored ones, and how far the result is from the photo on average."""
    result = await backend.beautify(photo, strength=1.0)
    with Image.open(io.BytesIO(result.content)) as after, Image.open(io.BytesIO(photo)) as before:
        apart = np.abs(np.asarray(after.convert("RGB")).astype(int) - np.asarray(before.convert("RGB"))).mean()
    return result.faces, result.unrestored, float(apart)


def enlarged_by(resampling: Image.Resampling) -> Callable[[Image.Image], Image.Image]:
    return lambda sent: sent.resize((sent.width * 4, sent.height * 4), resampling)


def pasted(sent: Image.Image) -> Image.Image:
    """As the service does when its network fails: the face goes to its size and back, and nothing else happens to it."""
    pixels = np.asarray(sent)
    [face] = FaceDetector().detect(pixels)
    to_crop, _ = cv2.estimateAffinePartial2D(face.landmarks, TEMPLATE, method=cv2.LMEDS)
    back = cv2.invertAffineTransform(to_crop) * 4
    back[:, 2] += 2
    size = (sent.width * 4, sent.height * 4)
    crop = cv2.warpAffine(pixels, to_crop, (512, 512))
    mask = cv2.erode(cv2.warpAffine(np.ones((512, 512), np.float32), back, size), np.ones((9, 9)))
    mask = cv2.GaussianBlur(mask, (101, 101), 11)[..., np.newaxis]
    around = cv2.resize(pixels, size, interpolation=cv2.INTER_LANCZOS4)
    return Image.fromarray((around * (1 - mask) + cv2.warpAffine(crop, back, size) * mask).astype(np.uint8))


#: Where the service wants eyes, nose and corners of the mouth in its crop.
TEMPLATE = np.array([(192.98, 239.95), (318.9, 240.19), (256.63, 314.02), (201.26, 371.41), (313.09, 371.15)], np.float32)


@pytest.mark.parametrize(
    "enlarge",
    [pasted, *map(enlarged_by, (Image.Resampling.LANCZOS, Image.Resampling.BICUBIC, Image.Resampling.BILINEAR))],
    ids=["pasted", "lanczos", "bicubic", "bilinear"],
)
@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
async def test_a_face_that_was_only_enlarged_is_unrestored(
    backend: PhotoEnhanceBackend, service: Service, scale: float, enlarge: Callable[[Image.Image], Image.Image]
) -> None:
    """Out of memory, the service calls that a success; the photo then stays as it is."""

    async def enlarges(_request: web.Request) -> web.StreamResponse:
        with Image.open(io.BytesIO(service.uploads[-1][2])) as sent:
            return web.Response(body=encoded(enlarge(sent), quality=90))

    service.answers[DOWNLOAD] = [enlarges]
    faces, unrestored, apart = await pixels_beside(backend, encoded(portrait(scale), quality=95))
    assert (faces, unrestored) == (0, 1)
    assert apart < 1.0


async def test_of_two_faces_one_may_be_restored(backend: PhotoEnhanceBackend, service: Service) -> None:
    """Each is judged by itself; the result is used for both."""
    pair = Image.new("RGB", (640, 320))
    for place in (0, 320):
        pair.paste(portrait(), (place, 0))

    async def restores_one(_request: web.Request) -> web.StreamResponse:
        with Image.open(io.BytesIO(service.uploads[-1][2])) as sent:
            large = sent.resize((2560, 1280), Image.Resampling.LANCZOS)
        with Image.open(io.BytesIO(restored(service.uploads[-1][2]))) as retouched:
            large.paste(retouched.crop((1280, 0, 2560, 1280)), (1280, 0))
        return web.Response(body=encoded(large, quality=95))

    service.answers[DOWNLOAD] = [restores_one]
    faces, unrestored, _ = await pixels_beside(backend, encoded(pair, quality=95))
    assert (faces, unrestored) == (1, 1)
