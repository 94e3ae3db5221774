"""Which calls go wrong and how: by seed, the same for the same job's same try however calls interleave."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from jobdaemon.errors import SettingsError


class Fault(StrEnum):
    """What may become of a call."""

    #: 429 with Retry-After, before any work
    RATE_LIMITED = "429"
    #: 500 after the latency
    ERROR = "500"
    #: the connection is reset after half the latency
    RESET = "reset"
    #: takes SLOW_FACTOR times the latency, then succeeds
    SLOW = "slow"


SLOW_FACTOR = 10.0


@dataclass(frozen=True, slots=True)
class Faults:
    """
    Attributes:
        shares: fault -> share of calls, 0.0 to 1.0; together at most 1.0.
        seed: the same seed, job and try give the same fault.
    """

    shares: Mapping[Fault, float] = field(default_factory=dict)
    seed: int = 0

    def of(self, job_id: int, attempt: int) -> Fault | None:
        """What goes wrong with this job's call number *attempt* (from 1), if anything."""
        dice = random.Random(f"{self.seed}:{job_id}:{attempt}").random()
        for fault, share in self.shares.items():
            if dice < share:
                return fault
            dice -= share
        return None


def parse_faults(text: str, *, seed: int = 0) -> Faults:
    """
    Read ``429=0.02,500=0.01,reset=0.01,slow=0.05``.

    Raises:
        SettingsError: not of that form, an unknown fault, or shares outside 0.0 to 1.0 or above 1.0 together.
    """
    shares: dict[Fault, float] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, share = part.partition("=")
        try:
            fault = Fault(name.strip())
            shares[fault] = float(share)
        except ValueError:
            names = ", ".join(Fault)
            raise SettingsError(f'faults: "{part[:40]}" is not FAULT=SHARE with a fault of {names}') from None
        if not 0.0 <= shares[fault] <= 1.0:
            raise SettingsError(f"faults: the share of {fault} must lie between 0.0 and 1.0")
    if sum(shares.values()) > 1.0:
        raise SettingsError("faults: the shares add up to more than 1.0")
    return Faults(shares, seed)
