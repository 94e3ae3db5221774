"""What makes two images the same to the cache."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

#: ``{"cache": false}`` in an order's params keeps the order out of the cache: nothing comes from there, and nothing goes there.
PARAM = "cache"


def may_be_cached(params: Mapping[str, Any]) -> bool:
    """Whether an order with these params takes part."""
    return params.get(PARAM) is not False


def cache_key(
    provider: str, settings: Mapping[str, Any], params: Mapping[str, Any], *, prompt: str, photo_sha256: str, ordinal: int
) -> str:
    """
    What an image is kept under: 64 hex digits, others for whatever may make another image.

    Args:
        settings: those of the provider that shape its images, as JSON has them.
        params: the order's.
        photo_sha256: of the beautified photo.
        ordinal: of the image among those of the same prompt in its order: five of one prompt are five images.
    """
    asked = {
        "provider": provider,
        "settings": dict(settings),
        "params": {name: value for name, value in params.items() if name != PARAM},
        "prompt": prompt,
        "photo": photo_sha256,
        "ordinal": ordinal,
    }
    return hashlib.sha256(json.dumps(asked, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
