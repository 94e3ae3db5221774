"""What the cache takes for the same image."""

from __future__ import annotations

import re
from typing import Any

import pytest
from pydantic import SecretStr

from jobdaemon.domain.cache import cache_key, may_be_cached
from jobdaemon.settings_generate import (
    ComfyUISettings,
    DashScopeSettings,
    JimengSettings,
    OpenAIImagesSettings,
    what_shapes_images,
)

SECRET = SecretStr("sk-secret")
ASKED: dict[str, Any] = {
    "provider": "openai_images",
    "settings": {"model": "gpt-image-2", "size": "1024x1536"},
    "params": {"seed": 7, "style": {"a": 1, "b": 2}},
    "prompt": "by a window",
    "photo_sha256": "0" * 64,
    "ordinal": 0,
}


def key(**changes: object) -> str:
    return cache_key(**(ASKED | changes))


@pytest.mark.parametrize(
    "change",
    [
        {"provider": "dashscope"},
        {"settings": {"model": "gpt-image-2", "size": "1024x1024"}},
        {"settings": {"model": "gpt-image-2"}},
        {"params": {"seed": 8, "style": {"a": 1, "b": 2}}},
        {"params": {}},
        {"prompt": "by a window "},
        {"photo_sha256": "1" * 64},
        {"ordinal": 1},
    ],
    ids=str,
)
def test_what_may_make_another_image_makes_another_key(change: dict[str, object]) -> None:
    """Each part of what was asked for counts."""
    assert key(**change) != key()


def test_the_same_is_the_same_however_it_is_written() -> None:
    """The order of names does not count, nor does the cache's own parameter; a key is 64 hex digits."""
    assert key(params={"style": {"b": 2, "a": 1}, "cache": True, "seed": 7}) == key()
    assert re.fullmatch(r"[0-9a-f]{64}", key(prompt="窗边 \ud800"))


def test_an_order_may_stay_out() -> None:
    """Only false keeps an order out."""
    assert [may_be_cached(params) for params in ({}, {"cache": True}, {"cache": None}, {"cache": False})] == [
        True,
        True,
        True,
        False,
    ]


@pytest.mark.parametrize(
    ("section", "names"),
    [
        (OpenAIImagesSettings(api_key=SECRET), {"base_url", "model", "endpoint", "size", "quality"}),
        (DashScopeSettings(api_key=SECRET), {"base_url", "model", "size", "negative_prompt"}),
        (JimengSettings(secret_access_key=SECRET), {"base_url", "req_key", "width", "height", "strength"}),
        (ComfyUISettings(), {"workflow", "width", "height"}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_settings_that_shape_images(section: Any, names: set[str]) -> None:
    """What decides how images look is in the key, what decides how they are asked for is not, and no secret ever is."""
    shaping = what_shapes_images(section)
    assert names <= shaping.keys()
    assert not {name for name in shaping if re.search("key$|keys|token|timeout|poll|per_call|servers|photo$", name)} - {"req_key"}
    assert "secret" not in str(shaping)
