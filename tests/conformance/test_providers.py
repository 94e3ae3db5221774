"""The promises of provider_promises.py, kept by every provider: a new one adds a factory and a line to the table."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from datetime import timedelta
from pathlib import Path

import pytest
import pytest_asyncio
from pydantic import SecretStr

from jobdaemon.http import GuardedClient
from jobdaemon.ports import Provider
from jobdaemon.sandbox import Behaviour, Sandbox
from tests.conformance.provider_promises import (
    MAX_IMAGE_BYTES,
    SECRET,
    Bench,
    EveryProvider,
    EveryService,
    EveryServiceGoneWrong,
    Make,
    Service,
)
from tests.fakes import FakeUploaded

#: How often a task is asked for, and how long.
_POLL, _PATIENCE = timedelta(milliseconds=5), timedelta(seconds=5)


def _local(_bench: Bench) -> Provider:
    from jobdaemon.providers.local import LocalProvider

    return LocalProvider(threads=1)


def _openai_images(bench: Bench) -> Provider:
    from jobdaemon.providers.openai_images import OpenAIImagesProvider
    from jobdaemon.settings_generate import OpenAIImagesSettings

    settings = OpenAIImagesSettings(base_url=f"{bench.url}/v1", timeout=timedelta(seconds=10))
    return OpenAIImagesProvider(settings, keys={"default": SECRET}, client=bench.client, max_image_bytes=MAX_IMAGE_BYTES)


def _openai_chat(bench: Bench) -> Provider:
    """A gateway's model that draws in a chat."""
    from jobdaemon.providers.openai_images import OpenAIImagesProvider
    from jobdaemon.settings_generate import OpenAIImagesSettings

    settings = OpenAIImagesSettings(
        base_url=f"{bench.url}/v1", api="chat", model="gemini-2.5-flash-image", timeout=timedelta(seconds=10)
    )
    return OpenAIImagesProvider(settings, keys={"default": SECRET}, client=bench.client, max_image_bytes=MAX_IMAGE_BYTES)


def _comfyui(bench: Bench) -> Provider:
    from jobdaemon.providers.comfyui import ComfyUIProvider
    from jobdaemon.settings_generate import ComfyUISettings

    settings = ComfyUISettings(
        servers=(f"{bench.url}/comfyui/one",),
        workflow=Path(__file__).parents[2] / "config" / "comfyui-example.json",
        images_per_call=3,
        width=64,
        height=64,
        poll=timedelta(milliseconds=20),
        task_timeout=timedelta(seconds=10),
    )
    return ComfyUIProvider(settings, client=bench.client, max_image_bytes=MAX_IMAGE_BYTES)


def _dashscope(model: str) -> Make:
    def make(bench: Bench) -> Provider:
        from jobdaemon.providers.dashscope import DashScopeProvider
        from jobdaemon.providers.photo_links import InlineLinks
        from jobdaemon.settings_generate import DashScopeSettings

        settings = DashScopeSettings(
            base_url=bench.url,
            model=model,
            poll=timedelta(milliseconds=5),
            polls_per_second=500,
            task_timeout=timedelta(seconds=5),
        )
        return DashScopeProvider(settings, keys={"default": SECRET}, client=bench.client, links=InlineLinks())

    return make


def _jimeng(bench: Bench) -> Provider:
    """The newest model, which gets the photo from Superbed and gives links."""
    from jobdaemon.providers.jimeng import JimengProvider, KeyPair
    from jobdaemon.providers.photo_links import SuperbedLinks, one_at_a_time
    from jobdaemon.providers.superbed import Superbed
    from jobdaemon.settings_generate import JimengSettings, SuperbedSettings

    superbed = SuperbedSettings(url=f"{bench.url}/superbed/upload", token=SecretStr(SECRET))
    return JimengProvider(
        JimengSettings(base_url=bench.url, photo="superbed", poll=_POLL, task_timeout=_PATIENCE),
        keys={"default": KeyPair(f"AK{SECRET[2:-2]}", SECRET)},
        client=bench.client,
        links=one_at_a_time(SuperbedLinks(Superbed(superbed, bench.client), FakeUploaded())),
        max_image_bytes=MAX_IMAGE_BYTES,
    )


def _jimeng_inline(bench: Bench) -> Provider:
    """An older model, whose photos and images travel in the requests."""
    from jobdaemon.providers.jimeng import JimengProvider, KeyPair
    from jobdaemon.providers.photo_links import InlineLinks
    from jobdaemon.settings_generate import JimengSettings

    return JimengProvider(
        JimengSettings(base_url=bench.url, req_key="jimeng_i2i_v30", photo="inline", poll=_POLL, task_timeout=_PATIENCE),
        keys={"default": KeyPair(f"AK{SECRET[2:-2]}", SECRET)},
        client=bench.client,
        links=InlineLinks(),
        max_image_bytes=MAX_IMAGE_BYTES,
    )


#: Providers that call a service; one line each.
SERVICES: Mapping[str, Make] = {
    "openai_images": _openai_images,
    "openai_images, chat": _openai_chat,
    "comfyui": _comfyui,
    "dashscope": _dashscope("wan2.5-i2i-preview"),
    "dashscope, messages": _dashscope("wan2.6-image"),
    "dashscope, no tasks": _dashscope("qwen-image-edit-plus"),
    "jimeng": _jimeng,
    "jimeng, inline": _jimeng_inline,
}
PROVIDERS: Mapping[str, Make] = {"local": _local, **SERVICES}


@pytest_asyncio.fixture
async def sandbox() -> AsyncIterator[Sandbox]:
    """A quick one with small pictures."""
    async with Sandbox(Behaviour(latency_s=0.01, image_px=(64, 64))) as sandbox:
        yield sandbox


@pytest_asyncio.fixture
async def client(sandbox: Sandbox) -> AsyncIterator[GuardedClient]:
    """A client that may reach the sandbox."""
    client = GuardedClient(allowed_hosts=[sandbox.url.removeprefix("http://")])
    yield client
    await client.close()


class TestProviders(EveryProvider):
    @pytest_asyncio.fixture(params=list(PROVIDERS))
    async def provider(
        self, request: pytest.FixtureRequest, sandbox: Sandbox, client: GuardedClient, tmp_path: Path
    ) -> AsyncIterator[Provider]:
        """Each in turn."""
        provider = PROVIDERS[request.param](Bench(sandbox.url, client, tmp_path))
        yield provider
        await provider.close()


class TestServices(EveryService):
    @pytest_asyncio.fixture(params=list(SERVICES))
    async def service(
        self, request: pytest.FixtureRequest, sandbox: Sandbox, client: GuardedClient, tmp_path: Path
    ) -> AsyncIterator[Service]:
        """Each in turn, with its sandbox."""
        provider = SERVICES[request.param](Bench(sandbox.url, client, tmp_path))
        yield Service(provider, sandbox, client)
        await provider.close()


class TestServicesGoneWrong(EveryServiceGoneWrong):
    @pytest.fixture(params=list(SERVICES))
    def make(self, request: pytest.FixtureRequest) -> Make:
        """Each factory in turn."""
        return SERVICES[request.param]
