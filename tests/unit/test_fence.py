"""The fence as a pure decision."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from jobdaemon.domain.job import Job, JobStatus, Task
from jobdaemon.domain.outcome import End, Transition, Verdict
from jobdaemon.domain.write import CallAccepted, CallEnded, ImageFailed, OrderStarted
from jobdaemon.queue.fence import HeldJob, Ruling, rule

JOB = Job(1, "generate.local", Task.GENERATE, 0, {"order_id": 7, "images": [1, 2]}, token=5)
DOING = HeldJob(JobStatus.DOING, 5, False)
tokens = st.none() | st.integers(1, 3)
jobs = st.builds(replace, st.just(JOB), token=tokens, task=st.sampled_from(list(Task)), attempts=st.integers(0, 5))
writes = st.sampled_from([(), (OrderStarted(7),)])
transitions = st.builds(Transition, jobs, st.sampled_from(list(End)), delay=st.none() | st.just(timedelta(1)), writes=writes)
held_jobs = st.none() | st.builds(HeldJob, st.sampled_from(list(JobStatus)), tokens, st.booleans())


@given(transitions, held_jobs, st.booleans())
def test_nothing_is_written_without_the_token(transition: Transition, held: HeldJob | None, ended: bool) -> None:
    """A lost lease writes nothing: no domain write, no status, no attempt."""
    ruling = rule(transition, held, order_has_ended=ended)
    if held is None or held.token != transition.job.token:
        assert ruling == Ruling(Verdict.LEASE_LOST, transition.job)
    if ruling.verdict is Verdict.LEASE_LOST:
        assert (ruling.commit, ruling.status, ruling.attempts_spent) == (None, None, 0)


@given(transitions, held_jobs, st.booleans())
def test_only_a_running_job_changes(transition: Transition, held: HeldJob | None, ended: bool) -> None:
    """What has ended already is left as it is, whatever is sent again."""
    assume(held is not None and held.status != JobStatus.DOING)
    ruling = rule(transition, held, order_has_ended=ended)
    assert (ruling.commit, ruling.status) == (None, None)


@given(transitions, held_jobs)
def test_an_ended_order_gets_no_writes(transition: Transition, held: HeldJob | None) -> None:
    """Nothing is written for an order that ended, but by the job that outlives it."""
    ruling = rule(transition, held, order_has_ended=True)
    if not transition.job.outlives_its_order:
        assert ruling.commit is None or ruling.commit.writes == ()


@given(transitions, held_jobs, st.booleans())
def test_a_waiting_job_never_keeps_a_dead_order_alive(transition: Transition, held: HeldJob | None, ended: bool) -> None:
    """Only an open order's job, or a removal, is put back to wait."""
    ruling = rule(transition, held, order_has_ended=ended)
    if ruling.status is JobStatus.TODO:
        assert not ended or transition.job.outlives_its_order
        assert held is not None
        assert not held.abort_requested


@pytest.mark.parametrize(
    ("end", "status", "spent", "deaths", "outcome"),
    [
        (End.SUCCEEDED, JobStatus.SUCCEEDED, 1, 0, None),
        (End.RETRY, JobStatus.TODO, 1, 0, "retry"),
        (End.SNOOZE, JobStatus.TODO, 0, 0, "snooze"),
        (End.HANDED_BACK, JobStatus.TODO, 0, 0, "handed_back"),
        (End.INTERRUPTED, JobStatus.TODO, 0, 1, "interrupted"),
        (End.MOVED, JobStatus.TODO, 0, 0, "moved"),
        (End.FAILED, JobStatus.FAILED, 1, 0, "failed"),
        (End.CHECKPOINT, None, 0, 0, None),
    ],
)
def test_each_end(end: End, status: JobStatus | None, spent: int, deaths: int, outcome: str | None) -> None:
    """What each end makes of a running job, and what it costs."""
    transition = Transition(JOB, end, delay=timedelta(1), writes=(OrderStarted(7),))
    ruling = rule(transition, DOING, order_has_ended=False)
    assert ruling.verdict is Verdict.ACCEPTED
    assert ruling.commit == transition
    assert (ruling.status, ruling.attempts_spent, ruling.deaths, ruling.recorded_outcome) == (status, spent, deaths, outcome)
    assert ruling.delay == (timedelta(1) if status is JobStatus.TODO else None)


@pytest.mark.parametrize("end", [end for end in End if end is not End.CHECKPOINT])
def test_an_end_sent_again_is_accepted(end: End) -> None:
    """Ended, and my token: it was I."""
    for status in JobStatus:
        if status is not JobStatus.DOING:
            ruling = rule(Transition(JOB, end), HeldJob(status, 5, False), order_has_ended=True)
            assert (ruling.verdict, ruling.commit, ruling.status) == (Verdict.ACCEPTED, None, None)


def test_a_checkpoint_after_the_end_is_refused() -> None:
    """A checkpoint of a job that has ended belongs to nobody."""
    late = Transition(JOB, End.CHECKPOINT)
    assert rule(late, HeldJob(JobStatus.SUCCEEDED, 5, False), order_has_ended=False).verdict is Verdict.LEASE_LOST


@pytest.mark.parametrize("end", list(End))
def test_a_cancelled_orders_job_is_aborted(end: End) -> None:
    """Its checkpoint is refused, its end is recorded as cancelled, its writes are dropped."""
    held = HeldJob(JobStatus.DOING, 5, True)
    ruling = rule(Transition(JOB, end, writes=(OrderStarted(7),)), held, order_has_ended=True)
    assert (ruling.verdict, ruling.commit) == (Verdict.ORDER_ENDED, None)
    assert ruling.status is (None if end is End.CHECKPOINT else JobStatus.ABORTED)


def test_a_success_with_nothing_to_write_outlives_its_order() -> None:
    """An attempt whose last image was uploaded before it ended has succeeded, unless somebody cancelled the order."""
    done = Transition(JOB, End.SUCCEEDED)
    assert rule(done, DOING, order_has_ended=True).status is JobStatus.SUCCEEDED
    assert rule(done, replace(DOING, abort_requested=True), order_has_ended=True).status is JobStatus.ABORTED
    assert rule(replace(done, end=End.RETRY), DOING, order_has_ended=True).status is JobStatus.ABORTED


def test_an_aborted_job_takes_its_images_along() -> None:
    """Procrastinate's abort of one job ends it where it would run again; a success stands."""
    held = replace(DOING, abort_requested=True)
    ruling = rule(Transition(JOB, End.RETRY), held, order_has_ended=False)
    assert ruling.status is JobStatus.ABORTED
    assert ruling.commit is not None
    assert ruling.commit.writes == tuple(ImageFailed(7, index, "the job was aborted", "pending") for index in (1, 2))
    assert rule(Transition(JOB, End.SUCCEEDED), held, order_has_ended=False).status is JobStatus.SUCCEEDED


def test_removal_works_on_an_ended_order() -> None:
    """The job that removes a cancelled order's images is not dropped with it."""
    remove = replace(JOB, task=Task.REMOVE)
    ruling = rule(Transition(remove, End.SUCCEEDED, writes=(OrderStarted(7),)), DOING, order_has_ended=True)
    assert (ruling.verdict, ruling.status) == (Verdict.ACCEPTED, JobStatus.SUCCEEDED)
    assert ruling.commit is not None


@pytest.mark.parametrize("end", [End.CHECKPOINT, End.SUCCEEDED, End.RETRY, End.HANDED_BACK, End.FAILED])
def test_what_became_of_a_call_is_kept_whatever_became_of_its_order(end: End) -> None:
    """A cancelled order's attempt still notes its task's id, so that it can be stopped; nothing else of it is written."""
    noted = CallAccepted(7, 1, "t1")
    ended = Transition(JOB, end, writes=(OrderStarted(7), noted, CallEnded(7, 1, "failed")))
    ruling = rule(ended, replace(DOING, abort_requested=True), order_has_ended=True)
    assert ruling.verdict is Verdict.ORDER_ENDED
    assert ruling.commit is not None
    assert ruling.commit.writes == (noted, CallEnded(7, 1, "failed"))


def test_closing_its_call_drops_nothing() -> None:
    """The upload of its last image may end an order before the attempt that made it closes its call: it has succeeded."""
    done = Transition(JOB, End.SUCCEEDED, writes=(CallEnded(7, 1, "succeeded"),))
    ruling = rule(done, DOING, order_has_ended=True)
    assert (ruling.status, ruling.commit) == (JobStatus.SUCCEEDED, done)
