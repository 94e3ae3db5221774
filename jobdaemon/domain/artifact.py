"""Artifacts: bytes in the shared store, and the keys they live under."""

from __future__ import annotations

import re
from dataclasses import dataclass

#: One to 512 bytes of URL-safe path segments; no empty, ``.`` or ``..`` segment, no leading slash.
_KEY = re.compile(r"\A(?!.*(?:^|/)\.{1,2}(?:/|$))[A-Za-z0-9._=-]+(?:/[A-Za-z0-9._=-]+)*\Z")
MAX_KEY_BYTES = 512
#: Before a key, where a link could stand as well: the source of an order, the locator of an image.
ARTIFACT_SCHEME = "artifact:"

EXTENSIONS = {"image/jpeg": "jpg", "image/png": "png", "image/webp": "webp"}


@dataclass(frozen=True, slots=True)
class Artifact:
    """
    Bytes that lie in the store.

    Attributes:
        key: where, as in :func:`is_valid_key`.
        sha256: lower-case hex digest of the bytes.
        size_bytes: how many bytes.
        media_type: for instance ``image/jpeg``.
    """

    key: str
    sha256: str
    size_bytes: int
    media_type: str


def is_valid_key(key: str) -> bool:
    """Whether *key* may name an artifact (it may become a path or an object key)."""
    return len(key) <= MAX_KEY_BYTES and _KEY.match(key) is not None


def source_key(sha256: str, extension: str = "img") -> str:
    """Key of an uploaded source photo: the same bytes always lie under the same key."""
    return f"sources/{sha256[:2]}/{sha256}.{extension}"


def work_folder(order_id: int) -> str:
    """Where everything of an order lies that is of no use once the order has ended and cannot be redriven."""
    return f"work/{order_id}"


def beautified_key(order_id: int, sha256: str) -> str:
    """Key of an order's beautified photo."""
    return f"{work_folder(order_id)}/beautified-{sha256[:16]}.jpg"


def prewarmed_key(photo_sha256: str, job_id: int, token: int) -> str:
    """Key of a photo that was beautified before anybody ordered it, by this attempt and no other."""
    return f"prewarmed/{photo_sha256[:2]}/{photo_sha256}-{job_id}-{token}.jpg"


def fitted_key(photo_key: str, longest_side: int, sha256: str, extension: str = "jpg") -> str:
    """
    Key of a smaller copy of a photo, made for a provider: beside the photo.

    Args:
        longest_side: of the copy, pixels.
        sha256: of the copy.
    """
    folder, slash, _ = photo_key.rpartition("/")
    return f"{folder}{slash}photo-{longest_side}-{sha256[:16]}.{extension}"


def order_of(key: str) -> int:
    """
    The order whose photo, copy of it or raw image lies under *key*.

    Raises:
        ValueError: it is no order's.
    """
    folder, _, rest = key.partition("/")
    number, _, _ = rest.partition("/")
    if folder != "work" or not number.isdecimal():
        raise ValueError(f"{key} is no order's")
    return int(number)


def generated_key(order_id: int, index: int, sha256: str, media_type: str) -> str:
    """Key of an image that arrived inline from a provider, before it is uploaded."""
    return f"{work_folder(order_id)}/{index:03d}-{sha256[:16]}.{EXTENSIONS.get(media_type, 'bin')}"


def image_key(order_id: int, index: int, sha256: str, media_type: str) -> str:
    """Key of a finished image: derived from order, index and content, so a second upload is the same."""
    return f"orders/{order_id}/{index:03d}-{sha256[:16]}.{EXTENSIONS.get(media_type, 'bin')}"
