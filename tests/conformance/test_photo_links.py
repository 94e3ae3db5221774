"""How photos reach providers: in the request, by a signed link, by Superbed; and one upload at a time."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
import pytest_asyncio
from pydantic import SecretStr

from jobdaemon.app import photo_links
from jobdaemon.domain.artifact import Artifact, beautified_key
from jobdaemon.errors import (
    JobdaemonError,
    ProviderRefusedError,
    ProviderUnavailableError,
    RateLimitedError,
    SettingsError,
    StoreRefusedError,
    StoreUnavailableError,
)
from jobdaemon.http import Answer, GuardedClient
from jobdaemon.providers.dashscope import DashScopeProvider
from jobdaemon.providers.photo_links import InlineLinks, StoreLinks, SuperbedLinks, one_at_a_time
from jobdaemon.providers.superbed import Superbed, link_in
from jobdaemon.sandbox import Behaviour, Sandbox, parse_faults
from jobdaemon.settings import load_settings
from jobdaemon.settings_generate import DashScopeSettings, SuperbedSettings
from jobdaemon.storage.files import FilesStore
from jobdaemon.storage.r2 import R2Store
from tests.conformance.provider_promises import outcome, wanted
from tests.fakes import FakeUploaded

PNG = b"\x89PNG\r\n\x1a\n" + bytes(200)
TOKEN = "superbed-token-0123456789"


def photo(content: bytes = PNG, media_type: str = "image/png") -> Artifact:
    digest = hashlib.sha256(content).hexdigest()
    return Artifact(beautified_key(1, digest), digest, len(content), media_type)


def loading(content: bytes = PNG) -> Callable[[], Awaitable[bytes]]:
    async def load() -> bytes:
        return content

    return load


async def unloadable() -> bytes:
    raise StoreUnavailableError("away")


# ---------------------------------------------------------------- inline and store


async def test_inline_is_the_photo_itself() -> None:
    """The photo as a data: URL, with its type."""
    link = await InlineLinks().link(photo(media_type="image/jpeg"), loading())
    assert link == f"data:image/jpeg;base64,{base64.b64encode(PNG).decode()}"
    with pytest.raises(StoreUnavailableError):
        await InlineLinks().link(photo(), unloadable)


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


async def test_a_store_link_can_be_fetched_without_a_key(s3_url: str) -> None:
    """A signed link gives the photo to anybody for at least an hour, without the photo being loaded here."""
    store = R2Store(s3_url, "photos", "key", "topsecret", prefix="team/a")
    await store.put(photo().key, PNG, "image/png")
    link = await StoreLinks(store.signed_url, store.put).link(photo(), unloadable)
    await store.close()
    assert f"/photos/team/a/{photo().key}?" in link
    assert "X-Amz-Expires=7200" in link
    assert "topsecret" not in link
    with await asyncio.to_thread(urllib.request.urlopen, link, timeout=10) as answer:
        assert answer.read() == PNG


async def test_a_signed_link_lasts_seven_days_at_most(s3_url: str) -> None:
    """S3 takes no longer lifetime; a bad key is refused before anything is signed."""
    store = R2Store(s3_url, "photos", "key", "secret")
    assert "X-Amz-Expires=604800" in await store.signed_url("a.png", timedelta(days=30))
    with pytest.raises(StoreRefusedError):
        await store.signed_url("../a.png", timedelta(hours=1))
    await store.close()


# ---------------------------------------------------------------- Superbed


@pytest_asyncio.fixture
async def sandbox() -> AsyncIterator[Sandbox]:
    async with Sandbox(Behaviour(latency_s=0.4)) as sandbox:
        yield sandbox


@pytest_asyncio.fixture
async def client(sandbox: Sandbox) -> AsyncIterator[GuardedClient]:
    client = GuardedClient(allowed_hosts=[sandbox.url.removeprefix("http://")])
    yield client
    await client.close()


Make = Callable[..., SuperbedLinks]


@pytest.fixture
def make(sandbox: Sandbox, client: GuardedClient) -> Make:
    """Makes links at the sandbox's Superbed."""

    def make(token: str = TOKEN, **chosen: Any) -> SuperbedLinks:
        section = {"url": f"{sandbox.url}/superbed/upload", "token": SecretStr(token)} | chosen
        return SuperbedLinks(Superbed(SuperbedSettings.model_validate(section), client), FakeUploaded())

    return make


def uploads(sandbox: Sandbox) -> dict[str, Any]:
    return dict(sandbox.report()["apis"].get("superbed", {"calls": 0}))


async def test_superbed_gives_a_link_to_the_same_bytes(make: Make, client: GuardedClient) -> None:
    """Photos can be fetched at their links, redirected or not."""
    links = make(album="portraits")
    for number in range(3):
        content = PNG + bytes([number])
        link = await links.link(photo(content), loading(content))
        assert link.endswith(".png")
        assert TOKEN not in link
        assert (await client.download(link, max_bytes=1000, timeout=timedelta(seconds=5))).content == content


async def test_one_photo_is_uploaded_once(make: Make, sandbox: Sandbox) -> None:
    """However many calls want a photo, at once or later, it is loaded and uploaded once."""
    links = make()
    found = await asyncio.gather(*(links.link(photo(), loading()) for _ in range(8)))
    found.append(await links.link(photo(), unloadable))
    assert len(set(found)) == 1
    assert uploads(sandbox)["calls"] == 1


async def test_different_photos_are_uploaded_at_once_unless_one_at_a_time(make: Make, sandbox: Sandbox) -> None:
    """Uploads of different photos overlap; behind one_at_a_time none does."""
    contents = [PNG + bytes([number]) for number in range(4)]
    together = make("token-together")
    await asyncio.gather(*(together.link(photo(content), loading(content)) for content in contents))
    assert uploads(sandbox)["peak_concurrency"] > 1
    alone = one_at_a_time(make("token-alone"))
    await asyncio.gather(*(alone.link(photo(content), loading(content)) for content in contents))
    assert uploads(sandbox)["keys"]["…lone"] == {"calls": 4, "peak_concurrency": 1, "rejected": 0}


async def test_a_failed_upload_is_tried_by_the_next(make: Make, sandbox: Sandbox) -> None:
    """One call's failure, or its end, is not another's: whoever waits behind it uploads."""
    links = make()
    with pytest.raises(StoreUnavailableError):
        await links.link(photo(), unloadable)
    first = asyncio.ensure_future(links.link(photo(), loading()))
    second = asyncio.ensure_future(links.link(photo(), loading()))
    await asyncio.sleep(0)
    first.cancel()
    assert (await second).endswith(".png")
    assert uploads(sandbox)["calls"] <= 2


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ("429", RateLimitedError),
        ("500", ProviderUnavailableError),
        ("html", ProviderUnavailableError),
        ("reset", ProviderUnavailableError),
        ("timeout", ProviderUnavailableError),
        ("unsafe", ProviderRefusedError),
    ],
)
async def test_each_fault_is_one_clear_error(make: Make, sandbox: Sandbox, fault: str, error: type[JobdaemonError]) -> None:
    """Whatever becomes of an upload is one of our errors, never a lost answer, and tells no token."""
    sandbox.behaviour.faults = parse_faults(f"{fault}=1")
    with pytest.raises(JobdaemonError) as caught:
        await make("faulty-token", timeout="300ms").link(photo(), loading())
    assert type(caught.value) is error
    assert "faulty" not in str(caught.value)


def answer(body: Any, status: int = 200) -> Answer:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return Answer(status, {"content-type": "application/json"}, content, "https://bed.example/upload")


LINK = "https://pic.superbed.cn/item/0123456789abcdef01234567.jpg"


@pytest.mark.parametrize(
    "body",
    [
        {"err": 0, "url": LINK},
        {"err": 0, "ids": ["x"], "urls": {"file0": LINK}},
        {"err": 0, "urls": [LINK]},
        {"err": 0, "url": "", "urls": {"x": LINK}},
    ],
)
def test_the_link_is_found_in_any_form(body: Any) -> None:
    """One link, several by name, or a list."""
    assert link_in(answer(body), TOKEN) == LINK


@pytest.mark.parametrize(
    ("body", "status", "error"),
    [
        ({"err": 1, "msg": f"token {TOKEN} 无效"}, 200, ProviderRefusedError),
        ({"err": 120}, 200, ProviderRefusedError),
        ({"msg": "no err"}, 200, ProviderRefusedError),
        ({"err": 0}, 200, ProviderUnavailableError),
        ({"err": 0, "url": "javascript:alert(1)"}, 200, ProviderUnavailableError),
        ({"err": 0, "urls": {}}, 200, ProviderUnavailableError),
        ([], 200, ProviderUnavailableError),
        (b"<html>", 200, ProviderUnavailableError),
        (b"<html>", 302, ProviderUnavailableError),
        (b"<html>", 413, ProviderRefusedError),
        ({"err": 1, "msg": "no"}, 401, StoreRefusedError),
        (b"", 403, StoreRefusedError),
        (b"slow down", 429, RateLimitedError),
        ({"err": 1, "msg": "later"}, 503, ProviderUnavailableError),
    ],
)
def test_what_superbed_says_has_a_kind(body: Any, status: int, error: type[JobdaemonError]) -> None:
    """A refusal is permanent, an outage and nonsense are not; a refused token is the operator's, and never shown."""
    with pytest.raises(JobdaemonError) as caught:
        link_in(answer(body, status), TOKEN)
    assert type(caught.value) is error
    assert TOKEN not in str(caught.value)


def test_superbed_needs_a_token(client: GuardedClient) -> None:
    """Without one nothing can be uploaded, and that is said at the start."""
    with pytest.raises(SettingsError, match=r"superbed\.token"):
        Superbed(SuperbedSettings(), client)


# ---------------------------------------------------------------- the choice


async def test_the_settings_choose(client: GuardedClient, tmp_path: Any, s3_url: str) -> None:
    """Inline, store and superbed are what the settings call them; a folder is no store that others can fetch from."""
    environ = {"JOBDAEMON_DATA_DIR": str(tmp_path), "JOBDAEMON_SUPERBED__TOKEN": TOKEN}
    settings = load_settings(environ=environ)
    folder = FilesStore(tmp_path / "artifacts")
    assert isinstance(photo_links(settings, "inline", client, folder, None), InlineLinks)
    assert isinstance(photo_links(settings, "superbed", client, folder, None), SuperbedLinks)
    with pytest.raises(SettingsError, match="folder"):
        photo_links(settings, "store", client, folder, None)
    r2 = {"ENDPOINT_URL": s3_url, "BUCKET": "photos", "ACCESS_KEY_ID": "key", "SECRET_ACCESS_KEY": "secret"}
    environ |= {"JOBDAEMON_STORE__KIND": "r2"} | {f"JOBDAEMON_STORE__R2__{name}": value for name, value in r2.items()}
    bucket = R2Store(s3_url, "photos", "key", "secret")
    links = photo_links(load_settings(environ=environ), "store", client, bucket, None)
    assert (await links.link(photo(), unloadable)).startswith(f"{s3_url}/photos/work/1/")
    await bucket.close()
    await folder.close()


async def test_dashscope_takes_a_link(sandbox: Sandbox, make: Make, client: GuardedClient) -> None:
    """A provider that usually gets the photo inline gets it by a link when its section says so."""
    sandbox.behaviour.latency_s = 0.01
    settings = DashScopeSettings(base_url=sandbox.url, photo="superbed", poll=timedelta(milliseconds=5), polls_per_second=500)
    provider = DashScopeProvider(settings, keys={"a": "sk-link"}, client=client, links=make())
    seen = await outcome(provider, wanted(provider, at_most=1))
    assert seen.error is None
    assert len(seen.made) == 1
    assert uploads(sandbox)["calls"] == 1
