"""Where a stage's bytes come from: an artifact of ours, or a link that somebody else named."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

from jobdaemon.errors import ProviderUnavailableError, RateLimitedError, SourceUnavailableError

T = TypeVar("T")

ARTIFACT_SCHEME = "artifact:"


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
