"""The beautify stage."""

from __future__ import annotations

import pytest

from jobdaemon.domain.job import Job, Task
from jobdaemon.domain.write import OrderStarted, PhotoBeautified
from jobdaemon.errors import ArtifactMissingError, InvalidOrderError, UnsupportedImageError
from jobdaemon.stages.beautify import BeautifyStage
from jobdaemon.stages.prewarm import Prewarming
from tests.fakes import FakeArtifacts, FakeAttempt, FakeBackend, FakeOrders, FakePrewarmed, image_row, order_row

JOB = Job(9, "beautify", Task.BEAUTIFY, 300, {"order_id": 1}, token=1)


def _stage(orders: FakeOrders, store: FakeArtifacts, backend: FakeBackend | None = None) -> BeautifyStage:
    async def fetch(url: str) -> bytes:
        return f"fetched {url}".encode()

    return BeautifyStage(
        orders=orders,
        store=store,
        prewarming=Prewarming(FakePrewarmed(), store, backend or FakeBackend(), strength=0.7, backend_key="f" * 64),
        fetch=fetch,
        max_photo_bytes=100,
        images_per_call=lambda name: 2,
    )


async def test_photo_is_retouched_stored_and_followed_by_batches() -> None:
    """Source in, beautified photo into the store, one generate job per batch in the same transition."""
    orders = FakeOrders(images=[image_row(1, "a"), image_row(2, "a"), image_row(3, "a"), image_row(4, "b")])
    store, backend = FakeArtifacts({"sources/a.jpg": b"photo"}), FakeBackend()
    attempt = FakeAttempt(JOB, orders)
    done = await _stage(orders, store, backend).run(attempt)
    assert attempt.checkpoints == [OrderStarted(1)]
    assert backend.calls == [(b"photo", 0.7)]
    [write] = done.writes
    assert isinstance(write, PhotoBeautified)
    assert store.objects[write.artifact.key] == b"otohp"
    assert (write.width, write.height, write.faces, write.model) == (20, 30, 1, "fake 1")
    assert [(job.queue, job.args["images"], job.priority) for job in write.then] == [
        ("generate.fake", [1, 2], 300),
        ("generate.fake", [3], 300),
        ("generate.fake", [4], 300),
    ]


async def test_a_second_run_gives_the_same() -> None:
    """The same photo again lies under the same key and brings the same jobs."""
    orders, store = FakeOrders(), FakeArtifacts({"sources/a.jpg": b"photo"})
    first = await _stage(orders, store).run(FakeAttempt(JOB, orders))
    assert await _stage(orders, store).run(FakeAttempt(JOB, orders)) == first
    assert len(store.objects) == 2


async def test_https_sources_are_fetched() -> None:
    """An https source goes through the guarded client."""
    orders, backend = FakeOrders(order_row(source="https://a.example/x.jpg")), FakeBackend()
    await _stage(orders, FakeArtifacts(), backend).run(FakeAttempt(JOB, orders))
    assert backend.calls == [(b"fetched https://a.example/x.jpg", 0.7)]


@pytest.mark.parametrize(
    ("orders", "store", "error"),
    [
        (FakeOrders(None), FakeArtifacts(), InvalidOrderError),
        (FakeOrders(), FakeArtifacts(), ArtifactMissingError),
        (FakeOrders(), FakeArtifacts({"sources/a.jpg": b"x" * 101}), UnsupportedImageError),
    ],
    ids=["no order", "no photo", "too big"],
)
async def test_what_cannot_be_is_permanent(orders: FakeOrders, store: FakeArtifacts, error: type[Exception]) -> None:
    """No order, no photo or too big a photo ends the order with a reason."""
    with pytest.raises(error):
        await _stage(orders, store).run(FakeAttempt(JOB, orders))
