"""Links that others name: what their hosts do concerns one order, never a queue."""

from __future__ import annotations

import random
from datetime import timedelta

import pytest

from jobdaemon.domain.job import Job
from jobdaemon.domain.retry import RetryPolicy, after_error
from jobdaemon.errors import ProviderUnavailableError, RateLimitedError, RetryableError, SourceUnavailableError
from jobdaemon.stages.source import fetched

POLICY = RetryPolicy(3, timedelta(seconds=1), timedelta(seconds=5), 0.2)


@pytest.mark.parametrize("error", [ProviderUnavailableError("down"), RateLimitedError("busy", retry_after=timedelta(seconds=9))])
async def test_a_dead_host_is_its_orders_own_trouble(error: RetryableError) -> None:
    """The attempt is retried, an attempt is spent, and the queue's circuit and limit hear nothing of it."""

    async def fetch(url: str) -> bytes:
        raise error

    with pytest.raises(SourceUnavailableError) as raised:
        await fetched(fetch, "https://dead.example/ada.jpg")
    assert raised.value.retry_after == error.retry_after
    job = Job(1, "beautify", "jobdaemon.beautify", 0)
    transition = after_error(job, raised.value, POLICY, jitter=random.random(), dead=lambda reason: ())
    assert transition.end == "retry"
    assert transition.signal is None


async def test_bytes_come_through() -> None:
    """What is there is given as it is."""

    async def fetch(url: str) -> bytes:
        return url.encode()

    assert await fetched(fetch, "https://a.example") == b"https://a.example"
