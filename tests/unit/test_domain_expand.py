"""What follows what: batches, the jobs of an order, and what a dead job takes along."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobdaemon.domain.expand import WantedImage, batches, generate_jobs, upload_job, writes_when_dead
from jobdaemon.domain.job import Job, Task
from jobdaemon.domain.write import ImageFailed, OrderFailed

wanted_images = st.lists(
    st.tuples(st.integers(1, 1000), st.sampled_from("abc")), unique_by=lambda pair: pair[0], max_size=80
).map(lambda pairs: [WantedImage(*pair) for pair in pairs])


@given(wanted_images, st.integers(1, 10))
def test_batches_share_out_every_image_once(images: list[WantedImage], images_per_call: int) -> None:
    """Every image is in exactly one batch of its own prompt, in order, and no batch is empty or too big."""
    cut = batches(images, images_per_call)
    assert [index for batch in cut for index in batch.images] == sorted(image.index for image in images)
    prompts = {image.index: image.prompt for image in images}
    assert all({prompts[index] for index in batch.images} == {batch.prompt} for batch in cut)
    assert all(1 <= len(batch.images) <= images_per_call for batch in cut)


@given(wanted_images, st.integers(1, 10))
def test_batches_are_as_few_as_can_be(images: list[WantedImage], images_per_call: int) -> None:
    """Two neighbouring batches of one prompt would not fit into one call."""
    cut = batches(images, images_per_call)
    for one, two in pairwise(cut):
        assert one.prompt != two.prompt or len(one.images) == images_per_call


def test_batches_need_a_size() -> None:
    """A provider that makes no image per call is a mistake of ours."""
    with pytest.raises(ValueError, match="at least 1"):
        batches([], 0)


def test_one_generate_job_per_batch() -> None:
    """The jobs go to the provider's queue, with the order's priority and their images' indexes."""
    jobs = generate_jobs(7, 300, "dashscope", [WantedImage(index, "p") for index in range(1, 8)], 5)
    assert [job.args for job in jobs] == [{"order_id": 7, "images": [1, 2, 3, 4, 5]}, {"order_id": 7, "images": [6, 7]}]
    assert {(job.queue, job.task, job.priority, job.delay) for job in jobs} == {("generate.dashscope", Task.GENERATE, 300, None)}


def test_upload_job_brings_one_image() -> None:
    """An upload job names its order and one image."""
    job = upload_job(7, 300, 3)
    assert (job.queue, job.task, job.args) == ("upload", Task.UPLOAD, {"order_id": 7, "image": 3})


@pytest.mark.parametrize(
    ("task", "args", "expected"),
    [
        (Task.BEAUTIFY, {}, (OrderFailed(7, "why"),)),
        (Task.GENERATE, {"images": [1, 3]}, (ImageFailed(7, 1, "why", "pending"), ImageFailed(7, 3, "why", "pending"))),
        (Task.UPLOAD, {"image": 2}, (ImageFailed(7, 2, "why", "generated"),)),
        (Task.REMOVE, {}, ()),
        ("somebody.elses", {}, ()),
    ],
)
def test_what_a_dead_job_takes_along(task: str, args: dict[str, Any], expected: tuple[object, ...]) -> None:
    """Beautify takes its order along, generate its batch, upload its image, any other job nothing."""
    assert writes_when_dead(Job(1, "q", task, 0, {"order_id": 7} | args), "why") == expected


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=6,
)


@given(st.sampled_from(list(Task)), st.dictionaries(st.sampled_from(["order_id", "images", "image"]), json_values))
def test_any_arguments_can_die(task: Task, args: dict[str, Any]) -> None:
    """Whatever arguments somebody deferred a job with, giving it up works and names only numbers that a row can have."""
    for write in writes_when_dead(Job(1, "q", task, 0, args), "why"):
        assert isinstance(write, OrderFailed | ImageFailed)
        assert 0 < write.order_id < 2**63
        assert not isinstance(write, ImageFailed) or 0 < write.index < 2**63
