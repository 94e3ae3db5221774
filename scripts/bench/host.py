"""What the machine under this one takes away: on a shared host a bench is slow at times for no reason of its own."""

from __future__ import annotations

from pathlib import Path

#: Of the first line of /proc/stat, in ticks (proc(5)): user, nice, system, idle, iowait, irq, softirq, steal.
_STEAL, _COLUMNS = 7, 8


class Stolen:
    """Since it was made: the share of this machine's processor time, 0.0 to 1.0, that its host gave to others."""

    def __init__(self) -> None:
        self._began = _ticks()

    def share(self) -> float | None:
        """Up to now; None where the kernel does not say."""
        spent = [now - then for then, now in zip(self._began, _ticks(), strict=True)]
        return round(spent[_STEAL] / sum(spent), 3) if len(spent) == _COLUMNS and sum(spent) else None


def _ticks() -> list[int]:
    try:
        first, *_ = Path("/proc/stat").read_text("ascii").splitlines()
    except OSError:
        return []
    return [int(ticks) for ticks in first.split()[1 : _COLUMNS + 1]]
