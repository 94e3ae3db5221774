"""
Which crops go to the device next: pure, given what waits, what runs and the time.

Faces of several photos share a batch. A full batch goes at once; one that is not full goes when the device has nothing to do and
its oldest crop has waited long enough for company. While a batch is on the device the next one gathers.

Whose company died with the process is a suspect. Suspects go one at a time with nothing beside them, so that the next death says
who is to blame: an innocent crop loses nothing but time by a neighbour that kills. They take turns with batches of whoever came
since, whom a few that kill would keep waiting for minutes otherwise, while process after process is started. A suspect that
leaves without having been cleared is known again when it comes back, as it does in a later attempt of its photo: or a start that
takes longer than anybody waits would have every death hit the whole company anew, and nobody ever found to blame.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from jobdaemon.backends.gfpgan.frames import SLOTS, Pixels

#: A process may also be killed by something else while a crop is alone in it; after so many such deaths it is the crop.
MAX_DEATHS_ALONE = 2
#: Suspects that are known again when they come back: those of some dozen photos with many faces, or of hundreds with one.
_MAX_REMEMBERED = 1_000


@dataclass(slots=True, eq=False)
class Crop:
    """
    One aligned face on its way through the device.

    Attributes:
        pixels: (512, 512, 3) uint8 RGB.
        restored: becomes the same, restored; done early when nobody wants it any more.
        added_at: seconds by the clock of the event loop.
        is_suspect: a process died while this was in it.
        deaths_alone: how many died while nothing else was in them.
    """

    pixels: Pixels
    restored: asyncio.Future[Pixels]
    added_at: float
    is_suspect: bool = False
    deaths_alone: int = 0

    @property
    def is_wanted(self) -> bool:
        """Whether anybody still waits for it."""
        return not self.restored.done()

    def digest(self) -> bytes:
        """Of its pixels: a millisecond."""
        return hashlib.blake2b(self.pixels.tobytes(), digest_size=16).digest()


@dataclass(slots=True)
class Waiting:
    """
    The crops that wait, and what is on the device.

    Attributes:
        batch: most crops of a batch.
        max_wait_s: how long a crop waits for company while the device has nothing to do.
        running: batches on the device now.
    """

    batch: int
    max_wait_s: float
    running: int = 0
    _fresh: deque[Crop] = field(default_factory=deque)
    _suspects: deque[Crop] = field(default_factory=deque)
    _is_alone: bool = False
    _is_turn_of_suspects: bool = True
    #: Digests of suspects that left, and how many processes died while they were alone; the latest last.
    _remembered: dict[bytes, int] = field(default_factory=dict)

    def add(self, crops: Iterable[Crop]) -> None:
        """They arrived just now."""
        for crop in crops:
            deaths_alone = self._remembered.pop(crop.digest(), None) if self._remembered else None
            if deaths_alone is None:
                self._fresh.append(crop)
            else:
                crop.is_suspect, crop.deaths_alone = True, deaths_alone
                self._suspects.append(crop)

    def next_batch(self, now: float) -> list[Crop]:
        """What to send to the device now; empty when there is nothing, or nothing yet. It runs from now on."""
        self._drop_unwanted()
        batch = self._picked(now)
        if batch:
            self.running += 1
            self._is_alone = batch[0].is_suspect
        return batch

    def due_in(self, now: float) -> float | None:
        """Seconds until the wait for company is over; None when only an event can change anything."""
        if self._fresh and not self._suspects and self.running == 0:
            return max(0.0, self._fresh[0].added_at + self.max_wait_s - now)
        return None

    def ended(self) -> None:
        """A batch came back, with or without success."""
        self.running -= 1
        self._is_alone = False

    def put_back(self, crops: list[Crop]) -> None:
        """They go first once more: the device could not do them now."""
        self._fresh.extendleft(reversed([crop for crop in crops if not crop.is_suspect]))
        self._suspects.extendleft(crop for crop in crops if crop.is_suspect)

    def died(self, crops: list[Crop]) -> list[Crop]:
        """
        The process died with these crops in it, or nothing came out of them.

        Returns:
            Those that were to blame, each of them twice while nothing else was there; the others wait again.
        """
        guilty = []
        for crop in crops:
            crop.deaths_alone += crop.is_suspect
            crop.is_suspect = True
            if crop.deaths_alone >= MAX_DEATHS_ALONE:
                guilty.append(crop)
                self._remember(crop, deaths_alone=0)  # the photo's next attempt gives it as many chances, but no company
            else:
                self._suspects.append(crop)
        return guilty

    def take_all(self) -> list[Crop]:
        """Everything that waits; nothing does afterwards."""
        everything = [*self._suspects, *self._fresh]
        for crop in self._suspects:
            self._remember(crop, deaths_alone=crop.deaths_alone)
        self._suspects.clear()
        self._fresh.clear()
        return everything

    def _picked(self, now: float) -> list[Crop]:
        if self._is_alone or self.running == SLOTS:
            return []
        if self._suspects:
            if self.running:
                return []
            is_their_turn = self._is_turn_of_suspects or not self._fresh
            self._is_turn_of_suspects = not is_their_turn
            return [self._suspects.popleft()] if is_their_turn else self._next_fresh()
        is_full = len(self._fresh) >= self.batch
        return self._next_fresh() if is_full or self.due_in(now) == 0.0 else []

    def _next_fresh(self) -> list[Crop]:
        return [self._fresh.popleft() for _ in range(min(self.batch, len(self._fresh)))]

    def _remember(self, crop: Crop, *, deaths_alone: int) -> None:
        self._remembered[crop.digest()] = deaths_alone
        if len(self._remembered) > _MAX_REMEMBERED:
            del self._remembered[next(iter(self._remembered))]

    def _drop_unwanted(self) -> None:
        for crop in self._suspects:
            if not crop.is_wanted:
                self._remember(crop, deaths_alone=crop.deaths_alone)
        for crops in (self._fresh, self._suspects):
            if any(not crop.is_wanted for crop in crops):
                kept = [crop for crop in crops if crop.is_wanted]
                crops.clear()
                crops.extend(kept)
