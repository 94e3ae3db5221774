"""
One image from the real service, for whoever has a key: ``pytest -m live tests/live``.

    JOBDAEMON_LIVE_OPENAI_API_KEY    without it these tests are skipped
    JOBDAEMON_LIVE_OPENAI_BASE_URL   a gateway instead of OpenAI
    JOBDAEMON_LIVE_OPENAI_MODEL      instead of the default one
"""

from __future__ import annotations

import io
import os
from datetime import timedelta
from urllib.parse import urlsplit

import pytest
from PIL import Image

from jobdaemon.http import GuardedClient
from jobdaemon.providers.openai_images import OpenAIImagesProvider
from jobdaemon.settings_generate import OpenAIImagesSettings
from tests.conformance.provider_promises import content_of, outcome, wanted

pytestmark = pytest.mark.live

# Read here because the environment is cleaned before each test.
_KEY = os.environ.get("JOBDAEMON_LIVE_OPENAI_API_KEY", "")
_CHOSEN = {
    name: value
    for name, variable in {"base_url": "JOBDAEMON_LIVE_OPENAI_BASE_URL", "model": "JOBDAEMON_LIVE_OPENAI_MODEL"}.items()
    if (value := os.environ.get(variable))
}


@pytest.mark.skipif(not _KEY, reason="JOBDAEMON_LIVE_OPENAI_API_KEY is not set")
@pytest.mark.parametrize("endpoint", ["edits", "generations"])
async def test_one_real_image(endpoint: str) -> None:
    """The real service makes one picture of the photo, and one of the prompt alone."""
    settings = OpenAIImagesSettings.model_validate({"endpoint": endpoint, "size": "1024x1024", **_CHOSEN})
    client = GuardedClient(allowed_hosts=[urlsplit(settings.base_url).netloc])
    provider = OpenAIImagesProvider(settings, keys={"live": _KEY}, client=client, max_image_bytes=50 * 1024 * 1024)
    seen = await outcome(provider, wanted(provider, prompt="A red square on a white wall, as a drawing.", at_most=1))
    assert seen.error is None
    [image] = seen.made
    with Image.open(
        io.BytesIO(await content_of(image, client, max_bytes=50 * 1024 * 1024, patience=timedelta(seconds=60)))
    ) as opened:
        opened.load()
    await client.close()
