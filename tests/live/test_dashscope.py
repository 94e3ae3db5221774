"""
One image from the real service, for whoever has a key: ``pytest -m live tests/live``.

    JOBDAEMON_LIVE_DASHSCOPE_API_KEY    without it these tests are skipped
    JOBDAEMON_LIVE_DASHSCOPE_BASE_URL   another region
    JOBDAEMON_LIVE_DASHSCOPE_MODEL      instead of the default one
"""

from __future__ import annotations

import hashlib
import io
import os
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from PIL import Image

from jobdaemon.domain.artifact import Artifact, source_key
from jobdaemon.http import GuardedClient
from jobdaemon.ports import GenerateRequest, ImageMade, ProviderCall
from jobdaemon.providers.dashscope import DashScopeProvider
from jobdaemon.providers.dashscope.models import route_of
from jobdaemon.providers.photo_links import InlineLinks
from jobdaemon.settings_generate import DashScopeSettings

pytestmark = pytest.mark.live

PORTRAIT = Path(__file__).parents[1] / "data" / "astronaut.png"
# Read here because the environment is cleaned before each test.
_KEY = os.environ.get("JOBDAEMON_LIVE_DASHSCOPE_API_KEY", "")
_CHOSEN = {
    name: value
    for name, variable in {"base_url": "JOBDAEMON_LIVE_DASHSCOPE_BASE_URL", "model": "JOBDAEMON_LIVE_DASHSCOPE_MODEL"}.items()
    if (value := os.environ.get(variable))
}


@pytest.mark.skipif(not _KEY, reason="JOBDAEMON_LIVE_DASHSCOPE_API_KEY is not set")
@pytest.mark.timeout(600)
async def test_one_real_image() -> None:
    """The real service makes one picture of the photo, and its task is found again by its prompt's mark."""
    content = PORTRAIT.read_bytes()
    digest = hashlib.sha256(content).hexdigest()

    async def load() -> bytes:
        return content

    photo = Artifact(source_key(digest, "png"), digest, len(content), "image/png")
    request = GenerateRequest(1, ((1, 0),), "The same person as a pencil drawing.", photo, load)
    settings = DashScopeSettings.model_validate({"task_timeout": "400s", **_CHOSEN})
    client = GuardedClient()
    provider = DashScopeProvider(settings, keys={"live": _KEY}, client=client, links=InlineLinks())
    submitted_at = datetime.now(UTC)
    events = [event async for event in provider.generate(request)]
    [image] = [event for event in events if isinstance(event, ImageMade)]
    file = await client.download(image.url or "", max_bytes=50_000_000, timeout=timedelta(seconds=60))
    with Image.open(io.BytesIO(file.content)) as picture:
        picture.load()
    if route_of(settings.model).tells_prompts:
        call = ProviderCall(1, None, (1,), None, submitted_at)
        task_id = await provider.find_task(request, call)
        assert task_id is not None
        resumed = replace(request, resume=replace(call, task_id=task_id))
        assert [type(event) async for event in provider.generate(resumed)] == [ImageMade]
    await client.close()
