"""Fetching what a caller names, as services do with the links they are given; from this machine only."""

from __future__ import annotations

import io
import ipaddress
from urllib.parse import urljoin, urlsplit

import aiohttp
from PIL import Image

_TIMEOUT_S = 5.0
_BEGINNINGS = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")


class UnfetchableError(Exception):
    """The link gives no picture; says why."""


def is_near(url: str) -> bool:
    """Whether *url* names this machine: nothing else is asked for anything."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


async def fetched(url: str, *, max_bytes: int) -> bytes:
    """
    The picture behind *url* of this machine; redirects are followed while they stay on it.

    Raises:
        UnfetchableError: there is none, or a larger one.
    """
    try:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=_TIMEOUT_S)) as session:
            for _ in range(4):
                if not is_near(url):
                    raise UnfetchableError("not on this machine")
                async with session.get(url, allow_redirects=False) as answer:
                    if answer.status in (301, 302, 303, 307, 308):
                        url = urljoin(url, answer.headers.get("Location", ""))
                        continue
                    if answer.status != 200:
                        raise UnfetchableError(f"status {answer.status}")
                    return _picture(await _read(answer, max_bytes))
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        raise UnfetchableError(type(error).__name__) from error
    raise UnfetchableError("too many redirects")


async def _read(answer: aiohttp.ClientResponse, max_bytes: int) -> bytes:
    content = b""
    async for block in answer.content.iter_any():
        content += block
        if len(content) > max_bytes:
            raise UnfetchableError("too large")
    return content


def _picture(content: bytes) -> bytes:
    if not is_picture(content):
        raise UnfetchableError("no picture")
    return content


def is_picture(content: bytes) -> bool:
    """Whether it begins like a JPEG or a PNG."""
    return content.startswith(_BEGINNINGS)


def picture_size(content: bytes) -> tuple[int, int]:
    """
    Width and height, by the header.

    Raises:
        UnfetchableError: no picture, or one of more pixels than anybody opens.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            return image.size
    except (OSError, ValueError, SyntaxError) as error:
        raise UnfetchableError("no picture") from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise UnfetchableError("too many pixels") from error
