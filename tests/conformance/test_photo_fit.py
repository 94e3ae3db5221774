"""Photos are made to fit the provider before they are sent or linked, by the provider's own bounds and at no cost."""

from __future__ import annotations

import asyncio
import hashlib
import io
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from PIL import Image

from jobdaemon.domain.artifact import Artifact, beautified_key, is_valid_key
from jobdaemon.errors import ProviderRefusedError, ProviderUnavailableError, StoreUnavailableError, UnsupportedImageError
from jobdaemon.http import GuardedClient
from jobdaemon.ports import GenerateRequest
from jobdaemon.providers import comfyui, dashscope, jimeng, openai_images, photo_links
from jobdaemon.providers.dashscope.models import ROUTES
from jobdaemon.providers.jimeng.provider import PHOTO_BOUNDS as JIMENG
from jobdaemon.providers.photo_fit import FITTED_SIDE_PX, FittedLinks, PhotoBounds, PhotoFitter
from jobdaemon.providers.photo_links import InlineLinks, StoreLinks, SuperbedLinks
from jobdaemon.providers.superbed import Superbed
from jobdaemon.sandbox import Behaviour, Sandbox
from jobdaemon.settings_generate import DashScopeSettings, JimengSettings, SuperbedSettings
from jobdaemon.storage.r2 import R2Store
from tests.conformance.provider_promises import Bench, outcome
from tests.conformance.test_providers import SERVICES
from tests.fakes import FakeUploaded

WAN25 = ROUTES["wan2.5-i2i"].photo
_POLL = timedelta(milliseconds=5)


class Source:
    """A beautified photo and how often it was loaded; *peak* is how many of all sources were being loaded at once."""

    loading = peak = 0

    def __init__(self, content: bytes, media_type: str = "image/jpeg", *, order_id: int = 1) -> None:
        digest = hashlib.sha256(content).hexdigest()
        self.content = content
        self.artifact = Artifact(beautified_key(order_id, digest), digest, len(content), media_type)
        self.loads = 0

    async def load(self) -> bytes:
        self.loads += 1
        Source.loading += 1
        Source.peak = max(Source.peak, Source.loading)
        await asyncio.sleep(0)
        Source.loading -= 1
        return self.content

    def request(self) -> GenerateRequest:
        return GenerateRequest(1, ((7, 0),), "a portrait by a window", self.artifact, self.load)


def picture(width: int, height: int, *, quality: int = 92) -> bytes:
    """A smooth JPEG."""
    out = io.BytesIO()
    Image.linear_gradient("L").resize((width, height)).convert("RGB").save(out, "JPEG", quality=quality)
    return out.getvalue()


def noise(side: int, seed: int = 0) -> bytes:
    """A JPEG of about one byte a pixel or more."""
    out = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)
    Image.fromarray(pixels).save(out, "JPEG", quality=95)
    return out.getvalue()


def size_of(content: bytes) -> tuple[int, int]:
    with Image.open(io.BytesIO(content)) as opened:
        opened.load()
        return opened.size


@pytest.fixture(scope="module")
def camera() -> bytes:
    """What a telephone of today takes: 48 megapixels."""
    return picture(8064, 6048)


# ---------------------------------------------------------------- what fits and what does not


@pytest.mark.parametrize(
    ("bounds", "size"),
    [
        (JIMENG, (4096, 4096)),
        (JIMENG, (4096, 1366)),
        (JIMENG, (64, 64)),
        (WAN25, (5000, 400)),
        (WAN25, (384, 384)),
        (ROUTES["wan2.6-image"].photo, (8000, 240)),
        (ROUTES["qwen-image-edit"].photo, (3072, 384)),
    ],
)
async def test_what_fits_is_untouched(bounds: PhotoBounds, size: tuple[int, int]) -> None:
    """A photo at the very limits is sent to the byte, under its own key, and is loaded once for it."""
    source = Source(picture(*size))
    fitted = await PhotoFitter("acme", bounds).fit(source.artifact, source.load)
    assert (fitted.artifact, fitted.is_copy) == (source.artifact, False)
    assert await fitted.load() is source.content
    assert source.loads == 1


@pytest.mark.parametrize(
    ("bounds", "size", "becomes"),
    [
        (JIMENG, (2000, 4097), (2000, 4096)),
        (JIMENG, (4099, 1400), (4096, 1399)),
        (WAN25, (5001, 1000), (4096, 819)),
        (WAN25, (5200, 400), (4992, 384)),  # at 4096 the shorter side would be too short
        (ROUTES["wan2.6-image"].photo, (8001, 1000), (4096, 512)),
        (ROUTES["qwen-image-edit"].photo, (1200, 3073), (1200, 3072)),
    ],
)
async def test_one_pixel_more_is_scaled_down(bounds: PhotoBounds, size: tuple[int, int], becomes: tuple[int, int]) -> None:
    """A photo beyond the limits becomes a JPEG within them, of the same shape."""
    source = Source(picture(*size))
    fitted = await PhotoFitter("acme", bounds).fit(source.artifact, source.load)
    content = await fitted.load()
    assert size_of(content) == becomes
    assert fitted.is_copy
    assert fitted.artifact == Artifact(fitted.artifact.key, hashlib.sha256(content).hexdigest(), len(content), "image/jpeg")


async def test_a_heavy_photo_becomes_lighter() -> None:
    """Too many bytes alone are a reason too: smaller steps are taken until it is light enough, without falling far below."""
    source = Source(noise(1000))
    bounds = PhotoBounds(max_bytes=200_000, longest_side=4096)
    content = await (await PhotoFitter("acme", bounds).fit(source.artifact, source.load)).load()
    assert 100_000 < len(content) <= 200_000
    assert min(size_of(content)) > 300


async def test_bytes_at_the_limit() -> None:
    """As many bytes as a provider takes are sent as they are; one more is not, though it keeps its size."""
    source = Source(noise(300))
    limit = len(source.content)
    exact = await PhotoFitter("acme", PhotoBounds(limit)).fit(source.artifact, source.load)
    assert not exact.is_copy
    over = await PhotoFitter("acme", PhotoBounds(limit - 1)).fit(source.artifact, source.load)
    assert over.is_copy
    assert size_of(await over.load()) == (300, 300)


async def test_a_type_that_is_not_read_is_encoded_anew() -> None:
    """A WebP goes as a JPEG to a provider that reads none."""
    out = io.BytesIO()
    Image.new("RGB", (500, 400), "teal").save(out, "WEBP")
    source = Source(out.getvalue(), "image/webp")
    fitted = await PhotoFitter("jimeng", JIMENG).fit(source.artifact, source.load)
    assert (await fitted.load()).startswith(b"\xff\xd8\xff")
    assert fitted.artifact.media_type == "image/jpeg"


async def test_orientation_and_profile_are_applied() -> None:
    """A copy is upright, without EXIF or profile that somebody might apply again."""
    exif = Image.Exif()
    exif[274] = 6
    out = io.BytesIO()
    Image.new("RGB", (5000, 3000), "teal").save(out, "JPEG", exif=exif.tobytes(), quality=50)
    source = Source(out.getvalue())
    content = await (await PhotoFitter("jimeng", JIMENG).fit(source.artifact, source.load)).load()
    with Image.open(io.BytesIO(content)) as opened:
        assert opened.size == (2458, 4096)
        assert opened.getexif().get(274, 1) == 1
        assert "icc_profile" not in opened.info


async def test_fine_lines_do_not_become_patterns() -> None:
    """Every pixel of the photo counts: lines of one pixel become grey and no stripes."""
    pixels = np.zeros((512, 9000, 3), np.uint8)
    pixels[:, ::2] = 255
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    source = Source(out.getvalue(), "image/png")
    content = await (
        await PhotoFitter("acme", PhotoBounds(10_000_000, longest_side=3000)).fit(source.artifact, source.load)
    ).load()
    with Image.open(io.BytesIO(content)) as opened:
        grey = np.asarray(opened.convert("L"))[:, 8:-8]
    assert (grey.min(), grey.max()) > (100, 100)
    assert grey.max() < 156


@pytest.mark.parametrize(
    ("bounds", "size", "words"),
    [
        (WAN25, (383, 2000), "at least 384 pixels a side; this one has 383 x 2000"),
        (ROUTES["wan2.6-image"].photo, (500, 239), "at least 240 pixels"),
        (JIMENG, (400, 1201), "at most 3 times the other; this one has 400 x 1201"),
        (WAN25, (6000, 400), "this one has 6000 x 400 pixels and cannot be made to fit"),
    ],
)
async def test_what_cannot_fit_is_refused(bounds: PhotoBounds, size: tuple[int, int], words: str) -> None:
    """Too small, or too narrow to become small enough: a clear and permanent no, each time that it is asked."""
    source, fitter = Source(picture(*size)), PhotoFitter("acme", bounds)
    for _ in range(2):
        with pytest.raises(ProviderRefusedError, match=f"acme takes photos of .*{words}"):
            await fitter.fit(source.artifact, source.load)


async def test_what_is_no_picture_is_refused() -> None:
    """Bytes that cannot be judged are not sent."""
    source = Source(b"\xff\xd8\xff nothing")
    with pytest.raises(UnsupportedImageError):
        await PhotoFitter("jimeng", JIMENG).fit(source.artifact, source.load)


# ---------------------------------------------------------------- once, and the same


async def test_the_work_is_done_once(camera: bytes) -> None:
    """However many calls want a photo, at once or later, it is loaded and made smaller once."""
    source, fitter = Source(camera), PhotoFitter("jimeng", JIMENG)
    found = await asyncio.gather(*(fitter.fit(source.artifact, source.load) for _ in range(8)))
    found.append(await fitter.fit(source.artifact, source.load))
    contents = [await fitted.load() for fitted in found]
    assert all(content is contents[0] for content in contents)
    assert len({fitted.artifact for fitted in found}) == 1
    assert source.loads == 1


async def test_a_retry_sends_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was forgotten, or is asked of another daemon, comes out the same to the byte; few copies are kept."""
    monkeypatch.setattr("jobdaemon.providers.photo_fit._KEPT", 1)
    fitter = PhotoFitter("jimeng", JIMENG)
    first, second = Source(picture(4200, 1500)), Source(picture(4200, 1502))
    fitted = await fitter.fit(first.artifact, first.load)
    content = await fitted.load()
    await (await fitter.fit(second.artifact, second.load)).load()
    assert list(fitter._contents) == [second.artifact.sha256]
    again = await fitter.fit(first.artifact, first.load)
    assert first.loads == 1  # what becomes of it is known, its bytes are not
    assert await again.load() == content
    assert first.loads == 2
    elsewhere = await PhotoFitter("jimeng", JIMENG).fit(first.artifact, first.load)
    assert (elsewhere.artifact, await elsewhere.load()) == (fitted.artifact, content)


async def test_verdicts_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The photo that was wanted longest ago is forgotten first, and judged again when it comes back."""
    monkeypatch.setattr("jobdaemon.providers.photo_fit._REMEMBERED", 2)
    fitter = PhotoFitter("jimeng", JIMENG)
    sources = [Source(picture(400, 400 + number)) for number in range(3)]
    for source in (*sources, sources[0]):
        await fitter.fit(source.artifact, source.load)
    assert len(fitter._verdicts) == 2
    assert [source.loads for source in sources] == [2, 1, 1]


async def test_one_photo_at_a_time_is_worked_on() -> None:
    """Photos that nobody has judged yet are not held in memory side by side."""
    Source.loading = Source.peak = 0
    fitter = PhotoFitter("jimeng", JIMENG)
    sources = [Source(picture(4100, 1400 + number, quality=30)) for number in range(4)]
    await asyncio.gather(*(fitter.fit(source.artifact, source.load) for source in sources))
    assert Source.peak == 1


async def test_a_photo_that_is_away_is_asked_for_again() -> None:
    """One call's failure is not another's: the next one loads the photo."""
    source, fitter = Source(picture(500, 500)), PhotoFitter("jimeng", JIMENG)

    async def away() -> bytes:
        raise StoreUnavailableError("away")

    with pytest.raises(StoreUnavailableError):
        await fitter.fit(source.artifact, away)
    assert not (await fitter.fit(source.artifact, source.load)).is_copy


async def test_without_bounds_of_sides_nothing_is_loaded() -> None:
    """Where only bytes count, their number is known, and the photo is loaded by whoever sends it."""
    source = Source(picture(100, 100))
    fitted = await PhotoFitter("openai_images", openai_images.PHOTO_BOUNDS).fit(source.artifact, source.load)
    assert source.loads == 0
    assert await fitted.load() is source.content


# ---------------------------------------------------------------- links


@pytest.fixture(scope="module")
def s3_url() -> Iterator[str]:
    """An S3 server on loopback with the bucket ``photos``."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with urllib.request.urlopen(urllib.request.Request(f"http://{host}:{port}/photos", method="PUT"), timeout=10):
        pass
    yield f"http://{host}:{port}"
    server.stop()


async def test_a_store_link_is_of_the_copy(s3_url: str) -> None:
    """The copy lies beside its photo, was put there once however many calls want it, and is what the link gives."""
    store = R2Store(s3_url, "photos", "key", "secret")
    puts: list[str] = []

    async def put(key: str, content: bytes, media_type: str) -> Artifact:
        puts.append(key)
        return await store.put(key, content, media_type)

    links = FittedLinks(StoreLinks(store.signed_url, put), PhotoFitter("jimeng", JIMENG))
    source = Source(picture(4200, 1500))
    found = await asyncio.gather(*(links.link(source.artifact, source.load) for _ in range(4)))
    [key] = puts
    assert is_valid_key(key)
    assert key.startswith("work/1/photo-4096-")
    with await asyncio.to_thread(urllib.request.urlopen, found[0], timeout=10) as answer:
        content = answer.read()
        assert answer.headers["Content-Type"] == "image/jpeg"
    assert size_of(content) == (4096, 1463)
    # Another order of the same photo has a copy of its own, so that one order's files can be removed alone.
    other = Source(source.content, order_id=2)
    await links.link(other.artifact, other.load)
    assert puts[1] == key.replace("work/1/", "work/2/")
    # What fits is linked where it lies.
    small = Source(picture(400, 400))
    assert small.artifact.key in await links.link(small.artifact, small.load)
    assert len(puts) == 2
    await store.close()


# ---------------------------------------------------------------- providers


@pytest_asyncio.fixture
async def sandbox() -> AsyncIterator[Sandbox]:
    async with Sandbox(Behaviour(latency_s=0.01, image_px=(64, 64))) as sandbox:
        yield sandbox


@pytest_asyncio.fixture
async def client(sandbox: Sandbox) -> AsyncIterator[GuardedClient]:
    client = GuardedClient(allowed_hosts=[sandbox.url.removeprefix("http://")])
    yield client
    await client.close()


def superbed(sandbox: Sandbox, client: GuardedClient) -> SuperbedLinks:
    section = {"url": f"{sandbox.url}/superbed/upload", "token": "superbed-token"}
    return SuperbedLinks(Superbed(SuperbedSettings.model_validate(section), client), FakeUploaded())


def jimeng_at(sandbox: Sandbox, client: GuardedClient, photo: str) -> jimeng.JimengProvider:
    req_key = "jimeng_i2i_v30" if photo == "inline" else "jimeng_t2i_v40"
    settings = JimengSettings.model_validate({"base_url": sandbox.url, "req_key": req_key, "photo": photo, "poll": _POLL})
    links = InlineLinks() if photo == "inline" else superbed(sandbox, client)
    keys = {"default": jimeng.KeyPair("AKfit", "SKfit==")}
    return jimeng.JimengProvider(settings, keys=keys, client=client, links=links, max_image_bytes=1_000_000)


def dashscope_at(sandbox: Sandbox, client: GuardedClient, photo: str, model: str) -> dashscope.DashScopeProvider:
    chosen = {"base_url": sandbox.url, "model": model, "photo": photo, "poll": _POLL, "polls_per_second": 500}
    settings = DashScopeSettings.model_validate(chosen)
    links = InlineLinks() if photo == "inline" else superbed(sandbox, client)
    return dashscope.DashScopeProvider(settings, keys={"a": "sk-fit"}, client=client, links=links)


Open = Callable[[Sandbox, GuardedClient], Any]

OPEN: dict[str, Open] = {
    "jimeng, superbed": lambda sandbox, client: jimeng_at(sandbox, client, "superbed"),
    "jimeng, inline": lambda sandbox, client: jimeng_at(sandbox, client, "inline"),
    "wan2.5, inline": lambda sandbox, client: dashscope_at(sandbox, client, "inline", "wan2.5-i2i-preview"),
    "wan2.5, superbed": lambda sandbox, client: dashscope_at(sandbox, client, "superbed", "wan2.5-i2i-preview"),
    "wan2.6, inline": lambda sandbox, client: dashscope_at(sandbox, client, "inline", "wan2.6-image"),
    "qwen, inline": lambda sandbox, client: dashscope_at(sandbox, client, "inline", "qwen-image-edit-plus"),
}


@pytest.mark.parametrize("name", ["jimeng, superbed", "wan2.5, inline"])
async def test_a_photo_of_48_megapixels_is_taken(name: str, sandbox: Sandbox, client: GuardedClient, camera: bytes) -> None:
    """The service, which judges what it gets, makes the image; without fitting it would refuse, in its own words."""
    await assert_fitting_is_what_helps(OPEN[name](sandbox, client), Source(camera).request())


@pytest.mark.parametrize("name", list(OPEN))
async def test_a_photo_that_is_too_wide_is_taken(name: str, sandbox: Sandbox, client: GuardedClient) -> None:
    """The same on every way that the photo takes, with each model's limits."""
    await assert_fitting_is_what_helps(OPEN[name](sandbox, client), Source(picture(8064, 2700)).request())


async def assert_fitting_is_what_helps(provider: Any, request: GenerateRequest) -> None:
    seen = await outcome(provider, request)
    assert seen.error is None
    assert len(seen.made) == 1
    provider._links = provider._links._links
    unfitted = await outcome(provider, request)
    assert isinstance(unfitted.error, ProviderRefusedError)
    assert "4096x4096" in str(unfitted.error) or "has 8064 * " in str(unfitted.error)


@pytest.mark.parametrize(("name", "size"), [("wan2.5, inline", (300, 400)), ("jimeng, superbed", (300, 1000))])
async def test_a_refusal_comes_before_the_money(
    name: str, size: tuple[int, int], sandbox: Sandbox, client: GuardedClient
) -> None:
    """What cannot fit is refused before anything is noted, uploaded or asked for; the service would refuse it too."""
    provider, request = OPEN[name](sandbox, client), Source(picture(*size)).request()
    seen = await outcome(provider, request)
    assert isinstance(seen.error, ProviderRefusedError)
    assert (seen.events, sandbox.report()["apis"]) == ([], {})
    provider._links = provider._links._links
    assert isinstance((await outcome(provider, request)).error, ProviderRefusedError)


@pytest.mark.parametrize("name", ["jimeng, superbed", "wan2.5, superbed"])
async def test_a_link_that_has_gone_bad_is_made_anew(name: str, sandbox: Sandbox, client: GuardedClient) -> None:
    """A photo that somebody deleted at Superbed costs an attempt and no image; one that cannot be used at all still fails."""
    provider, request = OPEN[name](sandbox, client), Source(picture(400, 400)).request()
    assert (await outcome(provider, request)).error is None
    link = await provider._links.link(request.photo, request.load_photo)
    url, gone = f"{sandbox.url}/superbed/delete", {"token": "superbed-token", "urls": [link]}
    await client.call("POST", url, payload=gone, max_bytes=10_000, timeout=timedelta(seconds=5))
    refused = await outcome(provider, request)
    assert isinstance(refused.error, ProviderUnavailableError)
    assert "made anew" in str(refused.error)
    assert sum(int(api["images_bought"]) for api in sandbox.shop.report().values()) == 1
    assert (await outcome(provider, request)).error is None
    assert await provider._links.link(request.photo, request.load_photo) != link


async def test_a_link_is_given_for_an_hour(sandbox: Sandbox, client: GuardedClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """How long Superbed keeps a photo nobody says: an old link is not relied on."""
    links, source = superbed(sandbox, client), Source(picture(400, 400))
    first = await links.link(source.artifact, source.load)
    assert await links.link(source.artifact, source.load) == first
    monkeypatch.setattr(photo_links, "_REUSED", timedelta(0))
    assert await links.link(source.artifact, source.load) != first
    assert source.loads == 2


async def test_a_fresh_link_that_is_refused_is_not_made_again(sandbox: Sandbox, client: GuardedClient) -> None:
    """What cannot be fetched by a link that was just made cannot be fetched: no link ever helps."""
    for links in (InlineLinks(), superbed(sandbox, client)):
        source = Source(picture(400, 400))
        await links.link(source.artifact, source.load)
        assert not await links.forget(source.artifact, source.load)


async def test_openai_gets_what_it_takes(sandbox: Sandbox, client: GuardedClient, tmp_path: Path) -> None:
    """A photo that is too heavy for the form is sent as a lighter JPEG."""
    provider = SERVICES["openai_images"](Bench(sandbox.url, client, tmp_path))
    assert isinstance(provider, openai_images.OpenAIImagesProvider)
    provider._photos = PhotoFitter(provider.name, replace(openai_images.PHOTO_BOUNDS, max_bytes=50_000))
    request = Source(noise(400)).request()
    content, media_type = await provider._photo(request)
    assert (len(content) <= 50_000, media_type) == (True, "image/jpeg")
    assert (await outcome(provider, request)).error is None


async def test_comfyui_gets_what_it_takes(sandbox: Sandbox, client: GuardedClient, tmp_path: Path) -> None:
    """The upload holds the lighter copy, under a name of its own."""
    provider = SERVICES["comfyui"](Bench(sandbox.url, client, tmp_path))
    assert isinstance(provider, comfyui.ComfyUIProvider)
    bounds = PhotoBounds(max_bytes=50_000)
    provider._photos = PhotoFitter(provider.name, bounds)
    source = Source(noise(400))
    fitted = await provider._photos.fit(source.artifact, source.load)
    assert (await outcome(provider, source.request())).error is None
    name = f"jobdaemon/{fitted.artifact.sha256[:32]}.jpg"
    url = f"{sandbox.url}/comfyui/one/view?type=input&subfolder=jobdaemon&filename={name.removeprefix('jobdaemon/')}"
    answer = await client.call("GET", url, max_bytes=100_000, timeout=timedelta(seconds=5))
    assert answer.content == await fitted.load()
    assert len(answer.content) <= bounds.max_bytes
    await provider.close()


def test_no_copy_is_larger_than_any_model_needs() -> None:
    """The side of a copy bounds what a photo of 100 megapixels takes in memory: it is decoded at half its size or less."""
    for bounds in (JIMENG, *(route.photo for route in ROUTES.values())):
        assert bounds.fitted_side(12_000, 8_333) <= FITTED_SIDE_PX
        assert bounds.fitted_side(10_000, 10_000) <= FITTED_SIDE_PX
