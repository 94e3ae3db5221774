"""
A small explicit-state explorer: walks every state that a model can reach, breadth first, so that what it finds broken is told
by a shortest story; and asks of each state whether the work can still be finished from there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Hashable, Iterable
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

S = TypeVar("S", bound=Hashable)


class Step(NamedTuple, Generic[S]):
    """One thing that may happen next: what it is called, the state after it, and the promise that it breaks, if any."""

    label: str
    state: S
    broken: str | None = None


@dataclass(frozen=True, slots=True)
class Exploration:
    """
    What was found.

    Attributes:
        states: how many different states were seen; all there are, when nothing is broken.
        steps: how many ways lead from one to another.
        broken: the promise that the last step of *story* breaks, or None.
        story: labels from the first state on; empty when nothing is broken.
    """

    states: int
    steps: int
    broken: str | None = None
    story: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.broken is None:
            return f"nothing is broken in {self.states} states and {self.steps} steps"
        lines = [f"{number:3}. {label}" for number, label in enumerate(self.story, 1)]
        return "\n".join([*lines, f"     broken: {self.broken}"])


def explore(
    first: S,
    steps: Callable[[S], Iterable[Step[S]]],
    *,
    is_end: Callable[[S], bool],
    stuck: str,
    watched: Collection[str] | None = None,
    reduce: Callable[[S], S] | None = None,
) -> Exploration:
    """
    Walk everything that can be reached from *first*.

    Args:
        steps: what may happen in a state.
        is_end: whether all work is done; from every state one such state must be in reach.
        stuck: the promise that a state without one breaks.
        watched: the promises to watch; None watches all.
        reduce: names one of several states that differ by names only; the story then changes names on its way.
    """
    first = first if reduce is None else reduce(first)
    numbers: dict[S, int] = {first: 0}
    came: list[tuple[int, str]] = [(-1, "")]
    before: list[list[int]] = [[]]  # the states that lead to each
    ends: list[int] = []
    waiting = deque([first])
    count = 0
    while waiting:
        state = waiting.popleft()
        number = numbers[state]
        if is_end(state):
            ends.append(number)
        for label, following, broken in steps(state):
            count += 1
            if broken is not None and (watched is None or broken in watched):
                return Exploration(len(numbers), count, broken, (*_story(came, number), label))
            if reduce is not None:
                following = reduce(following)  # noqa: PLW2901 - the same state by another name
            known = numbers.get(following)
            if known is None:
                known = numbers[following] = len(came)
                came.append((number, label))
                before.append([])
                waiting.append(following)
            before[known].append(number)
    lost = _first_without_end(before, ends)
    if lost is not None and (watched is None or stuck in watched):
        return Exploration(len(numbers), count, stuck, _story(came, lost))
    return Exploration(len(numbers), count)


def _story(came: list[tuple[int, str]], number: int) -> tuple[str, ...]:
    labels: list[str] = []
    while number > 0:
        number, label = came[number]
        labels.append(label)
    return tuple(reversed(labels))


def _first_without_end(before: list[list[int]], ends: list[int]) -> int | None:
    """The earliest state from which no end can be reached."""
    can_end = [False] * len(before)
    todo = list(ends)
    while todo:
        number = todo.pop()
        if not can_end[number]:
            can_end[number] = True
            todo.extend(before[number])
    return next((number for number, can in enumerate(can_end) if not can), None)
