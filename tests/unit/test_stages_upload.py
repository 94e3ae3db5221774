"""The upload and removal stages."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from dataclasses import replace
from typing import IO

import pytest

from jobdaemon.domain.artifact import generated_key, image_key
from jobdaemon.domain.job import Job, Task
from jobdaemon.domain.outcome import Done
from jobdaemon.domain.write import ImageFailed, ImageLost, ImagesRemoved, ImageStored
from jobdaemon.errors import (
    ArtifactMissingError,
    DownloadRefusedError,
    InvalidOrderError,
    SourceUnavailableError,
    UnsupportedImageError,
)
from jobdaemon.spool import Spool
from jobdaemon.stages.upload import DECODED_AT_ONCE, RemoveStage, UploadStage
from tests.fakes import JPEG, Facts, FakeArtifacts, FakeAttempt, FakeOrders, image_row

JOB = Job(9, "upload", Task.UPLOAD, 300, {"order_id": 1, "image": 1}, token=1)
CONTENT = b"an image"
DIGEST = hashlib.sha256(CONTENT).hexdigest()
WORK_KEY = generated_key(1, 1, DIGEST, JPEG)


def _inspect(file: IO[bytes]) -> Facts:
    if file.read() == b"garbage":
        raise UnsupportedImageError("this is no image")
    return Facts()


def _stage(orders: FakeOrders, store: FakeArtifacts, fetched: bytes = CONTENT) -> UploadStage:
    async def fetch(url: str, spool: Spool) -> None:
        spool.write(fetched)

    return UploadStage(orders=orders, store=store, spool=Spool, fetch=fetch, inspect=_inspect, max_image_bytes=100)


@pytest.mark.parametrize("locator", [f"artifact:{WORK_KEY}", "https://p.example/1?signature=x"])
async def test_an_image_is_stored_under_its_content(locator: str) -> None:
    """From the store or from a URL, the image goes under a key of order, index and content, with what is known of it."""
    orders = FakeOrders(images=[image_row(1, status="generated", locator=locator)])
    store = FakeArtifacts({WORK_KEY: CONTENT})
    done = await _stage(orders, store).run(FakeAttempt(JOB, orders))
    key = image_key(1, 1, DIGEST, JPEG)
    assert store.objects[key] == CONTENT
    assert done.writes == (ImageStored(1, 1, key, f"https://cdn.example/{key}", DIGEST, len(CONTENT), 8, 8, JPEG),)
    assert done.obsolete == ((WORK_KEY,) if locator.startswith("artifact:") else ())
    assert WORK_KEY in store.objects, "deleted only once the row is committed"


async def test_uploaded_twice_is_one_object() -> None:
    """A second run puts the same bytes under the same key and wants the same row."""
    orders = FakeOrders(images=[image_row(1, status="generated", locator=f"artifact:{WORK_KEY}")])
    store = FakeArtifacts({WORK_KEY: CONTENT})
    first = await _stage(orders, store).run(FakeAttempt(JOB, orders))
    assert await _stage(orders, store).run(FakeAttempt(JOB, orders)) == first
    assert len(store.objects) == 2


async def test_only_so_many_images_are_decoded_at_once() -> None:
    """However many uploads run, their pixels are in memory two at a time."""
    entered, leave = threading.Semaphore(0), threading.Event()

    def inspect(file: IO[bytes]) -> Facts:
        entered.release()
        assert leave.wait(10)
        return _inspect(file)

    async def fetch(url: str, spool: Spool) -> None:
        spool.write(url.encode())

    orders = FakeOrders(
        images=[image_row(index, status="generated", locator=f"https://p.example/{index}") for index in range(1, 5)]
    )
    store = FakeArtifacts()
    stage = UploadStage(orders=orders, store=store, spool=Spool, fetch=fetch, inspect=inspect, max_image_bytes=100)
    jobs = [replace(JOB, args={"order_id": 1, "image": index}) for index in range(1, 5)]
    running = asyncio.gather(*(stage.run(FakeAttempt(job, orders)) for job in jobs))
    for _ in range(DECODED_AT_ONCE):
        assert await asyncio.to_thread(entered.acquire, timeout=10)
    for _ in range(100):
        await asyncio.sleep(0)
    assert not entered.acquire(timeout=0.05)
    leave.set()
    await running
    assert len(store.objects) == 4


async def test_an_expired_link_is_asked_for_again() -> None:
    """A link that gives nothing any more sends the image back to the call that made it; only if that was no help does it fail."""
    image = replace(image_row(1, status="generated", locator="https://p.example/1"), provider="fake", call_id=7)
    orders = FakeOrders(images=[image])

    async def fetch(url: str, spool: Spool) -> None:
        raise DownloadRefusedError("gone", status=403)

    stage = UploadStage(orders=orders, store=FakeArtifacts(), spool=Spool, fetch=fetch, inspect=_inspect, max_image_bytes=100)
    done = await stage.run(FakeAttempt(JOB, orders))
    lost, failed = done.writes
    assert isinstance(lost, ImageLost)
    assert [(job.queue, job.args) for job in lost.then] == [("generate.fake", {"order_id": 1, "images": [1], "call": 7})]
    assert failed == ImageFailed(1, 1, "gone", was="generated")


@pytest.mark.parametrize("status", ["pending", "stored", "failed", "cancelled"])
async def test_an_image_that_is_not_waiting_is_left_alone(status: str) -> None:
    """Whatever is not generated needs no upload: a success with nothing to write."""
    orders = FakeOrders(images=[image_row(1, status=status, locator=f"artifact:{WORK_KEY}")])
    assert await _stage(orders, FakeArtifacts()).run(FakeAttempt(JOB, orders)) == Done()


@pytest.mark.parametrize(
    ("locator", "objects", "error"),
    [
        (None, {}, ArtifactMissingError),
        (f"artifact:{WORK_KEY}", {}, ArtifactMissingError),
        (f"artifact:{WORK_KEY}", {WORK_KEY: b"other bytes"}, ArtifactMissingError),
        (f"artifact:{WORK_KEY}", {WORK_KEY: b"garbage"}, UnsupportedImageError),
        # A download may have been cut short: it is fetched again before it is given up.
        ("https://p.example/garbage", {}, SourceUnavailableError),
    ],
    ids=["no link", "nothing there", "changed", "no image", "no image fetched"],
)
async def test_what_is_no_whole_image_is_not_stored(
    locator: str | None, objects: dict[str, bytes], error: type[Exception]
) -> None:
    """A lost, changed or undecodable image fails with a reason, and nothing is put."""
    orders, store = FakeOrders(images=[image_row(1, status="generated", locator=locator)]), FakeArtifacts(dict(objects))
    with pytest.raises(error):
        await _stage(orders, store, fetched=b"garbage").run(FakeAttempt(JOB, orders))
    assert store.objects == objects


@pytest.mark.parametrize("locator", [f"artifact:{WORK_KEY}", "https://p.example/garbage"])
async def test_the_provider_is_named_for_what_it_sent(locator: str) -> None:
    """What is wrong with an image is not mistaken for what is wrong with the customer's photo."""
    image = replace(image_row(1, status="generated", locator=locator), provider="jimeng")
    orders = FakeOrders(images=[image])
    with pytest.raises((UnsupportedImageError, SourceUnavailableError), match=r"^jimeng sent an image that cannot be used: "):
        await _stage(orders, FakeArtifacts({WORK_KEY: b"garbage"}), fetched=b"garbage").run(FakeAttempt(JOB, orders))


async def test_a_link_that_leads_inwards_is_the_provider_s() -> None:
    """A link, or where it redirects to, that is not fetched ends the image at once, with who gave it: no order was wrong."""
    orders = FakeOrders(images=[replace(image_row(1, status="generated", locator="https://p.example/a"), provider="jimeng")])

    async def fetch(url: str, spool: Spool) -> None:
        raise InvalidOrderError("https://169.254.169.254/ is not a public address.")

    stage = _stage(orders, FakeArtifacts())
    stage._fetch = fetch
    with pytest.raises(UnsupportedImageError, match=r"^jimeng gave a link that is not followed: .* not a public address"):
        await stage.run(FakeAttempt(JOB, orders))


async def test_an_unknown_image_is_permanent() -> None:
    """A job for an image that the order does not have."""
    orders = FakeOrders(images=[image_row(2)])
    with pytest.raises(InvalidOrderError):
        await _stage(orders, FakeArtifacts()).run(FakeAttempt(JOB, orders))


async def test_removal_deletes_what_is_stored() -> None:
    """Stored objects go, other images are not touched, and twice is a success."""
    orders = FakeOrders(images=[image_row(1, status="stored"), image_row(2, status="cancelled")])
    store = FakeArtifacts({"orders/1/1.jpg": b"1", "orders/2/1.jpg": b"another order's"})
    for _ in range(2):
        done = await RemoveStage(orders=orders, store=store).run(FakeAttempt(JOB, orders))
        assert done == Done((ImagesRemoved(1),))
    assert list(store.objects) == ["orders/2/1.jpg"]
