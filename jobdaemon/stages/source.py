"""Where a stage's bytes come from: an artifact of ours, or a link that somebody else named."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from jobdaemon.errors import ProviderUnavailableError, RateLimitedError, SourceUnavailableError

ARTIFACT_SCHEME = "artifact:"


async def fetched(fetch: Callable[[str], Awaitable[bytes]], url: str) -> bytes:
    """
    What lies behind *url*.

    Raises:
        SourceUnavailableError: its host is away or busy. Retryable, and of no consequence for the queue.
    """
    try:
        return await fetch(url)
    except (ProviderUnavailableError, RateLimitedError) as error:
        raise SourceUnavailableError(str(error), retry_after=error.retry_after) from error
