"""A provider behind the cache: what it asks for, and which claims it gives back."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta

import pytest

from jobdaemon.domain.artifact import Artifact
from jobdaemon.errors import (
    AnswerLostError,
    DatabaseUnavailableError,
    ProviderRefusedError,
    ProviderUnavailableError,
    PutOffError,
)
from jobdaemon.ports import (
    CachedImage,
    GenerateRequest,
    ImageMade,
    ImageRefused,
    ProviderCall,
    ProviderEvent,
    Submitting,
    Taken,
    TaskAccepted,
    TaskOver,
)
from jobdaemon.spool import Spool
from jobdaemon.stages.cached import CachingProvider
from tests.fakes import JPEG, FakeArtifacts, FakeProvider, content_of

PHOTO = Artifact("work/1/beautified-0.jpg", "0" * 64, 5, JPEG)
MADE = {index: ImageMade(index, content=b"new", media_type=JPEG) for index in (1, 2, 3)}


async def _no_photo() -> bytes:
    return b""


REQUEST = GenerateRequest(1, ((1, 0), (2, 1), (3, 2)), "p", PHOTO, _no_photo)


@dataclass(slots=True)
class FakeCache:
    """ImageCache that answers what a test says."""

    taken: Taken = field(default_factory=lambda: Taken({}, frozenset({1, 2, 3}), None))
    asked: list[dict[int, str]] = field(default_factory=list)
    released: list[set[int]] = field(default_factory=list)
    forgotten: list[int] = field(default_factory=list)
    is_away_at_release: bool = False

    async def take(
        self, provider: str, key: str | None, order_id: int, images: Mapping[int, str], *, hold: timedelta, ttl: timedelta
    ) -> Taken:
        self.asked.append(dict(images))
        return self.taken

    async def release(self, order_id: int, images: Iterable[int]) -> None:
        self.released.append(set(images))
        if self.is_away_at_release:
            raise DatabaseUnavailableError("away")

    async def forget(self, entry_id: int) -> None:
        self.forgotten.append(entry_id)


def cached(provider: FakeProvider, cache: FakeCache, store: FakeArtifacts | None = None) -> CachingProvider:
    hour = timedelta(hours=1)
    return CachingProvider(
        provider, cache, store or FakeArtifacts(), spool=Spool, settings={"model": "m"}, hold=hour, ttl=hour, max_image_bytes=100
    )


async def events(provider: CachingProvider, request: GenerateRequest = REQUEST) -> list[ProviderEvent]:
    async with aclosing(provider.generate(request)) as stream:
        return [in_memory(event) async for event in stream]


def in_memory(event: ProviderEvent) -> ProviderEvent:
    """Spools cannot be compared."""
    return replace(event, content=content_of(event)) if isinstance(event, ImageMade) and event.content is not None else event


def hit(store: FakeArtifacts, index: int, content: bytes = b"old", *, there: bytes | None = b"old") -> CachedImage:
    name = f"cache/{index}.jpg"
    if there is not None:
        store.objects[name] = there
    return CachedImage(index * 10, name, hashlib.sha256(content).hexdigest(), JPEG)


async def test_hits_come_first_and_the_rest_is_asked_for() -> None:
    """The provider is asked for exactly the images that the cache does not have."""
    store, provider = FakeArtifacts(), FakeProvider([Submitting(), MADE[1], MADE[3]])
    cache = FakeCache(Taken({2: hit(store, 2)}, frozenset({1, 3}), None))
    found = await events(cached(provider, cache, store))
    assert found == [ImageMade(2, content=b"old", media_type=JPEG), Submitting(), MADE[1], MADE[3]]
    assert [request.images for request in provider.requests] == [((1, 0), (3, 2))]
    assert (cache.released, len(set(cache.asked[0].values()))) == ([], 3)


async def test_hits_alone_ask_nobody() -> None:
    """Where everything was made before, the provider hears nothing."""
    store, provider = FakeArtifacts(), FakeProvider()
    cache = FakeCache(Taken({index: hit(store, index) for index in (1, 2, 3)}, frozenset(), None))
    assert [event.index for event in await events(cached(provider, cache, store)) if isinstance(event, ImageMade)] == [1, 2, 3]
    assert provider.requests == []


async def test_what_another_order_has_made_is_waited_for() -> None:
    """Hits are given all the same, then the job is put off for as long as the cache says; nothing is bought."""
    store, provider = FakeArtifacts(), FakeProvider()
    cache = FakeCache(Taken({1: hit(store, 1)}, frozenset(), timedelta(seconds=3)))
    stream = cached(provider, cache, store).generate(REQUEST)
    assert in_memory(await anext(stream)) == ImageMade(1, content=b"old", media_type=JPEG)
    with pytest.raises(PutOffError) as caught:
        await anext(stream)
    assert (caught.value.retry_after, provider.requests) == (timedelta(seconds=3), [])


@pytest.mark.parametrize("there", [None, b"other", b"x" * 101], ids=["missing", "damaged", "too large"])
async def test_a_bad_copy_is_forgotten(there: bytes | None) -> None:
    """A copy that is not what was stored is forgotten, its sound sibling is given, and the job comes back at once."""
    store, provider = FakeArtifacts(), FakeProvider()
    cache = FakeCache(Taken({1: hit(store, 1, there=there), 2: hit(store, 2)}, frozenset({3}), None))
    stream = cached(provider, cache, store).generate(REQUEST)
    assert in_memory(await anext(stream)) == ImageMade(2, content=b"old", media_type=JPEG)
    with pytest.raises(PutOffError, match="made anew") as caught:
        await anext(stream)
    assert (cache.forgotten, cache.released, caught.value.retry_after, provider.requests) == ([10], [{3}], None, [])


@pytest.mark.parametrize(
    ("script", "released"),
    [
        ([Submitting(), MADE[1], ProviderUnavailableError("away")], [{2, 3}]),
        ([Submitting(), AnswerLostError("lost")], [{1, 2, 3}]),
        ([Submitting(), MADE[1], ImageRefused(2, "no"), MADE[3]], [{2}]),
        ([Submitting(), MADE[1]], [{2, 3}]),
        ([Submitting(), TaskAccepted("t"), MADE[1], ProviderUnavailableError("slow")], []),
        ([Submitting("t"), ProviderUnavailableError("slow")], []),
        ([Submitting(), TaskAccepted("t"), TaskOver(), ProviderUnavailableError("failed")], [{1, 2, 3}]),
        ([Submitting(), TaskAccepted("t"), ProviderRefusedError("never")], [{1, 2, 3}]),
    ],
    ids=["error", "lost", "refused one", "left out", "task goes on", "chosen id", "task over", "refused"],
)
async def test_what_is_not_made_is_given_back(script: list[ProviderEvent | Exception], released: list[set[int]]) -> None:
    """An attempt that ends gives back what it claimed and did not get, unless a task of the provider's still makes it."""
    cache = FakeCache()
    provider = cached(FakeProvider(script), cache)
    error = next((event for event in script if isinstance(event, Exception)), None)
    if error is None:
        await events(provider)
    else:
        with pytest.raises(type(error)):
            await events(provider)
    assert cache.released == released


async def test_an_attempt_that_is_stopped_gives_back_too() -> None:
    """Closing the stream in the middle closes the provider's and gives back the rest, even if the database is away."""
    cache, inner = FakeCache(is_away_at_release=True), FakeProvider([Submitting(), MADE[1], MADE[2]])
    stream = cached(inner, cache).generate(REQUEST)
    await anext(stream)
    await anext(stream)
    await stream.aclose()
    assert (cache.released, inner.closed) == ([{2, 3}], 1)


@pytest.mark.parametrize("reason", ["resume", "params"])
async def test_the_cache_is_not_asked(reason: str) -> None:
    """What was bought already is fetched, and an order that stays out is bought, past the cache."""
    call = ProviderCall(7, "t", (1, 2, 3), None, datetime(2026, 1, 1, tzinfo=UTC))
    request = replace(REQUEST, resume=call) if reason == "resume" else replace(REQUEST, params={"cache": False})
    cache, inner = FakeCache(), FakeProvider([MADE[1]])
    assert await events(cached(inner, cache), request) == [MADE[1]]
    assert (cache.asked, cache.released, inner.requests, inner.closed) == ([], [], [request], 1)


async def test_everything_else_is_the_providers() -> None:
    """Name, limits and what is asked of a task are those of the provider behind."""
    inner = FakeProvider(found="t", max_images_per_call=4, is_paid=False, on_unknown_submit="fail")
    provider = cached(inner, FakeCache())
    call = ProviderCall(7, None, (1,), None, datetime(2026, 1, 1, tzinfo=UTC))
    assert (provider.name, provider.max_images_per_call, provider.is_paid, provider.on_unknown_submit) == (
        "fake",
        4,
        False,
        "fail",
    )
    assert await provider.find_task(REQUEST, call) == "t"
    assert await provider.cancel(call)
    assert inner.cancelled == [call]
    await provider.close()
