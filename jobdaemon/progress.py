"""How fast work goes and how long the rest will take, from counts alone."""

from __future__ import annotations


class Pace:
    """The average rate since the first result, which is what time is left for."""

    def __init__(self, started_s: float) -> None:
        """*started_s*: the beginning, by any clock that :meth:`text` is given too."""
        self._started_s = started_s

    def rate(self, done: int, now_s: float) -> float:
        """Results per second so far; 0.0 while there is none."""
        elapsed_s = now_s - self._started_s
        return done / elapsed_s if done > 0 and elapsed_s > 0 else 0.0

    def seconds_left(self, done: int, total: int, now_s: float) -> float | None:
        """How long the rest takes at this rate; None while nobody can tell."""
        rate = self.rate(done, now_s)
        return (total - done) / rate if rate > 0 else None

    def text(self, done: int, total: int, now_s: float) -> str:
        """Rate and time left as the end of a line, empty while nobody can tell."""
        left_s = self.seconds_left(done, total, now_s)
        if left_s is None:
            return ""
        return f", {self.rate(done, now_s):.1f} a second" + (f", {left_s:.0f} s left" if done < total else "")
