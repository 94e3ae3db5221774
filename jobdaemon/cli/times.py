"""Times as people give them to ``--at``."""

from __future__ import annotations

from datetime import datetime, timedelta


def parse_moment(value: str) -> datetime | timedelta:
    """
    Read ``2026-05-01T09:00+02:00``, ``2026-05-01 09:00`` (this machine's time zone) or ``+10min`` (from now).

    Raises:
        ValueError: with a sentence for people.
    """
    from jobdaemon.units import parse_duration

    value = value.strip()
    if value.startswith("+"):
        return parse_duration(value[1:])
    try:
        return datetime.fromisoformat(value).astimezone()
    except (ValueError, OverflowError) as error:
        raise ValueError("is neither a time such as 2026-05-01T09:00+02:00 nor a wait such as +10min") from error
