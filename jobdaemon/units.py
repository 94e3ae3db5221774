"""Durations and sizes as people write them (``15 min``, ``50 MB``), read and written in one place."""

from __future__ import annotations

import re
from datetime import timedelta
from decimal import Decimal

_MICROSECONDS = {
    **dict.fromkeys(("ms", "millisecond", "milliseconds"), 1_000),
    **dict.fromkeys(("", "s", "sec", "second", "seconds"), 1_000_000),
    **dict.fromkeys(("m", "min", "minute", "minutes"), 60_000_000),
    **dict.fromkeys(("h", "hour", "hours"), 3_600_000_000),
    **dict.fromkeys(("d", "day", "days"), 86_400_000_000),
}
_BYTES = {
    "": 1,
    "b": 1,
    "kb": 1_000,
    "mb": 1_000_000,
    "gb": 1_000_000_000,
    "kib": 1 << 10,
    "mib": 1 << 20,
    "gib": 1 << 30,
}
#: Digits are spelled out because ``\d`` also matches the digits of other scripts; the lengths bound the arithmetic.
_AMOUNT = re.compile(r"\s*([0-9]{1,15}(?:\.[0-9]{1,9})?)\s*([A-Za-z]*)\s*")

#: Longer waits are typing mistakes, and Postgres, asyncio and timedelta all still hold this one.
MAX_DURATION = timedelta(days=3650)
#: No setting of ours means more than a terabyte.
MAX_SIZE_BYTES = 10**12


def parse_duration(value: object) -> timedelta:
    """
    Read a duration.

    Args:
        value: ``"5s"``, ``"15 min"``, ``"24h"``, ``"250ms"``, ``"1h 30min"``, ``"2d"``, a plain number of seconds (number or
            text), or a timedelta.

    Returns:
        0 to :data:`MAX_DURATION`, rounded to whole microseconds.

    Raises:
        ValueError: with a sentence for people.
    """
    if isinstance(value, timedelta):
        duration = value
    elif isinstance(value, int | float) and not isinstance(value, bool):
        if not 0 <= value <= MAX_DURATION.total_seconds():  # also refuses nan and infinity
            raise ValueError(_out_of_range(value))
        duration = timedelta(seconds=value)
    elif isinstance(value, str):
        duration = _duration_of_text(value)
    else:
        raise ValueError('is not a duration: write one such as "5s", "15 min", "24h" or a number of seconds')  # noqa: TRY004 - callers show ValueErrors
    if not timedelta(0) <= duration <= MAX_DURATION:
        raise ValueError(_out_of_range(value))
    return duration


def _duration_of_text(text: str) -> timedelta:
    microseconds = Decimal(0)
    position = 0
    while match := _AMOUNT.match(text, position):
        number, unit = match.groups()
        factor = _MICROSECONDS.get(unit.lower())
        if factor is None or (unit == "" and match.end() - position != len(text)):  # "5 10s" is a slip, not 15 s
            break
        microseconds += Decimal(number) * factor
        position = match.end()
        if position == len(text):
            if microseconds > MAX_DURATION // timedelta(microseconds=1):
                raise ValueError(_out_of_range(text))
            return timedelta(microseconds=int(microseconds.to_integral_value()))
    raise ValueError(f'{_excerpt(text)}is not a duration: write one such as "5s", "15 min", "24h", "250ms"')


def format_duration(duration: timedelta) -> str:
    """Write *duration* so that :func:`parse_duration` reads it back exactly: ``5s``, ``15min``, ``24h``, ``250ms``."""
    microseconds = duration // timedelta(microseconds=1)
    for unit, size, at_least in (("h", 3_600_000_000, 1), ("min", 60_000_000, 2), ("s", 1_000_000, 0), ("ms", 1_000, 1)):
        if microseconds % size == 0 and microseconds // size >= at_least:
            return f"{microseconds // size}{unit}"
    return f"{Decimal(microseconds).scaleb(-6):f}s"


def parse_size(value: object) -> int:
    """
    Read a number of bytes.

    Args:
        value: ``"50 MB"`` (10^6), ``"64 MiB"`` (2^20), also kB, KiB, GB, GiB and B, or a plain number of bytes.

    Raises:
        ValueError: with a sentence for people.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        size = value
    elif isinstance(value, str) and (match := _AMOUNT.fullmatch(value)) and match[2].lower() in _BYTES:
        exact = Decimal(match[1]) * _BYTES[match[2].lower()]
        if exact != exact.to_integral_value():
            raise ValueError(f"{_excerpt(value)}is not a whole number of bytes")
        size = int(exact)
    else:
        shown = _excerpt(value) if isinstance(value, str) else ""
        raise ValueError(f'{shown}is not a size: write one such as "50 MB", "64 MiB" or a number of bytes')
    if not 0 <= size <= MAX_SIZE_BYTES:
        raise ValueError(f"must lie between 0 and {format_size(MAX_SIZE_BYTES)}")
    return size


def format_size(size_bytes: int) -> str:
    """Write *size_bytes* so that :func:`parse_size` reads it back exactly: ``50 MB``, ``64 MiB``, ``1234 B``."""
    for unit, factor in (("GB", 10**9), ("GiB", 1 << 30), ("MB", 10**6), ("MiB", 1 << 20), ("kB", 1_000), ("KiB", 1 << 10)):
        if size_bytes and size_bytes % factor == 0:
            return f"{size_bytes // factor} {unit}"
    return f"{size_bytes} B"


def _out_of_range(value: object) -> str:
    return f"{_excerpt(str(value))}must lie between 0s and {MAX_DURATION.days} days"


def _excerpt(text: str) -> str:
    """What was written, with a space after it, when it begins like an amount; anything else could be a misplaced secret."""
    return f"{text!r} " if len(text) <= 12 and re.match(r"-?[0-9]", text) else ""
