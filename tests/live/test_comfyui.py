"""
One image from a real ComfyUI, for whoever runs one: ``pytest -m live tests/live``.

    JOBDAEMON_LIVE_COMFYUI_URL        without it this test is skipped
    JOBDAEMON_LIVE_COMFYUI_WORKFLOW   instead of config/comfyui-example.json, which needs no model
"""

from __future__ import annotations

import hashlib
import io
import os
from contextlib import aclosing
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from PIL import Image

from jobdaemon.domain.artifact import Artifact, source_key
from jobdaemon.http import GuardedClient
from jobdaemon.ports import GenerateRequest, ImageMade
from jobdaemon.providers.comfyui import ComfyUIProvider
from jobdaemon.settings_generate import ComfyUISettings
from tests.fakes import content_of

pytestmark = pytest.mark.live

ROOT = Path(__file__).parents[2]
# Read here because the environment is cleaned before each test.
_URL = os.environ.get("JOBDAEMON_LIVE_COMFYUI_URL", "").rstrip("/")
_WORKFLOW = Path(os.environ.get("JOBDAEMON_LIVE_COMFYUI_WORKFLOW", ROOT / "config" / "comfyui-example.json"))


@pytest.mark.skipif(not _URL, reason="JOBDAEMON_LIVE_COMFYUI_URL is not set")
async def test_one_real_image() -> None:
    """A real server makes a picture of the photo in the size of the settings."""
    photo = (ROOT / "tests" / "data" / "astronaut.png").read_bytes()
    digest = hashlib.sha256(photo).hexdigest()

    async def load() -> bytes:
        return photo

    artifact = Artifact(source_key(digest, "png"), digest, len(photo), "image/png")
    request = GenerateRequest(1, ((1, 0),), "a portrait by a window", artifact, load)
    client = GuardedClient(allowed_hosts=[urlsplit(_URL).netloc])
    settings = ComfyUISettings(servers=(_URL,), workflow=_WORKFLOW, width=512, height=768)
    provider = ComfyUIProvider(settings, client=client, max_image_bytes=50 * 1024 * 1024)
    try:
        async with aclosing(provider.generate(request)) as events:
            [image] = [event async for event in events if isinstance(event, ImageMade)]
    finally:
        await provider.close()
        await client.close()
    with Image.open(io.BytesIO(content_of(image))) as picture:
        assert picture.size == (512, 768)
