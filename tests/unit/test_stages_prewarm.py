"""Prewarming: what is made beforehand, and when an order copies it."""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import replace

import pytest

from jobdaemon.domain.artifact import Artifact, is_valid_key, prewarmed_key
from jobdaemon.domain.job import PREWARM_PRIORITY, Job, Task
from jobdaemon.domain.prewarm import backend_key
from jobdaemon.domain.write import PhotoPrewarmed
from jobdaemon.errors import (
    ArtifactMissingError,
    InvalidOrderError,
    NothingRetouchedError,
    RetryableError,
    StoreRefusedError,
    StoreUnavailableError,
    UnsupportedImageError,
)
from jobdaemon.ports import Prewarmed
from jobdaemon.stages.prewarm import Prewarming, PrewarmStage
from tests.fakes import JPEG, FakeArtifacts, FakeAttempt, FakeBackend, FakeOrders, FakePrewarmed

BACKEND = "f" * 64
PHOTO = hashlib.sha256(b"photo").hexdigest()
MADE = b"made before"
JOB = Job(9, "beautify", Task.PREWARM, PREWARM_PRIORITY, {"source": "artifact:sources/a.jpg"}, token=1)
ENTRY = Prewarmed(
    4,
    Artifact("prewarmed/x.jpg", hashlib.sha256(MADE).hexdigest(), len(MADE), JPEG),
    width=20,
    height=30,
    faces=2,
    unrestored=1,
    model="fake 1",
    device="cpu",
)


async def _fetch(url: str) -> bytes:
    return b"photo" if url == "https://a.example/x.jpg" else b"another"


def _prewarming(rows: FakePrewarmed, store: FakeArtifacts, backend: FakeBackend) -> Prewarming:
    return Prewarming(rows, store, backend, strength=0.7, backend_key=BACKEND)


def _stage(rows: FakePrewarmed, store: FakeArtifacts, backend: FakeBackend) -> PrewarmStage:
    return PrewarmStage(_prewarming(rows, store, backend), store, _fetch, max_photo_bytes=100)


@pytest.mark.parametrize("source", ["artifact:sources/a.jpg", "https://a.example/x.jpg"])
async def test_a_photo_is_beautified_and_noted(source: str) -> None:
    """What the backend makes lies in the store under the prewarm's own key, and is noted for that photo and that backend."""
    rows, store, backend = FakePrewarmed(), FakeArtifacts({"sources/a.jpg": b"photo"}), FakeBackend()
    done = await _stage(rows, store, backend).run(FakeAttempt(replace(JOB, args={"source": source}), FakeOrders()))
    [write] = done.writes
    assert isinstance(write, PhotoPrewarmed)
    assert (write.photo, write.backend, write.artifact.key) == (PHOTO, BACKEND, prewarmed_key(PHOTO, 9, 1))
    assert (write.artifact.sha256, write.artifact.size_bytes) == (hashlib.sha256(b"otohp").hexdigest(), 5)
    assert rows.announced == [write]
    assert is_valid_key(write.artifact.key)
    assert store.objects[write.artifact.key] == b"otohp"
    assert backend.calls == [(b"photo", 0.7)]


async def test_a_photo_is_announced_before_it_is_stored() -> None:
    """Who is cancelled while it is stored leaves a portrait behind, and a row that tells of it."""

    class Late(FakeArtifacts):
        async def put(self, key: str, content: bytes, media_type: str) -> Artifact:
            await super().put(key, content, media_type)
            raise asyncio.CancelledError

    rows, store = FakePrewarmed(), Late({"sources/a.jpg": b"photo"})
    with pytest.raises(asyncio.CancelledError):
        await _stage(rows, store, FakeBackend()).run(FakeAttempt(JOB, FakeOrders()))
    assert {"sources/a.jpg", *(photo.artifact.key for photo in rows.announced)} == store.objects.keys()


async def test_what_was_made_is_not_made_again() -> None:
    """A photo that is prewarmed already costs nothing and changes nothing."""
    rows, store, backend = FakePrewarmed({(PHOTO, BACKEND): ENTRY}), FakeArtifacts({"sources/a.jpg": b"photo"}), FakeBackend()
    store.objects["prewarmed/x.jpg"] = MADE
    done = await _stage(rows, store, backend).run(FakeAttempt(JOB, FakeOrders()))
    assert (done.writes, backend.calls, len(store.objects), rows.uses) == ((), [], 2, [])


@pytest.mark.parametrize("content", [None, b"mad\x00 before"])
async def test_what_is_gone_from_the_store_is_made_again(content: bytes | None) -> None:
    """A prewarm says that a photo is there when it is: a copy that was deleted or damaged is made anew."""
    rows, store, backend = FakePrewarmed({(PHOTO, BACKEND): ENTRY}), FakeArtifacts({"sources/a.jpg": b"photo"}), FakeBackend()
    if content is not None:
        store.objects["prewarmed/x.jpg"] = content
    done = await _stage(rows, store, backend).run(FakeAttempt(JOB, FakeOrders()))
    assert (len(done.writes), len(backend.calls), rows.forgotten) == (1, 1, [4])


async def test_a_photo_that_was_not_retouched_is_not_kept() -> None:
    """A service out of memory gives back faces as they were: kept, they would be the photo of orders for a day."""
    store, backend = FakeArtifacts({"sources/a.jpg": b"photo"}), FakeBackend(faces=0, unrestored=2)
    with pytest.raises(NothingRetouchedError, match="2 faces") as told:
        await _stage(FakePrewarmed(), store, backend).run(FakeAttempt(JOB, FakeOrders()))
    assert isinstance(told.value, RetryableError)
    assert list(store.objects) == ["sources/a.jpg"]
    # Nothing is to be retouched: that is a result like any other.
    for prewarming in (
        Prewarming(FakePrewarmed(), store, backend, strength=0.0, backend_key=BACKEND),
        _prewarming(FakePrewarmed(), store, FakeBackend(faces=0)),
    ):
        assert await prewarming.prewarm(b"photo", 9, 1) is not None


@pytest.mark.parametrize(
    ("job", "store", "error"),
    [
        (replace(JOB, args={}), FakeArtifacts(), InvalidOrderError),
        (replace(JOB, args={"source": 7}), FakeArtifacts(), InvalidOrderError),
        (JOB, FakeArtifacts(), ArtifactMissingError),
        (JOB, FakeArtifacts({"sources/a.jpg": b"x" * 101}), UnsupportedImageError),
    ],
    ids=["no source", "no text", "no photo", "too big"],
)
async def test_what_cannot_be_is_permanent(job: Job, store: FakeArtifacts, error: type[Exception]) -> None:
    """No source, no photo or too big a photo is not tried again."""
    with pytest.raises(error):
        await _stage(FakePrewarmed(), store, FakeBackend()).run(FakeAttempt(job, FakeOrders()))


async def test_an_order_gets_what_was_made() -> None:
    """An order's photo that was prewarmed under the same settings is not beautified again; every other one is."""
    rows, backend = FakePrewarmed({(PHOTO, BACKEND): ENTRY}), FakeBackend()
    prewarming = _prewarming(rows, FakeArtifacts({"prewarmed/x.jpg": MADE}), backend)
    result = await prewarming.beautified(b"photo")
    assert (result.content, result.media_type, result.width, result.height) == (MADE, JPEG, 20, 30)
    assert (result.faces, result.unrestored, result.model, result.device) == (2, 1, "fake 1", "cpu")
    assert backend.calls == []
    assert (await prewarming.beautified(b"another")).content == b"rehtona"
    other = Prewarming(rows, FakeArtifacts({"prewarmed/x.jpg": MADE}), backend, strength=0.1, backend_key="0" * 64)
    assert (await other.beautified(b"photo")).content == b"otohp"
    assert (backend.calls, rows.forgotten, rows.uses) == ([(b"another", 0.7), (b"photo", 0.1)], [], [4])


@pytest.mark.parametrize("content", [None, b"longer than before", b"mad\x00 before", b""])
async def test_a_bad_copy_is_beautified_now(content: bytes | None) -> None:
    """What is missing in the store, or is not what was made, is forgotten and made anew within the same attempt."""
    rows, backend = FakePrewarmed({(PHOTO, BACKEND): ENTRY}), FakeBackend()
    store = FakeArtifacts({} if content is None else {"prewarmed/x.jpg": content})
    assert (await _prewarming(rows, store, backend).beautified(b"photo")).content == b"otohp"
    assert (rows.forgotten, rows.uses) == ([4], [])


@pytest.mark.parametrize("error", [StoreUnavailableError, StoreRefusedError])
async def test_a_copy_that_cannot_be_read_harms_no_order(error: type[Exception]) -> None:
    """The store keeps the copy to itself, a file of another user, say: the photo is beautified as if there were none."""

    class Shut(FakeArtifacts):
        async def get(self, key: str, *, max_bytes: int) -> bytes:
            raise error("not now")

    rows, backend = FakePrewarmed({(PHOTO, BACKEND): ENTRY}), FakeBackend()
    assert (await _prewarming(rows, Shut(), backend).beautified(b"photo")).content == b"otohp"
    assert (rows.forgotten, rows.uses) == ([], [])


def test_every_setting_counts() -> None:
    """Another version or another setting is another backend; the order of settings says nothing."""
    key = backend_key("1", {"backend": "opencv", "strength": 0.7})
    assert backend_key("1", {"strength": 0.7, "backend": "opencv"}) == key
    others = {
        backend_key("2", {"backend": "opencv", "strength": 0.7}),
        backend_key("1", {"backend": "opencv", "strength": 0.8}),
        backend_key("1", {"backend": "opencv", "strength": 0.7, "more": None}),
    }
    assert len(others | {key}) == 4
