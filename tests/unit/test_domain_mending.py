"""What becomes of an open order whose jobs others had their hands on."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobdaemon.domain.job import Job, Task
from jobdaemon.domain.mending import Mending, OrderCall, OrderImage, OrderJob, StrayOrder, mend
from jobdaemon.domain.write import ImageFailed, OrderFailed

ORDER = 7
PER_CALL = 2
OPEN, ENDED = ["todo", "doing"], ["cancelled", "aborted", "failed"]


def _job(task: Task, status: str, *images: int, id: int = 1) -> OrderJob:  # noqa: A002 - a job's
    args = {"image": images[0]} if task is Task.UPLOAD else {"images": list(images)}
    return OrderJob(Job(id, "", task, 0, {"order_id": ORDER, **args}), status)


def _order(statuses: str, *jobs: OrderJob, is_beautified: bool = True) -> StrayOrder:
    """One letter per image: (p)ending, (g)enerated, (s)tored, (f)ailed; the last two of four have another prompt."""
    words = {"p": "pending", "g": "generated", "s": "stored", "f": "failed"}
    images = [OrderImage(index, "a" if index <= 3 else "b", words[letter]) for index, letter in enumerate(statuses, 1)]
    return StrayOrder(ORDER, 5, "local", is_beautified, images, jobs)


def test_a_lost_beautify_job_is_made_again() -> None:
    """An order that was not beautified and has no such job gets one."""
    [job] = mend(_order("pp", is_beautified=False), PER_CALL).jobs
    assert (job.queue, job.task, job.priority, dict(job.args)) == ("beautify", Task.BEAUTIFY, 5, {"order_id": ORDER})


@pytest.mark.parametrize("status", ENDED)
def test_an_ended_beautify_job_takes_its_order_along(status: str) -> None:
    """An operator who cancels it wants it not made: the order fails with that reason; so it does with a dead letter."""
    reason = "its job had failed" if status == "failed" else "its job was cancelled"
    mending = mend(_order("pp", _job(Task.BEAUTIFY, status), is_beautified=False), PER_CALL)
    assert mending == Mending(writes=(OrderFailed(ORDER, reason),))


def test_lost_jobs_are_made_again_as_they_were_cut() -> None:
    """Each lost image gets its stage's job: generate by the batches of the order, an upload for each one that arrived."""
    mending = mend(_order("spgpp"), PER_CALL)
    made = [(job.queue, job.args.get("images") or job.args.get("image")) for job in mending.jobs]
    assert made == [("upload", 3), ("generate.local", [2]), ("generate.local", [4, 5])]
    assert mending.resumed == ((1, 2), (4, 4))
    assert mending.writes == ()


@pytest.mark.parametrize("status", ENDED)
@pytest.mark.parametrize(("letter", "task", "was"), [("p", Task.GENERATE, "pending"), ("g", Task.UPLOAD, "generated")])
def test_an_ended_job_fails_what_it_left(status: str, letter: str, task: Task, was: str) -> None:
    """What it would have made fails with the reason; what it had made before stays."""
    mending = mend(_order(f"s{letter}", _job(task, status, 2)), PER_CALL)
    [write] = mending.writes
    assert isinstance(write, ImageFailed)
    assert (write.index, write.was, mending.jobs) == (2, was, ())


def test_the_newest_word_counts() -> None:
    """Of a cancelled job and a later dead letter of the same image the later one gives the reason."""
    order = _order("p", _job(Task.GENERATE, "cancelled", 1, id=1), _job(Task.GENERATE, "failed", 1, id=2))
    [write] = mend(order, PER_CALL).writes
    assert isinstance(write, ImageFailed)
    assert write.error == "its job had failed"


some_jobs = st.tuples(st.sampled_from([Task.GENERATE, Task.UPLOAD]), st.sampled_from(OPEN + ENDED), st.integers(1, 5))


@given(st.text("pgsf", min_size=1, max_size=5), st.lists(some_jobs, max_size=8))
def test_whatever_happened_nothing_is_left_over_and_nothing_open_is_touched(
    statuses: str, jobs: list[tuple[Task, str, int]]
) -> None:
    """Each remaining image has an open job, gets a new one or fails: exactly one of these, and never beside an open job."""
    order = _order(statuses, *(_job(task, status, index, id=place) for place, (task, status, index) in enumerate(jobs)))
    mending = mend(order, PER_CALL)
    made = [index for job in mending.jobs for index in (job.args.get("images") or [job.args["image"]])]
    failed = [write.index for write in mending.writes if isinstance(write, ImageFailed)]
    for index, letter in enumerate(statuses, 1):
        task = {"p": Task.GENERATE, "g": Task.UPLOAD}.get(letter)
        is_open = any(job[0] is task and job[2] == index and job[1] in OPEN for job in jobs)
        assert made.count(index) + failed.count(index) == (1 if task is not None and not is_open else 0)


@pytest.mark.parametrize("status", OPEN)
def test_junk_among_the_arguments_is_nobodys_job(status: str) -> None:
    """A job of ours that somebody deferred with other arguments works on no image."""
    junk = OrderJob(Job(1, "", Task.GENERATE, 0, {"order_id": ORDER, "images": "all"}), status)
    assert len(mend(_order("p", junk), PER_CALL).jobs) == 1


def test_what_another_provider_was_asked_for_is_fetched_there() -> None:
    """A lost batch that had gone on to another provider goes back to its call there; one that had bought nothing begins anew."""
    order = replace(_order("pppp"), calls=(OrderCall("other", (2, 3)), OrderCall("local", (4,))))
    mending = mend(order, PER_CALL)
    made = [(job.queue, job.args["images"]) for job in mending.jobs]
    assert made == [("generate.other", [2, 3]), ("generate.local", [1]), ("generate.local", [4])]
    assert mending.resumed == ((2, 2), (1, 1), (4, 4))
