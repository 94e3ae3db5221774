"""
One image from the real service, for whoever has a key: ``pytest -m live tests/live``.

    JOBDAEMON_LIVE_JIMENG_ACCESS_KEY_ID, JOBDAEMON_LIVE_JIMENG_SECRET_ACCESS_KEY   without them these tests are skipped
    JOBDAEMON_LIVE_SUPERBED_TOKEN   for the model that gets its photo by a link; skipped without it
"""

from __future__ import annotations

import io
import os
from datetime import timedelta
from urllib.parse import urlsplit

import pytest
from PIL import Image
from pydantic import SecretStr

from jobdaemon.http import GuardedClient
from jobdaemon.providers.jimeng import JimengProvider, KeyPair
from jobdaemon.providers.photo_links import InlineLinks, SuperbedLinks
from jobdaemon.providers.superbed import Superbed
from jobdaemon.settings_generate import JimengSettings, SuperbedSettings
from tests.conformance.provider_promises import content_of, outcome, wanted
from tests.fakes import FakeUploaded

pytestmark = pytest.mark.live

# Read here because the environment is cleaned before each test.
_ID = os.environ.get("JOBDAEMON_LIVE_JIMENG_ACCESS_KEY_ID", "")
_SECRET = os.environ.get("JOBDAEMON_LIVE_JIMENG_SECRET_ACCESS_KEY", "")
_TOKEN = os.environ.get("JOBDAEMON_LIVE_SUPERBED_TOKEN", "")


@pytest.mark.skipif(not _ID or not _SECRET, reason="JOBDAEMON_LIVE_JIMENG_ACCESS_KEY_ID and …_SECRET_ACCESS_KEY are not set")
@pytest.mark.parametrize("req_key", ["jimeng_t2i_v40", "jimeng_i2i_v30"])
async def test_one_real_image(req_key: str) -> None:
    """The real service makes one picture of the photo, which it gets by a link or in the request."""
    is_inline = req_key == "jimeng_i2i_v30"
    if not is_inline and not _TOKEN:
        pytest.skip("JOBDAEMON_LIVE_SUPERBED_TOKEN is not set")
    settings = JimengSettings(req_key=req_key, photo="inline" if is_inline else "superbed", poll=timedelta(seconds=3))
    superbed = SuperbedSettings(token=SecretStr(_TOKEN or "unused"))
    hosts = [urlsplit(settings.base_url).netloc, urlsplit(superbed.url).netloc]
    client = GuardedClient(allowed_hosts=hosts)
    provider = JimengProvider(
        settings,
        keys={"live": KeyPair(_ID, _SECRET)},
        client=client,
        links=InlineLinks() if is_inline else SuperbedLinks(Superbed(superbed, client), FakeUploaded()),
        max_image_bytes=50 * 1024 * 1024,
    )
    seen = await outcome(provider, wanted(provider, prompt="A red square on a white wall, as a drawing.", at_most=1))
    assert seen.error is None
    [image] = seen.made
    content = await content_of(image, client, max_bytes=50 * 1024 * 1024, patience=timedelta(seconds=60))
    with Image.open(io.BytesIO(content)) as opened:
        opened.load()
    await client.close()
