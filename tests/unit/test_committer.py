"""The committer's grouping, without a database: what is put together, and what is tried again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field

import pytest

from jobdaemon.domain.job import Job, Task
from jobdaemon.domain.outcome import End, Transition, Verdict
from jobdaemon.domain.write import CallAccepted, ImageFailed
from jobdaemon.errors import DatabaseUnavailableError, RetryableError
from jobdaemon.events import CommitFailed, Event, Events
from jobdaemon.queue.committer import MAX_GROUP, Committer
from jobdaemon.queue.store import Committed


@dataclass(slots=True)
class FakeStore:
    """What the committer needs of a store: records groups; refuses poison; is away as often as told."""

    groups: list[list[Transition]] = field(default_factory=list)
    away: int = 0
    poison: set[int] = field(default_factory=set)
    refuses_writes: bool = False
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    asked: asyncio.Event = field(default_factory=asyncio.Event)

    async def commit(self, transitions: Sequence[Transition], *, daemon_id: int | None, wake: Iterable[str] = ()) -> Committed:
        self.groups.append(list(transitions))
        self.asked.set()
        await self.gate.wait()
        if self.away:
            self.away -= 1
            raise DatabaseUnavailableError("away")
        if any(t.job.id in self.poison and (t.end is not End.FAILED or (self.refuses_writes and t.writes)) for t in transitions):
            raise RuntimeError("new row violates check\nDETAIL: Failing row contains (https://p.example/?signature=secret)")
        return Committed([Verdict.ACCEPTED for _ in transitions], [])


def _end(job_id: int, end: End = End.SUCCEEDED) -> Transition:
    return Transition(Job(job_id, "upload", Task.UPLOAD, 0, {"order_id": 7, "image": job_id}, token=1), end)


@pytest.fixture
def fake() -> FakeStore:
    """A store that answers only once its gate is open."""
    return FakeStore()


@pytest.fixture
def seen() -> list[Event]:
    """Events, in order."""
    return []


@pytest.fixture
async def committer(fake: FakeStore, seen: list[Event]) -> AsyncIterator[Committer]:
    """A committer at work."""
    events = Events()
    events.subscribe(seen.append)
    committer = Committer(fake, events)  # type: ignore[arg-type]
    task = asyncio.ensure_future(committer.run())
    for _ in range(3):
        await asyncio.sleep(0)  # until it waits for work
    yield committer
    task.cancel()


async def test_what_gathers_meanwhile_is_one_group(committer: Committer, fake: FakeStore) -> None:
    """The first goes at once, alone; what comes while it is under way goes together, at most so many."""
    first = asyncio.ensure_future(committer.commit(_end(1)))
    await fake.asked.wait()
    rest = asyncio.gather(*(committer.commit(_end(job_id)) for job_id in range(2, MAX_GROUP + 10)))
    await asyncio.sleep(0)
    fake.gate.set()
    await first
    await rest
    assert [len(group) for group in fake.groups] == [1, MAX_GROUP, 8]


async def test_one_transition_per_job_and_group_in_order(committer: Committer, fake: FakeStore) -> None:
    """Two transitions of one job go one after the other, in the order in which they came."""
    fake.gate.set()
    ends = (End.CHECKPOINT, End.CHECKPOINT, End.HANDED_BACK)
    await asyncio.gather(*(committer.commit(_end(1, end)) for end in ends), committer.commit(_end(2)))
    assert [[(t.job.id, t.end) for t in group] for group in fake.groups] == [
        [(1, End.CHECKPOINT), (2, End.SUCCEEDED)],
        [(1, End.CHECKPOINT)],
        [(1, End.HANDED_BACK)],
    ]


async def test_a_commit_that_cannot_reach_the_database_is_kept(committer: Committer, fake: FakeStore, seen: list[Event]) -> None:
    """It is sent again until it is answered; that it waits is told once."""
    fake.away = 2
    fake.gate.set()
    assert await committer.commit(_end(1)) is Verdict.ACCEPTED
    assert len(fake.groups) == 3
    [event] = seen
    assert isinstance(event, CommitFailed)
    assert not event.is_dropped


@pytest.mark.parametrize("refuses_writes", [False, True])
async def test_a_bad_member_is_found_and_dies_alone(
    committer: Committer, fake: FakeStore, seen: list[Event], refuses_writes: bool
) -> None:
    """A group that is refused is committed singly; the guilty becomes a dead letter, if need be without its writes."""
    fake.poison, fake.refuses_writes = {2}, refuses_writes
    ends = asyncio.gather(*(committer.commit(_end(job_id)) for job_id in (1, 2, 3)))
    fake.gate.set()
    assert set(await ends) == {Verdict.ACCEPTED}
    dead = [t for group in fake.groups for t in group if t.end is End.FAILED]
    reason = "the result could not be recorded: new row violates check"
    assert [(t.job.id, t.error) for t in dead] == [(2, reason)] * len(dead)
    assert dead[0].writes == (ImageFailed(7, 2, reason, "generated"),)
    assert dead[-1].writes == (() if refuses_writes else dead[0].writes)
    assert all("secret" not in str(event) for event in seen)
    assert any(isinstance(event, CommitFailed) for event in seen)


async def test_a_bad_checkpoint_is_its_stages_error(committer: Committer, fake: FakeStore) -> None:
    """The stage hears that its checkpoint was refused; its job runs on to an end of its own."""
    fake.poison = {1}
    fake.gate.set()
    with pytest.raises(RetryableError, match="could not be recorded") as caught:
        await committer.commit(_end(1, End.CHECKPOINT))
    assert "secret" not in str(caught.value)
    assert [t.end for group in fake.groups for t in group] == [End.CHECKPOINT]


async def test_giving_up_waiting_calls_nothing_back(committer: Committer, fake: FakeStore) -> None:
    """A caller that is cancelled while it waits does not take its commit back."""
    waiting = asyncio.ensure_future(committer.commit(_end(1)))
    await fake.asked.wait()
    waiting.cancel()
    fake.gate.set()
    assert await committer.commit(_end(2)) is Verdict.ACCEPTED
    assert [t.job.id for group in fake.groups for t in group] == [1, 2]


def _note(job_id: int) -> Transition:
    job = Job(job_id, "generate.dashscope", Task.GENERATE, 0, {"order_id": 7, "images": [1]}, token=1)
    return Transition(job, End.CHECKPOINT, writes=(CallAccepted(7, job_id, "task-1"),))


async def test_a_note_of_a_call_passes_commits_that_are_under_way(committer: Committer, fake: FakeStore) -> None:
    """It goes at once, beside a commit that takes its time."""
    end = asyncio.ensure_future(committer.commit(_end(1)))
    await fake.asked.wait()
    fake.asked.clear()
    note = asyncio.ensure_future(committer.commit(_note(2)))
    async with asyncio.timeout(5):
        await fake.asked.wait()
    assert [[t.job.id for t in group] for group in fake.groups] == [[1], [2]]
    fake.gate.set()
    assert set(await asyncio.gather(end, note)) == {Verdict.ACCEPTED}


async def test_the_end_of_a_job_waits_for_its_note(committer: Committer, fake: FakeStore) -> None:
    """The id of a task that is being noted when its attempt is cut short is in before the job is handed back."""
    note = asyncio.ensure_future(committer.commit(_note(1)))
    await fake.asked.wait()
    note.cancel()
    ends = asyncio.gather(committer.commit(_end(1, End.HANDED_BACK)), committer.commit(_end(2)))
    for _ in range(5):
        await asyncio.sleep(0)
    fake.gate.set()
    await ends
    assert [(t.job.id, t.end) for group in fake.groups for t in group] == [
        (1, End.CHECKPOINT),
        (2, End.SUCCEEDED),
        (1, End.HANDED_BACK),
    ]
