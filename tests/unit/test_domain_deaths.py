"""Hours of SIGKILL and a poison job, simulated second by second on the rules of ``domain/retry.py``: who is given up on?"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest

from jobdaemon.domain.job import PREWARM_PRIORITY, Job, Task
from jobdaemon.domain.outcome import End
from jobdaemon.domain.retry import DIED_ALONE, STORM_DEATHS, STORM_WINDOW, after_death
from tests.effort import IS_THOROUGH

SLOTS = 4
#: From a worker's death until its jobs are rescued, and it is up again itself.
SILENT_S = 20
#: A poison job kills its worker after so long.
POISON_S = 3
#: This job and all with a lower id are poison.
POISON = 0


@dataclass(slots=True)
class Waiting:
    """A job that may start from *ready_at* on; *needs_s* of work, all lost with its worker."""

    job: Job
    needs_s: float
    ready_at: float = 0.0


@dataclass(slots=True)
class Worker:
    """A daemon; *up_at*: when it claims (again)."""

    up_at: float = 0.0
    running: list[tuple[Waiting, float]] = field(default_factory=list)


@dataclass(slots=True)
class Box:
    """
    Daemons and jobs.

    Attributes:
        is_alone: whether suspects run alone; without it, they run in company and are judged all the same, as before.
        completed, failed: ids of jobs.
        died: when workers died in which no suspect ran alone.
        alone: suspects that died alone, and when.
    """

    chance: random.Random
    workers: list[Worker]
    waiting: list[Waiting]
    is_alone: bool = True
    completed: set[int] = field(default_factory=set)
    failed: dict[int, float] = field(default_factory=dict)
    died: list[float] = field(default_factory=list)
    alone: list[tuple[int, float]] = field(default_factory=list)

    def run(self, seconds: int, *, kill_every_s: Callable[[float], float | None]) -> None:
        """Go on for so long; each worker that is up is killed about so often, None: never."""
        for now in range(seconds):
            every_s = kill_every_s(now)
            for worker in self.workers:
                if worker.up_at > now:
                    continue
                self._end(worker, now)
                self._claim(worker, now)
                is_killed = every_s is not None and self.chance.random() < 1 / every_s
                if is_killed or any(w.job.id <= POISON and now - since >= POISON_S for w, since in worker.running):
                    self._kill(worker, now)

    def _end(self, worker: Worker, now: float) -> None:
        for member in [member for member in worker.running if member[0].job.id > POISON and now - member[1] >= member[0].needs_s]:
            worker.running.remove(member)
            self.completed.add(member[0].job.id)

    def _claim(self, worker: Worker, now: float) -> None:
        for job in sorted((w for w in self.waiting if w.ready_at <= now), key=lambda w: w.job.id):
            suspects = [w for w, _ in worker.running if w.job.is_suspect]
            if len(worker.running) >= SLOTS or (self.is_alone and suspects):
                return
            if self.is_alone and job.job.is_suspect and worker.running:
                return  # the door is closed: it waits until what runs has ended
            self.waiting.remove(job)
            worker.running.append((job, now))

    def _kill(self, worker: Worker, now: float) -> None:
        dead, worker.running, worker.up_at = worker.running, [], now + SILENT_S
        kinds = set()
        for member, _ in dead:
            # Without solitude every death was the job's own, as if nobody else had died.
            ran_alone, others = (len(dead) == 1, self._signs(member.job.id, now)) if self.is_alone else (True, 0)
            ended = after_death(member.job, ran_alone=ran_alone, other_deaths=others, dead=lambda reason: ())
            kinds.add(ended.error_kind)
            if ended.error_kind == DIED_ALONE:
                self.alone.append((member.job.id, now))
            if ended.end is End.FAILED:
                self.failed[member.job.id] = now
            else:
                rest_s = SILENT_S + (ended.delay.total_seconds() if ended.delay else 0)
                job = replace(member.job, deaths=member.job.deaths + 1)
                self.waiting.append(Waiting(job, member.needs_s, now + rest_s))
        if kinds != {DIED_ALONE}:
            self.died.append(now)

    def _signs(self, job_id: int, now: float) -> int:
        since = now - STORM_WINDOW.total_seconds()
        return sum(at > since for at in self.died) + len({other for other, at in self.alone if at > since and other != job_id})


def _box(seed: int, *, workers: int, needs_s: float, innocents: int = 40, poison: int = 1, is_alone: bool = True) -> Box:
    chance = random.Random(seed)
    jobs = [Waiting(Job(place, "q", "t", 0), chance.uniform(0.5, 1.5) * needs_s) for place in range(1, innocents + 1)]
    jobs += [Waiting(Job(POISON - place, "q", "t", 0), 0.0) for place in range(poison)]
    return Box(chance, [Worker() for _ in range(workers)], jobs, is_alone=is_alone)


@pytest.mark.parametrize("kill_every_s", [10, 30, 120, 600])
@pytest.mark.parametrize("needs_s", [5, 30, 120])
@pytest.mark.parametrize("workers", [1, 3])
def test_hours_of_kills_fail_no_innocent_job(workers: int, needs_s: float, kill_every_s: float) -> None:
    """Whatever is killed for three hours, only the poison job is ever given up on, and within two hours after the storm it is."""
    storm_s, after_s = 3 * 3600, 2 * 3600
    for seed in range(2 if IS_THOROUGH else 1):
        box = _box(seed, workers=workers, needs_s=needs_s)
        box.run(storm_s + after_s, kill_every_s=lambda now: kill_every_s if now < storm_s else None)
        assert set(box.failed) == {POISON}
        assert box.completed == set(range(1, 41))


@pytest.mark.parametrize("workers", [1, 3])
def test_a_poison_job_alone_is_found_within_minutes(workers: int) -> None:
    """Where nobody else kills, the poison job is given up on after ten workers, and the others are all done long before."""
    box = _box(1, workers=workers, needs_s=10)
    box.run(3600, kill_every_s=lambda now: None)
    assert set(box.failed) == {POISON}
    assert box.failed[POISON] < 20 * 60
    assert box.completed == set(range(1, 41))
    assert len(box.died) < STORM_DEATHS


def test_in_company_the_innocent_die_with_the_poison() -> None:
    """Why a suspect runs alone: what comes back together dies together, and is given up on with its poison."""
    for is_alone, failed in ((False, {POISON, 1, 2, 3}), (True, {POISON})):
        box = _box(1, workers=1, needs_s=120, innocents=SLOTS - 1, is_alone=is_alone)
        box.run(3600, kill_every_s=lambda now: None)
        assert set(box.failed) == failed


def test_a_count_of_deaths_alone_fails_the_innocent() -> None:
    """Why deaths prove nothing in a storm: long jobs that were only counted would be given up on within three hours of it."""
    box = _box(1, workers=3, needs_s=120, is_alone=False)
    box.waiting = [member for member in box.waiting if member.job.id != POISON]
    box.run(3 * 3600, kill_every_s=lambda now: 60)
    assert box.failed


def test_two_poison_jobs_are_found_all_the_same() -> None:
    """What two of them kill in company may look like a storm for an hour; then each is convicted by what it does alone."""
    box = _box(1, workers=2, needs_s=10, poison=2)
    box.run(2 * 3600, kill_every_s=lambda now: None)
    assert set(box.failed) == {POISON, POISON - 1}
    assert box.completed == set(range(1, 41))


def test_a_prewarm_gets_no_daemon_to_itself() -> None:
    """Nobody waits for a prewarm: after the second death it is given up, guilty or not, before it would run alone."""
    job = Job(1, "beautify", Task.PREWARM, PREWARM_PRIORITY)
    first = after_death(job, ran_alone=False, other_deaths=0, dead=lambda reason: ())
    assert first.end is End.INTERRUPTED
    second = after_death(replace(job, deaths=1), ran_alone=False, other_deaths=STORM_DEATHS, dead=lambda reason: ())
    assert (second.end, second.error, second.writes) == (End.FAILED, "2 workers died while this job ran", ())
    ours = after_death(replace(job, deaths=1, task=Task.BEAUTIFY), ran_alone=False, other_deaths=0, dead=lambda reason: ())
    assert ours.end is End.INTERRUPTED
