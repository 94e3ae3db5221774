"""Photos that are kept in memory between the calls of an order."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

from jobdaemon.domain.artifact import Artifact
from jobdaemon.ports import ArtifactStore
from jobdaemon.stages.photo_cache import PhotoCache


@dataclass(slots=True)
class Shelf:
    """What the cache needs of a store: notes what was fetched; every photo is as long as its artifact says."""

    photos: list[Artifact]
    fetched: list[str] = field(default_factory=list)

    async def get(self, key: str, *, max_bytes: int) -> bytes:
        self.fetched.append(key)
        return next(b"x" * photo.size_bytes for photo in self.photos if photo.key == key and photo.size_bytes <= max_bytes)


def photo(name: str, size_bytes: int) -> Artifact:
    """An artifact of so many bytes."""
    return Artifact(f"work/{name}.jpg", name * 64, size_bytes, "image/jpeg")


async def test_the_calls_of_an_order_fetch_its_photo_once() -> None:
    """And each gets all of it."""
    a = photo("a", 10)
    shelf = Shelf([a])
    cache = PhotoCache(cast("ArtifactStore", shelf), max_photo_bytes=100)
    assert [await cache.get(a) for _ in range(3)] == [b"x" * 10] * 3
    assert shelf.fetched == [a.key]


async def test_what_was_used_last_is_kept_as_far_as_it_has_room() -> None:
    """The oldest goes first; one that is larger than the room is fetched each time, and drives nobody out."""
    a, b, c, large = photo("a", 40), photo("b", 40), photo("c", 40), photo("d", 101)
    shelf = Shelf([a, b, c, large])
    cache = PhotoCache(cast("ArtifactStore", shelf), max_photo_bytes=200, kept_bytes=100)
    for wanted in (a, b, a, c, a, b):
        await cache.get(wanted)
    assert shelf.fetched == [a.key, b.key, c.key, b.key]
    for _ in range(2):
        await cache.get(large)
    for wanted in (a, b, a, b):
        await cache.get(wanted)
    assert shelf.fetched[4:] == [large.key] * 2


async def test_another_photo_under_the_same_key_is_another_one() -> None:
    """A photo that was beautified anew with other settings may lie where the old one lay."""
    old, new = photo("a", 10), Artifact("work/a.jpg", "b" * 64, 20, "image/jpeg")
    shelf = Shelf([old])
    cache = PhotoCache(cast("ArtifactStore", shelf), max_photo_bytes=100)
    await cache.get(old)
    shelf.photos = [new]
    assert len(await cache.get(new)) == 20


async def test_a_photo_that_came_in_part_is_fetched_again() -> None:
    """One bad answer of a store is one call's, as it was without a cache."""
    whole, part = photo("a", 10), photo("a", 6)
    shelf = Shelf([part])
    cache = PhotoCache(cast("ArtifactStore", shelf), max_photo_bytes=100)
    assert len(await cache.get(whole)) == 6
    shelf.photos = [whole]
    assert len(await cache.get(whole)) == 10
