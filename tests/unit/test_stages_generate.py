"""The generate stage."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from jobdaemon.domain.artifact import Artifact
from jobdaemon.domain.job import Job, Task
from jobdaemon.domain.outcome import Done
from jobdaemon.domain.write import CallSubmitted, ImageFailed, ImageGenerated
from jobdaemon.errors import InvalidOrderError, LeaseLostError, ProviderUnavailableError, UnsupportedFeatureError
from jobdaemon.ports import ImageMade, ImageRefused, TaskAccepted
from jobdaemon.stages.generate import GenerateStage
from tests.fakes import JPEG, FakeArtifacts, FakeAttempt, FakeOrders, FakeProvider, image_row, order_row

JOB = Job(9, "generate.fake", Task.GENERATE, 300, {"order_id": 1, "images": [1, 2]}, token=1)
PHOTO = Artifact("work/1/beautified-0.jpg", "0" * 64, 5, JPEG)


def _orders(*images: Any, **changes: Any) -> FakeOrders:
    return FakeOrders(order_row(beautified=PHOTO), list(images) or [image_row(1), image_row(2)], **changes)


def _stage(orders: FakeOrders, provider: FakeProvider, store: FakeArtifacts | None = None) -> GenerateStage:
    return GenerateStage(orders=orders, store=store or FakeArtifacts(), providers={"fake": provider}, max_photo_bytes=100)


async def test_images_are_noted_as_they_arrive() -> None:
    """Task id first, then each image with its upload job: inline bytes into the store, URLs as they are."""
    orders, store = _orders(), FakeArtifacts({PHOTO.key: b"photo"})
    provider = FakeProvider([TaskAccepted("t1"), ImageMade(2, b"two", JPEG), ImageMade(1, url="https://p.example/1")])
    attempt = FakeAttempt(JOB, orders)
    assert await _stage(orders, provider, store).run(attempt) == Done()
    noted, second, first = attempt.checkpoints
    assert noted == CallSubmitted(1, 9, 1, "fake", "t1")
    assert isinstance(second, ImageGenerated)
    assert isinstance(first, ImageGenerated)
    assert store.objects[second.locator.removeprefix("artifact:")] == b"two"
    assert first.locator == "https://p.example/1"
    assert [job.args for write in (second, first) for job in write.then] == [
        {"order_id": 1, "image": 2},
        {"order_id": 1, "image": 1},
    ]
    [request] = provider.requests
    assert await request.load_photo() == b"photo"
    assert (request.prompt, request.images, request.params, request.task_id) == ("p", ((1, 0), (2, 1)), {"seed": 3}, None)
    assert provider.closed == 1


async def test_ordinals_count_the_images_of_the_same_prompt() -> None:
    """An image's ordinal is its place among the order's images of its prompt, whatever is still missing."""
    orders = _orders(image_row(1, "a"), image_row(2, "b", "stored"), image_row(3, "b"), image_row(4, "b"))
    provider = FakeProvider([ImageMade(3, b"3", JPEG), ImageMade(4, b"4", JPEG)])
    job = Job(9, "generate.fake", Task.GENERATE, 300, {"order_id": 1, "images": [2, 3, 4]})
    await _stage(orders, provider).run(FakeAttempt(job, orders))
    assert provider.requests[0].images == ((3, 1), (4, 2))


async def test_a_later_attempt_asks_only_for_what_is_missing_and_resumes() -> None:
    """What arrived before is not made again, and a noted task id is handed back to the provider."""
    orders = _orders(image_row(1, status="generated"), image_row(2), task_id="t1")
    provider = FakeProvider([ImageMade(2, b"two", JPEG)])
    await _stage(orders, provider).run(FakeAttempt(JOB, orders))
    assert provider.requests[0].images == ((2, 1),)
    assert provider.requests[0].task_id == "t1"


async def test_a_call_is_made_and_noted_with_the_attempts_key() -> None:
    """The provider is told which key to use, and the call it takes remembers it."""
    orders, provider = _orders(), FakeProvider([TaskAccepted("t1"), ImageMade(1, b"1", JPEG), ImageMade(2, b"2", JPEG)])
    attempt = FakeAttempt(replace(JOB, key_alias="a"), orders)
    await _stage(orders, provider).run(attempt)
    assert provider.requests[0].key == "a"
    assert attempt.checkpoints[0] == CallSubmitted(1, 9, 1, "fake", "t1", "a")


async def test_nothing_missing_calls_nobody() -> None:
    """An attempt whose images are all there costs no call."""
    orders, provider = _orders(image_row(1, status="stored"), image_row(2, status="failed")), FakeProvider()
    assert await _stage(orders, provider).run(FakeAttempt(JOB, orders)) == Done()
    assert provider.requests == []


async def test_a_refused_image_fails_alone() -> None:
    """What the provider will not make fails with its reason; its sibling is made."""
    orders = _orders()
    attempt = FakeAttempt(JOB, orders)
    await _stage(orders, FakeProvider([ImageRefused(1, "policy"), ImageMade(2, b"two", JPEG)])).run(attempt)
    assert attempt.checkpoints[0] == ImageFailed(1, 1, "policy", was="pending")
    assert [image.status for image in orders.images] == ["failed", "generated"]


@pytest.mark.parametrize("script", [[], [ImageMade(1, b"one", JPEG)], [ImageMade(1), ImageMade(2)]])
async def test_an_image_left_out_without_a_word_is_retried(script: list[Any]) -> None:
    """A call that ends before every image was made or refused failed, retryably; what arrived is kept."""
    orders = _orders()
    with pytest.raises(ProviderUnavailableError):
        await _stage(orders, FakeProvider(script)).run(FakeAttempt(JOB, orders))
    assert orders.images[1].status == "pending"


async def test_the_call_is_closed_when_the_lease_is_lost() -> None:
    """A lost lease stops the stream at once, so that nothing more is fetched or bought."""
    orders, provider = _orders(), FakeProvider([ImageMade(1, b"one", JPEG), ImageMade(2, b"two", JPEG)])
    with pytest.raises(LeaseLostError):
        await _stage(orders, provider).run(FakeAttempt(JOB, orders, lost_after=1))
    assert provider.closed == 1


@pytest.mark.parametrize(
    ("orders", "queue", "error"),
    [
        (FakeOrders(None), "generate.fake", InvalidOrderError),
        (FakeOrders(), "generate.fake", InvalidOrderError),
        (_orders(), "generate.other", UnsupportedFeatureError),
    ],
    ids=["no order", "no photo", "no provider"],
)
async def test_what_cannot_be_is_permanent(orders: FakeOrders, queue: str, error: type[Exception]) -> None:
    """No order, no beautified photo or no such provider ends the batch with a reason."""
    job = Job(9, queue, Task.GENERATE, 300, {"order_id": 1, "images": [1, 2]})
    with pytest.raises(error):
        await _stage(orders, FakeProvider()).run(FakeAttempt(job, orders))
