"""Where a stage's bytes come from: an artifact of ours, or a link that somebody else named."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

from jobdaemon.domain.artifact import ARTIFACT_SCHEME
from jobdaemon.errors import ProviderUnavailableError, RateLimitedError, SourceUnavailableError
from jobdaemon.ports import ArtifactStore

T = TypeVar("T")


async def fetched(fetch: Callable[[str], Awaitable[T]], url: str) -> T:
    """
    What *fetch* makes of what lies behind *url*.

    Raises:
        SourceUnavailableError: its host is away or busy. Retryable, and of no consequence for the queue.
    """
    try:
        return await fetch(url)
    except (ProviderUnavailableError, RateLimitedError) as error:
        raise SourceUnavailableError(str(error), retry_after=error.retry_after) from error


async def source_photo(source: str, store: ArtifactStore, fetch: Callable[[str], Awaitable[bytes]], *, max_bytes: int) -> bytes:
    """
    The photo that somebody named as a source: ``artifact:<key>`` or ``https://…``.

    Raises:
        SourceUnavailableError: see :func:`fetched`.
        What the store and *fetch* raise.
    """
    if source.startswith(ARTIFACT_SCHEME):
        return await store.get(source.removeprefix(ARTIFACT_SCHEME), max_bytes=max_bytes)
    return await fetched(fetch, source)
