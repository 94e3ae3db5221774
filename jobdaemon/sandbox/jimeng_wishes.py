"""What Jimeng's models take: a wish is read and judged before anything is made."""

from __future__ import annotations

import base64
import binascii
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jobdaemon.sandbox.fetching import UnfetchableError, fetched, is_near, is_picture, picture_size

_MAX_PROMPT_CHARACTERS = 800
_MAX_PHOTO_BYTES = 15 * 1024 * 1024
#: Of a photo: most pixels of a side, and most of the longer one over the shorter.
_MAX_PHOTO_SIDE, _MAX_PHOTO_RATIO = 4096, 3
#: Photos and images of one call together.
_MAX_PICTURES = 15
#: A prompt that asks for several images says so in words; "a set of 3 images".
_COUNT = re.compile(r"(\d{1,2})\s*(?:images|pictures|张|幅)")


class WishError(Exception):
    """A wish that the service does not take."""


@dataclass(frozen=True, slots=True)
class _Rules:
    """
    What one model takes.

    Attributes:
        photos: fewest and most.
        takes_inline: a photo may come as base64.
        sides: fewest and most pixels of width and height.
        areas: the same of their product; None is no bound.
        scale: lowest and highest.
        is_single: makes one image, whatever is asked.
    """

    photos: tuple[int, int]
    sides: tuple[int, int]
    areas: tuple[int, int] | None = None
    takes_inline: bool = False
    scale: tuple[float, float] = (0.0, 1.0)
    is_single: bool = True


_WIDE = {"sides": (342, 12_288), "areas": (1024**2, 4096**2), "is_single": False}
_RULES: Mapping[str, _Rules] = {
    "jimeng_t2i_v40": _Rules(photos=(0, 10), **_WIDE),  # type: ignore[arg-type]
    "jimeng_seedream46_cvtob": _Rules(photos=(0, 14), scale=(1, 100), **_WIDE),  # type: ignore[arg-type]
    "jimeng_t2i_v31": _Rules(photos=(0, 0), sides=(512, 2048)),
    "jimeng_t2i_v30": _Rules(photos=(0, 0), sides=(512, 2048)),
    "jimeng_i2i_v30": _Rules(photos=(1, 1), sides=(512, 1536), takes_inline=True),
}
#: These send base64 whatever is asked for.
_INLINE_RESULTS = frozenset({"jimeng_i2i_v30"})


@dataclass(frozen=True, slots=True)
class Wish:
    """
    A good submit.

    Attributes:
        count: images that come of it.
        size: their width and height, where it says so.
        gives_links: where links are asked for.
    """

    req_key: str
    prompt: str
    count: int
    size: tuple[int, int] | None
    gives_links: bool


async def read_wish(body: Mapping[str, Any]) -> Wish:
    """
    Raises:
        WishError: a field is wrong, or a photo cannot be had.
    """
    req_key = body.get("req_key")
    rules = _RULES.get(req_key) if isinstance(req_key, str) else None
    if rules is None or not isinstance(req_key, str):
        raise WishError("req_key is invalid")
    prompt = body.get("prompt")
    if not isinstance(prompt, str) or not prompt or len(prompt) > _MAX_PROMPT_CHARACTERS:
        raise WishError("prompt is invalid")
    photos = await _photos(body, rules)
    asked_size = _size(body, rules)
    low, high = rules.scale
    if not _is_number(body.get("scale", low)) or not low <= body.get("scale", low) <= high:
        raise WishError("scale is invalid")
    is_single = body.get("force_single", False)
    if not isinstance(is_single, bool):
        raise WishError("force_single is invalid")
    asked = _COUNT.search(prompt)
    count = 1 if rules.is_single or is_single or asked is None else int(asked[1])
    return Wish(req_key, prompt, max(1, min(count, _MAX_PICTURES - photos)), asked_size, req_key not in _INLINE_RESULTS)


async def _photos(body: Mapping[str, Any], rules: _Rules) -> int:
    """How many photos there are, each looked at."""
    links, inline = body.get("image_urls") or [], body.get("binary_data_base64") or []
    if not isinstance(links, list) or not isinstance(inline, list) or (inline and not rules.takes_inline):
        raise WishError("image_urls or binary_data_base64 is invalid")
    fewest, most = rules.photos
    if (links and inline) or not fewest <= len(links) + len(inline) <= most:
        raise WishError("the number of input images is invalid")
    for link in links:
        if not isinstance(link, str) or not link.startswith(("https://", "http://")):
            raise WishError("image_urls is invalid")
        if is_near(link):
            try:
                _judge_photo(await fetched(link, max_bytes=_MAX_PHOTO_BYTES))
            except UnfetchableError as error:
                raise WishError(f"image download failed ({error})") from error
    for text in inline:
        try:
            content = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError, TypeError):
            content = b""
        if not is_picture(content) or len(content) > _MAX_PHOTO_BYTES:
            raise WishError("binary_data_base64 holds no image")
        try:
            _judge_photo(content)
        except UnfetchableError as error:
            raise WishError(f"image decode failed ({error})") from error
    return len(links) + len(inline)


def _judge_photo(content: bytes) -> None:
    width, height = picture_size(content)
    if max(width, height) > _MAX_PHOTO_SIDE:
        raise WishError(f"input image must be up to {_MAX_PHOTO_SIDE}x{_MAX_PHOTO_SIDE}")
    if max(width, height) > _MAX_PHOTO_RATIO * min(width, height):
        raise WishError("the ratio of the input image is invalid")


def _size(body: Mapping[str, Any], rules: _Rules) -> tuple[int, int] | None:
    """Width and height; an area alone is that of a square."""
    width, height = body.get("width"), body.get("height")
    if width is None and height is None:
        size = body.get("size")
        if size is not None and (not _is_number(size) or rules.areas is None or not rules.areas[0] <= size <= rules.areas[1]):
            raise WishError("size is invalid")
        return None if size is None else (math.isqrt(int(size)),) * 2
    low, high = rules.sides
    if not isinstance(width, int) or not isinstance(height, int) or not (low <= width <= high and low <= height <= high):
        raise WishError("width and height are invalid")
    if not 1 / 3 <= width / height <= 3 or (rules.areas and not rules.areas[0] <= width * height <= rules.areas[1]):
        raise WishError("width and height are invalid")
    return width, height


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
